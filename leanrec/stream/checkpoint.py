"""Tensors in a folder of torch.distributed.checkpoint, in one file or sharded over many, by rows, columns or both.

The folder's index is a pickle, and so is the note beside each shard's values. Neither is ever run: of all that a pickle may name, these
readers know a short list of records, for which empty ones of our own are made, and whatever else a file names is an error.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanrec.stream.source import DTYPES, Source, Stretch, choose_name, one_line, whole_numbers

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


def _layout(storage: tuple[Any, ...], first: int, shape: tuple[int, ...], strides: tuple[int, ...], *rest: Any) -> _Layout:
    [first_value] = whole_numbers([first])
    return _Layout(storage, first_value, whole_numbers(shape), whole_numbers(strides))


class _Reader(pickle.Unpickler):
    """Reads records, names of types, numbers and text; refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        """The harmless thing that stands for a name."""
        if name in _RECORDS.get(module, ()):
            return type("_Record", (_Record,), {})  # a class of its own, so that nothing a file does to it reaches another
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and name in _STORAGES:
            return name
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _layout
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of tensors needs")

    def persistent_load(self, pid: Any) -> Any:
        """Where a tensor's values are: ("storage", type, key, device, number of values)."""
        return pid


def _load(pickled: bytes) -> Any:
    """What a pickle holds. First its steps are gone through: the reader would take whatever memory a damaged one names."""
    for step, argument, _ in pickletools.genops(pickled):
        if step.name.endswith("PUT") and (argument or 0) > len(pickled):
            raise pickle.UnpicklingError(f"it puts a thing into place {argument}, but has {len(pickled)} bytes")
    return _Reader(io.BytesIO(pickled)).load()


class _Shard(NamedTuple):
    """A part of the table: its first row and column, and its rows."""

    row: int
    column: int
    rows: Stretch

    @property
    def spans(self) -> tuple[range, range]:
        """Its rows and columns of the table."""
        return range(self.row, self.row + self.rows.num_rows), range(self.column, self.column + (self.rows.row_shape or (1,))[0])

    def overlaps(self, other: _Shard) -> bool:
        """Whether a value stands in both."""
        return all(max(ours.start, theirs.start) < min(ours.stop, theirs.stop) for ours, theirs in zip(self.spans, other.spans, strict=True))


class CheckpointRows(Source):
    """A two-dimensional tensor, put together from its shards, or a one-dimensional one."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, shards: list[_Shard]) -> None:
        self.path, self.num_rows, self.row_shape, self.dtype, self._shards = path, shape[0], shape[1:], dtype, shards
        covered = sum(math.prod(map(len, shard.spans)) for shard in shards)
        beyond = any(span.stop > size for shard in shards for span, size in zip(shard.spans, (*shape, 1), strict=False))
        if covered != math.prod(shape) or beyond or any(shard.overlaps(other) for shard, other in itertools.combinations(shards, 2)):
            sizes = " x ".join(map(str, shape))
            raise ValueError(f"{path}: shards of {covered} values make no table of {sizes}. The checkpoint is incomplete or damaged.")

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
        raise ValueError(f"{path}: {chosen!r} holds {tensor.dtype!r}. Give rows of one of {list(map(str, DTYPES.values()))}.")
    shards: dict[_Place, _Shard] = {}
    for offsets, sizes in tensor.chunks:
        if len(offsets) != len(tensor.shape) or len(sizes) != len(tensor.shape):
            raise ValueError(f"{path}: a part of {sizes} values from {offsets} on in {chosen!r} of shape {tensor.shape}. The checkpoint is damaged.")
        place = stored.get((chosen, offsets))
        if place is None or place in shards:
            raise ValueError(f"{path}: the part of {chosen!r} from {offsets} on is nowhere, or where another part is. The checkpoint is damaged.")
        shards[place] = _Shard(offsets[0], (*offsets, 0)[1], _open_shard(path, place, sizes, tensor.dtype))
    return CheckpointRows(path, tensor.shape, tensor.dtype, list(shards.values()))


class _Tensor(NamedTuple):
    """What an index says of a tensor: its chunks by their first place and shape."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[tuple[tuple[int, ...], tuple[int, ...]]]


class _Place(NamedTuple):
    """Where a shard is stored: from some byte of a file of the folder on."""

    file: str
    first_byte: int
    nbytes: int
    is_compressed: bool


def _read_index(path: Path) -> tuple[dict[str, _Tensor], dict[tuple[str, tuple[int, ...]], _Place]]:
    """Name -> tensor; and for each name and first place of a chunk, where it is stored."""
    try:
        index = _load(path.read_bytes()).state
        tensors = {name: _tensor(entry.state) for name, entry in index["state_dict_metadata"].items() if hasattr(entry, "state")}
        places = ((key.state["fqn"], key.state.get("offset"), _place(info.state)) for key, info in index["storage_data"].items())
        return tensors, {(name, whole_numbers(offset)): place for name, offset, place in places if offset is not None}
    except Exception as error:  # a damaged pickle fails in any way
        raise ValueError(f"{path}: no index of a torch.distributed.checkpoint ({one_line(error)}).") from None


def _tensor(entry: dict[str, Any]) -> _Tensor:
    chunks = [(whole_numbers(chunk.state["offsets"]), whole_numbers(chunk.state["sizes"])) for chunk in entry["chunks"]]
    return _Tensor(whole_numbers(entry["size"]), entry["properties"].state["parts"][0], chunks)


def _place(info: dict[str, Any]) -> _Place:
    first_byte, nbytes = whole_numbers((info["offset"], info["length"]))
    return _Place(str(info["relative_path"]), first_byte, nbytes, bool(info.get("transform_descriptors")))


def _open_shard(folder: Path, place: _Place, sizes: tuple[int, ...], dtype: torch.dtype) -> Stretch:
    """The values of a shard: a zip archive, as torch.save makes them."""
    path = folder / place.file
    if path.name != place.file or not os.path.isfile(path):
        raise ValueError(f"{folder}: a shard of it is missing, the file {place.file!r}. Copy the whole folder.")
    if place.is_compressed:
        raise ValueError(f"{path}: its shards are compressed, which cannot be read in stretches. Save the checkpoint without.")
    with path.open("rb") as file:
        part = _Part(file, place.first_byte, place.nbytes)
        try:
            with zipfile.ZipFile(part) as archive:
                members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
                if min(member.header_offset for member in members.values()) != 0:
                    raise zipfile.BadZipFile("another archive lies there")
                layout = _load(archive.read(members["data.pkl"]))
                _, kind, key, *_ = layout.storage
                values, stored_dtype = members[f"data/{key}"], _STORAGES.get(kind)
                first_byte = _first_byte(part, values) + layout.first_value * dtype.itemsize
        except Exception as error:  # as above, and zipfile's ways
            raise ValueError(f"{path}: no shard of a torch.distributed.checkpoint from byte {place.first_byte} on ({one_line(error)}).") from None
    row_by_row = tuple(math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))
    if layout.shape != sizes or layout.strides != row_by_row or values.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{path}: a shard of {layout.shape} is not stored row by row. Save contiguous tensors.")
    if stored_dtype != dtype or (layout.first_value + math.prod(sizes)) * dtype.itemsize > values.file_size:
        raise ValueError(f"{path}: a shard of {stored_dtype} in {values.file_size} bytes for {sizes} of {dtype}. The checkpoint is damaged.")
    return Stretch(path, place.first_byte + first_byte, dtype, sizes)


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
