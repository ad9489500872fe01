"""Parquet files as a source of raw rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from pyarrow import parquet

from leanrec.data.source import BadRows, Chunk

CHUNK_ROWS = 65_536


class ParquetSource:
    """Rows of Parquet files that have the same columns."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)

    def chunks(self, bad_rows: BadRows) -> Generator[Chunk, None, None]:
        """See `Source.chunks`; every row of a Parquet file has its columns, so none is refused here."""
        names: list[str] | None = None
        for path in self.paths:
            with _open(path) as file:
                names = names or _names(file, path)
                if file.schema_arrow.names != names:
                    raise ValueError(f"{path}: columns {file.schema_arrow.names}, but {self.paths[0]} has {names}.")
                start = 1
                for batch in _batches(file, path):
                    yield Chunk(_frame(batch), path, np.arange(start, start + batch.num_rows), "row")
                    start += batch.num_rows


def _open(path: Path) -> parquet.ParquetFile:
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty.")
    try:
        return parquet.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a whole Parquet file, truncated or of another format ({_line(error)}).") from None


def _names(file: parquet.ParquetFile, path: Path) -> list[str]:
    names: list[str] = file.schema_arrow.names
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{path}: two columns have the name {repeated[0]!r}. Columns need names of their own.")
    return names


def _batches(file: parquet.ParquetFile, path: Path) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(batch_size=CHUNK_ROWS)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: damaged Parquet file ({_line(error)}).") from None


def _frame(batch: pa.RecordBatch) -> pl.DataFrame:
    frame = pl.from_arrow(batch)
    assert isinstance(frame, pl.DataFrame)
    # How a column was encoded says nothing of its kind.
    return frame.with_columns(series.cast(pl.String) for series in frame.get_columns() if series.dtype in (pl.Categorical, pl.Enum))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
