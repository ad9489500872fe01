"""The quality of a model's predictions, per popularity of the item too, and its difference to another model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from leanrec.data.schema import FIRST_ID
from leanrec.ops.intervals import Difference, bootstrap_difference, delong, delong_difference
from leanrec.ops.metrics import auc, calibration_error, calibration_ratio, checked, describe, log_loss, normalized_entropy

BUCKETS = ("head", "torso", "tail", "unseen")
HEAD, TORSO, TAIL, UNSEEN = range(len(BUCKETS))

TITLES = {
    "auc": "AUC",
    "logloss": "log loss",
    "normalized_entropy": "normalized entropy",
    "calibration_ratio": "calibration ratio",
    "calibration_error": "calibration error",
}


@dataclass(frozen=True)
class Bucket:
    """Quality on the rows of one popularity bucket; None where a number is not defined: no rows, one class only, no clicks."""

    rows: int
    share: float
    auc: float | None
    logloss: float | None
    calibration_ratio: float | None


@dataclass(frozen=True)
class Evaluation:
    """Quality of one model on one set of rows.

    Attributes:
        rows: N.
        auc: Exact area under the ROC curve, with its DeLong interval from `auc_low` to `auc_high`.
        logloss: Mean negative log likelihood, in nats.
        normalized_entropy: Log loss over the entropy of the base rate: 1 is a model that knows the base rate only.
        calibration_ratio: Mean prediction over mean label.
        calibration_error: Expected calibration error over 20 bins of equal mass.
        buckets: Name of the popularity bucket -> quality on its rows; None where no popularity was given.
        confidence: That the interval covers the true AUC.
    """

    rows: int
    auc: float
    auc_low: float
    auc_high: float
    logloss: float
    normalized_entropy: float
    calibration_ratio: float
    calibration_error: float
    buckets: Mapping[str, Bucket] | None = None
    confidence: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """What `to_dict` gave."""
        buckets = values["buckets"] and {name: Bucket(**bucket) for name, bucket in values["buckets"].items()}
        return cls(**{**values, "buckets": buckets})

    def __str__(self) -> str:
        metrics = [[title, _cell(getattr(self, name))] for name, title in TITLES.items()]
        interval = [f"{100 * self.confidence:.4g}% interval of AUC", f"{self.auc_low:.5f} to {self.auc_high:.5f}"]
        text = _table([["rows", f"{self.rows:,}"], metrics[0], interval, *metrics[1:]])
        if self.buckets is None:
            return text
        header = ["bucket", "rows", "share", "AUC", "log loss", "calibration ratio"]
        rows = [[name, f"{b.rows:,}", f"{b.share:.1%}", *map(_cell, (b.auc, b.logloss, b.calibration_ratio))] for name, b in self.buckets.items()]
        return f"{text}\n\n{_table([header, *rows])}"


@dataclass(frozen=True)
class Comparison:
    """Differences of a model's quality to a baseline's on the same rows, model minus baseline.

    Attributes:
        rows: N.
        auc: With DeLong's interval; the rest with bootstrap intervals.
        logloss: Below 0 the model is better.
        normalized_entropy: Below 0 the model is better.
        calibration_ratio: Neither sign is better by itself: the ratio should be 1.
        calibration_error: Below 0 the model is better.
        confidence: Of the intervals.
    """

    rows: int
    auc: Difference
    logloss: Difference
    normalized_entropy: Difference
    calibration_ratio: Difference
    calibration_error: Difference
    confidence: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """What `to_dict` gave."""
        differences: dict[str, Any] = {name: Difference(**value) if isinstance(value, dict) else value for name, value in values.items()}
        return cls(**differences)

    def __str__(self) -> str:
        header = ["model - baseline", "difference", f"{100 * self.confidence:.4g}% interval", "p"]
        rows = [[title, *_difference_cells(getattr(self, name))] for name, title in TITLES.items()]
        return _table([["rows", f"{self.rows:,}", "", ""], header, *rows])


def evaluate_predictions(
    labels: Tensor,
    logits: Tensor,
    *,
    bucket_ids: Tensor | None = None,
    counts: Tensor | None = None,
    confidence: float = 0.95,
) -> Evaluation:
    """Quality of predictions, per popularity bucket too where `bucket_ids` and `counts` are given.

    Args:
        labels: (N,) 0 or 1, any dtype.
        logits: (N,) float.
        bucket_ids: (N,) int64, the id of each row in the field whose popularity matters, usually the item.
        counts: (V,) int64, occurrences of each of that field's ids in the training split.
        confidence: Of the interval of AUC.

    Raises:
        ValueError: Lengths differ, labels are not 0 and 1, fewer than two rows have either label, a logit is NaN, or an id is outside `counts`.
    """
    if (bucket_ids is None) != (counts is None):
        raise ValueError("evaluate: bucket_ids and counts go together, but only one of them was given.")
    area = delong(labels, logits, confidence=confidence)
    return Evaluation(
        rows=len(labels),
        auc=area.value,
        auc_low=area.low,
        auc_high=area.high,
        logloss=log_loss(labels, logits),
        normalized_entropy=normalized_entropy(labels, logits),
        calibration_ratio=calibration_ratio(labels, logits),
        calibration_error=calibration_error(labels, logits),
        buckets=None if bucket_ids is None or counts is None else evaluate_buckets(labels, logits, bucket_ids, counts),
        confidence=confidence,
    )


def compare_predictions(
    labels: Tensor,
    logits: Tensor,
    baseline_logits: Tensor,
    *,
    seed: int = 0,
    num_resamples: int = 1000,
    confidence: float = 0.95,
) -> Comparison:
    """Paired differences of a model's predictions to a baseline's on the same rows, model minus baseline.

    Args:
        labels: (N,) 0 or 1, any dtype.
        logits: (N,) float, the model's.
        baseline_logits: (N,) float, the baseline's, in the same order of rows.
        seed: Of the bootstrap.
        num_resamples: Of the bootstrap.
        confidence: Of the intervals.

    Raises:
        ValueError: As `evaluate_predictions`.
    """
    generator = torch.Generator().manual_seed(seed)
    differences = bootstrap_difference(labels, logits, baseline_logits, generator=generator, num_resamples=num_resamples, confidence=confidence)
    return Comparison(
        rows=len(labels),
        auc=delong_difference(labels, logits, baseline_logits, confidence=confidence),
        **differences,
        confidence=confidence,
    )


def evaluate_buckets(labels: Tensor, logits: Tensor, bucket_ids: Tensor, counts: Tensor) -> dict[str, Bucket]:
    """Quality on the rows of each popularity bucket.

    Args:
        labels: (N,) 0 or 1, any dtype.
        logits: (N,) float.
        bucket_ids: (N,) int64 ids of the field whose popularity matters.
        counts: (V,) int64 occurrences of each of its ids in the training split.

    Raises:
        ValueError: Lengths differ, or an id is outside [0, V).
    """
    clicks, values = checked(labels, logits)
    ids = bucket_ids.detach().cpu().long()
    if ids.shape != clicks.shape:
        raise ValueError(f"evaluate: bucket_ids is {describe(bucket_ids)}, and must be one id for each of the {len(clicks)} rows.")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= len(counts):
        raise ValueError(f"evaluate: bucket_ids holds {low if low < 0 else high}, but counts has ids 0 to {len(counts) - 1}. Are they of one field?")
    row_buckets = popularity_buckets(counts)[ids]
    return {name: _bucket(clicks[row_buckets == code], values[row_buckets == code], len(clicks)) for code, name in enumerate(BUCKETS)}


def popularity_buckets(counts: Tensor, *, head: float = 0.5, torso: float = 0.4) -> Tensor:
    """Popularity bucket of each id: an index into `BUCKETS`, (V,) int8.

    Head: the fewest ids that together cover the share `head` of the training occurrences of known ids. Torso: the next ones, up to the share
    `head + torso`. Tail: the other ids that occur. Unseen: ids that do not, padding and the unknown id, whatever their counts.

    Args:
        counts: (V,) int64 occurrences of each id in the training split.
        head: Share of the occurrences.
        torso: Share of the occurrences.

    Raises:
        ValueError: `counts` is not a vector of integers from 0, or the shares are negative or add to more than 1.
    """
    if counts.dim() != 1 or counts.is_floating_point() or (counts < 0).any():
        raise ValueError(f"popularity: counts is {describe(counts)}, and must be one integer from 0 for each id: (V,) int64.")
    if head < 0 or torso < 0 or head + torso > 1:
        raise ValueError(f"popularity: head={head} and torso={torso} must be shares from 0 that add to at most 1, such as 0.5 and 0.4.")
    known = counts.detach().cpu().long().clone()
    known[:FIRST_ID] = 0
    falling, order = known.sort(descending=True, stable=True)
    # Share of the occurrences that stands before each id: an id on a border belongs to the hotter side, so head is never empty.
    share_before = (falling.cumsum(0) - falling).double() / max(int(known.sum()), 1)
    buckets = torch.full(counts.shape, TAIL, dtype=torch.int8)
    buckets[order[share_before < head + torso]] = TORSO
    buckets[order[share_before < head]] = HEAD
    return buckets.masked_fill(known == 0, UNSEEN)


def _bucket(clicks: Tensor, values: Tensor, num_rows: int) -> Bucket:
    """Quality on these of `num_rows` rows."""
    rows, num_clicks = len(clicks), int(clicks.sum())
    return Bucket(
        rows=rows,
        share=rows / num_rows,
        auc=auc(clicks, values) if 0 < num_clicks < rows else None,
        logloss=log_loss(clicks, values) if rows else None,
        calibration_ratio=calibration_ratio(clicks, values) if num_clicks else None,
    )


def _difference_cells(d: Difference) -> list[str]:
    """Cells of one line of a comparison."""
    return [f"{d.difference:+.5f}", f"{d.low:+.5f} to {d.high:+.5f}", "<0.0001" if d.p_value < 1e-4 else f"{d.p_value:.4f}"]


def _cell(value: float | None) -> str:
    """A number of a table; a dash where it is not defined."""
    return "-" if value is None else f"{value:.5f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Lines of aligned columns: the first to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows)
