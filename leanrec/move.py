"""The tables of one model in the place of those of another: what "model-agnostic" means in MEC."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import nn

from leanrec.bag import TableBag
from leanrec.embeddings import EmbeddingModule, Group, like, listing, put, replacements, table_groups, title, unpooled
from leanrec.methods.base import Table


def move_tables(source: nn.Module, target: nn.Module) -> dict[str, str]:
    """Put the tables of one model, compressed or not, in the place of those of another.

    Tables meet by the last part of their paths, the name of the vocabulary, and by V and D. Where a model has several tables of one name,
    such as vectors and first-order weights, those with a match move and the others stay; every name needs at least one match.
    The modules themselves move: `source` goes on holding them, so that training one model trains both.

    Returns:
        Path in `target` -> path in `source` that it was filled from.

    Raises:
        ValueError: Names, V or D do not match, or padding or pooling differ; nothing was moved then.
    """
    origins, places = table_groups(source), table_groups(target)
    moves = _matches(origins, places)
    moved = [replacements(places[path], partial(_moved, origin, origins[origin])) for path, origin in moves.items()]
    for modules in moved:
        put(target, modules)
    return moves


def _matches(origins: Mapping[str, Group], places: Mapping[str, Group]) -> dict[str, str]:
    """Path in the target -> path in the source."""
    names, needed = _by_name(origins), _by_name(places)
    if lacking := names.keys() ^ needed.keys():
        found = ", ".join(f"{name!r} only in the {'source' if name in names else 'target'}" for name in sorted(lacking))
        raise ValueError(f"The tables of the two models do not match: {found}.")
    moves: dict[str, str] = {}
    for name, paths in needed.items():
        fits = {path: [origin for origin in names[name] if _same_shape(origins[origin], places[path])] for path in paths}
        chosen = {path: path if path in candidates else candidates[0] for path, candidates in fits.items() if candidates}
        if not chosen or len(set(chosen.values())) < len(chosen) or any(len(fits[path]) > 1 and path != origin for path, origin in chosen.items()):
            theirs, ours = (listing({path: groups[path][path] for path in paths}) for groups, paths in ((origins, names[name]), (places, paths)))
            raise ValueError(f"Table {name!r}: the source has {theirs}, the target {ours}; one of each must agree in rows and dimension.")
        moves |= chosen
    return moves


def _by_name(groups: Mapping[str, Group]) -> dict[str, list[str]]:
    """Last part of a path -> the paths that end with it."""
    names: dict[str, list[str]] = {}
    for path in groups:
        names.setdefault(path.rsplit(".", 1)[-1], []).append(path)
    return names


def _same_shape(first: Group, second: Group) -> bool:
    one, other = next(iter(first.values())), next(iter(second.values()))
    return (one.num_embeddings, one.embedding_dim) == (other.num_embeddings, other.embedding_dim)


def _moved(path: str, origin: Group, module: EmbeddingModule) -> nn.Module:
    """What of the source's table stands in the place of a module of the target."""
    source = origin[path]
    held = unpooled(source)
    pools = isinstance(module, nn.EmbeddingBag | TableBag)
    is_alike = _settings(source) == _settings(module)
    if isinstance(held, Table) and (is_alike if isinstance(source, TableBag) == pools else pools or held.padding_idx == module.padding_idx):
        return like(module, held)
    if not isinstance(held, Table) and is_alike:
        return source
    raise ValueError(f"{title(path, source)}: the source has {_settings(source)}, the target {_settings(module)}. Build both models alike.")


def _settings(module: EmbeddingModule) -> str:
    if isinstance(module, nn.EmbeddingBag | TableBag):
        return f"pooling with mode={module.mode!r}, padding_idx={module.padding_idx}, include_last_offset={module.include_last_offset}"
    return f"no pooling, padding_idx={module.padding_idx}"
