"""Tensors in a folder of torch.distributed.checkpoint, in one file or sharded over many, by rows, columns or both.

The folder's index is a pickle, and so is the note beside each shard's values. Neither is ever run: of all that a pickle may name, these
readers know a short list of records, for which empty ones of our own are made, and whatever else a file names is an error.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanrec.stream.source import DTYPES, Source, Stretch, choose_name

INDEX_FILE = ".metadata"
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "ByteStorage": torch.uint8,
}
_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("device",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath", "WindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath", "WindowsPath"),
    "collections": ("OrderedDict",),
}


class _Record:
    """Stands for any object of an index: what it was made of, and nothing that it could do."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {"parts": state}

    def __setitem__(self, key: Any, value: Any) -> None:
        """What a pickle puts into a dict, such as the hooks of a tensor, is let go."""


class _Layout(NamedTuple):
    """How a tensor lies in its storage."""

    storage: tuple[Any, ...]
    first_value: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Reader(pickle.Unpickler):
    """Reads records, names of types, numbers and text; refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        """The harmless thing that stands for a name."""
        if name in _RECORDS.get(module, ()):
            return type("_Record", (_Record,), {})  # a class of its own, so that nothing a file does to it reaches another
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and (name in _STORAGES or isinstance(getattr(torch, name, None), torch.dtype)):
            return name
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, first, shape, strides, *rest: _Layout(storage, first, shape, strides)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of tensors needs")

    def persistent_load(self, pid: Any) -> Any:
        """Where a tensor's values are: ("storage", type, key, device, number of values)."""
        return pid


class _Shard(NamedTuple):
    """A part of the table: its first row and column, and its rows."""

    row: int
    column: int
    rows: Stretch


class CheckpointRows(Source):
    """A two-dimensional tensor, put together from its shards, or a one-dimensional one."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, shards: list[_Shard]) -> None:
        self.path, self.num_rows, self.row_shape, self.dtype, self._shards = path, shape[0], shape[1:], dtype, shards
        covered = sum(shard.rows.num_rows * (shard.rows.row_shape or (1,))[0] for shard in shards)
        if covered != shape[0] * (shape[1:] or (1,))[0]:
            raise ValueError(f"{path}: shards of {covered} values make no table of {shape[0]} x {shape[1]}. The checkpoint is incomplete.")

    @property
    def files(self) -> list[Path]:  # noqa: D102  # as in Source
        return [self.path / INDEX_FILE, *sorted({shard.rows.path for shard in self._shards})]

    def read(self, start: int, stop: int) -> Tensor:  # noqa: D102  # as in Source
        rows = torch.empty(stop - start, *self.row_shape, dtype=self.dtype)
        for first, column, shard in self._shards:
            low, high = max(start, first), min(stop, first + shard.num_rows)
            if low < high:
                part = shard.read(low - first, high - first)
                place = rows[low - start : high - start]
                (place[:, column : column + part.shape[1]] if self.row_shape else place).copy_(part)
        return rows


def open_checkpoint(path: Path, name: str | None) -> Source:
    """A tensor of a folder that `torch.distributed.checkpoint.save` wrote.

    Raises:
        ValueError: The folder is no checkpoint, is damaged or incomplete, names what no checkpoint needs, or holds no such tensor.
    """
    if not (path / INDEX_FILE).is_file():
        raise ValueError(f"{path}: a folder without {INDEX_FILE}, so no torch.distributed.checkpoint. Give the folder that holds one, or a file.")
    tensors, stored = _read_index(path / INDEX_FILE)
    chosen = choose_name(path, name, {key: tensor.shape for key, tensor in tensors.items() if len(tensor.shape) in (1, 2)})
    tensor = tensors[chosen]
    if tensor.dtype not in DTYPES.values():
        raise ValueError(f"{path}: {chosen!r} holds {tensor.dtype}. Give rows of one of {list(map(str, DTYPES.values()))}.")
    shards = []
    for offsets, sizes in tensor.chunks:
        if (chosen, offsets) not in stored:
            raise ValueError(f"{path}: the part of {chosen!r} from {offsets} on is nowhere. The checkpoint is incomplete.")
        shards.append(_Shard(offsets[0], (*offsets, 0)[1], _open_shard(path, stored[chosen, offsets], sizes, tensor.dtype)))
    return CheckpointRows(path, tensor.shape, tensor.dtype, shards)


class _Tensor(NamedTuple):
    """What an index says of a tensor: its chunks by their first place and shape."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[tuple[tuple[int, ...], tuple[int, ...]]]


def _read_index(path: Path) -> tuple[dict[str, _Tensor], dict[tuple[str, tuple[int, ...]], dict[str, Any]]]:
    """Name -> tensor; and for each name and first place of a chunk, where it is stored."""
    try:
        index = _Reader(io.BytesIO(path.read_bytes())).load().state
        entries = {name: entry.state for name, entry in index["state_dict_metadata"].items() if hasattr(entry, "state")}
        tensors = {
            name: _Tensor(
                tuple(entry["size"]),
                getattr(torch, entry["properties"].state["parts"][0]),
                [(tuple(chunk.state["offsets"]), tuple(chunk.state["sizes"])) for chunk in entry["chunks"]],
            )
            for name, entry in entries.items()
        }
        places = ((key.state["fqn"], key.state.get("offset"), info.state) for key, info in index["storage_data"].items())
        return tensors, {(name, tuple(offset)): info for name, offset, info in places if offset is not None}
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: no index of a torch.distributed.checkpoint ({error}).") from None


def _open_shard(folder: Path, info: dict[str, Any], sizes: tuple[int, ...], dtype: torch.dtype) -> Stretch:
    """The values of a shard: a zip archive, as torch.save makes them, from some byte of a file on."""
    path = folder / info["relative_path"]
    if path.parent.resolve() != folder.resolve() or not path.is_file():
        raise ValueError(f"{path}: a shard of {folder} is missing. Copy the whole folder.")
    if info.get("transform_descriptors"):
        raise ValueError(f"{path}: its shards are compressed, which cannot be read in stretches. Save the checkpoint without.")
    with path.open("rb") as file:
        part = _Part(file, info["offset"], info["length"])
        try:
            with zipfile.ZipFile(part) as archive:
                members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
                layout = _Reader(archive.open(members["data.pkl"])).load()
                values = members[f"data/{layout.storage[2]}"]
                first_byte = _first_byte(part, values)
        except (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, AttributeError, IndexError, EOFError, struct.error) as error:
            raise ValueError(f"{path}: no shard of a torch.distributed.checkpoint from byte {info['offset']} on ({error}).") from None
    strides = tuple(int(torch.tensor(sizes[place + 1 :]).prod()) for place in range(len(sizes)))
    if tuple(layout.shape) != sizes or tuple(layout.strides) != strides or values.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{path}: a shard of {tuple(layout.shape)} is not stored row by row. Save contiguous tensors.")
    if _STORAGES.get(layout.storage[1]) != dtype:
        raise ValueError(f"{path}: a shard of {layout.storage[1]} in a tensor of {dtype}. The checkpoint is damaged.")
    return Stretch(path, info["offset"] + first_byte + layout.first_value * dtype.itemsize, dtype, sizes)


class _Part(io.RawIOBase):
    """A stretch of a file as a file of its own."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._place = file, start, length, 0

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte."""
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        return self._place

    def tell(self) -> int:
        """The byte it is at."""
        return self._place

    def read(self, size: int = -1) -> bytes:
        """Bytes from there on."""
        left = max(0, self._length - self._place)
        self._file.seek(self._start + self._place)
        found = self._file.read(left if size < 0 else min(size, left))
        self._place += len(found)
        return found


def _first_byte(part: _Part, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: after its local header, whose own name and extra field decide how long that is."""
    part.seek(member.header_offset)
    name_length, extra_length = struct.unpack("<26xHH", part.read(30))
    return member.header_offset + 30 + name_length + extra_length
