import pytest

from leanrec.methods import MixedDim


def test_dimensions_are_powers_of_popularity_in_blocks_of_equal_popularity():
    shapes = MixedDim(base_dim=16, alpha=0.5, num_blocks=4).shapes(10_000, 32)
    # Under Zipf's law ranks 1 to 10, 10 to 100, ... are asked for alike, log 10 each; a row's share is one over the rows of its block.
    expected = [round(16 * (10 / rows) ** 0.5) for rows in (10, 90, 900, 9000)]
    assert [shape.last for shape in shapes] == [10, 100, 1000, 10_000]
    assert [shape.width for shape in shapes] == [32, *expected[1:]] == [32, 5, 2, 1]  # 10 rows of 16 with a projection take more than 10 of 32


def test_a_temperature_of_zero_makes_all_dimensions_alike():
    assert {shape.width for shape in MixedDim(base_dim=2, alpha=0.0, num_blocks=3).shapes(10_000, 16)} == {2}


def test_dimensions_are_no_less_than_asked():
    assert [MixedDim(base_dim=2, alpha=0.5, min_dim=least).shapes(10_000, 16)[-1].width for least in (0, 1)] == [0, 1]


def test_bytes_are_coordinates_projections_and_biases():
    expected = 10 * 32 + (90 * 5 + 5 * 32 + 32) + (900 * 2 + 2 * 32 + 32) + (9000 + 32 + 32)
    assert MixedDim(base_dim=16, alpha=0.5, num_blocks=4).nbytes(10_000, 32) == 4 * expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"base_dim": 17}, r"base_dim=17, but embedding_dim=16\. Choose 1 to 16"), ({"alpha": 1.5}, r"alpha=1\.5"), ({"num_blocks": 0}, "num_blocks=0")],
)
def test_settings_out_of_range_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        MixedDim(**settings).build(1000, 16)
