"""Scalar quantization: 2 ** num_bits levels, evenly spread over [-scale, scale].

Level q of L stands for (2 q + 1 - L) / (L - 1) times the scale, so the outermost levels are the scale itself and no level is wasted on a
second sign of zero; a scale of 0 gives 0. N groups of G values.
"""

from __future__ import annotations

import torch
from torch import Tensor

# From 1/20 of the largest magnitude on: an outlier among 2-bit values is best cut off far below it.
_CLIP_CANDIDATES = 20


def quantize(values: Tensor, scales: Tensor, num_bits: int) -> Tensor:
    """The nearest level of each value: (N, G) float, (N, 1) float -> (N, G) int32 in [0, 2 ** num_bits)."""
    last = 2**num_bits - 1
    positions = values.float() / scales.float().clamp(min=torch.finfo(torch.float32).tiny) * last
    return ((positions + last) / 2).round().clamp(0, last).int()


def dequantize(codes: Tensor, scales: Tensor, num_bits: int) -> Tensor:
    """The values that levels stand for: (N, G) int, (N, 1) float -> (N, G) of the dtype of `scales`."""
    last = 2**num_bits - 1
    return (2 * codes - last).to(scales.dtype) * (scales / last)


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
