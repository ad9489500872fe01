"""Quality of predicted clicks: AUC, log loss, normalized entropy, calibration.

He et al., ADKDD 2014, doi:10.1145/2648584.2648589 (normalized entropy, calibration); Naeini, Cooper and Hauskrecht, AAAI 2015 (expected calibration
error). Everything is computed on the CPU in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_BINS = 20


def auc(labels: Tensor, logits: Tensor) -> float:
    """Probability that a random click has a larger logit than a random non-click, ties counted half: exact, by mid-ranks.

    Args:
        labels: (N,) 0 or 1, any dtype.
        logits: (N,) float; any rising function of them gives the same.

    Raises:
        ValueError: All labels are the same.
    """
    clicks, values = checked(labels, logits)
    num_clicks, num_others = class_sizes(clicks, "AUC", at_least=1)
    rank_sum = mid_ranks(values)[clicks].sum().item()
    return (rank_sum - num_clicks * (num_clicks + 1) / 2) / (num_clicks * num_others)


def log_loss(labels: Tensor, logits: Tensor) -> float:
    """Mean negative log likelihood in nats; finite for every finite logit.

    Args:
        labels: (N,) 0 or 1, any dtype.
        logits: (N,) float.
    """
    return row_losses(*checked(labels, logits)).mean().item()


def normalized_entropy(labels: Tensor, logits: Tensor) -> float:
    """Log loss over the entropy of the base rate of these labels (He et al. 2014): what always predicting the base rate would get is 1.

    Args:
        labels: (N,) 0 or 1, any dtype.
        logits: (N,) float.

    Raises:
        ValueError: All labels are the same, so the entropy is 0.
    """
    clicks, values = checked(labels, logits)
    class_sizes(clicks, "Normalized entropy", at_least=1)
    return (row_losses(clicks, values).mean() / entropy(clicks.double().mean())).item()


def calibration_ratio(labels: Tensor, logits: Tensor) -> float:
    """Mean prediction over mean label: above 1 the model promises more clicks than come (He et al. 2014).

    Args:
        labels: (N,) 0 or 1, any dtype.
        logits: (N,) float.

    Raises:
        ValueError: No label is 1.
    """
    clicks, values = checked(labels, logits)
    if not clicks.any():
        raise ValueError(f"Calibration ratio divides by the mean label, but all {len(clicks)} labels are 0.")
    return (values.sigmoid().mean() / clicks.double().mean()).item()


def calibration_error(labels: Tensor, logits: Tensor, *, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error: the mean over rows of |mean prediction - mean label| of the row's bin.

    Rows are cut by the rank of their prediction into bins of equal mass. Rows with equal predictions share a bin, so the order of rows
    does not matter. Never 0 on finitely many rows: a perfectly calibrated model with base rate r gets about 0.8 sqrt(r (1 - r) num_bins / N).

    Args:
        labels: (N,) 0 or 1, any dtype.
        logits: (N,) float.
        num_bins: Bins, each of about N / num_bins rows.
    """
    clicks, values = checked(labels, logits)
    gaps = torch.bincount(equal_mass_bins(values, num_bins), weights=values.sigmoid() - clicks.double())
    return (gaps.abs().sum() / len(values)).item()


def checked(labels: Tensor, *logits: Tensor) -> tuple[Tensor, ...]:
    """Labels as (N,) bool and each logits as (N,) float64, on the CPU."""
    if labels.dim() != 1 or len(labels) == 0:
        raise ValueError(f"evaluate: labels is {describe(labels)}, and must be (N,) with at least one row.")
    if not ((labels == 0) | (labels == 1)).all():
        wrong = labels[(labels != 0) & (labels != 1)]
        raise ValueError(f"evaluate: {len(wrong)} of {len(labels)} labels are neither 0 nor 1, the first of them {wrong[0].item()}.")
    for values in logits:
        if values.shape != labels.shape:
            raise ValueError(f"evaluate: labels is {describe(labels)} but logits is {describe(values)}; give one logit for each label.")
        if not values.isfinite().all():
            raise ValueError(f"evaluate: {int((~values.isfinite()).sum())} of {len(values)} logits are NaN or infinite. Did training diverge?")
    return (labels.detach().cpu() == 1, *(values.detach().cpu().double() for values in logits))


def class_sizes(clicks: Tensor, what: str, *, at_least: int) -> tuple[int, int]:
    """Numbers of clicks and of other rows."""
    num_clicks = int(clicks.sum())
    num_others = len(clicks) - num_clicks
    if min(num_clicks, num_others) < at_least:
        raise ValueError(f"{what} needs {at_least} or more rows of each label, but {num_clicks} rows have label 1 and {num_others} have label 0.")
    return num_clicks, num_others


def mid_ranks(values: Tensor) -> Tensor:
    """Ranks from 1, equal values sharing the mean of theirs: (N,) -> (N,) float64."""
    ordered, order = values.sort()
    _, run, lengths = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    ranks = lengths.cumsum(0).double() - (lengths - 1).double() / 2
    return torch.empty(len(values), dtype=torch.float64).index_put_((order,), ranks[run])


def row_losses(clicks: Tensor, values: Tensor) -> Tensor:
    """Negative log likelihood of each row: (N,)."""
    return -F.logsigmoid(torch.where(clicks, values, -values))


def entropy(rate: Tensor) -> Tensor:
    """Entropy of a coin that shows 1 at this rate, in nats."""
    return -(torch.xlogy(rate, rate) + torch.xlogy(1 - rate, 1 - rate))


def equal_mass_bins(values: Tensor, num_bins: int) -> Tensor:
    """Bin of equal mass of each row, in [0, num_bins): (N,) -> (N,) int64."""
    return ((mid_ranks(values) - 0.5) * num_bins / len(values)).long()


def describe(tensor: Tensor) -> str:
    """Shape and dtype of a tensor in words."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
