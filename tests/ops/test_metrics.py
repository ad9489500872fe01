import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

from leanrec.ops.metrics import auc, calibration_error, calibration_ratio, log_loss, normalized_entropy


def _log(num_rows=2_000, *, seed=0, decimals=None):
    """Labels drawn from the very probabilities that the logits give; few decimals make ties."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, generator=generator, dtype=torch.float64) - 1
    labels = torch.bernoulli(logits.sigmoid(), generator=generator)
    return labels, logits if decimals is None else logits.round(decimals=decimals)


@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_auc_is_that_of_scikit_learn_also_with_ties(decimals):
    labels, logits = _log(decimals=decimals)
    assert auc(labels, logits) == pytest.approx(sklearn_metrics.roc_auc_score(labels.numpy(), logits.numpy()), abs=1e-14)


def test_auc_is_the_share_of_pairs_in_order():
    labels, logits = _log(300, decimals=1)
    clicks, others = logits[labels == 1], logits[labels == 0]
    pairs = (clicks[:, None] > others).double() + (clicks[:, None] == others).double() / 2
    assert auc(labels, logits) == pytest.approx(pairs.mean().item(), abs=1e-14)


def test_auc_of_one_value_for_all_rows_is_a_half():
    assert auc(torch.tensor([0, 1, 1, 0, 1]), torch.full((5,), 3.0)) == 0.5


def test_auc_tells_apart_logits_whose_probabilities_are_both_one():
    logits = torch.tensor([50.0, 60.0])
    assert torch.equal(logits.double().sigmoid(), torch.ones(2, dtype=torch.float64))
    assert auc(torch.tensor([0, 1]), logits) == 1.0


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.float32])
def test_labels_of_any_dtype_give_the_same(dtype):
    labels, logits = _log()
    assert auc(labels.to(dtype), logits) == auc(labels, logits)
    assert log_loss(labels.to(dtype), logits) == log_loss(labels, logits)


@pytest.mark.parametrize("label", [0, 1])
def test_auc_of_one_class_is_an_error_that_counts_both(label):
    with pytest.raises(ValueError, match=rf"AUC needs 1 or more rows of each label, but {4 * label} rows have label 1"):
        auc(torch.full((4,), label), torch.randn(4, generator=torch.Generator().manual_seed(0)))


def test_log_loss_is_that_of_scikit_learn():
    labels, logits = _log()
    assert log_loss(labels, logits) == pytest.approx(sklearn_metrics.log_loss(labels.numpy(), logits.sigmoid().numpy()), rel=1e-12)


def test_log_loss_of_extreme_logits_is_their_size_where_wrong_and_nothing_where_right():
    assert log_loss(torch.tensor([0, 1]), torch.tensor([1e4, 1e4])) == pytest.approx(5e3)
    assert log_loss(torch.tensor([1, 0]), torch.tensor([800.0, -800.0])) == 0.0
    # -log(1 - e^-30) = e^-30 to first order: lost where the probability is rounded to 1 first
    assert log_loss(torch.tensor([1]), torch.tensor([30.0])) == pytest.approx(np.exp(-30.0), rel=1e-9)


def test_normalized_entropy_of_always_the_base_rate_is_one():
    labels, _ = _log()
    base_rate = labels.mean()
    assert normalized_entropy(labels, torch.full_like(labels, torch.logit(base_rate).item())) == pytest.approx(1.0, abs=1e-12)


def test_normalized_entropy_is_log_loss_over_entropy():
    labels, logits = _log()
    rate = labels.mean().item()
    entropy = -rate * np.log(rate) - (1 - rate) * np.log(1 - rate)
    assert normalized_entropy(labels, logits) == pytest.approx(log_loss(labels, logits) / entropy, rel=1e-12)


def test_calibration_ratio_is_predicted_over_actual_clicks():
    assert calibration_ratio(torch.tensor([1, 0, 0, 0]), torch.zeros(4)) == 2.0


def test_calibration_ratio_without_clicks_is_an_error():
    with pytest.raises(ValueError, match="all 3 labels are 0"):
        calibration_ratio(torch.zeros(3), torch.zeros(3))


def test_calibration_error_is_the_weighted_gap_of_equal_bins():
    labels, logits = _log(2_000)
    order = logits.argsort()
    predicted, actual = logits.sigmoid()[order].view(20, 100).mean(1), labels[order].view(20, 100).mean(1)
    assert calibration_error(labels, logits) == pytest.approx((predicted - actual).abs().mean().item(), abs=1e-12)


def test_calibration_error_does_not_depend_on_the_order_of_tied_rows():
    labels, logits = _log(decimals=0)
    shuffle = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    assert calibration_error(labels[shuffle], logits[shuffle]) == pytest.approx(calibration_error(labels, logits), abs=1e-12)


def test_calibration_error_of_a_calibrated_model_is_its_documented_noise():
    num_rows = 40_000
    labels = torch.bernoulli(torch.full((num_rows,), 0.2), generator=torch.Generator().manual_seed(0))
    # Rising by next to nothing: distinct ranks, so 20 full bins, each of prediction 0.2.
    logits = torch.logit(torch.tensor(0.2, dtype=torch.float64)) + torch.linspace(-1e-9, 1e-9, num_rows, dtype=torch.float64)
    noise = 0.8 * (0.2 * 0.8 * 20 / num_rows) ** 0.5
    assert calibration_error(labels, logits) == pytest.approx(noise, rel=0.4)  # 20 gaps: a standard error of 17%


def test_calibration_error_sees_a_shift_that_auc_does_not():
    labels, logits = _log(20_000)
    assert auc(labels, logits + 2) == auc(labels, logits)
    assert calibration_error(labels, logits + 2) > 0.3 > 0.02 > calibration_error(labels, logits)


@pytest.mark.parametrize(
    ("labels", "logits", "message"),
    [
        (torch.tensor([0, 1, 1]), torch.zeros(2), r"labels is \(3,\) int64 but logits is \(2,\) float32"),
        (torch.tensor([[0], [1]]), torch.zeros(2), r"labels is \(2, 1\) int64"),
        (torch.tensor([0.0, 2.0]), torch.zeros(2), "1 of 2 labels are neither 0 nor 1, the first of them 2.0"),
        (torch.tensor([0.0, float("nan")]), torch.zeros(2), "1 of 2 labels are neither 0 nor 1"),
        (torch.tensor([0, 1]), torch.tensor([0.0, float("nan")]), "1 of 2 logits are NaN or infinite"),
        (torch.tensor([]), torch.tensor([]), "at least one row"),
    ],
)
def test_wrong_input_is_named_in_one_line(labels, logits, message):
    for metric in (auc, log_loss, normalized_entropy, calibration_ratio, calibration_error):
        with pytest.raises(ValueError, match=message) as error:
            metric(labels, logits)
        assert "\n" not in str(error.value)
