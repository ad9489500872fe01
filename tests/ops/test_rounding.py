import pytest
import torch

from leanrec.ops.rounding import (
    GAUSSIAN_ERRORS,
    GAUSSIAN_SCALES,
    dequantize,
    fake_quantize,
    largest_magnitudes,
    least_squares_scales,
    quantize,
)


def rows(num_rows=200, width=16):
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(0))


def squared_error(values, scales, num_bits):
    return (values - dequantize(quantize(values, scales, num_bits), scales.float(), num_bits)).square().sum(1)


@pytest.mark.parametrize("num_bits", [2, 4, 8])
def test_the_nearest_of_all_levels_is_taken(num_bits):
    values, scales = rows(), torch.full((200, 1), 1.5)
    levels = torch.linspace(-1.5, 1.5, 2**num_bits)
    expected = (values.unsqueeze(2) - levels).abs().argmin(2)
    found = quantize(values, scales, num_bits)
    assert (found == expected).float().mean() > 0.999  # a value halfway between two levels may go either way
    torch.testing.assert_close(dequantize(found, scales, num_bits), levels[found.long()])


def test_the_largest_magnitude_is_met_exactly():
    values = torch.tensor([[0.5, -2.0, 1.0], [0.0, 0.25, 0.0]])
    scales = largest_magnitudes(values)
    assert scales.flatten().tolist() == [2.0, 0.25]
    assert dequantize(quantize(values, scales, 8), scales.float(), 8)[[0, 1], [1, 1]].tolist() == [-2.0, 0.25]


def test_zeros_stay_zeros():
    scales = least_squares_scales(torch.zeros(3, 4), 4)
    assert not dequantize(quantize(torch.zeros(3, 4), scales, 4), scales.float(), 4).any()


@pytest.mark.parametrize(("num_bits", "gain"), [(2, 0.75), (4, 0.95)])
def test_clipping_lowers_the_squared_error(num_bits, gain):
    values = rows()
    clipped = squared_error(values, least_squares_scales(values, num_bits), num_bits)
    whole = squared_error(values, largest_magnitudes(values), num_bits)
    assert (clipped <= whole).all()
    assert clipped.sum() < gain * whole.sum()


def test_scales_are_as_good_as_those_of_a_fine_search():
    values = rows(50)
    fine = torch.stack([squared_error(values, largest_magnitudes(values) * share, 2) for share in torch.linspace(0.05, 1, 500)])
    assert squared_error(values, least_squares_scales(values, 2), 2).sum() < 1.05 * fine.amin(0).sum()


def test_magnitudes_beyond_float16_are_cut_to_its_range():
    assert largest_magnitudes(torch.tensor([[1e9, 1.0]])).isfinite().all()


@pytest.mark.parametrize("num_bits", range(9))
def test_the_best_even_levels_for_a_gaussian_have_the_scale_and_the_error_listed(num_bits):
    normal = torch.distributions.Normal(0.0, 1.0)
    values = normal.icdf((torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000).unsqueeze(1)

    def error(scale):
        return float((fake_quantize(values, torch.tensor([[scale]], dtype=torch.float64), torch.tensor([[num_bits]])) - values).square().mean())

    scale, listed = GAUSSIAN_SCALES[num_bits], GAUSSIAN_ERRORS[num_bits]
    assert error(scale) == pytest.approx(listed, rel=1e-2)  # the tail ends at 4.7 deviations
    if num_bits:
        assert error(scale) < min(error(scale * 0.97), error(scale * 1.03))


def test_rounding_in_training_gives_the_values_of_the_stored_codes():
    values, scales = rows(), rows(200, 1).abs()
    for num_bits in (1, 3, 8):
        expected = dequantize(quantize(values, scales, num_bits), scales, num_bits)
        torch.testing.assert_close(fake_quantize(values, scales, torch.full((200, 1), num_bits)), expected, rtol=1e-4, atol=1e-6)
    assert not fake_quantize(values, scales, torch.zeros(200, 1, dtype=torch.int64)).any()


def test_gradients_of_rounding_are_those_of_learned_step_sizes():
    values, scales = rows().requires_grad_(), torch.full((200, 1), 0.8, requires_grad=True)
    rounded = fake_quantize(values, scales, torch.full((200, 1), 3))
    rounded.sum().backward()
    inside = values.abs() < 0.8
    assert torch.equal(values.grad, inside.float())
    expected = torch.where(inside, (rounded - values) / 0.8, values.sign()).sum(1, keepdim=True)  # Esser et al., equation 3
    torch.testing.assert_close(scales.grad, expected.detach(), rtol=1e-4, atol=1e-5)
