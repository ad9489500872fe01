"""Settings per table for a number of bytes: marginal analysis over each table's lower convex hull of error against bytes."""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from leanrec.calibration import cost_factors
from leanrec.compress import check_compressible, choose, group_counts, group_sensitivities
from leanrec.embeddings import EmbeddingModule, Group, group_nbytes, group_nbytes_full, naming, row_chunks, table_groups, tables
from leanrec.methods.base import Method
from leanrec.ops.sensitivity import Sensitivity


@dataclass(frozen=True)
class Option:
    """One way to keep a table: `method`, or None to leave it alone.

    Attributes:
        nbytes: Bytes of the table then.
        loss: Expected squared error of a row that is looked up.
    """

    method: Method | None
    nbytes: int
    loss: float


def fit_budget(
    model: nn.Module,
    method: Method | Mapping[str, Method | None],
    *,
    nbytes: int | None = None,
    ratio: float | None = None,
    counts: Mapping[str, Tensor] | None = None,
    sensitivities: Mapping[str, Sensitivity] | None = None,
    held_out: Iterable[tuple[Any, Tensor]] | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Method | None]:
    """Settings for each table with which all tables together fit into a number of bytes, for `compress`.

    Each table takes one of the variants of its method or stays as it is. Chosen is what loses least in sum over the tables of
    energy x expected error, where the energy of a table is the mean squared distance of its rows from their mean, each row weighted
    by its count. Nothing is built or fitted for it, but for methods that measure their sizes on a sample of the rows (`Method.curve`).
    Steps along each table's lower convex hull are taken in the order of loss saved per byte while they fit, which is where a Lagrange
    multiplier would lead; what is left over is then spent greedily.

    With `held_out`, tables whose methods use sensitivities are compressed to this plan once, and what each of them alone costs there
    corrects what is expected of it for a second plan. Sensitivities are those of the rows that the model learned from: they do not know
    where it has learned by heart.

    Args:
        model: Any module.
        method: As in `compress`; its knob is what the budget sets. A table with None stays as it is, and its bytes count.
        nbytes: Bytes of all tables afterwards, at most; or
        ratio: fp32 bytes of all tables / bytes afterwards, at least.
        counts: As in `compress`. Without counts, each row of a table weighs the same.
        sensitivities: As in `compress`.
        held_out: Batches that the model did not learn from: (what it is called with, a tuple as `model(*inputs)`; 0 or 1 for each logit).
        seed: As in `compress`, for tables compressed on trial.
        progress: Called after each table with its path, the number of tables whose sizes are known and the number in all; then again for
            tables compressed on trial.

    Returns:
        Path of each table, glob characters escaped -> method, or None to leave it alone.

    Raises:
        ValueError: Neither or both of nbytes and ratio, a pattern without a table, counts that do not fit, held-out batches without
            sensitivities, or a budget that cannot be met.
    """
    sizes = Sizes(model, method, counts=counts, sensitivities=sensitivities, held_out=held_out, seed=seed, progress=progress)
    return sizes.plan(nbytes=nbytes, ratio=ratio)


class Sizes:
    """What each table of a model can become, found once for budgets of several sizes; arguments and errors are those of `fit_budget`.

    Attributes:
        full: float32 bytes of all tables.
        least: The fewest bytes that all tables together can have.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method | Mapping[str, Method | None],
        *,
        counts: Mapping[str, Tensor] | None = None,
        sensitivities: Mapping[str, Sensitivity] | None = None,
        held_out: Iterable[tuple[Any, Tensor]] | None = None,
        seed: int = 0,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        if held_out is not None and not sensitivities:
            raise ValueError("held_out goes with sensitivities: without them the loss expected of a table is no log loss to compare with.")
        self._model, self._held_out, self._seed = model, held_out, seed
        self._method, self._groups = method, table_groups(model)
        self._counts, self._sensitivities = group_counts(self._groups, counts), group_sensitivities(self._groups, sensitivities)
        self._chosen = {path: chosen and chosen.for_counts(self._counts.get(path)) for path, chosen in choose(model, method).items()}
        found = tables(model)
        self._owners = {path: first for first, group in self._groups.items() for path in group if path in found}
        self.full = sum(group_nbytes_full(group) for group in self._groups.values())
        self.least = _least_nbytes(self._groups, self._chosen)
        self._progress = progress

    def plan(self, *, nbytes: int | None = None, ratio: float | None = None) -> dict[str, Method | None]:
        """What `fit_budget` gives for this budget."""
        budget = self.budget(nbytes=nbytes, ratio=ratio)
        picks = dict(zip(self._groups, spend(self._options, budget), strict=True))
        if self._held_out is not None:
            factors = self._cost_factors(picks, self._held_out)
            options = zip(self._groups, self._options, strict=True)
            corrected = [[replace(option, loss=option.loss * factors.get(path, 1.0)) for option in choices] for path, choices in options]
            picks = dict(zip(self._groups, spend(corrected, budget), strict=True))
        return {glob.escape(path): picks[first].method for path, first in self._owners.items()}

    def budget(self, *, nbytes: int | None = None, ratio: float | None = None) -> int:
        """Bytes of this budget; raises if it cannot be met, before any table is looked at."""
        budget = _budget(self.full, nbytes, ratio)
        if self.least > budget:
            raise ValueError(
                f"The budget of {budget} bytes cannot be met: the smallest that {self._method} can do with these {len(self._groups)} tables is "
                f"{self.least} bytes, a ratio of {self.full / self.least:.1f}."
            )
        return budget

    def _cost_factors(self, picks: Mapping[str, Option], held_out: Iterable[tuple[Any, Tensor]]) -> dict[str, float]:
        # What other methods are expected to lose is a squared error and no log loss.
        chosen = {path: pick.method for path, pick in picks.items() if path in self._sensitivities}
        methods = {path: method for path, method in chosen.items() if method is not None and method.uses_sensitivity}
        return cost_factors(
            self._model,
            self._groups,
            methods,
            {path: picks[path].loss for path in methods},
            held_out,
            counts=self._counts,
            sensitivities=self._sensitivities,
            seed=self._seed,
            progress=self._progress,
        )

    @cached_property
    def _options(self) -> list[list[Option]]:
        found = []
        for done, (path, group) in enumerate(self._groups.items(), start=1):
            found.append(_options(path, group, self._chosen[path], self._counts.get(path), self._sensitivities.get(path)))
            if self._progress is not None:
                self._progress(path, done, len(self._groups))
        return found


def least_nbytes(model: nn.Module, method: Method | Mapping[str, Method | None]) -> int:
    """The fewest bytes of all tables together that `fit_budget` can reach; for the arguments and errors see there."""
    return _least_nbytes(table_groups(model), choose(model, method))


def _least_nbytes(groups: Mapping[str, Group], chosen: Mapping[str, Method | None]) -> int:
    return sum(min(nbytes for _, nbytes in _sizes(path, group, chosen[path])) for path, group in groups.items())


def spend(options: Sequence[Sequence[Option]], nbytes: int) -> list[Option]:
    """One option per table, within `nbytes` together, such that the sum of their losses is near its minimum.

    No choice within the budget loses less by more than the largest single step along a hull saves.

    Args:
        options: Per table; the smallest of all tables fit into `nbytes`.
        nbytes: The budget.
    """
    hulls = [lower_hull(choices) for choices in options]
    picks = [hull[0] for hull in hulls]
    left = nbytes - sum(pick.nbytes for pick in picks)
    steps = [(_saving(low, high), table, low, high) for table, hull in enumerate(hulls) for low, high in pairwise(hull)]
    for _, table, low, high in sorted(steps, key=lambda step: -step[0]):
        if picks[table] is low and high.nbytes - low.nbytes <= left:
            picks[table] = high
            left -= high.nbytes - low.nbytes
    while upgrades := [
        (_saving(picks[table], option), table, option)
        for table, choices in enumerate(options)
        for option in choices
        if option.loss < picks[table].loss and option.nbytes - picks[table].nbytes <= left
    ]:
        _, table, option = max(upgrades, key=lambda upgrade: upgrade[:2])
        left -= option.nbytes - picks[table].nbytes
        picks[table] = option
    return picks


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of loss over bytes: bytes rise, loss falls, and each step saves less per byte than the last."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _saving(hull[-2], hull[-1]) <= _saving(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _saving(low: Option, high: Option) -> float:
    """Loss saved per byte."""
    return (low.loss - high.loss) / (high.nbytes - low.nbytes) if high.nbytes > low.nbytes else math.inf


def _budget(full: int, nbytes: int | None, ratio: float | None) -> int:
    if (nbytes is None) == (ratio is None):
        raise ValueError(f"Give one of nbytes and ratio, not nbytes={nbytes} and ratio={ratio}.")
    if nbytes is not None:
        if not isinstance(nbytes, Real) or not math.isfinite(nbytes):
            raise ValueError(f"nbytes={nbytes!r} must be a number of bytes.")
        return math.floor(nbytes)
    if not isinstance(ratio, Real) or not ratio > 0 or not math.isfinite(full / ratio):
        raise ValueError(f"ratio={ratio!r} must be more than 0, such as 50 for tables 50 times smaller.")
    most = math.floor(full / ratio)
    return most + 1 if full / (most + 1) >= ratio else most  # where rounding made the quotient too small by a hair


def _options(path: str, group: Group, method: Method | None, counts: Tensor | None, sensitivity: Sensitivity | None) -> list[Option]:
    """What can be done with a table; leaving it alone is the last."""
    alone = Option(None, group_nbytes(group), 0.0)
    if method is None:
        return [alone]
    check_compressible(group)
    _sizes(path, group, method)  # raises what is wrong with it
    module = next(iter(group.values()))
    shape = (module.num_embeddings, module.embedding_dim)
    with naming(path, module):
        curve = method.curve(row_chunks(module), *shape, counts=counts, sensitivity=sensitivity)
        return [*(Option(setting, _nbytes(setting, module), loss) for setting, loss in curve), alone]


def _sizes(path: str, group: Group, method: Method | None) -> list[tuple[Method | None, int]]:
    """What can be done with a table, each with its bytes; leaving it alone is the last."""
    alone = (None, group_nbytes(group))
    if method is None:
        return [alone]
    module = next(iter(group.values()))
    shape = (module.num_embeddings, module.embedding_dim)
    with naming(path, module):
        return [*((variant, _nbytes(variant, module)) for variant in method.variants(*shape)), alone]


def _nbytes(method: Method, module: EmbeddingModule) -> int:
    """Bytes of a table with these settings in the precision of the one that is there."""
    shape, dtype = (module.num_embeddings, module.embedding_dim), next(row_chunks(module, chunk_rows=1)).dtype
    nbytes = method.nbytes(*shape)
    if dtype == torch.float32:
        return nbytes
    with torch.device("meta"):
        return method.build(*shape).to(dtype).nbytes
