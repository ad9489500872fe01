import json

import pytest
import torch
from sklearn import metrics as sklearn_metrics

from leanrec.evaluate import BUCKETS, compare_predictions, evaluate_predictions, popularity_buckets
from leanrec.ops.intervals import delong, delong_difference
from leanrec.ops.metrics import auc, calibration_error, calibration_ratio, log_loss, normalized_entropy


def _log(num_rows=2_000, *, seed=0):
    """Labels, the logits that they were drawn from, and those logits blurred."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, generator=generator) - 1
    return torch.bernoulli(logits.sigmoid(), generator=generator), logits, logits + 0.5 * torch.randn(num_rows, generator=generator)


def _names(counts, **shares):
    return [BUCKETS[code] for code in popularity_buckets(torch.tensor(counts), **shares)]


def test_evaluation_holds_every_metric():
    labels, logits, _ = _log()
    result = evaluate_predictions(labels, logits)
    area = delong(labels, logits)
    assert result.rows == 2_000
    assert (result.auc, result.auc_low, result.auc_high) == (area.value, area.low, area.high)
    assert result.auc == pytest.approx(auc(labels, logits), abs=1e-14)
    assert result.logloss == log_loss(labels, logits)
    assert result.normalized_entropy == normalized_entropy(labels, logits)
    assert result.calibration_ratio == calibration_ratio(labels, logits)
    assert result.calibration_error == calibration_error(labels, logits)
    assert result.buckets is None


def test_head_covers_half_of_the_occurrences_and_torso_the_next_two_fifths():
    #               padding, unknown, then 100 occurrences of known ids
    counts = [0, 0, 30, 20, 15, 10, 10, 5, 4, 3, 2, 1]
    assert _names(counts) == ["unseen"] * 2 + ["head"] * 2 + ["torso"] * 4 + ["tail"] * 4


def test_id_that_crosses_a_border_belongs_to_the_hotter_bucket():
    assert _names([0, 0, 40, 20, 20, 19, 1]) == ["unseen", "unseen", "head", "head", "torso", "torso", "tail"]


def test_buckets_follow_counts_where_ids_are_in_no_order():
    assert _names([0, 0, 2, 58, 0, 40]) == ["unseen", "unseen", "tail", "head", "unseen", "torso"]


def test_padding_and_unknown_are_unseen_and_no_part_of_the_occurrences():
    assert _names([900, 9_000, 6, 4]) == ["unseen", "unseen", "head", "torso"]


def test_one_id_is_the_head_and_no_occurrence_is_no_bucket():
    assert _names([0, 0, 7]) == ["unseen", "unseen", "head"]
    assert _names([0, 5, 0]) == ["unseen"] * 3


def test_shares_move_the_borders():
    assert _names([0, 0, 25, 25, 25, 25], head=0.25, torso=0.25) == ["unseen", "unseen", "head", "torso", "tail", "tail"]


def test_buckets_of_zipf_counts_hold_the_asked_shares():
    counts = (1e6 / torch.arange(1, 50_001)).long()
    counts[:2] = 0
    buckets = popularity_buckets(counts)
    assert buckets.dtype == torch.int8 and buckets.shape == counts.shape
    shares = [(counts[buckets == code].sum() / counts.sum()).item() for code in range(4)]
    assert shares == pytest.approx([0.5, 0.4, 0.1, 0.0], abs=0.02)


@pytest.mark.parametrize("counts", [torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]]), torch.tensor([0, -1])])
def test_counts_that_are_none_are_an_error(counts):
    with pytest.raises(ValueError, match=r"popularity: counts is .* must be one integer from 0 for each id"):
        popularity_buckets(counts)


@pytest.mark.parametrize("shares", [{"head": 0.7}, {"head": -0.1}, {"torso": -0.4}])
def test_impossible_shares_are_an_error(shares):
    with pytest.raises(ValueError, match="must be shares from 0 that add to at most 1"):
        popularity_buckets(torch.tensor([0, 0, 1]), **shares)


def test_buckets_split_the_rows_and_score_each_part():
    labels, logits, _ = _log()
    counts = torch.tensor([0, 0, 60, 35, 5, 0])
    ids = torch.randint(1, 6, (2_000,), generator=torch.Generator().manual_seed(1))
    buckets = evaluate_predictions(labels, logits, bucket_ids=ids, counts=counts).buckets
    assert tuple(buckets) == BUCKETS
    parts = {"head": ids == 2, "torso": ids == 3, "tail": ids == 4, "unseen": (ids == 1) | (ids == 5)}
    for name, rows in parts.items():
        part = buckets[name]
        assert part.rows == int(rows.sum())
        assert part.share == part.rows / 2_000
        assert part.auc == pytest.approx(sklearn_metrics.roc_auc_score(labels[rows], logits[rows]), abs=1e-12)
        assert part.logloss == pytest.approx(sklearn_metrics.log_loss(labels[rows], logits[rows].double().sigmoid()))
        assert part.calibration_ratio == pytest.approx((logits[rows].sigmoid().mean() / labels[rows].mean()).item(), rel=1e-5)


def test_bucket_without_rows_clicks_or_others_has_none_there():
    labels, logits = torch.tensor([0, 1, 0, 0, 1, 1]), torch.arange(6.0)
    ids = torch.tensor([2, 2, 3, 3, 4, 4])
    buckets = evaluate_predictions(labels, logits, bucket_ids=ids, counts=torch.tensor([0, 0, 60, 35, 5])).buckets
    assert (buckets["torso"].auc, buckets["torso"].calibration_ratio) == (None, None)
    assert buckets["torso"].logloss > 0
    assert buckets["tail"].auc is None and buckets["tail"].calibration_ratio > 0
    unseen = buckets["unseen"]
    assert (unseen.rows, unseen.share, unseen.auc, unseen.logloss, unseen.calibration_ratio) == (0, 0.0, None, None, None)


def test_bucket_ids_of_another_field_are_an_error():
    labels, logits, _ = _log(10, seed=1)
    with pytest.raises(ValueError, match="bucket_ids holds 7, but counts has ids 0 to 4"):
        evaluate_predictions(labels, logits, bucket_ids=torch.full((10,), 7), counts=torch.zeros(5, dtype=torch.int64))


def test_bucket_ids_of_other_rows_are_an_error():
    labels, logits, _ = _log(10, seed=1)
    with pytest.raises(ValueError, match=r"bucket_ids is \(9,\) int64, and must be one id for each of the 10 rows"):
        evaluate_predictions(labels, logits, bucket_ids=torch.ones(9, dtype=torch.int64), counts=torch.zeros(5, dtype=torch.int64))


def test_bucket_ids_without_counts_are_an_error():
    labels, logits, _ = _log(10, seed=1)
    with pytest.raises(ValueError, match="bucket_ids and counts go together"):
        evaluate_predictions(labels, logits, bucket_ids=torch.ones(10, dtype=torch.int64))


def test_comparison_is_model_minus_baseline():
    labels, good, blurred = _log()
    result = compare_predictions(labels, blurred, good, num_resamples=200)
    assert result.rows == 2_000
    assert result.auc == delong_difference(labels, blurred, good)
    assert result.auc.difference < 0 < result.logloss.difference
    assert result.logloss.difference == pytest.approx(log_loss(labels, blurred) - log_loss(labels, good), abs=1e-12)
    assert result.logloss.low < result.logloss.difference < result.logloss.high


def test_comparison_repeats_with_its_seed():
    labels, a, b = _log(500)
    assert compare_predictions(labels, a, b, num_resamples=50) == compare_predictions(labels, a, b, num_resamples=50)
    assert compare_predictions(labels, a, b, num_resamples=50) != compare_predictions(labels, a, b, seed=1, num_resamples=50)


def test_comparison_of_other_rows_is_an_error():
    labels, a, b = _log(500)
    with pytest.raises(ValueError, match=r"labels is \(500,\) float32 but logits is \(499,\) float32"):
        compare_predictions(labels, a, b[:499])


def test_wider_confidence_is_a_wider_interval():
    labels, a, b = _log(500)
    narrow, wide = (compare_predictions(labels, a, b, num_resamples=50, confidence=confidence) for confidence in (0.9, 0.99))
    assert wide.auc.high - wide.auc.low > narrow.auc.high - narrow.auc.low
    assert wide.logloss.high - wide.logloss.low > narrow.logloss.high - narrow.logloss.low


def test_results_are_json():
    labels, a, b = _log(500)
    ids, counts = torch.full((500,), 2), torch.tensor([0, 0, 1])
    record = json.loads(json.dumps(evaluate_predictions(labels, a, bucket_ids=ids, counts=counts).to_dict()))
    assert record["buckets"]["head"]["rows"] == 500 and record["buckets"]["tail"]["auc"] is None
    comparison = compare_predictions(labels, a, b, num_resamples=50)
    assert json.loads(json.dumps(comparison.to_dict()))["auc"]["low"] == comparison.auc.low


def test_evaluation_reads_as_a_table():
    labels, logits, _ = _log()
    result = evaluate_predictions(labels, logits, bucket_ids=torch.full((2_000,), 2), counts=torch.tensor([0, 0, 1]), confidence=0.9)
    cells = [line.split() for line in str(result).splitlines()]
    assert ["rows", "2,000"] in cells
    assert ["AUC", f"{result.auc:.5f}"] in cells
    assert ["90%", "interval", "of", "AUC", f"{result.auc_low:.5f}", "to", f"{result.auc_high:.5f}"] in cells
    assert ["head", "2,000", "100.0%", f"{result.auc:.5f}", f"{result.logloss:.5f}", f"{result.calibration_ratio:.5f}"] in cells
    assert ["tail", "0", "0.0%", "-", "-", "-"] in cells


def test_comparison_reads_as_a_table():
    labels, a, b = _log()
    result = compare_predictions(labels, b, a, num_resamples=50)
    cells = [line.split() for line in str(result).splitlines()]
    area = result.auc
    assert area.p_value < 1e-4
    assert ["AUC", f"{area.difference:+.5f}", f"{area.low:+.5f}", "to", f"{area.high:+.5f}", "<0.0001"] in cells
    assert ["AUC", "+0.00000", "+0.00000", "to", "+0.00000", "1.0000"] in [
        line.split() for line in str(compare_predictions(labels, a, a)).splitlines()
    ]
    assert "95% interval" in str(result)
