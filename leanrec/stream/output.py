"""The safetensors file of one table, written as its rows are encoded; `leanrec.load` reads it."""

from __future__ import annotations

import json
import mmap
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from leanrec.methods.base import Table
from leanrec.storage import checksum, describe_table, header_texts

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_READ_BYTES = 2**22
_LONGEST_NUMBER = "-1.2345678901234567e-308"  # no float takes more characters in JSON


class TableFile:
    """A file with room for all tensors of a table from the start on; they are filled in pieces, in any order, and the header comes last.

    Until then the file is no safetensors file, so nothing takes half a table for a whole one.

    Args:
        path: The file; what it holds already is kept.
        table: With tensors of the right shapes, on any device.
        ends: Name of each tensor -> bytes that it was given so far.
    """

    def __init__(self, path: Path, table: Table, ends: Mapping[str, int] | None = None) -> None:
        self.path, self._table = path, table
        state = table.state_dict()
        # As the safetensors library lays them out: wide types first, so that each begins at a multiple of its own size.
        self._names = sorted(state, key=lambda name: (-state[name].element_size(), name))
        self._tensors = {name: (state[name].dtype, tuple(state[name].shape), state[name].nbytes) for name in self._names}
        self._room = len(self._header(_LONGEST_NUMBER, "0" * 64)) // 8 * 8 + 8
        self._starts, place = {}, 8 + self._room
        for name in self._names:
            self._starts[name] = place
            place += self._tensors[name][2]
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, self._file)
        os.ftruncate(self._file, place)
        self.ends = dict.fromkeys(self._names, 0) | dict(ends or {})

    def append(self, name: str, piece: Tensor) -> None:
        """Write the next values of a tensor."""
        dtype, _, nbytes = self._tensors[name]
        data = piece.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8)
        assert self.ends[name] + len(data) <= nbytes, f"more values than {name} has"
        left, place = data.numpy().data, self._starts[name] + self.ends[name]
        while left:
            count = os.pwrite(self._file, left, place)
            left, place = left[count:], place + count
        self.ends[name] += len(data)

    def sync(self) -> None:
        """Have all that was written on the disk."""
        os.fsync(self._file)

    def mapped(self, name: str) -> tuple[Tensor, mmap.mmap]:
        """A tensor as it stands in the file, read-only, and the map of the file that it lies in."""
        dtype, shape, nbytes = self._tensors[name]
        pages = mmap.mmap(self._file, 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)
        return torch.frombuffer(pages, dtype=dtype, offset=self._starts[name], count=nbytes // dtype.itemsize).view(shape), pages

    def finish(self) -> None:
        """Make it a whole file: checksum and header. Every tensor must have all its values.

        The checksum goes over names in order, small tensors that are settled last among them, so the file is read once more for it.
        """
        assert all(self.ends[name] == self._tensors[name][2] for name in self._names), "a tensor lacks values"
        error = json.dumps(self._table.fit_error)
        texts = self._texts(error)
        parts = ((name, self._tensors[name][0], self._tensors[name][1], self._read(name)) for name in sorted(self._names))
        header = self._header(error, checksum(texts, parts)).ljust(self._room)
        os.pwrite(self._file, len(header).to_bytes(8, "little") + header, 0)
        self.sync()

    def _read(self, name: str) -> Iterator[bytes]:
        first, nbytes = self._starts[name], self._tensors[name][2]
        for place in range(first, first + nbytes, _READ_BYTES):
            yield os.pread(self._file, min(_READ_BYTES, first + nbytes - place), place)

    def _texts(self, fit_error: str) -> dict[str, str]:
        entry = describe_table(self._table, torch.float32, {"": None})
        return header_texts([{**entry, "fit_error": json.loads(fit_error)}])

    def _header(self, fit_error: str, digest: str) -> bytes:
        entries: dict[str, object] = {"__metadata__": self._texts(fit_error) | {"checksum": digest}}
        place = 0
        for name in self._names:
            dtype, shape, nbytes = self._tensors[name]
            entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [place, place + nbytes]}
            place += nbytes
        return json.dumps(entries, separators=(",", ":")).encode()
