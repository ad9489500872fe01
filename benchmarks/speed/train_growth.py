"""What a step of training costs as the tables grow: `python benchmarks/speed/train_growth.py`, with 12 GB of free memory.

One DeepFM over 26 tables of 1 million rows in all and one over 50 million take turns on batches of their own, with Adam and with row-wise Adagrad
for the tables. Ids follow the same power law in both. All of the optimizer's state is touched before the clock runs: the system hands out memory
at the first touch, which is paid once. Time is that of the processor, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from record import write
from torch import Tensor

from leanrec import runs
from leanrec.data.schema import Field, Schema
from leanrec.models import build
from leanrec.train import TrainSettings
from leanrec.train.state import State

NUM_FIELDS, EMBEDDING_DIM, BATCH_SIZE = 26, 16, 4096
SMALL, LARGE = 1_000_000, 50_000_000
EXPONENT = 1.05  # of the power law that ids follow
NUM_BATCHES = 8


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm-ups", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for optimizer in ("adam", "adagrad"):
        compare(optimizer, options.steps, options.warm_ups)


def compare(optimizer: str, num_steps: int, warm_ups: int) -> None:
    """Measure and keep the result of one optimizer of the tables."""
    runs.reset_peak_memory()
    steps = {rows: step_of(rows, optimizer) for rows in (SMALL, LARGE)}
    times: dict[int, list[float]] = {rows: [] for rows in steps}
    for turn in range(warm_ups + num_steps):
        for rows, step in steps.items():
            start = time.process_time()
            step(turn)
            if turn >= warm_ups:
                times[rows].append(time.process_time() - start)
    small, large = (statistics.median(times[rows]) * 1e3 for rows in (SMALL, LARGE))
    write(
        f"train_growth_{optimizer}",
        ratio=small / large,
        bar=1 / 1.2,
        against="its own step with 1 million rows, with 50 million",
        medians={"1M rows ms": small, "50M rows ms": large, "peak GB": runs.peak_memory() / 1e9},
        setting={
            "fields": NUM_FIELDS,
            "embedding_dim": EMBEDDING_DIM,
            "batch_size": BATCH_SIZE,
            "exponent": EXPONENT,
            "table_optimizer": optimizer,
            "threads": 1,
            "steps": num_steps,
            "warm_ups": warm_ups,
        },
    )


def step_of(num_rows: int, optimizer: str) -> Callable[[int], None]:
    """A step of the training loop on the batch of a given number, for a new model with `num_rows` rows in all its tables together."""
    sizes = [num_rows // NUM_FIELDS] * NUM_FIELDS
    schema = Schema(tuple(Field(f"C{place}", "categorical", f"C{place}", size) for place, size in enumerate(sizes)))
    torch.manual_seed(0)
    model = build("deepfm", schema, embedding_dim=EMBEDDING_DIM)
    state = State(model, TrainSettings(table_optimizer=optimizer))
    batches = [({f"C{place}": _ids(size) for place, size in enumerate(sizes)}, torch.randint(2, (BATCH_SIZE,)).float()) for _ in range(NUM_BATCHES)]

    def step(turn: int) -> None:
        features, labels = batches[turn % NUM_BATCHES]
        F.binary_cross_entropy_with_logits(model(features), labels).backward()
        state.optimizer.step()
        state.optimizer.zero_grad()

    step(0)
    for values in state.optimizer.state.values():
        for tensor in values.values():
            if tensor.dim():
                tensor += 0.0
    return step


def _ids(size: int) -> Tensor:
    """A batch of ids by the inverse of a power law's distribution, frequent ones first as `leanrec prepare` orders them."""
    power = 1 - EXPONENT
    ranks = (((size - 1.0) ** power - 1) * torch.rand(BATCH_SIZE, dtype=torch.float64) + 1) ** (1 / power)
    return ranks.long().clamp(1, size - 1)


if __name__ == "__main__":
    main()
