# ruff: noqa: ANN001, ANN202  (arguments of Triton kernels are pointers and numbers that its compiler types)
"""Look-ups in coded tables on a GPU, in Triton: the same layouts as `kernel.cpp`. N ids, V rows, D columns, K words of a code book."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_IDS, _COLUMNS = 32, 64  # of a block


def rows(ids: Tensor, tensors: list[Tensor], numbers: list[int], layout: str, width: int, num_rows: int, padding: int) -> Tensor:
    """Rows: (N,) int -> (N, D) float32; for the other arguments see `fused.Coded` and `fused.rows`.

    An id out of range stops the device, as in torch.
    """
    out = torch.empty(len(ids), width, device=ids.device)
    if not len(ids):
        return out
    grid = (triton.cdiv(len(ids), _IDS), triton.cdiv(width, _COLUMNS))
    common: dict[str, Any] = {"num_ids": len(ids), "width": width, "num_rows": num_rows, "padding": padding, "IDS": _IDS, "COLUMNS": _COLUMNS}
    first, packed, *others = tensors
    if layout == "concat":
        num_books, num_words, part = first.shape
        _concat[grid](ids, out, packed, packed.numel(), numbers[0], first, num_books, num_words, part, **common)
    elif layout in ("sum", "byte_sum"):
        books = others[0] if others else first
        num_books, num_words, _ = books.shape
        _sum[grid](ids, out, packed, packed.numel(), numbers[0], books, num_books, num_words, first, SCALED=bool(others), **common)
    elif layout == "levels":
        borders, words, scales, *ranks = others
        place = ranks[0] if ranks else packed
        _levels[grid](
            ids, out, packed, packed.numel(), numbers[0], place, place.numel(), numbers[1], first, borders, len(borders), words, scales,
            len(scales) // len(borders), RANKED=bool(ranks), **common,
        )  # fmt: skip
    else:
        _scaled[grid](ids, out, packed, numbers[0], first, numbers[1], first.shape[1], **common)
    return out


@triton.jit
def _code(packed, nbytes, index, num_bits, mask):
    """Codes by their number in a stream, lowest bit first: of up to 31 bits, which lie in five bytes at most."""
    first = index.to(tl.int64) * num_bits
    byte = first >> 3
    read = tl.load(packed + byte, mask=mask & (byte < nbytes), other=0).to(tl.int64)
    for step in tl.static_range(1, 5):
        read |= tl.load(packed + byte + step, mask=mask & (byte + step < nbytes), other=0).to(tl.int64) << (8 * step)
    return (read >> (first & 7)) & ((1 << num_bits) - 1)


@triton.jit
def _block(ids, num_ids, width, num_rows, IDS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns of a block, which of them are there, and where they go."""
    places = tl.program_id(0) * IDS + tl.arange(0, IDS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(ids + places, mask=places < num_ids, other=0).to(tl.int64)
    tl.device_assert((row >= 0) & (row < num_rows), "id outside the table's rows")
    inside = (places < num_ids)[:, None] & (columns < width)[None, :]
    return row, columns, inside, places.to(tl.int64)[:, None] * width + columns[None, :]


@triton.jit(debug=True)
def _concat(
    ids, out, packed, nbytes, num_bits, books, num_books, num_words, part, num_ids, width, num_rows, padding, IDS: tl.constexpr, COLUMNS: tl.constexpr
):
    row, columns, inside, target = _block(ids, num_ids, width, num_rows, IDS, COLUMNS)
    book = (columns // part)[None, :]
    code = tl.minimum(_code(packed, nbytes, row[:, None] * num_books + book, num_bits, inside), num_words - 1)
    values = tl.load(books + (book * num_words + code) * part + (columns % part)[None, :], mask=inside, other=0.0)
    tl.store(out + target, tl.where((row == padding)[:, None], 0.0, values), mask=inside)


@triton.jit(debug=True)
def _sum(
    ids, out, packed, nbytes, num_bits, books, num_books, num_words, scales, num_ids, width, num_rows, padding,
    SCALED: tl.constexpr, IDS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row, columns, inside, target = _block(ids, num_ids, width, num_rows, IDS, COLUMNS)
    values = tl.zeros((IDS, COLUMNS), tl.float32)
    for book in range(num_books):
        code = tl.minimum(_code(packed, nbytes, row * num_books + book, num_bits, row >= 0), num_words - 1)
        values += tl.load(books + (book * num_words + code)[:, None] * width + columns[None, :], mask=inside, other=0).to(tl.float32)
    if SCALED:
        values *= tl.load(scales + columns, mask=columns < width, other=0.0)[None, :]
    tl.store(out + target, tl.where((row == padding)[:, None], 0.0, values), mask=inside)


@triton.jit(debug=True)
def _levels(
    ids, out, packed, nbytes, num_bits, ranks, ranks_nbytes, rank_bits, mean, borders, num_levels, words, scales, num_words,
    num_ids, width, num_rows, padding, RANKED: tl.constexpr, IDS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row, columns, inside, target = _block(ids, num_ids, width, num_rows, IDS, COLUMNS)
    rank = row
    if RANKED:
        rank = tl.minimum(_code(ranks, ranks_nbytes, row, rank_bits, row >= 0), num_rows - 1)
    place = tl.zeros((IDS,), tl.int64)
    for level in range(num_levels):  # all rows before it have min(rank, border) codes of a level
        place += tl.minimum(rank, tl.load(borders + level))
    values = tl.load(mean + columns, mask=columns < width, other=0.0)[None, :] + tl.zeros((IDS, COLUMNS), tl.float32)
    for level in range(num_levels):
        present = rank < tl.load(borders + level)
        word = level * num_words + tl.minimum(_code(packed, nbytes, place + level, num_bits, present), num_words - 1)
        nibbles = word[:, None] * width + columns[None, :]
        read = tl.load(words + (nibbles >> 1), mask=inside & present[:, None], other=0).to(tl.int32)
        level_of = 2 * ((read >> ((nibbles & 1) * 4).to(tl.int32)) & 15) - 15
        step = tl.load(scales + word, mask=present, other=0.0).to(tl.float32) / 15
        values += tl.where(present[:, None], level_of.to(tl.float32) * step[:, None], 0.0)
    tl.store(out + target, tl.where((row == padding)[:, None], 0.0, values), mask=inside)


@triton.jit(debug=True)
def _scaled(ids, out, packed, num_bits, scales, group_size, num_groups, num_ids, width, num_rows, padding, IDS: tl.constexpr, COLUMNS: tl.constexpr):
    row, columns, inside, target = _block(ids, num_ids, width, num_rows, IDS, COLUMNS)
    first = (row[:, None] * width + columns[None, :]) * num_bits
    last = (1 << num_bits) - 1
    read = tl.load(packed + (first >> 3), mask=inside, other=0).to(tl.int64)
    code = (read >> (first & 7)) & last
    scale = tl.load(scales + row[:, None] * num_groups + (columns // group_size)[None, :], mask=inside, other=0.0).to(tl.float32)
    values = (2 * code - last).to(tl.float32) * (scale / last)
    tl.store(out + target, tl.where((row == padding)[:, None], 0.0, values), mask=inside)
