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
        ValueError: The names do not tell one format, or it has no use for a setting.
    """
    formats = {settings.format or format_of(path) for path in paths}
    if len(formats) > 1:
        raise ValueError(f"{paths[0]} and the other files have the formats {sorted(formats)}. Give --format, or files of one format.")
    format = formats.pop()
    if format == "parquet":
        return ParquetSource(paths)
    if format == "libsvm":
        _refuse_options_of_text(paths[0], settings)
        return LibsvmSource(paths, as_list=FEATURES in settings.fields)
    delimiter = settings.delimiter or ("\t" if format == "tsv" else ",")
    header = not settings.columns if settings.header is None else settings.header
    text = DelimitedSource(paths, delimiter=delimiter, header=header, columns=settings.columns)
    return DerivedSource(text, DERIVED[format]) if format in DERIVED else text


def _refuse_options_of_text(path: Path, settings: Settings) -> None:
    header = "--no-header" if settings.header is False else "--header"
    given = {"--delimiter": settings.delimiter, "--columns": settings.columns or None, header: settings.header}
    useless = [option for option, value in given.items() if value is not None]
    if useless:
        raise ValueError(f"{path}: the format is libsvm, which has no use for {', '.join(useless)}. Leave that out, or give another --format.")
