"""Codes of 1 to 16 bits in one contiguous stream of bytes.

Code m of row n takes the bits from (n * M + m) * num_bits on, lowest bit first. N rows of M codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_CODES = 2**20


def packed_nbytes(num_rows: int, codes_per_row: int, num_bits: int) -> int:
    """Bytes of a packed table of codes: only the last byte of all may have unused bits."""
    return -(-num_rows * codes_per_row * num_bits // 8)


def pack(codes: Tensor, num_bits: int) -> Tensor:
    """Packed codes: (N, M) integers in [0, 2 ** num_bits) -> (packed_nbytes,) uint8 on the same device."""
    num_rows, codes_per_row = codes.shape
    packed = torch.zeros(packed_nbytes(num_rows, codes_per_row, num_bits), dtype=torch.uint8, device=codes.device)
    pack_rows_(packed, codes, 0, num_bits)
    return packed


def pack_rows_(packed: Tensor, codes: Tensor, start: int, num_bits: int) -> None:
    """Overwrites the rows of `packed` from `start` on, in place.

    Args:
        packed: (packed_nbytes,) uint8.
        codes: (N, M) integers in [0, 2 ** num_bits).
        start: First row, a multiple of 8 so that it begins at a byte. N is a multiple of 8 too, unless these are the last rows.
        num_bits: Bits per code, 1 to 31.
    """
    assert start % 8 == 0, "a chunk begins at a whole byte"
    codes_per_row = codes.shape[1]
    chunk_rows = max(8, _CHUNK_CODES // max(codes_per_row, 1) // 8 * 8)
    for chunk in codes.split(chunk_rows):
        piece = _pack_chunk(chunk, num_bits)
        offset = start * codes_per_row * num_bits // 8
        packed[offset : offset + len(piece)] = piece
        start += chunk_rows


def pack_at_(packed: Tensor, codes: Tensor, rows: Tensor, num_bits: int) -> None:
    """Overwrites some rows of `packed`, in place, wherever they stand; slower than `pack_rows_`, which takes stretches of them.

    Args:
        packed: (packed_nbytes,) uint8.
        codes: (N, M) integers in [0, 2 ** num_bits).
        rows: (N,) int64, no row twice.
        num_bits: Bits per code, 1 to 31.
    """
    chunk_rows = max(1, _CHUNK_CODES // max(codes.shape[1], 1))
    for new, places in zip(codes.long().split(chunk_rows), rows.split(chunk_rows), strict=True):
        old = unpack_rows(packed, places, codes.shape[1], num_bits)
        first_bits = (places.unsqueeze(1) * codes.shape[1] + torch.arange(codes.shape[1], device=codes.device)) * num_bits
        first, shifts = first_bits >> 3, first_bits & 7
        # No two codes share a bit, so taking the old bits off a byte and adding the new ones is exact, modulo 256, in any order.
        for step in range((num_bits + 14) // 8):
            change = (new << shifts >> 8 * step & 255) - (old << shifts >> 8 * step & 255)
            packed.index_add_(0, (first + step).clamp(max=packed.numel() - 1).flatten(), (change & 255).to(torch.uint8).flatten())


def unpack_rows(packed: Tensor, ids: Tensor, codes_per_row: int, num_bits: int) -> Tensor:
    """Codes of some rows, without unpacking the others: (packed_nbytes,) uint8, (N,) int64 -> (N, M) int64."""
    if 8 % num_bits == 0 and codes_per_row * num_bits % 8 == 0:
        return _unpack_within_bytes(packed.view(-1, codes_per_row * num_bits // 8)[ids], num_bits)
    if num_bits == 16:
        low, high = packed.view(-1, codes_per_row, 2)[ids].long().unbind(-1)
        return low | high << 8
    return _unpack_across_bytes(packed, ids, codes_per_row, num_bits)


def unpack_at(packed: Tensor, first_bits: Tensor, num_bits: Tensor) -> Tensor:
    """Codes of up to 8 bits that begin at given bits of the stream, each of its own width.

    Args:
        packed: (bytes,) uint8.
        first_bits: (N, M) int64, the lowest bit of each code.
        num_bits: (N, M) or (N, 1) int64, 0 to 8; a code of 0 bits is 0.

    Returns:
        (N, M) int64.
    """
    first, last = first_bits >> 3, packed.numel() - 1
    # Bytes past the end hold no bit of a code, so the last one may stand in for them.
    low, high = packed[first.clamp(max=last)].long(), packed[(first + 1).clamp(max=last)].long()
    return (low | high << 8) >> (first_bits & 7) & (1 << num_bits) - 1


def _pack_chunk(codes: Tensor, num_bits: int) -> Tensor:
    """As `pack`, at one go."""
    if num_bits == 8:
        return codes.reshape(-1).to(torch.uint8)
    flat = codes.reshape(-1, 1).int()
    bits = (flat >> torch.arange(num_bits, dtype=torch.int32, device=codes.device) & 1).to(torch.uint8).flatten()
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(1, dtype=torch.uint8)


def _unpack_within_bytes(rows: Tensor, num_bits: int) -> Tensor:
    """(N, bytes per row) uint8 -> (N, M) int64, for codes of which a byte holds a whole number."""
    if num_bits == 8:
        return rows.long()
    shifts = torch.arange(0, 8, num_bits, dtype=torch.uint8, device=rows.device)
    return (rows.unsqueeze(-1) >> shifts & (1 << num_bits) - 1).flatten(1).long()


def _unpack_across_bytes(packed: Tensor, ids: Tensor, codes_per_row: int, num_bits: int) -> Tensor:
    """As `unpack_rows`, for any number of bits: the few bytes that may hold a code are read and the rest is masked."""
    first_bits = (ids.unsqueeze(1) * codes_per_row + torch.arange(codes_per_row, device=ids.device)) * num_bits
    first, last = first_bits >> 3, packed.numel() - 1
    # A byte past the end holds no bit of the code, so the last one may stand in for it.
    read = packed[first].long()
    for step in range(1, (num_bits + 14) // 8):
        read = read | packed[(first + step).clamp(max=last)].long() << 8 * step
    return read >> (first_bits & 7) & (1 << num_bits) - 1
