"""How much the loss of any model depends on the rows of its tables: Fisher information, measured on batches of the log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from leanrec.bag import TableBag
from leanrec.compress import group_counts
from leanrec.embeddings import EmbeddingModule, table_groups, unpooled
from leanrec.methods.base import Table
from leanrec.ops.sensitivity import Sensitivity

_PRIOR_LOOKUPS = 0.1  # a row counts as seen so many times more with the mean of its table


def measure_sensitivity(
    model: nn.Module, batches: Iterable[Any], *, counts: Mapping[str, Tensor] | None = None, seed: int = 0
) -> dict[str, Sensitivity]:
    """Path of each table -> how much the click loss depends on its rows, for `compress` and `fit_budget`.

    The model is run, in evaluation mode, over the batches; whatever it puts out counts as logits of independent clicks. With p the
    probability of a click and g the gradient of the logit by a row that was looked up, p (1 - p) g g^T is what the look-up adds to the
    Fisher information: labels are not needed. Where there are several logits per row of the log, their gradients are summed with random
    signs, which is right on average.

    Args:
        model: Any module; left as it is.
        batches: What the model is called with, one after the other: a tuple as `model(*batch)`, all else as `model(batch)`.
        counts: As in `compress`: rows that the batches show rarely get their weight from them. None: what the batches show is all there is.
        seed: Source of the random signs.

    Returns:
        First path of each table; those that share a weight are measured as one.

    Raises:
        ValueError: The model puts out something else than a tensor, outputs without a gradient by the rows, values or gradients that are
            not finite, or looks up nothing on the batches.
    """
    groups = table_groups(model)
    row_counts = group_counts(groups, counts)
    sums = {path: _Sums(next(iter(group.values()))) for path, group in groups.items()}
    # A module that is the table of several bags, or stands in several places, is heard once for each call.
    heard = {unpooled(module) if isinstance(module, TableBag) else module: path for path, group in groups.items() for module in group.values()}
    seen: list[tuple[str, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(_bag_hook(path, seen) if isinstance(module, nn.EmbeddingBag) else _hook(path, seen), with_kwargs=True)
        for module, path in heard.items()
    ]
    modes = {module: module.training for module in model.modules()}
    generator, num_outputs = torch.Generator().manual_seed(seed), 0
    try:
        model.eval()
        for batch in batches:
            seen.clear()
            with torch.enable_grad():
                outputs = model(*(batch if isinstance(batch, tuple) else (batch,)))
                for (path, ids, _), gradient in zip(seen, _gradients(outputs, seen, generator), strict=True):
                    sums[path].add(ids, gradient)
            num_outputs += outputs.numel()
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    if not any(total.lookups.any() for total in sums.values()):
        raise ValueError("The model looked up no rows of its tables on the batches. Give batches of the log.")
    return {path: total.value(num_outputs, row_counts.get(path)) for path, total in sums.items()}


class _Sums:
    """What the look-ups of one table add up to."""

    def __init__(self, module: EmbeddingModule) -> None:
        held = unpooled(module)
        self.padding_idx = module.padding_idx
        self.metric = torch.zeros(held.embedding_dim, held.embedding_dim, dtype=torch.float64)
        self.squares = torch.zeros(held.num_embeddings, dtype=torch.float64)
        self.lookups = torch.zeros(held.num_embeddings, dtype=torch.float64)

    def add(self, ids: Tensor, gradients: Tensor) -> None:
        """Count in (N,) ids and the gradients (N, D) of their rows, each times the root of p (1 - p)."""
        if self.padding_idx is not None:
            real = ids != self.padding_idx
            ids, gradients = ids[real], gradients[real]
        self.metric += gradients.T @ gradients
        self.squares.index_add_(0, ids, gradients.square().sum(1))
        self.lookups.index_add_(0, ids, torch.ones_like(ids, dtype=torch.float64))

    def value(self, num_outputs: int, counts: Tensor | None) -> Sensitivity:
        """Per output; each row's mean square, drawn a little to the table's, times how often it occurs."""
        mean = self.squares.sum() / self.lookups.sum().clamp(min=1)
        means = (self.squares + _PRIOR_LOOKUPS * mean) / (self.lookups + _PRIOR_LOOKUPS)
        often = (self.lookups if counts is None else counts.cpu().double()).clamp(min=_PRIOR_LOOKUPS)
        rows = means * often * (self.lookups.sum() / often.sum() / num_outputs)
        return Sensitivity(rows.float(), self.metric / num_outputs)


def _gradients(outputs: Any, seen: list[tuple[str, Tensor, Tensor]], generator: torch.Generator) -> list[Tensor]:
    """Of the looked-up rows, (N, D) float64 each on the CPU: gradients of the logits times the root of p (1 - p)."""
    if not isinstance(outputs, Tensor):
        raise ValueError(f"The model puts out a {type(outputs).__name__}, but a tensor of logits is needed. Wrap it so that it gives one.")
    if not seen:
        return []
    chances = outputs.detach().sigmoid()
    signs = torch.randint(2, outputs.shape, generator=generator).to(outputs.device) * 2 - 1
    scalar = (outputs * (chances * (1 - chances)).sqrt() * signs).sum()
    leaves = [rows for _, _, rows in seen]
    gradients = torch.autograd.grad(scalar, leaves, allow_unused=True) if scalar.requires_grad else [None] * len(leaves)
    if all(gradient is None for gradient in gradients):
        raise ValueError(
            f"The model's outputs ({outputs.dtype}) have no gradient by the rows of its tables. "
            "Give a model whose logits are floats that depend on the rows, without torch.no_grad in its forward."
        )
    if not all(values.isfinite().all() for values in (outputs, *gradients) if values is not None):
        raise ValueError(
            "The model's outputs on the batches, or their gradients by the rows of its tables, are not finite (nan or inf). "
            "Repair the model or the batches."
        )
    return [
        torch.zeros(len(ids), rows.shape[-1], dtype=torch.float64) if gradient is None else gradient.reshape(len(ids), -1).double().cpu()
        for (_, ids, rows), gradient in zip(seen, gradients, strict=True)
    ]


def _hook(path: str, seen: list[tuple[str, Tensor, Tensor]]) -> Callable[..., Tensor]:
    """Puts the rows that a table answers out of the graph of its weight, and keeps them to take gradients by."""

    def keep(module: nn.Module, inputs: Any, kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        ids = inputs[0] if inputs else kwargs["input"]
        rows = output.detach().requires_grad_()
        seen.append((path, ids.reshape(-1).long().cpu(), rows))
        return rows.clone()  # a model may change in place what it looked up, which a leaf does not allow

    return keep


def _bag_hook(path: str, seen: list[tuple[str, Tensor, Tensor]]) -> Callable[..., Tensor]:
    """The same for rows that are pooled: they are looked up and pooled again, one by one."""

    def keep(module: nn.EmbeddingBag, inputs: Any, kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        rows = nn.Embedding(module.num_embeddings, module.embedding_dim, _weight=module.weight.detach())
        rows.register_forward_hook(_hook(path, seen), with_kwargs=True)
        bag = TableBag(cast(Table, rows), mode=module.mode, padding_idx=module.padding_idx, include_last_offset=module.include_last_offset)
        pooled: Tensor = bag(*inputs, **kwargs)
        return pooled

    return keep
