"""Embedding tables of any model swapped for compressed ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from leanrec.bag import TableBag
from leanrec.embeddings import (
    EmbeddingModule,
    Group,
    check_changeable,
    has_hooks,
    like,
    listing,
    naming,
    put,
    reconstruction_error,
    replacements,
    row_chunks,
    share_memory,
    table_groups,
    tables,
    title,
    unpooled,
)
from leanrec.methods.base import Method, Table
from leanrec.ops.sensitivity import Sensitivity


def compress(
    model: nn.Module,
    method: Method | Mapping[str, Method | None],
    *,
    counts: Mapping[str, Tensor] | None = None,
    sensitivities: Mapping[str, Sensitivity] | None = None,
    fit: bool = True,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> nn.Module:
    """The model with its embedding tables compressed, in place.

    Everything is checked before the first table is touched. Tables are then fitted one at a time, and each original weight is let go
    before the next begins. Modules that share a weight share the compressed table. Device, dtype, training mode and `requires_grad`
    stay as they were; an optimizer over the old parameters has to be made anew. A table that is compressed already is fitted again on
    its decoded rows, unless it has this very method: then it stays as it is.

    Args:
        model: Any module; also an embedding table itself.
        method: For every table; or pattern -> method, where patterns are globs on the paths of `tables(model)`, the first that matches
            decides, and None leaves alone, as does matching no pattern.
        counts: Path of a table -> (V,) int occurrences of its ids in the training split. Tables that share a weight add theirs.
        sensitivities: What `measure_sensitivity` gave for the model, for methods that use it.
        fit: Whether the tables take over the rows that are there. If not, they start at random, to be trained from scratch.
        seed: Source of all random draws, for each table together with its path: the order of the tables does not matter.
        progress: Called after each table with its path, the number of tables done and the number in all.

    Returns:
        The same model; where the model is a table itself, the compressed table.

    Raises:
        ValueError: A pattern matches no table, a method does not fit one, counts do not fit, or a table has what cannot be kept: a
            forward of its own, hooks, `max_norm`, `scale_grad_by_freq`, a padding row that is not zero, a weight tied to another parameter.
    """
    check_changeable(model)
    groups = table_groups(model)
    methods = choose(model, method)
    row_counts, row_sensitivities = group_counts(groups, counts), group_sensitivities(groups, sensitivities)
    jobs = {path: chosen for path, chosen in methods.items() if chosen is not None and not _has_method(groups[path], chosen)}
    _check(model, {path: groups[path] for path in jobs}, jobs, row_counts, way="fit" if fit else "scratch")
    for done, (path, chosen) in enumerate(jobs.items(), start=1):
        with naming(path, groups[path][path]):
            model = _swap(model, groups.pop(path), chosen, row_counts.get(path), row_sensitivities.get(path), _generator(seed, path), fit=fit)
        if progress is not None:
            progress(path, done, len(jobs))
    return model


def choose(model: nn.Module, method: Method | Mapping[str, Method | None]) -> dict[str, Method | None]:
    """The method for each of `table_groups(model)` by the rules of `compress`.

    Raises:
        ValueError: The model has no tables, a pattern matches none, or tables that share a weight get different methods.
    """
    patterns = _checked_patterns(method)
    found = tables(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no embedding tables: no nn.Embedding, nn.EmbeddingBag or compressed table in it.")
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in found):
            raise ValueError(f"No table matches the pattern {pattern!r}. The tables are {listing(found)}.")
    picks = {path: next((chosen for pattern, chosen in patterns.items() if fnmatchcase(path, pattern)), None) for path in found}
    groups = table_groups(model)
    for path, group in groups.items():
        for other in group.keys() & found.keys():
            if picks[other] != picks[path]:
                raise ValueError(
                    f"{title(path, group[path])}: shares its weight with {other!r}; give both one method, not {picks[path]} and {picks[other]}."
                )
    return {path: picks[path] for path in groups}


def group_counts(groups: Mapping[str, Group], counts: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """First path of a group -> (V,) int64, the sum of the counts given for its paths; groups without counts are left out.

    Raises:
        ValueError: An unknown path, another length than V, or values that are no counts.
    """
    totals: dict[str, Tensor] = {}
    owners = {path: first for first, group in groups.items() for path in group}
    if counts is not None and not isinstance(counts, Mapping):
        raise ValueError(f"counts must be a dict of tables' paths to counts, not {type(counts).__name__}.")
    for path, given in (counts or {}).items():
        if path not in owners:
            known = listing({first: group[first] for first, group in groups.items()})
            raise ValueError(f"counts: the model has no table {path!r}. The tables are {known}.")
        first = owners[path]
        table, count = groups[first][path], torch.as_tensor(given)
        if count.is_complex() or count.shape != (table.num_embeddings,) or count.is_floating_point() or (count < 0).any():
            raise ValueError(
                f"{title(path, table)}: counts must be {table.num_embeddings} integers >= 0, not {count.dtype} of shape {tuple(count.shape)}."
            )
        totals[first] = count.long() + totals.get(first, 0)
    return totals


def group_sensitivities(groups: Mapping[str, Group], sensitivities: Mapping[str, Sensitivity] | None) -> dict[str, Sensitivity]:
    """First path of a group -> what is known of its weight; groups of which nothing is known are left out.

    Raises:
        ValueError: An unknown path, or a sensitivity of another shape.
    """
    for path, known in (sensitivities or {}).items():
        if path not in groups:
            raise ValueError(
                f"sensitivities: the model has no table {path!r}. The tables are {listing({first: groups[first][first] for first in groups})}."
            )
        table = groups[path][path]
        if known.rows.shape != (table.num_embeddings,) or known.metric.shape != (table.embedding_dim, table.embedding_dim):
            raise ValueError(
                f"{title(path, table)}: its sensitivity is that of a table of {len(known.rows)} x {len(known.metric)}. Measure it on this model."
            )
    return dict(sensitivities or {})


def check_compressible(group: Group) -> None:
    """Raise ValueError for the first module that has what a compressed table cannot keep."""
    for path, module in group.items():
        if reason := _obstacle(module):
            raise ValueError(f"{title(path, module)}: {reason}, or {_exempt(path)}.")


def _checked_patterns(method: Method | Mapping[str, Method | None]) -> Mapping[str, Method | None]:
    if isinstance(method, Method):
        return {"*": method}
    if not isinstance(method, Mapping):
        raise ValueError(f"method must be a Method such as PQ() or a dict of patterns to methods, not {method!r}.")
    for pattern, chosen in method.items():
        if not (chosen is None or isinstance(chosen, Method)):
            raise ValueError(f"Pattern {pattern!r}: its method must be a Method such as PQ(), or None, not {chosen!r}.")
    return method


def _generator(seed: int, path: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _has_method(group: Group, method: Method) -> bool:
    held = unpooled(next(iter(group.values())))
    return isinstance(held, Table) and held.method == method


def _check(model: nn.Module, groups: Mapping[str, Group], methods: Mapping[str, Method], counts: Mapping[str, Tensor], *, way: str) -> None:
    """Raise ValueError for the first table that cannot be compressed as asked."""
    ties = _ties(model, groups)
    for path, group in groups.items():
        name = title(path, group[path])
        if path in ties:
            raise ValueError(
                f"{name}: its weight is also the parameter {ties[path]!r}, which a compressed table cannot be. Untie them or {_exempt(path)}."
            )
        if len(_paddings(group)) > 1 or len({(module.num_embeddings, module.embedding_dim) for module in group.values()}) > 1:
            raise ValueError(
                f"{name}: shares its weight with {list(group)[1:]}, but their padding_idx or shapes differ. Make them equal or {_exempt(path)}."
            )
        check_compressible(group)
        if way in methods[path].gaps:
            how = {"fit": "be fitted to a trained table", "scratch": "be trained from scratch"}[way]
            raise ValueError(f"{name}: {type(methods[path]).__name__} cannot {how}: {methods[path].gaps[way]}.")
        with naming(path, group[path]):
            methods[path].nbytes(group[path].num_embeddings, group[path].embedding_dim)
            methods[path].check_counts(counts.get(path))


def _exempt(path: str) -> str:
    return f"leave the table alone: {{{path!r}: None, '*': ...}}"


def _ties(model: nn.Module, groups: Mapping[str, Group]) -> dict[str, str]:
    """First path of a group -> name of a parameter of some other module that has memory in common with it."""
    named = [
        (module, f"{path}.{name}".lstrip("."), parameter)
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    ties: dict[str, str] = {}
    for path, group in groups.items():
        within = {part for module in group.values() for part in module.modules()}
        own = list(group[path].parameters())
        shared = (name for module, name, other in named if module not in within and any(share_memory(parameter, other) for parameter in own))
        if name := next(shared, None):
            ties[path] = name
    return ties


def _paddings(group: Group) -> set[int | None]:
    """What the group's modules without pooling answer zero for; a bag leaves its padding out by itself."""
    return {module.padding_idx for module in group.values() if isinstance(module, nn.Embedding | Table)}


def _obstacle(module: EmbeddingModule) -> str | None:
    """What of a module a compressed table cannot keep, and what to do about it; None where nothing hinders."""
    if has_hooks(module) or has_hooks(unpooled(module)):
        return "it has hooks or parametrizations, which would be lost. Remove them"
    if isinstance(module, Table | TableBag):
        return None
    plain = nn.Embedding if isinstance(module, nn.Embedding) else nn.EmbeddingBag
    if not module.num_embeddings or not module.embedding_dim:
        return "it holds no values. Give it rows and columns"
    if any(getattr(type(module), name) is not getattr(plain, name) or name in vars(module) for name in ("forward", "__call__")):
        return f"it is a {type(module).__name__} with a forward of its own, which would be lost. Use a plain nn.{plain.__name__}"
    if [*module.children(), *module.buffers()] or [name for name, _ in module.named_parameters()] != ["weight"]:
        return "it has modules, buffers or parameters of its own, which would be lost. Use a plain one"
    if module.max_norm is not None:
        return f"max_norm={module.max_norm} rescales rows when they are looked up, which compressed rows cannot do. Set it to None"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq scales gradients of rows, and a compressed table has none. Set it to False"
    if module.weight.is_meta:
        return "it is on the meta device and holds no values to compress. Load its weights first"
    if not all(chunk.isfinite().all() for chunk in row_chunks(module)):
        return "it holds values that are not finite (nan or inf). Repair them"
    if isinstance(module, nn.Embedding) and module.padding_idx is not None and module.weight[module.padding_idx].any():
        return f"its padding row {module.padding_idx} is not zero, as a compressed table's would be. Zero it or set padding_idx to None"
    return None


def _swap(
    model: nn.Module,
    group: Group,
    method: Method,
    counts: Tensor | None,
    sensitivity: Sensitivity | None,
    generator: torch.Generator,
    *,
    fit: bool,
) -> nn.Module:
    """The model with one table built, fitted if so asked, and put in all its places."""
    old = next(iter(group.values()))
    held = unpooled(old)
    weight = held.decode() if isinstance(held, Table) else held.weight.detach()
    counts = None if counts is None else counts.to(weight.device)
    table = method.build(old.num_embeddings, old.embedding_dim, generator=generator).to(weight.device)
    table.padding_idx = next(iter(_paddings(group)), None)
    table.sparse = held.sparse
    if fit and sensitivity is not None:
        table.weigh(sensitivity)
    if fit:
        table.fit(weight, counts)
    elif counts is not None:
        table.sort_rows(counts)
    table.eval()
    if weight.dtype != torch.float32:  # a method may store parts of a float32 table in fewer bits, which stay as they are
        table.to(weight.dtype)
    if fit:
        table.fit_error = reconstruction_error(old, table, counts)
    table.train(old.training)
    if not any(parameter.requires_grad for parameter in old.parameters()):
        table.requires_grad_(False)
    return put(model, replacements(group, lambda module: like(module, table)))
