"""Folders of Parquet shards with row groups of one size: written from pieces of any size, read back batch by batch in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import pyarrow as pa
from pyarrow import parquet
from typing_extensions import Self

ROW_GROUP_ROWS = 65_536
SHARD_ROW_GROUPS = 64


class ShardWriter:
    """Writes `part-00000.parquet`, `part-00001.parquet`, ... with `ROW_GROUP_ROWS` rows in every row group but the last of all.

    Shards that are `temporary`, read once and deleted, are written faster and are larger. `dictionary` names the paths of columns (as in
    `read_shards`) whose values repeat enough for a dictionary to pay; None leaves it to Parquet, which tries for all.

    Attributes:
        num_rows: Rows given so far.
    """

    def __init__(self, folder: Path, schema: pa.Schema, *, temporary: bool = False, dictionary: Sequence[str] | None = None) -> None:
        folder.mkdir(parents=True)
        self.folder, self.schema, self.num_rows = folder, schema, 0
        kind = {"compression": "lz4", "write_statistics": False} if temporary else {"compression": "zstd"}
        self._options = {**kind, "use_dictionary": True if dictionary is None else list(dictionary)}
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self._shard: parquet.ParquetWriter | None = None
        self._row_groups = 0

    def write(self, table: pa.Table) -> None:
        """Append rows; the columns are cast to the schema."""
        self._pending.append(table.select(self.schema.names).cast(self.schema))
        self._pending_rows += table.num_rows
        self.num_rows += table.num_rows
        if self._pending_rows >= ROW_GROUP_ROWS:
            rows = pa.concat_tables(self._pending)
            whole = rows.num_rows - rows.num_rows % ROW_GROUP_ROWS
            for start in range(0, whole, ROW_GROUP_ROWS):
                self._write_row_group(rows.slice(start, ROW_GROUP_ROWS))
            self._pending = [rows.slice(whole)]
            self._pending_rows = rows.num_rows - whole

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and (self._pending_rows or not self._row_groups):
            self._write_row_group(pa.concat_tables(self._pending) if self._pending_rows else self.schema.empty_table())
        if self._shard is not None:
            self._shard.close()

    def _write_row_group(self, rows: pa.Table) -> None:
        if self._row_groups % SHARD_ROW_GROUPS == 0:
            if self._shard is not None:
                self._shard.close()
            path = self.folder / f"part-{self._row_groups // SHARD_ROW_GROUPS:05d}.parquet"
            self._shard = parquet.ParquetWriter(path, self.schema, **self._options)
        assert self._shard is not None
        self._shard.write_table(rows, row_group_size=ROW_GROUP_ROWS)
        self._row_groups += 1


def read_shards(folder: Path, *, columns: Sequence[str] | None = None, dictionary: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
    """The rows that a `ShardWriter` wrote, in order, in batches of at most `ROW_GROUP_ROWS`.

    Args:
        folder: Where they are.
        columns: Which columns to read; None for all.
        dictionary: Paths of text columns (`NAME`, or `NAME.list.element` of a list) to read as dictionaries.
    """
    for path in sorted(folder.glob("*.parquet")):
        with parquet.ParquetFile(path, read_dictionary=list(dictionary)) as file:
            yield from file.iter_batches(batch_size=ROW_GROUP_ROWS, columns=columns)
