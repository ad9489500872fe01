import math
import statistics

import pytest
import torch
from scipy import stats

from leanrec.ops.intervals import bootstrap_difference, combine_seeds, delong, delong_difference, seed_interval
from leanrec.ops.metrics import auc, calibration_error, calibration_ratio, log_loss, normalized_entropy


def _log(num_rows, *, seed, noise=0.5, decimals=None):
    """Labels, the logits that they were drawn from, and those logits blurred."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, generator=generator, dtype=torch.float64) - 1
    labels = torch.bernoulli(logits.sigmoid(), generator=generator)
    blurred = logits + noise * torch.randn(num_rows, generator=generator, dtype=torch.float64)
    return (labels, logits, blurred) if decimals is None else (labels, logits.round(decimals=decimals), blurred.round(decimals=decimals))


def _pair_kernels(labels, *logits):
    """DeLong's psi for every click and other row, for each logits: (C, clicks, others)."""
    pairs = [values[labels == 1][:, None] - values[labels == 0] for values in logits]
    return torch.stack([(pair > 0).double() + (pair == 0).double() / 2 for pair in pairs])


def _naive_covariance(labels, *logits):
    """S = S10 / m + S01 / n, from all pairs."""
    psi = _pair_kernels(labels, *logits)
    _, num_clicks, num_others = psi.shape
    return torch.cov(psi.mean(2)) / num_clicks + torch.cov(psi.mean(1)) / num_others


@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_delong_is_the_formula_over_all_pairs(decimals):
    labels, logits, _ = _log(300, seed=0, decimals=decimals)
    result = delong(labels, logits)
    assert result.value == pytest.approx(auc(labels, logits), abs=1e-14)
    assert result.standard_error == pytest.approx(_naive_covariance(labels, logits).sqrt().item(), rel=1e-10)
    assert (result.high - result.value) / result.standard_error == pytest.approx(stats.norm.ppf(0.975))
    assert (result.value - result.low) / result.standard_error == pytest.approx(stats.norm.ppf(0.975))


@pytest.mark.parametrize("decimals", [None, 1, 0])
def test_delong_difference_is_the_formula_over_all_pairs(decimals):
    labels, a, b = _log(300, seed=1, decimals=decimals)
    result = delong_difference(labels, a, b, confidence=0.9)
    covariance = _naive_covariance(labels, a, b)
    error = (covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]).sqrt().item()
    assert result.difference == pytest.approx(auc(labels, a) - auc(labels, b), abs=1e-14)
    assert result.standard_error == pytest.approx(error, rel=1e-9)
    assert result.high - result.low == pytest.approx(2 * stats.norm.ppf(0.95) * error)
    assert result.p_value == pytest.approx(2 * stats.norm.sf(abs(result.difference) / error))


def test_delong_agrees_with_a_bootstrap_of_the_rows():
    labels, a, b = _log(1_000, seed=2)
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(1_000, (1_000,), generator=generator) for _ in range(400)]
    areas = [(auc(labels[rows], a[rows]), auc(labels[rows], b[rows])) for rows in draws]
    # 400 resamples know a standard deviation to 1 / sqrt(800) = 3.5%.
    assert delong(labels, a).standard_error == pytest.approx(statistics.stdev(first for first, _ in areas), rel=0.12)
    assert delong_difference(labels, a, b).standard_error == pytest.approx(statistics.stdev(first - second for first, second in areas), rel=0.12)


def test_delong_interval_covers_the_truth_95_times_in_100():
    # Two normal classes at distance d: the true AUC is Phi(d / sqrt 2).
    generator, distance, repeats = torch.Generator().manual_seed(0), 1.0, 1_000
    truth = stats.norm.cdf(distance / math.sqrt(2))
    labels = torch.arange(200) % 2
    results = [delong(labels, torch.randn(200, generator=generator) + distance * labels) for _ in range(repeats)]
    covered = sum(result.low <= truth <= result.high for result in results) / repeats
    assert covered == pytest.approx(0.95, abs=0.025)  # three standard errors of 1,000 trials are 0.021


def test_delong_difference_covers_the_truth_95_times_in_100():
    generator, repeats = torch.Generator().manual_seed(0), 1_000
    truth = stats.norm.cdf(1.0 / math.sqrt(2)) - stats.norm.cdf(0.8 / math.sqrt(2))
    labels = torch.arange(300) % 2
    covered = 0
    for _ in range(repeats):
        shared, own_a, own_b = torch.randn(3, 300, generator=generator)
        a, b = 0.8 * shared + 0.6 * own_a + labels, 0.8 * shared + 0.6 * own_b + 0.8 * labels
        result = delong_difference(labels, a, b)
        covered += result.low <= truth <= result.high
    assert covered / repeats == pytest.approx(0.95, abs=0.025)


def test_same_ranking_has_no_difference_and_p_one():
    labels, logits, _ = _log(500, seed=3)
    result = delong_difference(labels, logits, 2 * logits + 7)
    assert (result.difference, result.low, result.high, result.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_difference_turns_its_sign_with_the_order():
    labels, a, b = _log(500, seed=3)
    forth, back = delong_difference(labels, a, b), delong_difference(labels, b, a)
    assert (forth.difference, forth.low, forth.high) == pytest.approx((-back.difference, -back.high, -back.low), abs=1e-15)
    assert forth.p_value == pytest.approx(back.p_value)


def test_perfect_ranking_has_an_interval_of_no_width_inside_one():
    labels = torch.tensor([0, 0, 1, 1])
    assert delong(labels, torch.tensor([0.0, 1.0, 2.0, 3.0])).high == 1.0
    assert delong_difference(labels, torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.zeros(4)).p_value == 0.0


def test_interval_of_auc_needs_two_rows_of_each_label():
    with pytest.raises(ValueError, match="2 or more rows of each label, but 1 rows have label 1 and 3 have label 0"):
        delong(torch.tensor([1, 0, 0, 0]), torch.zeros(4))


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_confidence_outside_zero_and_one_is_an_error(confidence):
    labels, logits, _ = _log(100, seed=0)
    with pytest.raises(ValueError, match=r"between 0 and 1, such as 0\.95"):
        delong(labels, logits, confidence=confidence)


def test_bootstrap_differences_are_those_of_the_metrics():
    labels, a, b = _log(3_000, seed=4, decimals=2)
    results = bootstrap_difference(labels, a, b, generator=torch.Generator().manual_seed(0), num_resamples=2)
    metrics = {
        "logloss": log_loss,
        "normalized_entropy": normalized_entropy,
        "calibration_ratio": calibration_ratio,
        "calibration_error": calibration_error,
    }
    assert {name: result.difference for name, result in results.items()} == pytest.approx(
        {name: metric(labels, a) - metric(labels, b) for name, metric in metrics.items()}, abs=1e-12
    )


@pytest.mark.parametrize("num_rows", [2_000, 100_000])
def test_bootstrap_error_of_a_mean_is_its_standard_error(num_rows):
    labels, a, b = _log(num_rows, seed=5)
    results = bootstrap_difference(labels, a, b, generator=torch.Generator().manual_seed(0), num_resamples=1_000)
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    losses = loss(a, labels, reduction="none") - loss(b, labels, reduction="none")
    assert results["logloss"].standard_error == pytest.approx(losses.std().item() / num_rows**0.5, rel=0.1)
    # The delta method for a ratio: the error of the mean of (p_a - p_b - ratio y) / mean y.
    gaps = a.sigmoid() - b.sigmoid()
    linear = (gaps - gaps.mean() / labels.mean() * labels) / labels.mean()
    assert results["calibration_ratio"].standard_error == pytest.approx(linear.std().item() / num_rows**0.5, rel=0.1)


def test_drawing_groups_of_rows_gives_the_errors_of_drawing_rows():
    labels, a, b = _log(8_000, seed=6)
    rows = bootstrap_difference(labels, a, b, generator=torch.Generator().manual_seed(0), num_resamples=600)
    groups = bootstrap_difference(labels, a, b, generator=torch.Generator().manual_seed(1), num_resamples=600, max_groups=1_000)
    for name in rows:
        assert groups[name].difference == pytest.approx(rows[name].difference, abs=1e-12)
        assert groups[name].standard_error == pytest.approx(rows[name].standard_error, rel=0.15)


def test_bootstrap_intervals_cover_the_truth_95_times_in_100():
    # Both models are fixed functions of a row, so a log of a million rows gives the true differences.
    labels, a, b = _log(1_000_000, seed=7)
    truth = {
        "logloss": log_loss(labels, a) - log_loss(labels, b),
        "normalized_entropy": normalized_entropy(labels, a) - normalized_entropy(labels, b),
        "calibration_ratio": calibration_ratio(labels, a) - calibration_ratio(labels, b),
    }
    generator, repeats = torch.Generator().manual_seed(0), 400
    covered = dict.fromkeys(truth, 0)
    for repeat in range(repeats):
        results = bootstrap_difference(*_log(400, seed=1_000 + repeat), generator=generator, num_resamples=200)
        for name, value in truth.items():
            covered[name] += results[name].low <= value <= results[name].high
    assert {name: count / repeats for name, count in covered.items()} == pytest.approx(dict.fromkeys(truth, 0.95), abs=0.035)


def test_bootstrap_of_one_model_with_itself_is_nothing():
    labels, logits, _ = _log(500, seed=8)
    for result in bootstrap_difference(labels, logits, logits, generator=torch.Generator().manual_seed(0), num_resamples=50).values():
        assert (result.difference, result.low, result.high, result.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_bootstrap_stands_resamples_without_a_click():
    labels = (torch.arange(50) < 2).long()
    a, b = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    for result in bootstrap_difference(labels, a, b, generator=torch.Generator().manual_seed(0), num_resamples=200).values():
        assert math.isfinite(result.low) and math.isfinite(result.high) and result.standard_error > 0


def test_same_generator_state_gives_the_same_interval_and_leaves_the_global_state():
    labels, a, b = _log(500, seed=9)
    before = torch.get_rng_state()
    first, second = (bootstrap_difference(labels, a, b, generator=torch.Generator().manual_seed(3), num_resamples=50) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)


def test_one_resample_is_an_error():
    labels, a, b = _log(100, seed=0)
    with pytest.raises(ValueError, match="num_resamples=1 gives no spread"):
        bootstrap_difference(labels, a, b, generator=torch.Generator(), num_resamples=1)


@pytest.mark.parametrize("num_seeds", [2, 3, 5, 30, 150])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_seed_interval_is_that_of_students_t(num_seeds, confidence):
    differences = torch.randn(num_seeds, generator=torch.Generator().manual_seed(0)).tolist()
    low, high = stats.t.interval(confidence, num_seeds - 1, loc=statistics.fmean(differences), scale=stats.sem(differences))
    result = seed_interval(differences, confidence=confidence)
    assert (result.low, result.high) == pytest.approx((low, high), rel=1e-5)


def test_combined_interval_is_wider_than_either_source_alone():
    differences, errors = [0.001, 0.002, 0.004], [0.001, 0.001, 0.001]
    combined = combine_seeds(differences, errors)
    assert combined.value == pytest.approx(7 / 3000)
    assert combined.standard_error == pytest.approx(math.sqrt(statistics.variance(differences) / 3 + 0.001**2))
    assert combined.standard_error > max(seed_interval(differences).standard_error, 0.001)


def test_combined_interval_uses_satterthwaites_degrees_of_freedom():
    differences, error = [-1.0, 0.0, 1.0], 0.5  # B / S = 1 / 3, W = 1 / 4
    result = combine_seeds(differences, [error] * 3)
    degrees = (1 / 3 + 1 / 4) ** 2 / ((1 / 3) ** 2 / 2)  # W has as many degrees as rows: its own term vanishes
    assert result.high == pytest.approx(stats.t.ppf(0.975, degrees) * math.sqrt(1 / 3 + 1 / 4), rel=1e-9)


def test_equal_differences_leave_the_normal_interval_of_the_rows():
    result = combine_seeds([0.25, 0.25], [0.1, 0.1])
    assert result.high - result.value == pytest.approx(stats.norm.ppf(0.975) * 0.1)


def test_combined_interval_covers_the_truth_where_all_seeds_share_their_rows():
    generator, repeats, num_seeds, row_error = torch.Generator().manual_seed(0), 1_000, 3, 1.0
    rows = row_error * torch.randn(repeats, 1, generator=generator)  # the same for all seeds of a repeat
    differences = rows + 0.5 * torch.randn(repeats, num_seeds, generator=generator)
    intervals = [combine_seeds(row.tolist(), [row_error] * num_seeds) for row in differences]
    covered = sum(interval.low <= 0 <= interval.high for interval in intervals) / repeats
    assert 0.935 < covered < 0.98
    alone = [seed_interval(row.tolist()) for row in differences]
    assert sum(interval.low <= 0 <= interval.high for interval in alone) / repeats < 0.85  # what leaving the rows out would claim


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match="1 given, but the spread over seeds needs at least 2"):
        seed_interval([0.1])


def test_each_difference_needs_its_standard_error():
    with pytest.raises(ValueError, match="3 differences but 2 standard errors"):
        combine_seeds([0.1, 0.2, 0.3], [0.1, 0.1])
