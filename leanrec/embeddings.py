"""The embedding modules of a model: where they stand, which of them hold one weight, and the rows they hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from leanrec.bag import TableBag
from leanrec.methods.base import Table
from leanrec.ops.spread import moments, variance

EmbeddingModule: TypeAlias = nn.Embedding | nn.EmbeddingBag | Table | TableBag
Group: TypeAlias = dict[str, EmbeddingModule]
"""All places that hold one weight: path -> module. The first path names the group."""


def tables(model: nn.Module) -> dict[str, EmbeddingModule]:
    """The embedding tables of a model, compressed or not: path -> `nn.Embedding`, `nn.EmbeddingBag`, `Table` or `TableBag`.

    In the model's order; a module that stands in several places appears once, under its first path. The path of the model itself is "".
    """
    first_paths: dict[int, str] = {}
    found = dict(_places(model))
    return {path: module for path, module in found.items() if first_paths.setdefault(id(module), path) == path}


def table_groups(model: nn.Module) -> dict[str, Group]:
    """All places of embedding tables, put together where they hold one weight: first path -> group."""
    groups: dict[int, Group] = {}
    for path, module in _places(model):
        groups.setdefault(_weight_identity(module), {})[path] = module
    return {next(iter(group)): group for group in groups.values()}


def check_changeable(model: nn.Module) -> None:
    """Raise ValueError if a module of the model says, in an attribute `unchangeable`, why its tables and layers have to stay as they are."""
    for module in model.modules():
        if (reason := getattr(module, "unchangeable", None)) is not None:
            raise ValueError(reason)


def has_hooks(module: nn.Module) -> bool:
    """Whether anything listens to a module: to its calls, its gradients, its state dict or the gradients of its parameters."""
    held = [hooks for name, hooks in vars(module).items() if name.endswith("_hooks")]
    parameters = module.parameters(recurse=False)
    return any(held) or any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in parameters)


def put(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The model with modules set at paths, in place; a module at "" takes the place of the model itself."""
    for path, module in modules.items():
        if path == "":
            return module
        model.set_submodule(path, module)
    return model


def replacements(group: Group, make: Callable[[EmbeddingModule], nn.Module]) -> dict[str, nn.Module]:
    """Path -> what takes the place of the module there, made once per module."""
    made = {id(module): make(module) for module in {id(module): module for module in group.values()}.values()}
    return {path: made[id(module)] for path, module in group.items()}


def like(module: EmbeddingModule, table: Table) -> nn.Module:
    """The table as it stands in the place of a module: pooled where that pools."""
    if isinstance(module, nn.EmbeddingBag | TableBag):
        bag = TableBag(table, mode=module.mode, padding_idx=module.padding_idx, include_last_offset=module.include_last_offset)
        return bag.train(module.training)
    return table


def row_chunks(module: EmbeddingModule, *, chunk_rows: int = 16_384) -> Iterator[Tensor]:
    """The rows of a table without pooling, (N, D) at a time, without gradients."""
    held = unpooled(module)
    for start in range(0, held.num_embeddings, chunk_rows):
        stop = min(start + chunk_rows, held.num_embeddings)
        if isinstance(held, Table):
            device = next(iter(held.state_dict().values())).device
            with torch.no_grad():
                rows = held(torch.arange(start, stop, device=device))
            yield rows  # outside of no_grad, which would reach into the caller
        else:
            yield held.weight[start:stop].detach()


def reconstruction_error(original: EmbeddingModule, module: EmbeddingModule, counts: Tensor | None = None) -> float | None:
    """Share of the original rows' variance that a table loses, each row weighted by its count: sum |x - x'|^2 / sum |x - mean|^2.

    None where the original rows are all equal.
    """
    spread = variance(row_chunks(original), counts)
    if spread == 0:
        return None
    differences = (row.double() - other.to(row.device).double() for row, other in zip(row_chunks(original), row_chunks(module), strict=True))
    return moments(differences, counts)[1] / spread


def unpooled(module: EmbeddingModule) -> nn.Embedding | nn.EmbeddingBag | Table:
    """The table that a `TableBag` pools; any other module itself."""
    return module.table if isinstance(module, TableBag) else module


def group_nbytes(group: Group) -> int:
    """Bytes of a weight as stored, once for all its places."""
    held = unpooled(next(iter(group.values())))
    return held.nbytes if isinstance(held, Table) else held.weight.nbytes


def group_nbytes_full(group: Group) -> int:
    """Bytes of a weight as V x D float32."""
    module = next(iter(group.values()))
    return module.num_embeddings * module.embedding_dim * 4


def title(path: str, module: EmbeddingModule) -> str:
    """How errors name a table: path, V and D."""
    return f"Table {path!r} ({module.num_embeddings} x {module.embedding_dim})"


@contextmanager
def naming(path: str, module: EmbeddingModule) -> Iterator[None]:
    """What a method finds wrong within is raised as an error that names the table."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{title(path, module)}: {error}") from None


def listing(found: Mapping[str, EmbeddingModule]) -> str:
    """How errors list tables: paths, V and D."""
    return ", ".join(f"{path!r} ({module.num_embeddings} x {module.embedding_dim})" for path, module in found.items())


def address(tensor: Tensor) -> int:
    """The same number for tensors that begin at the same place in memory; one without memory (empty, meta, lazy, sparse) is only itself."""
    return _span(tensor)[0] or id(tensor)


def share_memory(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have memory in common."""
    (begin, end), (other_begin, other_end) = _span(first), _span(second)
    return begin < other_end and other_begin < end


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first byte and of that after its last; zeros where it has no memory of its own to look at."""
    if is_lazy(tensor) or tensor.layout != torch.strided or not tensor.numel() or tensor.is_meta:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _places(model: nn.Module) -> Iterator[tuple[str, EmbeddingModule]]:
    """Every place of an embedding module, so a shared one several times; what a table is made of is not looked into."""
    inside = None
    for path, module in model.named_modules(remove_duplicate=False):
        if inside is not None and (inside == "" or path.startswith(f"{inside}.")):
            continue
        if isinstance(module, EmbeddingModule):
            inside = path
            yield path, module


def _weight_identity(module: EmbeddingModule) -> int:
    held = unpooled(module)
    return id(held) if isinstance(held, Table) else address(held.weight)
