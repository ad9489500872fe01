"""Intervals: of an AUC, of the paired difference between two models, and of a mean over seeds.

DeLong, DeLong and Clarke-Pearson, Biometrics 1988, doi:10.2307/2531595 (AUC); Sun and Xu, IEEE Signal Processing Letters 2014,
doi:10.1109/LSP.2014.2337313 (the same in O(N log N)); Efron and Tibshirani, An Introduction to the Bootstrap, 1993 (the other metrics).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance

import numpy as np
import torch
from torch import Tensor

from leanrec.ops.metrics import NUM_BINS, checked, class_sizes, entropy, equal_mass_bins, mid_ranks, row_losses


@dataclass(frozen=True)
class Interval:
    """An estimate, its standard error, and the interval that covers the truth with the asked confidence."""

    value: float
    low: float
    high: float
    standard_error: float


@dataclass(frozen=True)
class Difference:
    """A paired difference, first minus second, with its interval and the two-sided p-value of there being none."""

    difference: float
    low: float
    high: float
    standard_error: float
    p_value: float


def delong(labels: Tensor, logits: Tensor, *, confidence: float = 0.95) -> Interval:
    """AUC with DeLong's standard error and normal interval, cut to [0, 1].

    Args:
        labels: (N,) 0 or 1, any dtype.
        logits: (N,) float.
        confidence: Of the interval.

    Raises:
        ValueError: Fewer than two rows have either label.
    """
    clicks, values = checked(labels, logits)
    of_clicks, of_others = _placements(clicks, values)
    area, error = of_clicks.mean().item(), _placement_error(of_clicks, of_others)
    margin = _normal_quantile(confidence) * error
    return Interval(area, max(area - margin, 0.0), min(area + margin, 1.0), error)


def delong_difference(labels: Tensor, logits_a: Tensor, logits_b: Tensor, *, confidence: float = 0.95) -> Difference:
    """AUC of `logits_a` minus AUC of `logits_b` on the same rows, with DeLong's interval for correlated curves.

    Args:
        labels: (N,) 0 or 1, any dtype.
        logits_a: (N,) float.
        logits_b: (N,) float, in the same order of rows.
        confidence: Of the interval.

    Raises:
        ValueError: Lengths differ, or fewer than two rows have either label.
    """
    clicks, a, b = checked(labels, logits_a, logits_b)
    (clicks_a, others_a), (clicks_b, others_b) = _placements(clicks, a), _placements(clicks, b)
    difference = (clicks_a.mean() - clicks_b.mean()).item()
    return _normal_difference(difference, _placement_error(clicks_a - clicks_b, others_a - others_b), confidence)


def bootstrap_difference(
    labels: Tensor,
    logits_a: Tensor,
    logits_b: Tensor,
    *,
    generator: torch.Generator,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    max_groups: int = 32_768,
) -> dict[str, Difference]:
    """Differences, a minus b, in log loss, normalized entropy, calibration ratio and calibration error, with bootstrap intervals.

    Rows are drawn with replacement, both models' predictions together; the interval is the difference +- the normal quantile times the
    standard deviation over resamples. The bins of the calibration error stay those of the data. All of it depends on sums over rows only, so
    with more than `max_groups` rows, groups of rows put together at random are drawn instead: the same standard error, at a fixed cost.

    Args:
        labels: (N,) 0 or 1, any dtype.
        logits_a: (N,) float.
        logits_b: (N,) float, in the same order of rows.
        generator: Source of the resamples.
        num_resamples: At least 2. Where a resample lacks one label and a metric with it, it does not count for that metric.
        confidence: Of the intervals.
        max_groups: Most groups to draw from.

    Raises:
        ValueError: Lengths differ, or fewer than two rows have either label.
    """
    if num_resamples < 2:
        raise ValueError(f"bootstrap: num_resamples={num_resamples} gives no spread. Choose at least 2, better 1000.")
    clicks, a, b = checked(labels, logits_a, logits_b)
    class_sizes(clicks, "The bootstrap", at_least=2)
    groups = torch.randperm(len(clicks), generator=generator) % max_groups
    sums = _group_sums(groups, clicks, a, b)
    observed = _differences(torch.ones(1, len(sums[0]), dtype=torch.float64), sums)
    resampled = [_differences(times, sums) for times in _resamples(len(sums[0]), num_resamples, generator)]
    draws = {name: torch.cat([chunk[name] for chunk in resampled]) for name in observed}
    return {name: _normal_difference(observed[name].item(), _finite_spread(draws[name]), confidence) for name in observed}


def seed_interval(differences: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Mean over seeds with Student's t interval: what other seeds on these same test rows would give.

    Args:
        differences: One per seed, at least two.
        confidence: Of the interval.

    Raises:
        ValueError: Fewer than two seeds.
    """
    return combine_seeds(differences, [0.0] * len(differences), confidence=confidence)


def combine_seeds(differences: Sequence[float], standard_errors: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Mean over seeds with an interval for other seeds and other test rows.

    With B the variance of the differences over S seeds and W the mean squared standard error, the mean has variance B / S + W: all seeds are
    tested on the same rows, so more seeds average out the seeds' part but not the rows'. This errs on the wide side, because B holds
    some of the rows' noise too. The interval is Student's with (S - 1) (1 + W / (B / S))^2 degrees of freedom (Satterthwaite 1946).

    Args:
        differences: One per seed, at least two.
        standard_errors: Of each difference, over test rows.
        confidence: Of the interval.

    Raises:
        ValueError: Fewer than two seeds, or lengths differ.
    """
    num_seeds = len(differences)
    if num_seeds < 2:
        raise ValueError(f"seeds: {num_seeds} given, but the spread over seeds needs at least 2.")
    if len(standard_errors) != num_seeds:
        raise ValueError(f"seeds: {num_seeds} differences but {len(standard_errors)} standard errors; each difference needs its own.")
    between = variance(differences) / num_seeds
    within = fmean(error**2 for error in standard_errors)
    inflation = 1 + within / between if between > 0 else math.inf
    degrees = (num_seeds - 1) * inflation * inflation
    mean, error = fmean(differences), math.sqrt(between + within)
    margin = _student_quantile(confidence, degrees) * error
    return Interval(mean, mean - margin, mean + margin, error)


def _placements(clicks: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Share of the other rows that each click beats, and share of the clicks that beat each other row (ties half). The mean of either is AUC."""
    num_clicks, num_others = class_sizes(clicks, "The interval of AUC", at_least=2)
    ranks = mid_ranks(values)
    of_clicks = (ranks[clicks] - mid_ranks(values[clicks])) / num_others
    of_others = 1 - (ranks[~clicks] - mid_ranks(values[~clicks])) / num_clicks
    return of_clicks, of_others


def _placement_error(of_clicks: Tensor, of_others: Tensor) -> float:
    """DeLong's standard error of the mean placement."""
    return (of_clicks.var() / len(of_clicks) + of_others.var() / len(of_others)).sqrt().item()


def _group_sums(groups: Tensor, clicks: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over groups of rows: (G, 4) rows, clicks, loss a - b and prediction a - b; (G, NUM_BINS) gaps of a; the same of b."""
    num_groups = int(groups.max()) + 1
    columns = [torch.ones(len(a)), clicks, row_losses(clicks, a) - row_losses(clicks, b), a.sigmoid() - b.sigmoid()]
    totals = [torch.bincount(groups, weights=column.double(), minlength=num_groups) for column in columns]
    return torch.stack(totals, dim=1), _group_gaps(groups, clicks, a, num_groups), _group_gaps(groups, clicks, b, num_groups)


def _group_gaps(groups: Tensor, clicks: Tensor, values: Tensor, num_groups: int) -> Tensor:
    """Predicted minus actual clicks of each group in each bin: (G, NUM_BINS)."""
    cells = groups * NUM_BINS + equal_mass_bins(values, NUM_BINS)
    return torch.bincount(cells, weights=values.sigmoid() - clicks.double(), minlength=num_groups * NUM_BINS).view(num_groups, NUM_BINS)


def _resamples(num_groups: int, num_resamples: int, generator: torch.Generator, *, chunk: int = 16) -> Iterator[Tensor]:
    """How often each group was drawn, in as many draws with replacement as there are groups: (up to `chunk`, G) float64, chunk after chunk."""
    for start in range(0, num_resamples, chunk):
        size = min(chunk, num_resamples - start)
        drawn = torch.randint(num_groups, (size, num_groups), generator=generator) + torch.arange(size).unsqueeze(1) * num_groups
        yield torch.bincount(drawn.flatten(), minlength=size * num_groups).view(size, num_groups).double()


def _differences(times: Tensor, sums: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """Metric -> a minus b, (R,), with each group counted so many times, (R, G); not finite where a label that it needs is absent."""
    totals, gaps_a, gaps_b = (times @ part for part in sums)
    rows, clicks, losses, predictions = totals.unbind(1)
    return {
        "logloss": losses / rows,
        "normalized_entropy": losses / rows / entropy(clicks / rows),
        "calibration_ratio": predictions / clicks,
        "calibration_error": (gaps_a.abs().sum(1) - gaps_b.abs().sum(1)) / rows,
    }


def _finite_spread(values: Tensor) -> float:
    """Standard deviation of those that are finite."""
    return values[values.isfinite()].std().item()


def _normal_difference(difference: float, error: float, confidence: float) -> Difference:
    """A difference with a normal interval; without spread, p is 1 where there is no difference and 0 where there is one."""
    margin = _normal_quantile(confidence) * error
    score = abs(difference) / error if error > 0 else (math.inf if difference else 0.0)
    return Difference(difference, difference - margin, difference + margin, error, math.erfc(score / math.sqrt(2)))


def _normal_quantile(confidence: float) -> float:
    """What a standard normal exceeds in size with probability 1 - confidence."""
    if not 0 < confidence < 1:
        raise ValueError(f"evaluate: confidence={confidence} must lie between 0 and 1, such as 0.95.")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _student_quantile(confidence: float, degrees: float) -> float:
    """What Student's t exceeds in size with probability 1 - confidence.

    Up to 100 degrees by bisection of the distribution function; beyond, by its expansion around the normal (Abramowitz and Stegun 26.7.5).
    """
    z = _normal_quantile(confidence)
    if degrees > 100:
        return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    nodes, weights = np.polynomial.legendre.leggauss(50)
    scale = 2 / math.sqrt(math.pi) * math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(degrees)
    for _ in range(60):
        middle = (low + high) / 2
        mass = scale * middle / 2 * weights.dot(np.cos(middle / 2 * (nodes + 1)) ** (degrees - 1))  # of |t|: an integral of cos^(degrees - 1)
        low, high = (middle, high) if mass < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)
