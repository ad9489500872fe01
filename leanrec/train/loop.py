"""The training loop."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanrec.data.loader import Batch, Loader
from leanrec.methods.base import Table
from leanrec.ops.metrics import describe
from leanrec.train.observe import observe
from leanrec.train.settings import TrainSettings
from leanrec.train.state import Progress, State


class Teacher(NamedTuple):
    """A model, such as the one before compression, whose predictions have a share in the labels, 0 to 1; the clicks have the rest.

    Hinton, Vinyals and Dean, 2015, arXiv 1503.02531, at a temperature of 1.
    """

    model: nn.Module
    share: float


def train(
    model: nn.Module,
    loader: Loader,
    validation: Loader,
    settings: TrainSettings,
    *,
    checkpoint: Path | None = None,
    from_scratch: bool = False,
    teacher: Teacher | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> Progress:
    """Train a model on log loss, in place, to its best validation AUC.

    Embedding tables with sparse gradients (`nn.Embedding(sparse=True)`) cost what a batch touches, whatever the table holds. A run that is
    killed and called again with the same arguments and checkpoint goes on from there and ends with the same weights.

    Args:
        model: Takes a batch's features, gives logits (B,).
        loader: Training rows; its seed should be `settings.seed`.
        validation: Validation rows.
        settings: How to train.
        checkpoint: File for the state of the run, or None.
        from_scratch: Whether compressed tables are to learn all that they store, their codes too, or are fitted and learn what follows from codes.
        teacher: Of the same batches; its predictions are learned too.
        on_step: Called after every step.

    Raises:
        ValueError: The model has nothing to train or gives no logits, the validation rows have one label only, or the training diverged
            (with `keep_initial`, what was best before is kept then).
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"Model {type(model).__name__} has no parameters to train.")
    _check_labels(validation, least=2 if settings.keep_initial else 1)
    if teacher is not None:
        teacher.model.eval()
    tables = [module for module in model.modules() if isinstance(module, Table)]
    if from_scratch:
        observe(model, tables, loader)
    for table in tables:
        (table.begin if from_scratch else table.begin_tuning)()
    state = State(model, settings)
    with torch.random.fork_rng(devices=[]), _l2_of_lookups(model, settings.l2) as l2:
        torch.manual_seed(settings.seed)
        if checkpoint is not None and checkpoint.exists():
            state.load(checkpoint)
        elif settings.keep_initial:
            state.evaluate(validation)
        model.train()
        try:
            while state.progress.epoch < settings.epochs and state.progress.failures < settings.patience:
                _epoch(state, loader, validation, l2, teacher, checkpoint, on_step)
        except _Diverged as error:
            if not settings.keep_initial:
                raise
            warnings.warn(f"{error} Kept what was best before.", stacklevel=2)
    model.load_state_dict(state.best)
    for table in tables:
        table.finish()
    return state.progress


def _epoch(
    state: State,
    loader: Loader,
    validation: Loader,
    l2: Callable[[], Tensor | float],
    teacher: Teacher | None,
    checkpoint: Path | None,
    on_step: Callable[[Progress], None] | None,
) -> None:
    """The rest of the current epoch, or less if patience runs out."""
    progress, settings = state.progress, state.settings
    num_batches = loader.num_batches(epoch=progress.epoch)
    due = {num_batches * (part + 1) // settings.evaluations_per_epoch for part in range(settings.evaluations_per_epoch)}
    tables = [module for module in state.model.modules() if isinstance(module, Table)]
    for batch in loader.batches(epoch=progress.epoch, start=progress.batch):
        logits = state.model(batch.features)
        _check_logits(state.model, logits, len(batch.labels))
        loss = F.binary_cross_entropy_with_logits(logits, _labels(batch, teacher))
        loss_value = loss.item()
        if not math.isfinite(loss_value):
            raise _diverged(f"the loss is {loss_value}", state)
        (loss + l2() / len(batch.labels) + sum(table.penalty() for table in tables)).backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        for table in tables:
            for parameter, rows in table.maintain(progress.step):
                state.optimizer.forget(parameter, rows)
        progress.batch, progress.step = progress.batch + 1, progress.step + 1
        progress.loss_sum, progress.loss_steps = progress.loss_sum + loss_value, progress.loss_steps + 1
        if progress.batch in due:
            _check_weights(state)
            state.evaluate(validation)
        if on_step is not None:
            on_step(progress)
        if checkpoint is not None and (progress.batch in due or progress.step % settings.checkpoint_steps == 0):
            state.save(checkpoint)
        if progress.failures >= settings.patience:
            return
    progress.epoch, progress.batch = progress.epoch + 1, 0


def _check_labels(validation: Loader, *, least: int) -> None:
    """Raise ValueError unless so many validation rows have either label; mostly the first batch has them."""
    counts: Counter[float] = Counter()
    for batch in validation.batches():
        counts.update(batch.labels.tolist())
        if len(counts) > 1 and min(counts.values()) >= least:
            return
    found = ", ".join(f"{count} with label {label:g}" for label, count in sorted(counts.items()))
    raise ValueError(
        f"The validation split has {validation.num_rows} rows, {found}: their AUC, which tells the best weights, needs {least} or more of each of "
        "the labels 0 and 1. Give the split more rows, or other ones, in `leanrec prepare`."
    )


def _check_logits(model: nn.Module, logits: object, num_rows: int) -> None:
    if not isinstance(logits, Tensor):
        given = f"a {type(logits).__name__}"
    elif logits.shape != (num_rows,) or not logits.is_floating_point():
        given = describe(logits)
    elif not logits.requires_grad:
        given = f"{describe(logits)} without gradients, as .detach() leaves it,"
    else:
        return
    raise ValueError(
        f"Model {type(model).__name__} gives {given} for a batch of {num_rows} rows. Its forward must give a float tensor of shape ({num_rows},) "
        "with gradients: one logit for each row."
    )


def _check_weights(state: State) -> None:
    for name, parameter in state.model.named_parameters():
        parts = parameter.detach().reshape(-1).split(1 << 24)  # a mask of a whole table would need as much memory again
        if parameter.requires_grad and not all(part.isfinite().all() for part in parts):
            raise _diverged(f"weights of {name} are NaN or infinite", state)


class _Diverged(ValueError):
    """Weights or the loss are no numbers any more."""


def _diverged(what: str, state: State) -> ValueError:
    step, settings = state.progress.step, state.settings
    if step == 0:
        return ValueError(f"In the first batch, before any step, {what}. Look at the model's initial values and at the numbers of the log.")
    rates = f"{settings.learning_rate:g} (of the tables: {settings.table_learning_rate or settings.learning_rate:g})"
    return _Diverged(f"The training diverged: after step {step}, {what}. Lower the learning rate, {rates}.")


@torch.no_grad()
def _labels(batch: Batch, teacher: Teacher | None) -> Tensor:
    """What is to be predicted: clicks, and what a teacher predicts: (B,)."""
    if teacher is None:
        return batch.labels
    return torch.lerp(batch.labels, teacher.model(batch.features).sigmoid(), teacher.share)


@contextmanager
def _l2_of_lookups(model: nn.Module, l2: float) -> Iterator[Callable[[], Tensor | float]]:
    """A function that gives l2 times the summed squares of all embeddings looked up since it was last called."""
    squares: list[Tensor] = []

    def add(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if module.training:
            squares.append(output.square().sum())

    def take() -> Tensor | float:
        total = l2 * torch.stack(squares).sum() if squares else 0.0
        squares.clear()
        return total

    modules = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag | Table)]
    hooks = [module.register_forward_hook(add) for module in modules] if l2 else []
    try:
        yield take
    finally:
        for hook in hooks:
            hook.remove()
