"""Tables of vectors, and vectors of counts, in files: read a stretch or some rows at a time, never whole."""

from __future__ import annotations

import math
import os
import reprlib
import textwrap
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What a row is made of: name in a safetensors header -> type. Counts are integers, vectors floats.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
}
_TAKE_ROWS = 16_384
_FAR_ROWS = 256  # so far apart, rows are read one by one and not with all that lies between them


class Source(ABC):
    """Rows on the disk.

    Attributes:
        path: The file or folder.
        num_rows: V.
        row_shape: Of one row: (D,), or () where a row is one number.
        dtype: Of the values.
    """

    path: Path
    num_rows: int
    row_shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def files(self) -> list[Path]:
        """All files that are read."""
        return [self.path]

    @abstractmethod
    def read(self, start: int, stop: int) -> Tensor:
        """Rows from one to before another: (N, *row_shape).

        Raises:
            ValueError: The file ends before them, or they are not what they should be.
        """

    def take(self, ids: Tensor) -> Tensor:
        """Some rows: (S,) int64, rising -> (S, *row_shape)."""
        rows = torch.empty(len(ids), *self.row_shape, dtype=self.dtype)
        for start in range(0, self.num_rows, _TAKE_ROWS):
            low, high = torch.searchsorted(ids, torch.tensor([start, start + _TAKE_ROWS])).tolist()
            if low < high:
                rows[low:high] = self.read(start, min(start + _TAKE_ROWS, self.num_rows))[ids[low:high] - start]
        return rows

    def chunks(self, start: int, chunk_rows: int) -> Iterator[tuple[int, Tensor]]:
        """First row and rows of each stretch from `start` on, one being read while another is worked on."""
        starts = range(start, self.num_rows, chunk_rows)
        with ThreadPoolExecutor(1) as reader:
            waiting = [reader.submit(self.read, first, min(first + chunk_rows, self.num_rows)) for first in starts[:1]]
            for place, first in enumerate(starts):
                rows = waiting.pop().result()
                waiting = [reader.submit(self.read, after, min(after + chunk_rows, self.num_rows)) for after in starts[place + 1 : place + 2]]
                yield first, rows


class Stretch(Source):
    """Rows one after another in a file, little-endian and row by row, as `.npy` and safetensors files hold them."""

    def __init__(self, path: Path, first_byte: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.path, self.dtype, self.num_rows, self.row_shape = path, dtype, shape[0], shape[1:]
        self._first_byte = first_byte
        self._row_values = math.prod(self.row_shape)
        # Read, not mapped: pages of a mapped file count as memory of the process for as long as they are there.
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        end = first_byte + self.num_rows * self._row_values * dtype.itemsize
        if path.stat().st_size < end:
            raise ValueError(f"{path}: is truncated: it has {path.stat().st_size} bytes, but its table ends at byte {end}. Copy it again.")

    def read(self, start: int, stop: int) -> Tensor:  # noqa: D102  # as in Source
        rows = torch.empty(stop - start, *self.row_shape, dtype=self.dtype)
        self._fill(_bytes_of(rows), start)
        return rows

    def take(self, ids: Tensor) -> Tensor:  # noqa: D102  # as in Source
        if self.num_rows < _FAR_ROWS * len(ids):
            return super().take(ids)
        rows = torch.empty(len(ids), *self.row_shape, dtype=self.dtype)
        target, size = _bytes_of(rows), self._row_values * self.dtype.itemsize
        for place, row in enumerate(ids.tolist()):
            self._fill(target[place * size : (place + 1) * size], row)
        return rows

    def _fill(self, target: memoryview, row: int) -> None:
        """Read bytes from a row on."""
        place = self._first_byte + row * self._row_values * self.dtype.itemsize
        while target and (count := os.preadv(self._file, [target], place)):
            target, place = target[count:], place + count
        if target:
            raise ValueError(f"{self.path}: was cut off while it was read, at byte {place}. Copy it again.")


def _bytes_of(rows: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return rows.reshape(-1).view(torch.uint8).numpy().data


def choose_name(path: Path, name: str | None, shapes: dict[str, tuple[int, ...]], kind: str = "tensors") -> str:
    """The name that was asked for, or the only one there is; the file holds things of one kind.

    Raises:
        ValueError: There are several and none was asked for, or another one was.
    """
    listed = ", ".join(f"{known!r} ({' x '.join(map(str, shape))})" for known, shape in list(shapes.items())[:20]) or "none"
    if name is None and len(shapes) != 1:
        raise ValueError(f"{path}: holds {len(shapes)} {kind}. Name one of {listed}.")
    if name is not None and name not in shapes:
        raise ValueError(f"{path}: holds no {name!r}. Name one of {listed}.")
    return name or next(iter(shapes))


def whole_numbers(values: Iterable[Any]) -> tuple[int, ...]:
    """A shape, or places in a file, as a header gives them.

    Raises:
        ValueError: They are no whole numbers from 0 on.
    """
    numbers = tuple(values)
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError(f"{reprlib.repr(values)} are no whole numbers from 0 on")
    return numbers


def one_line(error: Exception) -> str:
    """What an error that another library raised says of a damaged file."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__
