"""The smallest tables that keep a promise of quality, found by trying."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leanrec import runs
from leanrec.budget import Sizes
from leanrec.compress import compress
from leanrec.data.loader import Loader
from leanrec.methods import parse
from leanrec.ops.metrics import auc
from leanrec.recommender import PREDICT_BATCH, HeldOut, Recommender, Work, open_run, predict, table_counts, table_sensitivities, told_of_tables

FIRST_RATIO, LEAST_RATIO = 10.0, 1.2
BISECTIONS = 3


@dataclass(frozen=True)
class Trial:
    """A size that was tried.

    Attributes:
        ratio: Bytes of all tables before / after that was asked for.
        auc: On the validation split, nothing fine-tuned.
        auc_drop: What it is below that of the model as it was.
        within: Whether that is no more than was promised.
    """

    ratio: float
    auc: float
    auc_drop: float
    within: bool


def smallest_ratio(
    run: Path,
    method: str,
    *,
    max_auc_drop: float,
    seed: int,
    found: Path,
    on_trial: Callable[[Trial], None] | None = None,
    on_work: Work | None = None,
) -> Trial:
    """The largest ratio whose validation AUC is no more than `max_auc_drop` below that of the run.

    Ratios are doubled, from 10 on, until one drops too much, or halved until one does not; then the span between is halved three times,
    so that the result is within about 9% of the border. The validation AUC is a measurement on as many rows as there are, not a law:
    between two ratios it need not fall evenly.

    Args:
        run: Run folder.
        method: Text form of one method for all tables.
        max_auc_drop: The promise, such as 0.0005.
        seed: As in `compress_tables`, which with this seed and the ratio gives the model that was tried.
        found: File that keeps the trials, so that a killed search does not repeat them.
        on_trial: Called with every trial.
        on_work: Told as tables are measured and, for each trial, fitted.

    Raises:
        ValueError: No ratio keeps the promise.
    """
    search = _Search(run, method, max_auc_drop, seed, found, on_trial, on_work)
    good, bad = search.bracket()
    if bad is not None:
        for _ in range(BISECTIONS):
            middle = search.attempt(math.sqrt(good.ratio * bad.ratio))
            good, bad = (middle, bad) if middle.within else (good, middle)
    return good


def search_summary(found: Path) -> dict[str, Any]:
    """What a run keeps of its search: `trials` by ratio, the largest that was `kept`, and the next one `beyond`, None where there is none."""
    trials = sorted(_read(found), key=lambda trial: trial.ratio)
    kept = max((trial for trial in trials if trial.within), key=lambda trial: trial.ratio)
    beyond = next((trial for trial in trials if trial.ratio > kept.ratio), None)
    return {"trials": [asdict(trial) for trial in trials], "kept": asdict(kept), "beyond": beyond and asdict(beyond)}


class _Search:
    """Tries ratios, each once."""

    def __init__(
        self,
        run: Path,
        method: str,
        max_auc_drop: float,
        seed: int,
        found: Path,
        on_trial: Callable[[Trial], None] | None,
        on_work: Work | None,
    ) -> None:
        self.run, self.method, self.max_auc_drop, self.seed, self.found = run, parse(method), max_auc_drop, seed, found
        self.on_trial, self.fitting = on_trial, told_of_tables(on_work, "table")
        self.trials = _read(found) if found.exists() else []
        base = open_run(run)
        self.full_auc = _valid_auc(base)
        self.counts, self.sensitivities = table_counts(base), table_sensitivities(base, [self.method], seed=seed, on_work=on_work)
        sizing = told_of_tables(on_work, "sizes of table")
        held_out = None if self.sensitivities is None else HeldOut(base, seed)
        self.sizes = Sizes(
            base.model, self.method, counts=self.counts, sensitivities=self.sensitivities, held_out=held_out, seed=seed, progress=sizing
        )

    def bracket(self) -> tuple[Trial, Trial | None]:
        """A ratio that keeps the promise and a larger one that does not; None where the smallest tables of all keep it."""
        highest = self.sizes.full / self.sizes.least
        good, bad, ratio = None, None, min(FIRST_RATIO, highest)
        while good is None or (bad is None and good.ratio < highest):
            trial = self.attempt(ratio)
            if trial.within:
                good, ratio = trial, min(ratio * 2, highest)
            else:
                bad, ratio = trial, ratio / 2
                if good is None and ratio < LEAST_RATIO:
                    name = type(self.method).__name__
                    raise ValueError(
                        f"No size of {name} keeps the validation AUC within {self.max_auc_drop}: at ratio {trial.ratio:g} it drops by "
                        f"{trial.auc_drop:.5f}. Allow more, or choose another method."
                    )
        return good, bad

    def attempt(self, ratio: float) -> Trial:
        """What the tables lose at a ratio."""
        known = next((trial for trial in self.trials if trial.ratio == ratio), None)
        if known is not None:
            return known
        recommender = open_run(self.run)
        plan = self.sizes.plan(ratio=ratio)
        recommender.model = compress(
            recommender.model, plan, counts=self.counts, sensitivities=self.sensitivities, seed=self.seed, progress=self.fitting
        )
        quality = _valid_auc(recommender)
        drop = self.full_auc - quality
        trial = Trial(ratio, quality, drop, drop <= self.max_auc_drop)
        self.trials.append(trial)
        runs.write_atomically(self.found, json.dumps([asdict(tried) for tried in self.trials]))
        if self.on_trial is not None:
            self.on_trial(trial)
        return trial


def _read(found: Path) -> list[Trial]:
    return [Trial(**trial) for trial in json.loads(found.read_text())]


def _valid_auc(recommender: Recommender) -> float:
    return auc(*predict(recommender.model, Loader(recommender.data, "valid", recommender.schema, batch_size=PREDICT_BATCH)))
