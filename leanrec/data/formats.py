"""The input formats: which reader opens which files, and the presets for logs whose columns are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from leanrec.data.inputs import format_of
from leanrec.data.parquet import ParquetSource
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
    return ParquetSource(paths)
