import numpy as np
import pytest
import torch

from leanrec.ops import packing
from leanrec.ops.packing import pack, pack_at_, pack_rows_, packed_nbytes, unpack_at, unpack_rows


def random_codes(num_rows, codes_per_row, num_bits):
    return torch.randint(2**num_bits, (num_rows, codes_per_row), generator=torch.Generator().manual_seed(num_rows))


def numpy_pack(codes, num_bits):
    """Every code as bits, lowest first, one after the other."""
    bits = (codes.reshape(-1, 1).numpy() >> np.arange(num_bits)) & 1
    return np.packbits(bits.reshape(-1).astype(np.uint8), bitorder="little")


@pytest.mark.parametrize("num_bits", range(1, 17))
@pytest.mark.parametrize(("num_rows", "codes_per_row"), [(1, 1), (7, 3), (100, 4), (13, 16), (33, 8)])
def test_packed_bytes_are_numpys_and_any_rows_unpack(num_bits, num_rows, codes_per_row):
    codes = random_codes(num_rows, codes_per_row, num_bits)
    packed = pack(codes, num_bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_nbytes(num_rows, codes_per_row, num_bits) == -(-num_rows * codes_per_row * num_bits // 8)
    assert packed.numpy().tobytes() == numpy_pack(codes, num_bits).tobytes()
    ids = torch.randint(num_rows, (50,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(unpack_rows(packed, ids, codes_per_row, num_bits), codes[ids])


@pytest.mark.parametrize("num_bits", [1, 4, 8, 11, 16])
def test_no_rows_and_no_ids_are_fine(num_bits):
    nothing, none = pack(torch.zeros(0, 3, dtype=torch.int64), num_bits), torch.zeros(0, dtype=torch.int64)
    assert len(nothing) == 0
    assert unpack_rows(nothing, none, 3, num_bits).shape == (0, 3)
    assert unpack_rows(pack(random_codes(5, 3, num_bits), num_bits), none, 3, num_bits).shape == (0, 3)


@pytest.mark.parametrize("num_bits", [3, 8, 13])
def test_packing_in_pieces_is_packing_at_once(num_bits, monkeypatch):
    codes = random_codes(1001, 3, num_bits)
    at_once = pack(codes, num_bits)
    monkeypatch.setattr(packing, "_CHUNK_CODES", 100)
    packed = torch.full_like(at_once, 255)
    for start in range(0, 1001, 248):
        pack_rows_(packed, codes[start : start + 248], start, num_bits)
    assert torch.equal(packed, at_once)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_codes_of_any_integer_type_pack(dtype):
    codes = random_codes(9, 3, 6)
    assert torch.equal(pack(codes.to(dtype), 6), pack(codes, 6))


@pytest.mark.parametrize("num_bits", [2, 8, 11, 16])
def test_unpacking_exports(num_bits):
    class Unpack(torch.nn.Module):
        def forward(self, packed, ids):
            return unpack_rows(packed, ids, 4, num_bits)

    codes = random_codes(20, 4, num_bits)
    packed, ids = pack(codes, num_bits), torch.tensor([19, 0, 7])
    program = torch.export.export(Unpack(), (packed, ids), dynamic_shapes=(None, {0: torch.export.Dim("batch")})).module()
    longer = torch.arange(20)
    assert torch.equal(program(packed, longer), codes)


def test_codes_of_several_widths_unpack_from_where_they_begin():
    widths = torch.arange(9).repeat(20)
    codes = torch.randint(256, (180,), generator=torch.Generator().manual_seed(0)) & (1 << widths) - 1
    bits = [code >> bit & 1 for code, width in zip(codes.tolist(), widths.tolist(), strict=True) for bit in range(width)]
    packed = torch.from_numpy(np.packbits(np.array(bits, dtype=np.uint8), bitorder="little"))
    assert torch.equal(unpack_at(packed, (widths.cumsum(0) - widths).view(60, 3), widths.view(60, 3)), codes.view(60, 3))


@pytest.mark.parametrize("num_bits", [1, 3, 4, 7, 8, 11, 16])
def test_rows_packed_here_and_there_leave_the_others_as_they_are(num_bits):
    draws = torch.Generator().manual_seed(num_bits)
    codes, others = torch.randint(2**num_bits, (2, 101, 3), generator=draws)
    rows = torch.randperm(101, generator=draws)[:40]
    packed = pack(codes, num_bits)
    pack_at_(packed, others[rows], rows, num_bits)
    expected = codes.clone()
    expected[rows] = others[rows]
    assert torch.equal(packed, pack(expected, num_bits))
