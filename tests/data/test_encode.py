import numpy as np
import polars as pl
import pytest

from leanrec.data.encode import _standardization


@pytest.mark.parametrize(
    "training",
    [
        pytest.param([0.1] * 409, id="one number"),
        pytest.param([0.1 + 0.2, 0.3] * 200, id="one number, computed in two ways"),
        pytest.param([-1e300] * 3, id="a large one"),
        pytest.param([0.0] * 9, id="zero"),
        pytest.param([7.5], id="one row"),
        pytest.param([None] * 9, id="none"),
    ],
)
def test_a_constant_column_is_not_divided_by_the_noise_of_rounding(tmp_path, training):
    (tmp_path / "train").mkdir()
    pl.DataFrame({"x": training}, schema={"x": pl.Float64}).write_parquet(tmp_path / "train" / "part-00000.parquet")
    transform = _standardization(tmp_path, "x")
    assert transform["std"] == 1.0
    assert transform["mean"] == pytest.approx(training[0] or 0.0)


def test_small_deviations_of_large_numbers_are_kept(tmp_path):
    training = 1.7e9 + np.arange(409.0)  # seconds of seven minutes
    (tmp_path / "train").mkdir()
    pl.DataFrame({"x": training}).write_parquet(tmp_path / "train" / "part-00000.parquet")
    assert _standardization(tmp_path, "x")["std"] == pytest.approx(training.std())
