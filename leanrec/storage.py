"""Models on disk: one safetensors file with all tensors, in its header how tables and layers are compressed, and a checksum over both."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from leanrec.bag import TableBag
from leanrec.dense import LowRankLinear, factored_layers
from leanrec.embeddings import EmbeddingModule, Group, address, listing, put, table_groups, tables, unpooled
from leanrec.methods import parse
from leanrec.methods.base import Table

FORMAT_VERSION = "1"
ROW_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
"""What a table answers in, where it is not float32."""


def save(model: nn.Module, path: str | os.PathLike[str], *, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a model, compressed or not, so that `load` can give it back.

    The file appears under its name when it is whole: it is written aside, flushed to the disk and renamed. A tensor that stands under
    several names is stored once.

    Args:
        model: Any module whose state is tensors.
        path: The file; one that exists is replaced.
        metadata: Notes to keep in the header, JSON values; `read_metadata` gives them back.

    Raises:
        ValueError: The model's state holds something that is not a tensor, or tensors without values (on the meta device), or the metadata
            something that is not JSON.
        OSError: The file cannot be written, such as on a full disk; what was there before is untouched.
    """
    path = Path(path)
    tensors, shared = _state(model)
    dense = {path: layer.rank for path, layer in factored_layers(model).items()}
    header = header_texts(_describe(table_groups(model)), dense=dense, shared=shared, metadata=metadata)
    header["checksum"] = _checksum(tensors, header)
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, header)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: cannot be written ({error}). Nothing was changed.") from None
    finally:
        temporary.unlink(missing_ok=True)


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """A model as `save` wrote it, in a model built by the same code.

    The tables that were compressed, and the layers that were factored, are put in the place of the model's own without ever making a full
    one, then all tensors are copied, none missing and none left over. Everything is checked before the model is touched. What the model has
    on the meta device is put on the CPU; with `torch.device("meta")` around its construction, nothing is allocated twice. Training mode and
    `requires_grad` are those of the given model: what takes the place of a frozen table or layer is frozen.

    Args:
        model: Built as the saved one was before `compress` and `compress_dense`; its values do not matter.
        path: The file.

    Returns:
        The same model; where the model is a table itself, the table.

    Raises:
        ValueError: The file is missing, truncated or altered, of an unknown format, or does not fit the model.
    """
    header, stored = _read(Path(path))
    try:
        shared: dict[str, str] = json.loads(header["shared"])
        stored |= {name: stored[first] for name, first in shared.items()}
        modules = _build(json.loads(header["tables"]), model) | _build_layers(json.loads(header.get("dense", "{}")), model)
        _check(model, modules, stored, shared)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, MemoryError) as error:  # RecursionError is a RuntimeError
        raise ValueError(f"{path}: its header is malformed ({type(error).__name__}: {' '.join(str(error).split())}).") from None
    for place, module in modules.items():
        old = model.get_submodule(place)
        _allocate(module.train(old.training), place, stored, next(iter(old.state_dict().values())).device)
    model = put(model, modules)
    _allocate(model, "", stored, torch.device("cpu"))
    model.load_state_dict(stored)
    return model


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The notes that `save` was given, from the header alone; the checksum is not verified, which `load` does.

    Raises:
        ValueError: The file is missing, is not one of ours, is of an unknown format, or its notes are damaged.
    """
    try:
        notes = json.loads(_read_header(Path(path)).get("metadata", ""))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: its metadata is damaged ({error}). Write or copy the file again.") from None
    if not isinstance(notes, dict):
        raise ValueError(f"{path}: its metadata is damaged (a {type(notes).__name__}, not a dict). Write or copy the file again.")
    return notes


def header_texts(
    tables: list[dict[str, Any]],
    *,
    dense: Mapping[str, int] | None = None,
    shared: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """The texts of a file's header but for its checksum.

    Args:
        tables: Per compressed table, as `describe_table` gives it.
        dense: Path of each factored layer -> rank.
        shared: Further names of tensors -> first name.
        metadata: Notes, JSON values.

    Raises:
        ValueError: `metadata` is something else.
    """
    try:
        notes = json.dumps(dict(metadata or {}))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"metadata cannot be written as JSON ({error}). Give a dict of texts, numbers, lists and dicts.") from None
    return {
        "format": "pt",
        "leanrec": FORMAT_VERSION,
        "tables": json.dumps(tables),
        "dense": json.dumps(dict(dense or {})),
        "shared": json.dumps(dict(shared or {})),
        "metadata": notes,
    }


def describe_table(table: Table, dtype: torch.dtype, places: Mapping[str, dict[str, Any] | None]) -> dict[str, Any]:
    """What a header says of a compressed table that answers in `dtype`: path of each of its places -> how it is pooled there, or None."""
    return {
        "method": repr(table.method),
        "num_embeddings": table.num_embeddings,
        "embedding_dim": table.embedding_dim,
        "dtype": str(dtype).removeprefix("torch."),
        "padding_idx": table.padding_idx,
        "fit_error": table.fit_error,
        "places": dict(places),
    }


def checksum(header: Mapping[str, str], tensors: Iterable[tuple[str, torch.dtype, Sequence[int], Iterable[Any]]]) -> str:
    """SHA-256 over the texts of the header and over names, dtypes, shapes and bytes of the tensors.

    Args:
        header: As `header_texts` gives it.
        tensors: Sorted by name; the bytes of each in pieces, so that it need not be in memory.
    """
    digest = hashlib.sha256(json.dumps(sorted(header.items())).encode())
    for name, dtype, shape, pieces in tensors:
        digest.update(json.dumps([name, str(dtype), list(shape)]).encode())
        for piece in pieces:
            digest.update(piece)
    return digest.hexdigest()


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Name -> tensor on the CPU, each once; and for its further names, name -> first name."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    names: dict[Any, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            what = "on the meta device and has no values" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}, not a tensor"
            raise ValueError(f"The model cannot be saved: {name!r} of its state is {what}.")
        first = names.setdefault((address(tensor), tensor.shape, tensor.stride(), tensor.dtype), name)
        if first == name:
            plain = tensor.detach().cpu().contiguous()
            is_part = plain.untyped_storage().nbytes() != plain.nbytes  # safetensors refuses what shares memory with another
            tensors[name] = plain.clone() if is_part else plain
        else:
            shared[name] = first
    return tensors, shared


def _describe(groups: Mapping[str, Group]) -> list[dict[str, Any]]:
    """What `_build` needs to know of each compressed table."""
    held = [(group, unpooled(next(iter(group.values())))) for group in groups.values()]
    return [
        describe_table(table, _row_dtype(table), {place: _pooling(module) for place, module in group.items()})
        for group, table in held
        if isinstance(table, Table)
    ]


def _row_dtype(table: Table) -> torch.dtype:
    with torch.no_grad():
        return table(torch.zeros(1, dtype=torch.int64, device=next(iter(table.state_dict().values())).device)).dtype


def _pooling(module: EmbeddingModule) -> dict[str, Any] | None:
    if not isinstance(module, TableBag):
        return None
    return {"mode": module.mode, "padding_idx": module.padding_idx, "include_last_offset": module.include_last_offset}


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    plain = ((name, tensor.reshape(-1).view(torch.uint8).numpy().data) for name, tensor in sorted(tensors.items()))
    return checksum(header, ((name, tensors[name].dtype, tensors[name].shape, [data]) for name, data in plain))


def _read_header(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: is missing, truncated or no safetensors file ({error}).") from None
    if "leanrec" not in header:
        raise ValueError(f"{path}: was not written by leanrec.save, so it does not say which tables are compressed and how.")
    if header["leanrec"] != FORMAT_VERSION:
        raise ValueError(f"{path}: is of format {header['leanrec']!r}, but this version of leanrec reads {FORMAT_VERSION!r}.")
    return header


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors, mapped into memory, of a file whose checksum holds."""
    header = _read_header(path)
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    checksum = header.pop("checksum", None)
    if checksum != _checksum(tensors, header):
        raise ValueError(f"{path}: is damaged or was altered since it was written (its checksum does not hold). Write or copy it again.")
    return header, tensors


def _build(entries: list[dict[str, Any]], model: nn.Module) -> dict[str, nn.Module]:
    """Place -> compressed table without values, on the meta device, for the entries that `_describe` wrote."""
    places = {place: module for group in table_groups(model).values() for place, module in group.items()}
    modules: dict[str, nn.Module] = {}
    for entry in entries:
        num_embeddings, embedding_dim = entry["num_embeddings"], entry["embedding_dim"]
        are_sizes = type(num_embeddings) is type(embedding_dim) is int
        for place in entry["places"]:
            if place not in places or not are_sizes or (places[place].num_embeddings, places[place].embedding_dim) != (num_embeddings, embedding_dim):
                known = listing(tables(model)) or "none"
                raise ValueError(f"it holds the table {place!r} ({num_embeddings} x {embedding_dim}), but the model's tables are {known}.")
        modules |= _build_table(entry, [places[place] for place in entry["places"]])
    return modules


def _build_table(entry: dict[str, Any], replaced: Sequence[EmbeddingModule]) -> dict[str, nn.Module]:
    try:
        _check_entry(entry)
        with torch.device("meta"):
            table = parse(entry["method"]).build(entry["num_embeddings"], entry["embedding_dim"])
        if entry["dtype"] != "float32":
            table.to(ROW_DTYPES[entry["dtype"]])
        table.padding_idx, table.fit_error = entry["padding_idx"], entry["fit_error"]
        table.sparse = any(unpooled(module).sparse for module in replaced)
        parameters = [parameter for module in replaced for parameter in module.parameters()]
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            table.requires_grad_(False)
        return {place: table if pooling is None else TableBag(table, **pooling) for place, pooling in entry["places"].items()}
    except ValueError as error:
        raise ValueError(f"table {next(iter(entry['places']), '')!r}: {error}") from None


def _check_entry(entry: dict[str, Any]) -> None:
    """Raise ValueError for a value that nothing else would look at before it is used."""
    poolings = [pooling for pooling in entry["places"].values() if pooling is not None]
    for padding_idx in (entry["padding_idx"], *(pooling.get("padding_idx") for pooling in poolings)):
        if padding_idx is not None and not (type(padding_idx) is int and 0 <= padding_idx < entry["num_embeddings"]):
            raise ValueError(f"padding_idx={padding_idx!r} is neither null nor one of the rows 0 to {entry['num_embeddings'] - 1}.")
    for pooling in poolings:
        if type(pooling.get("include_last_offset", False)) is not bool:
            raise ValueError(f"include_last_offset={pooling['include_last_offset']!r} is neither true nor false.")
    if entry["fit_error"] is not None and type(entry["fit_error"]) not in (int, float):
        raise ValueError(f"fit_error={entry['fit_error']!r} is neither null nor a number.")


def _build_layers(ranks: dict[str, int], model: nn.Module) -> dict[str, nn.Module]:
    """Path -> factored layer without values, on the meta device, for path -> rank."""
    found = dict(model.named_modules())
    modules: dict[str, nn.Module] = {}
    for path, rank in ranks.items():
        layer = found.get(path)
        if not isinstance(layer, nn.Linear | LowRankLinear) or type(rank) is not int or not 1 <= rank <= min(layer.in_features, layer.out_features):
            raise ValueError(f"it holds the layer {path!r} factored to rank {rank!r}, but the model has no nn.Linear there that wide.")
        modules[path] = LowRankLinear.empty(layer, rank, device="meta")
    return modules


def _check(model: nn.Module, modules: Mapping[str, nn.Module], stored: Mapping[str, Tensor], shared: Mapping[str, str]) -> None:
    """Raise ValueError unless the tensors of the file are those of the model with `modules` in their places."""
    prefixes = {place: f"{place}." if place else "" for place in modules}
    within = tuple(prefixes.values())
    kept = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if not name.startswith(within)}
    built = {name: tensor for place in modules for name, tensor in modules[place].state_dict(prefix=prefixes[place], keep_vars=True).items()}
    expected = kept | built
    if expected.keys() != stored.keys():
        lacking, beyond = _some(expected.keys() - stored.keys()), _some(stored.keys() - expected.keys())
        raise ValueError(f"it does not fit the model: of the model's tensors it lacks {lacking}, and the model lacks {beyond}.")
    for name, tensor in expected.items():
        given = stored[name]
        fits = given.dtype == tensor.dtype or (name in built and given.is_floating_point() and tensor.is_floating_point())
        if given.shape != tensor.shape or not fits:
            theirs, ours = (f"{tuple(part.shape)} {part.dtype}" for part in (given, tensor))
            raise ValueError(f"it does not fit the model: {name!r} is {theirs} in the file and {ours} in the model.")
    for name, buffer in model.named_buffers():
        if buffer.is_meta and buffer.numel() and name not in expected and not name.startswith(within):
            raise ValueError(f"the model's buffer {name!r} is never saved and has no values on the meta device. Build the model on the CPU.")
    _check_ties(expected, shared)


def _check_ties(expected: Mapping[str, Tensor], shared: Mapping[str, str]) -> None:
    """Raise ValueError where the model has one tensor and the file two."""
    firsts: dict[int, str] = {}
    for name, tensor in expected.items():
        first = firsts.setdefault(id(tensor), name)
        if shared.get(name, name) != shared.get(first, first):
            raise ValueError(f"it does not fit the model: {first!r} and {name!r} are one tensor in the model and two in the file.")


def _some(names: set[str]) -> str:
    """Names for an error of one line: the first four."""
    listed = ", ".join(repr(name) for name in sorted(names)[:4]) or "none"
    return f"{listed} and {len(names) - 4} more" if len(names) > 4 else listed


def _allocate(module: nn.Module, path: str, stored: Mapping[str, Tensor], device: torch.device) -> None:
    """Give what a module has on the meta device memory, with the dtypes of the file; what was one tensor stays one."""
    device = torch.device("cpu") if device.type == "meta" else device
    made: dict[int, Tensor] = {}
    for part_path, part in module.named_modules(prefix=path):
        own = [*part.named_parameters(recurse=False, remove_duplicate=False), *part.named_buffers(recurse=False, remove_duplicate=False)]
        for name, tensor in own:
            full_name = f"{part_path}.{name}".lstrip(".")
            if tensor.is_meta and (full_name in stored or not tensor.numel()):
                if id(tensor) not in made:
                    values = torch.empty_like(stored.get(full_name, tensor), device=device)
                    made[id(tensor)] = nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
                setattr(part, name, made[id(tensor)])
