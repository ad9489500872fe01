"""Rows of a Parquet file: a column of lists of floats, all of one length, or of integers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from leanrec.stream.source import Source, choose_name, one_line

_BATCH_ROWS = 16_384
_READ_AHEAD = 2**22
_TYPES = {
    pa.float16(): torch.float16,
    pa.float32(): torch.float32,
    pa.float64(): torch.float64,
    pa.int16(): torch.int16,
    pa.int32(): torch.int32,
    pa.int64(): torch.int64,
}
_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)  # what pyarrow raises where bytes are not what they should be


class ParquetRows(Source):
    """A column. Rows come fast in their order; others cost decoding the row group in which they stand.

    Raises:
        ValueError: No Parquet file, no such column, or one of another type.
    """

    def __init__(self, path: Path, name: str | None) -> None:
        self.path = path
        try:
            # A buffered stream: the pages of a row group are read as they are decoded, not all at once.
            self._file = pq.ParquetFile(path, buffer_size=_READ_AHEAD, pre_buffer=False, page_checksum_verification=True)
            kinds = {field.name: field.type for field in self._file.schema_arrow}
            metadata = self._file.metadata
            sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        except _DAMAGE as error:
            raise ValueError(f"{path}: no Parquet file, or a truncated one ({one_line(error)}).") from None
        self.num_rows = metadata.num_rows
        if min(0, *sizes, self.num_rows) < 0 or sum(sizes) != self.num_rows:
            raise ValueError(f"{path}: its row groups hold {sum(sizes)} rows, but the file {self.num_rows}. It is damaged: copy it again.")
        columns: dict[str, tuple[int, ...]] = {known: (self.num_rows,) for known, kind in kinds.items() if name is not None or _is_readable(kind)}
        self._column = choose_name(path, name, columns, kind="columns of numbers")
        kind = kinds[self._column]
        value = kind.value_type if _is_list(kind) else kind
        if value not in _TYPES:
            raise ValueError(f"{path}: column {self._column!r} holds {kind}. Give lists of floats (or, for counts, integers).")
        self.dtype = _TYPES[value]
        self._group_starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        self._place, self._rest = 0, torch.empty(0)
        self._batches: Iterator[Tensor] = self._decode(0)
        self.row_shape = (self._first_length(),) if _is_list(kind) else ()

    def read(self, start: int, stop: int) -> Tensor:  # noqa: D102  # as in Source
        if start != self._place:
            self._go_to(start)
        parts, missing = [], stop - start
        while missing > 0:
            if not len(self._rest):
                batch = next(self._batches, None)
                if batch is None:
                    raise ValueError(f"{self.path}: ends before row {stop - missing}, but should have {self.num_rows} rows. Copy it again.")
                self._rest = batch
            parts.append(self._rest[:missing])
            self._rest = self._rest[len(parts[-1]) :]
            missing -= len(parts[-1])
        self._place = stop
        return torch.cat(parts) if parts else torch.empty(0, *self.row_shape, dtype=self.dtype)

    def _go_to(self, start: int) -> None:
        """Let the next batch begin at a row: those of its group that stand before it are decoded and let go."""
        group = int(np.searchsorted(self._group_starts, start, side="right")) - 1
        self._batches, self._rest = self._decode(group), torch.empty(0)
        self._place = self._group_starts[group]
        while self._place < start:
            self.read(self._place, min(start, self._place + _BATCH_ROWS))

    def _decode(self, group: int) -> Iterator[Tensor]:
        row = self._group_starts[group]
        for column in self._columns(group, _BATCH_ROWS):
            yield self._tensor(column, row)
            row += len(column)

    def _columns(self, group: int, batch_rows: int) -> Iterator[pa.Array]:
        """Values of some rows at a time, from a row group on."""
        row, groups = self._group_starts[group], list(range(group, len(self._group_starts) - 1))
        try:
            for batch in self._file.iter_batches(batch_rows, row_groups=groups, columns=[self._column], use_threads=False):
                yield batch.column(0)
                row += batch.num_rows
        except _DAMAGE as error:
            raise ValueError(f"{self.path}: cannot be read beyond row {row} ({one_line(error)}). Copy it again.") from None

    def _tensor(self, column: pa.Array, row: int) -> Tensor:
        """Values of some rows, the first of which is `row`."""
        if column.null_count:
            empty = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise ValueError(f"{self.path}: row {row + empty} of {self._column!r} is null. Every row needs its values.")
        if not _is_list(column.type):
            return torch.from_numpy(column.to_numpy(zero_copy_only=False).copy())
        [width] = self.row_shape
        lengths = np.full(len(column), column.type.list_size) if pa.types.is_fixed_size_list(column.type) else column.value_lengths().to_numpy()
        if (lengths != width).any():
            odd = int(np.flatnonzero(lengths != width)[0])
            raise ValueError(
                f"{self.path}: row {row + odd} of {self._column!r} has {lengths[odd]} values, the first row has {width}. Make them equal."
            )
        values = column.flatten()
        if values.null_count:
            odd = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0]) // width
            raise ValueError(f"{self.path}: row {row + odd} of {self._column!r} holds a null. Every row needs its values.")
        return torch.from_numpy(values.to_numpy(zero_copy_only=False).copy()).view(-1, width)

    def _first_length(self) -> int:
        """Values in the first row, which all rows must have."""
        for column in self._columns(0, 1):
            first = column[0].as_py()
            if first:
                return len(first)
        raise ValueError(f"{self.path}: column {self._column!r} has no values in its first row.")


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_readable(kind: pa.DataType) -> bool:
    return (kind.value_type if _is_list(kind) else kind) in _TYPES
