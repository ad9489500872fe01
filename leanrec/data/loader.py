from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from leanrec.data.batch import Batch
from leanrec.data.schema import Schema

RowGroup = tuple[Path, int, int]  # file, row group, rows
BUFFER_ROWS, BUFFER_NBYTES = 1 << 20, 256 << 20


class Loader:
    """Batches of one split of a prepared log.

    Row groups are read into a buffer, in file order or, with a seed, in an order drawn anew for each epoch; the buffer's rows are then
    shuffled and cut into batches. The rows of a batch depend on seed, epoch and position only, so an interrupted epoch goes on where it
    stopped without reading what is done. The last batch of a buffer may be smaller; with a seed, one of a single row, in which batch norm finds
    nothing to measure, joins the batch before it.

    A log is mostly in the order of time. Where the buffer holds a part of it, items that were popular at one time come together, and a model
    forgets those of the last buffer: the buffer should hold the log, or many row groups of it.

    Args:
        folder: What `leanrec prepare` wrote.
        split: "train", "valid" or "test".
        schema: The log's fields.
        batch_size: Rows in a batch.
        seed: Source of the shuffling; None keeps the order of the files.
        buffer_rows: Rows that are held and shuffled together, at least one row group. None: a million, or more that 256 MiB hold, lists being as
            long as they may.

    Raises:
        ValueError: The split is missing or a file cannot be read.
    """

    def __init__(self, folder: Path, split: str, schema: Schema, *, batch_size: int, seed: int | None = None, buffer_rows: int | None = None) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        self.schema, self.batch_size, self.seed = schema, batch_size, seed
        values = 1 + sum(field.max_length if field.is_list else 1 for field in schema.fields)  # of a row, 4 bytes each
        self.buffer_rows = max(BUFFER_ROWS, BUFFER_NBYTES // (4 * values)) if buffer_rows is None else buffer_rows
        self.columns = [field.name for field in schema.fields] + [schema.label]
        self.groups = _row_groups(folder, split, self.columns)
        self.num_rows = _num_rows(self.groups)

    def __len__(self) -> int:
        """Batches in an epoch (with a seed: in epoch 0)."""
        return self.num_batches(epoch=0)

    def num_batches(self, *, epoch: int) -> int:
        """Batches in this epoch; it varies by a few where buffers end in small batches."""
        return sum(self._batches_in(buffer) for buffer in self._buffers(epoch))

    def batches(self, *, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from batch `start` on."""
        for number, buffer in enumerate(self._buffers(epoch)):
            in_buffer = self._batches_in(buffer)
            if start >= in_buffer:
                start -= in_buffer
                continue
            columns = _Columns(_read(buffer, self.columns), self.schema)
            order = self._order(epoch, number, columns.num_rows)
            for batch in range(start, in_buffer):
                end = (batch + 1) * self.batch_size if batch + 1 < in_buffer else columns.num_rows
                yield columns.take(order[batch * self.batch_size : end])
            del columns  # before the next ones are read
            start = 0

    def _batches_in(self, buffer: Sequence[RowGroup]) -> int:
        whole, rest = divmod(_num_rows(buffer), self.batch_size)
        return whole + (rest > (1 if whole and self.seed is not None else 0))

    def _buffers(self, epoch: int) -> list[list[RowGroup]]:
        """Row groups in this epoch's order, in runs of at least `buffer_rows` rows."""
        groups = self.groups
        if self.seed is not None:
            groups = [groups[index] for index in np.random.default_rng([self.seed, epoch]).permutation(len(groups))]
        ends = itertools.accumulate(rows for _, _, rows in groups)
        starts = [end - rows for end, (_, _, rows) in zip(ends, groups, strict=True)]
        buffers: list[list[RowGroup]] = []
        for _, members in itertools.groupby(zip(starts, groups, strict=True), key=lambda pair: pair[0] // self.buffer_rows):
            buffer = [group for _, group in members]
            if buffers and self.seed is not None and _num_rows(buffer) == 1:
                buffers[-1] += buffer
            else:
                buffers.append(buffer)
        return buffers

    def _order(self, epoch: int, number: int, num_rows: int) -> Tensor:
        if self.seed is None:
            return torch.arange(num_rows)
        return torch.from_numpy(np.random.default_rng([self.seed, epoch, number]).permutation(num_rows))


class _Columns:
    """Rows in memory, laid out so that a batch is one gather per kind of field."""

    def __init__(self, table: pa.Table, schema: Schema) -> None:
        self.num_rows = table.num_rows
        self.labels = torch.from_numpy(table[schema.label].to_numpy().astype(np.float32))
        self.categorical = [field.name for field in schema.fields if field.kind == "categorical"]
        self.numeric = [field.name for field in schema.fields if field.kind == "numeric"]
        self.ids = _matrix(table, self.categorical, np.int32)
        self.numbers = _matrix(table, self.numeric, np.float32)
        self.lists = {field.name: _ragged(table[field.name]) for field in schema.fields if field.is_list}
        self.fields = schema.fields

    def take(self, rows: Tensor) -> Batch:
        """A batch of these rows: (B,) int64 positions."""
        ids = self.ids.index_select(0, rows).t().long()  # (F, B), a field's ids side by side
        numbers = self.numbers.index_select(0, rows).t().contiguous()
        features = dict(zip(self.categorical, ids.contiguous(), strict=True)) | dict(zip(self.numeric, numbers, strict=True))
        features |= {name: _pad(*ragged, rows) for name, ragged in self.lists.items()}
        return Batch({field.name: features[field.name] for field in self.fields}, self.labels[rows])


def _matrix(table: pa.Table, names: Sequence[str], dtype: type[np.generic]) -> Tensor:
    """Columns side by side: (N, len(names))."""
    matrix = np.empty((table.num_rows, len(names)), dtype)
    for index, name in enumerate(names):
        matrix[:, index] = table[name].to_numpy()
    return torch.from_numpy(matrix)


def _ragged(column: pa.ChunkedArray) -> tuple[Tensor, Tensor]:
    """A list column as starts (N + 1,) int64 and values int32, one after another."""
    array = column.combine_chunks()
    lengths = array.value_lengths().to_numpy(zero_copy_only=False)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return torch.from_numpy(starts), torch.from_numpy(array.flatten().to_numpy(zero_copy_only=False).astype(np.int32))


def _pad(starts: Tensor, values: Tensor, rows: Tensor) -> Tensor:
    """Lists of some rows: (B, L) int64, padded with 0 to the longest of them (L >= 1)."""
    first, lengths = starts[rows], starts[rows + 1] - starts[rows]
    positions = torch.arange(max(int(lengths.max()), 1))
    inside = positions < lengths[:, None]
    padded = torch.zeros(inside.shape, dtype=torch.int64)
    padded[inside] = values[(first[:, None] + positions)[inside]].long()
    return padded


def _row_groups(folder: Path, split: str, columns: Sequence[str]) -> list[RowGroup]:
    """All row groups of a split, in file order."""
    paths = sorted((folder / split).glob("*.parquet"))
    if not paths:
        raise ValueError(f"{folder / split}: no Parquet files here. Does {folder} hold a prepared log with a {split} split?")
    groups = []
    for path in paths:
        file = _open(path)
        missing = [name for name in columns if name not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"{path}: columns {missing} of the schema are missing; there are {file.schema_arrow.names}.")
        groups += [(path, index, file.metadata.row_group(index).num_rows) for index in range(file.num_row_groups)]
    return [group for group in groups if group[2]]


def _num_rows(groups: Sequence[RowGroup]) -> int:
    return sum(rows for _, _, rows in groups)


def _read(groups: Sequence[RowGroup], columns: Sequence[str]) -> pa.Table:
    """The rows of these row groups, in this order."""
    files = {path: _open(path) for path, _, _ in groups}
    try:
        return pa.concat_tables([files[path].read_row_group(index, columns=list(columns)) for path, index, _ in groups])
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{groups[0][0].parent}: cannot be read ({str(error).splitlines()[0]}).") from None


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a whole Parquet file ({str(error).splitlines()[0]}).") from None
