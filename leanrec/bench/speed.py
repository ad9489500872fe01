"""How fast the tables of a model answer."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from leanrec.methods.base import Table

ROUNDS = 21


@torch.no_grad()
def lookups_per_second(models: Sequence[nn.Module], features: Mapping[str, Any]) -> list[float]:
    """Ids that all tables of a model together answer in a second, for each of some models, on the same batch in turn.

    The models take turns, so that what else the machine does slows all of them alike; the median counts.
    """
    calls = [_lookups(model, features) for model in models]
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(ROUNDS):
        for number, lookups in enumerate(calls):
            start = time.perf_counter()
            for table, ids in lookups:
                table(ids)
            seconds[number].append(time.perf_counter() - start)
    return [sum(ids.numel() for _, ids in lookups) / median(taken) for lookups, taken in zip(calls, seconds, strict=True)]


def _lookups(model: nn.Module, features: Mapping[str, Any]) -> list[tuple[nn.Module, Tensor]]:
    """The tables that a model asks for a batch, and the ids that it asks them for."""
    seen: list[tuple[nn.Module, Tensor]] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.append((module, inputs[0]))

    hooks = [module.register_forward_hook(keep) for module in model.modules() if isinstance(module, nn.Embedding | Table)]
    model.eval()(features)
    for hook in hooks:
        hook.remove()
    return seen
