"""The training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanrec.data.loader import Batch, Loader
from leanrec.methods.base import Table
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
        from_scratch: Whether compressed tables are to learn all that they store, their codes too, and not only what has gradients.
        teacher: Of the same batches; its predictions are learned too.
        on_step: Called after every step.
    """
    if teacher is not None:
        teacher.model.eval()
    tables = [module for module in model.modules() if isinstance(module, Table)] if from_scratch else []
    observe(model, tables, loader)
    for table in tables:
        table.begin()
    state = State(model, settings)
    with torch.random.fork_rng(devices=[]), _l2_of_lookups(model, settings.l2) as l2:
        torch.manual_seed(settings.seed)
        if checkpoint is not None and checkpoint.exists():
            state.load(checkpoint)
        elif settings.keep_initial:
            state.evaluate(validation)
        model.train()
        while state.progress.epoch < settings.epochs and state.progress.failures < settings.patience:
            _epoch(state, loader, validation, l2, teacher, checkpoint, on_step)
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
        loss = F.binary_cross_entropy_with_logits(logits, _labels(batch, teacher))
        (loss + l2() / len(batch.labels) + sum(table.penalty() for table in tables)).backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        for table in tables:
            for parameter, rows in table.maintain(progress.step):
                state.optimizer.forget(parameter, rows)
        progress.batch, progress.step = progress.batch + 1, progress.step + 1
        progress.loss_sum, progress.loss_steps = progress.loss_sum + loss.item(), progress.loss_steps + 1
        if progress.batch in due:
            state.evaluate(validation)
        if on_step is not None:
            on_step(progress)
        if checkpoint is not None and (progress.batch in due or progress.step % settings.checkpoint_steps == 0):
            state.save(checkpoint)
        if progress.failures >= settings.patience:
            return
    progress.epoch, progress.batch = progress.epoch + 1, 0


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
