"""What compression costs on held-out rows, table by table, beside what was expected of it from the rows that the model learned from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanrec.compress import compress
from leanrec.embeddings import Group, like, naming, unpooled
from leanrec.methods.base import Method, Table
from leanrec.ops.sensitivity import Sensitivity

_MOST = 16.0  # a table counts as so many times dearer or cheaper than expected, at most
_LEAST_SHARE = 1e-3  # of the expected costs; a table of less is not tried


def cost_factors(
    model: nn.Module,
    groups: Mapping[str, Group],
    methods: Mapping[str, Method],
    expected: Mapping[str, float],
    batches: Iterable[tuple[Any, Tensor]],
    *,
    counts: Mapping[str, Tensor],
    sensitivities: Mapping[str, Sensitivity],
    seed: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, float]:
    """First path of a table -> how many times more its compression raises the log loss of held-out rows than expected, 1/16 to 16.

    Each table is compressed, and put in its place alone. What a sample of rows cannot tell apart from nothing is drawn to 1 by as much as
    its standard error. A table that has learned rare rows by heart costs less than expected, often less than nothing.

    Args:
        model: Puts out logits; left as it is.
        groups: Its tables, as `table_groups` gives them.
        methods: First path -> what the table becomes; tables without one stay.
        expected: First path -> by how much that should raise the mean log loss.
        batches: What the model is called with, a tuple as `model(*inputs)`, all else as `model(inputs)`; and 0 or 1 for each logit.
        counts: As in `compress`, by first path.
        sensitivities: As in `compress`.
        seed: As in `compress`.
        progress: Called after each table that was fitted with its path, the number of these and the number in all.
    """
    tried = [path for path in methods if expected[path] > _LEAST_SHARE * sum(expected.values())]
    if not tried:
        return {}
    twins = {}
    for done, path in enumerate(tried, start=1):
        twins[path] = _twins(path, groups[path], methods[path], counts.get(path), sensitivities.get(path), seed)
        if progress is not None:
            progress(path, done, len(tried))
    modes = {module: module.training for module in model.modules()}
    rises: dict[str, list[Tensor]] = {path: [] for path in tried}
    try:
        model.eval()
        for inputs, labels in batches:
            before = _losses(model, inputs, labels)
            for path in tried:
                with _answering(twins[path]):
                    rises[path].append(_losses(model, inputs, labels) - before)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return {path: _factor(torch.cat(rises[path]), expected[path]) for path in tried if rises[path]}


def _twins(path: str, group: Group, method: Method, counts: Tensor | None, sensitivity: Sensitivity | None, seed: int) -> dict[nn.Module, nn.Module]:
    """Modules of a group -> what would stand in their places."""
    held = unpooled(next(iter(group.values())))
    with naming(path, group[path]):
        table = compress(
            held,
            method,
            counts=None if counts is None else {"": counts},
            sensitivities=None if sensitivity is None else {"": sensitivity},
            seed=seed,
        )
    table = unpooled(table)  # type: ignore[arg-type]  # what a table is compressed to is one
    assert isinstance(table, Table)
    return {module: like(module, table).eval() for module in group.values()}


@torch.no_grad()
def _losses(model: nn.Module, inputs: Any, labels: Tensor) -> Tensor:
    """Log loss of each logit: (N,) float64 on the CPU."""
    logits = model(*(inputs if isinstance(inputs, tuple) else (inputs,))).double()
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").flatten().cpu()


@contextmanager
def _answering(twins: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """Within it, other modules answer for some."""
    hooks = [module.register_forward_hook(partial(_answer, twin), with_kwargs=True) for module, twin in twins.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _answer(twin: nn.Module, module: nn.Module, inputs: Any, kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
    answer: Tensor = twin(*inputs, **kwargs)
    return answer


def _factor(rises: Tensor, expected: float) -> float:
    error = float(rises.std()) / len(rises) ** 0.5 if len(rises) > 1 else float("inf")
    if not error < float("inf"):
        return 1.0
    factor = (max(float(rises.mean()), 0.0) + error) / (expected + error) if expected + error else 1.0
    return min(max(factor, 1 / _MOST), _MOST)
