"""Scalar quantization: 2 ** num_bits levels, evenly spread over [-scale, scale].

Level q of L stands for (2 q + 1 - L) / (L - 1) times the scale, so the outermost levels are the scale itself and no level is wasted on a
second sign of zero; a scale of 0 gives 0. N groups of G values.
"""

from __future__ import annotations

import torch
from torch import Tensor

# From 1/20 of the largest magnitude on: an outlier among 2-bit values is best cut off far below it.
_CLIP_CANDIDATES = 20

# For 0 to 8 bits: mean squared error of the best even levels for standard normal values, and their scale. Max, Quantizing for minimum
# distortion, 1960, table II, carried on numerically. The only level of 0 bits is 0, whatever the scale; training clips at that of 1 bit.
GAUSSIAN_ERRORS = (1.0, 0.363380, 0.118846, 0.0374397, 0.0115429, 0.00349521, 0.00104005, 0.000304333, 0.0000876862)
GAUSSIAN_SCALES = (0.7979, 0.7979, 1.4935, 2.0511, 2.5140, 2.9162, 3.2780, 3.6111, 3.9222)


def quantize(values: Tensor, scales: Tensor, num_bits: int) -> Tensor:
    """The nearest level of each value: (N, G) float, (N, 1) float -> (N, G) int32 in [0, 2 ** num_bits)."""
    last = 2**num_bits - 1
    positions = values.float() / scales.float().clamp(min=torch.finfo(torch.float32).tiny) * last
    return ((positions + last) / 2).round().clamp(0, last).int()


def dequantize(codes: Tensor, scales: Tensor, num_bits: int) -> Tensor:
    """The values that levels stand for: (N, G) int, (N, 1) float -> (N, G) of the dtype of `scales`."""
    last = 2**num_bits - 1
    return (2 * codes - last).to(scales.dtype) * (scales / last)


def fake_quantize(values: Tensor, scales: Tensor, num_bits: Tensor) -> Tensor:
    """The values of the nearest levels, for training: gradients reach values and scales as if nothing had been rounded.

    Esser et al., Learned Step Size Quantization, ICLR 2020, arXiv 1902.08153.

    Args:
        values: (N, G) float. Those beyond the scale get no gradient.
        scales: (N, 1) float, not negative.
        num_bits: (N, 1) int, 0 for the one level 0.
    """
    last = (1 << num_bits) - 1
    positions = (values / scales.clamp(min=torch.finfo(scales.dtype).tiny)).clamp(-1, 1)
    levels = (((positions * last + last) / 2).round() * 2 - last) / last.clamp(min=1)
    return scales * (positions + (levels - positions).detach())


def largest_magnitudes(values: Tensor) -> Tensor:
    """Scales that clip nothing: (N, G) float -> (N, 1) float16, values beyond its range cut to it."""
    return _to_half(values.float().abs().amax(1, keepdim=True))


def least_squares_scales(values: Tensor, num_bits: int) -> Tensor:
    """Scales with the least squared error of the rounded values, of 20 that clip more or less: (N, G) float -> (N, 1) float16.

    With few levels, clipping the largest values gives finer steps to all the others.
    """
    largest = values.float().abs().amax(1, keepdim=True)
    best, best_error = _to_half(largest), torch.full_like(largest, float("inf"))
    for candidate in range(_CLIP_CANDIDATES, 0, -1):
        scales = _to_half(largest * (candidate / _CLIP_CANDIDATES))
        error = (values - dequantize(quantize(values, scales, num_bits), scales.float(), num_bits)).square().sum(1, keepdim=True)
        best, best_error = torch.where(error < best_error, scales, best), torch.minimum(error, best_error)
    return best


def _to_half(scales: Tensor) -> Tensor:
    return scales.clamp(max=torch.finfo(torch.float16).max).half()
