"""What is seen of long work: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from leanrec.train import Progress as Training

LOG_WIDTH = 160
LOG_SECONDS = 5.0  # between lines of progress in a log: short work needs none
LOG_ROWS = 1_000_000  # where nobody knows how many there are in all


class Display(Protocol):
    """Where work is shown."""

    def line(self, text: str) -> None:
        """Say something that stays."""

    def work(self, description: str, done: int, total: int | None = None) -> None:
        """Say how far the work is; `total` is None where nobody knows."""


@contextmanager
def display() -> Iterator[Display]:
    """A bar where stdout is a terminal, else a log."""
    if not sys.stdout.isatty():
        yield Log()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(), transient=True) as progress:
        yield Bar(progress)


class Bar:
    """A bar on a terminal, gone when the work is done."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task("", total=None)

    def line(self, text: str) -> None:
        """Print above the bar."""
        self.progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def work(self, description: str, done: int, total: int | None = None) -> None:
        """Move the bar; another description begins a new one."""
        if description != self.progress.tasks[0].description:
            self.progress.reset(self.task)
        self.progress.update(self.task, description=description, completed=done, total=total)


class Log:
    """Lines: at most one per tenth of the work, or per million rows, and none that follows another at once."""

    def __init__(self, *, seconds: float = LOG_SECONDS) -> None:
        self.seconds, self.last, self.mark = seconds, time.monotonic(), ("", 0)

    def line(self, text: str) -> None:
        """Print."""
        typer.echo(text)

    def work(self, description: str, done: int, total: int | None = None) -> None:
        """Print, if there is something new to say."""
        mark = (description, done * 10 // total if total else done // LOG_ROWS)
        if mark == self.mark or time.monotonic() - self.last < self.seconds:
            return
        self.mark, self.last = mark, time.monotonic()
        typer.echo(f"{description}: {done:,} of {total:,} ({done / total:.0%})" if total else f"{description}: {done:,}")


def show_training(shown: Display, data: Callable[[], Path], *, batch_size: int, epochs: int) -> Callable[[Training], None]:
    """What `train` calls after every step: an evaluation is a line, an epoch a bar.

    Args:
        shown: Where.
        data: Gives the folder of the prepared log; asked at the first step.
        batch_size: Rows in a batch.
        epochs: The most there will be.
    """
    num_batches, lines = 0, 0

    def on_step(progress: Training) -> None:
        nonlocal num_batches, lines
        num_batches = num_batches or _num_batches(data(), batch_size)
        for entry in progress.history[lines:]:
            shown.line(_evaluation(entry))
        lines = len(progress.history)
        shown.work(f"epoch {progress.epoch + 1} of at most {epochs}", progress.batch, num_batches)

    return on_step


def _num_batches(data: Path, batch_size: int) -> int:
    from leanrec.data.loader import Loader
    from leanrec.data.schema import Schema

    return len(Loader(data, "train", Schema.load(data / "schema.json"), batch_size=batch_size, seed=0))


def _evaluation(entry: dict[str, float]) -> str:
    """An entry of a training's history in words."""
    error = f" (gain ±{entry['gain_error']:.5f})" if "gain_error" in entry else ""
    quality = f"validation AUC {entry['auc']:.5f}{error}, log loss {entry['logloss']:.5f}"
    if not entry["step"]:
        return f"before tuning: {quality}"
    way = f", {entry['share']:g} of the way" if "share" in entry else ", the tables alone" if "table_share" in entry else ""
    return f"epoch {entry['epoch'] + 1}, step {entry['step']:,}: training loss {entry['loss']:.5f}, {quality}{way}"


def print_table(header: tuple[str, ...], rows: list[tuple[Any, ...]], *, title: str | None = None) -> None:
    """Print a table. None is an empty cell, whole numbers stand to the right."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if any(isinstance(row[index], int) for row in rows) else "left", overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else LOG_WIDTH, highlight=False, markup=False, emoji=False).print(table)
