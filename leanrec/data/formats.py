"""Which reader opens which files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from leanrec.data.delimited import DelimitedSource
from leanrec.data.inputs import format_of
from leanrec.data.libsvm import FEATURES, LibsvmSource
from leanrec.data.parquet import ParquetSource
from leanrec.data.presets import DERIVED, DerivedSource
from leanrec.data.settings import Settings
from leanrec.data.source import Source


def open_source(paths: Sequence[Path], settings: Settings) -> Source:
    """The rows of files of one format.

    Raises:
        ValueError: The names do not tell one format.
    """
    formats = {settings.format or format_of(path) for path in paths}
    if len(formats) > 1:
        raise ValueError(f"{paths[0]} and the other files have the formats {sorted(formats)}. Give --format, or files of one format.")
    format = formats.pop()
    if format == "parquet":
        return ParquetSource(paths)
    if format == "libsvm":
        return LibsvmSource(paths, as_list=FEATURES in settings.fields)
    delimiter = settings.delimiter or ("\t" if format == "tsv" else ",")
    header = not settings.columns if settings.header is None else settings.header
    text = DelimitedSource(paths, delimiter=delimiter, header=header, columns=settings.columns)
    return DerivedSource(text, DERIVED[format]) if format in DERIVED else text
