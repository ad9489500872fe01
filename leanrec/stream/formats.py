"""Which files are read how; and the headers of `.npy` and safetensors files, which say where rows lie one after another."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from leanrec.stream.checkpoint import open_checkpoint
from leanrec.stream.source import DTYPES, Source, Stretch, choose_name, one_line, whole_numbers

_NUMPY_NAMES = {"f8": "F64", "f4": "F32", "f2": "F16", "i8": "I64", "i4": "I32", "i2": "I16", "u1": "U8"}
_LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors library


def open_source(path: Path, name: str | None = None) -> Source:
    """The rows in a `.npy` or safetensors file, a Parquet file, or a folder of torch.distributed.checkpoint.

    Args:
        path: The file or folder.
        name: Of the tensor or column, where there are several.

    Raises:
        ValueError: The file is missing, damaged, of another format or type, or holds no such tensor.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file. Give a .npy, .safetensors or .parquet file, or a folder of torch.distributed.checkpoint.")
    if path.is_dir():
        return open_checkpoint(path, name)
    if path.suffix == ".parquet":
        from leanrec.stream.parquet import ParquetRows  # brings pyarrow, whose memory other formats need not take

        return ParquetRows(path, name)
    if path.suffix == ".npy":
        return _open_npy(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path, name)
    raise ValueError(f"{path}: of unknown format. Give a .npy, .safetensors or .parquet file, or a folder of torch.distributed.checkpoint.")


def _open_npy(path: Path) -> Source:
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_column, dtype = reader(file)
            shape = whole_numbers(shape)
        except Exception as error:  # numpy evaluates the header as Python, which fails in many ways
            raise ValueError(f"{path}: no .npy file, or a truncated one ({one_line(error)}).") from None
        first_byte = file.tell()
    if by_column and len(shape) > 1:
        raise ValueError(f"{path}: is stored column by column. Save it again with numpy.ascontiguousarray.")
    kind = _NUMPY_NAMES.get(dtype.str[1:]) if dtype.str[0] in "<|" else None
    if kind is None or not shape:
        raise ValueError(f"{path}: holds {dtype} of shape {shape}. Give rows of little-endian floats of 2, 4 or 8 bytes (or, for counts, integers).")
    return Stretch(path, first_byte, DTYPES[kind], shape)


def _open_safetensors(path: Path, name: str | None) -> Source:
    with path.open("rb") as file:
        try:
            length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
            if length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            shapes = {known: whole_numbers(entry["shape"]) for known, entry in entries.items()}
            spans = {known: whole_numbers(entry["data_offsets"]) for known, entry in entries.items()}
            dtypes = {known: str(entry["dtype"]) for known, entry in entries.items()}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: no safetensors file, or a truncated one ({one_line(error)}).") from None
    chosen = choose_name(path, name, shapes)
    shape, span = shapes[chosen], spans[chosen]
    if dtypes[chosen] not in DTYPES or not shape:
        raise ValueError(f"{path}: holds {dtypes[chosen]!r} of shape {shape}. Give rows of one of {list(DTYPES)}.")
    dtype = DTYPES[dtypes[chosen]]
    nbytes = math.prod(shape) * dtype.itemsize
    if len(span) != 2 or span[1] - span[0] != nbytes:
        raise ValueError(f"{path}: {chosen!r} of shape {shape} takes {nbytes} bytes, but its data_offsets are {list(span)}. Copy it again.")
    return Stretch(path, 8 + length + span[0], dtype, shape)
