import pytest
import torch

from leanrec.methods import Scalar


def make_weight(num_embeddings=500, embedding_dim=16):
    return torch.randn(num_embeddings, embedding_dim, generator=torch.Generator().manual_seed(0))


def share_lost(method, weight):
    rows = method.build(*weight.shape).fit(weight).decode()
    return float((rows - weight).square().sum() / weight.square().sum())


def test_8_bits_are_within_half_a_step_of_the_largest_magnitude():
    weight = make_weight()
    rows = Scalar(num_bits=8).build(500, 16).fit(weight).decode()
    half_steps = weight.abs().amax(1, keepdim=True) / 255
    assert ((rows - weight).abs() <= half_steps * 1.01 + 1e-3 * weight.abs()).all()  # 1e-3: a float16 scale may be that much below the largest


@pytest.mark.parametrize(("num_bits", "most"), [(8, 1e-4), (4, 0.01154), (2, 0.1188)])
def test_loses_no_more_than_the_best_even_levels_for_a_gaussian(num_bits, most):
    # Max, Quantizing for minimum distortion, 1960, table II, for 4 and 16 even levels of one scale for all rows.
    assert share_lost(Scalar(num_bits=num_bits), make_weight(5000)) < most


def test_smaller_groups_lose_less_and_cost_more():
    weight = make_weight()
    whole, halves = Scalar(num_bits=4), Scalar(num_bits=4, group_size=8)
    assert share_lost(halves, weight) < share_lost(whole, weight)
    assert halves.nbytes(500, 16) - whole.nbytes(500, 16) == 500 * 2


@pytest.mark.parametrize("group_size", [3, 5, 16, 100])
def test_the_last_group_may_be_short(group_size):
    weight = make_weight(100, 7)
    method = Scalar(num_bits=8, group_size=group_size)
    table = method.build(100, 7).fit(weight)
    assert table.scales.shape == (100, -(-7 // min(group_size, 7)))
    torch.testing.assert_close(table.scales[:, -1].float(), weight[:, (7 - 1) // group_size * group_size :].abs().amax(1), rtol=1e-3, atol=0)
    torch.testing.assert_close(table.decode(), weight, rtol=0, atol=0.02)


@pytest.mark.parametrize("num_bits", [2, 4, 8])
@pytest.mark.parametrize("embedding_dim", [1, 3, 7])
def test_odd_dimensions_pack_without_a_gap(num_bits, embedding_dim):
    method = Scalar(num_bits=num_bits)
    assert method.build(11, embedding_dim).nbytes == -(-11 * embedding_dim * num_bits // 8) + 11 * 2


@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_a_single_column_is_as_precise_as_its_scale(num_bits):
    weight = make_weight(100, 1)
    torch.testing.assert_close(Scalar(num_bits=num_bits).build(100, 1).fit(weight).decode(), weight, rtol=1e-3, atol=1e-6)


def test_weights_far_smaller_than_float16_steps_keep_their_shape():
    weight = make_weight() * 1e-4  # the start of many recommenders' tables
    assert share_lost(Scalar(num_bits=8), weight) < 1e-4


@pytest.mark.parametrize("setting", [{"num_bits": 3}, {"num_bits": 16}, {"group_size": -1}])
def test_settings_out_of_range_are_errors(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"Scalar has {name}={value}. Choose"):
        Scalar(**setting).build(100, 8)
