from dataclasses import replace

import pytest
import torch
from torch import nn

from leanrec.budget import Sizes
from leanrec.methods import RQ, VRQ, vrq
from leanrec.ops.packing import unpack_rows
from leanrec.ops.rounding import dequantize
from leanrec.ops.sensitivity import Sensitivity


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_weight(num_embeddings, embedding_dim):
    draws = seeded(0)
    return torch.randn(num_embeddings, embedding_dim, generator=draws) @ torch.randn(embedding_dim, embedding_dim, generator=draws)


def make_counts(num_embeddings):
    return (1e6 / (1 + torch.arange(num_embeddings)) ** 1.2).long()


def weighted_error(rows, weight, weights):
    return float((weights * (rows - weight).square().sum(1)).sum() / weights.sum())


def make_sensitivity(num_embeddings, embedding_dim):
    """Few rows and few directions matter."""
    directions = torch.randn(embedding_dim, embedding_dim, generator=seeded(5), dtype=torch.float64) * 0.4 ** torch.arange(embedding_dim)
    rows = torch.rand(num_embeddings, generator=seeded(6)) ** 8
    return Sensitivity(rows / rows.sum() * directions.square().sum(), directions @ directions.T)


def expected_rise(sensitivity, errors):
    metric = sensitivity.metric.float() / sensitivity.metric.trace().float()
    return float((sensitivity.rows * ((errors @ metric) * errors).sum(1)).sum()) / 2


@pytest.mark.parametrize("sorted_rows", [True, False])
def test_a_row_is_the_mean_and_one_word_per_level_up_to_its_length(sorted_rows):
    method = VRQ(codes_per_1000_rows=2100, num_levels=4, num_centroids=20, sorted_rows=sorted_rows)
    table = method.build(300, 5).fit(make_weight(300, 5), make_counts(300))
    words = dequantize(unpack_rows(table.packed_words, torch.arange(80), 5, 4), table.scales.float(), 4).view(4, 20, 5)
    codes = iter(unpack_rows(table.packed_codes, torch.arange(630), 1, 5).flatten().tolist())
    expected = table.mean.detach().repeat(300, 1)
    for row in range(300):
        for level, border in enumerate(table.borders.tolist()):
            if row < border:
                expected[row] += words[level, next(codes)]
    torch.testing.assert_close(table.decode(), expected)
    assert next(codes, None) is None and len(set(table.borders.tolist())) > 1


def test_popular_rows_get_more_codes_and_the_error_is_below_that_of_equal_lengths_with_more_bytes():
    weight, counts = make_weight(20_000, 16), make_counts(20_000)
    rq = RQ(num_levels=2, num_centroids=64).build(20_000, 16).fit(weight, counts)
    table = VRQ(codes_per_1000_rows=2000, num_levels=12, num_centroids=64).build(20_000, 16).fit(weight, counts)
    assert table.nbytes < rq.nbytes
    assert weighted_error(table.decode(), weight, counts) < 0.5 * weighted_error(rq.decode(), weight, counts)
    lengths = table.lengths()
    assert (lengths.diff() <= 0).all() and lengths[0] > lengths[-1]


def test_sensitivity_makes_the_expected_rise_of_the_loss_small_not_the_distance():
    weight, counts, sensitivity = make_weight(2000, 16), make_counts(2000), make_sensitivity(2000, 16)
    method = VRQ(codes_per_1000_rows=3000)
    plain, weighed = method.build(2000, 16), method.build(2000, 16)
    weighed.weigh(sensitivity)
    plain_errors, weighed_errors = (table.fit(weight, counts).decode().detach() - weight for table in (plain, weighed))
    assert expected_rise(sensitivity, weighed_errors) < 0.3 * expected_rise(sensitivity, plain_errors)
    blind = replace(method, by_loss=False).build(2000, 16)
    blind.weigh(sensitivity)
    assert torch.equal(blind.fit(weight, counts).decode().detach() - weight, plain_errors)
    assert weighted_error(plain_errors, 0, counts**0.75) < weighted_error(weighed_errors, 0, counts**0.75)


def test_a_curve_foresees_the_error_of_a_fit_in_units_of_the_loss():
    weight, counts, sensitivity = make_weight(3000, 8), make_counts(3000), make_sensitivity(3000, 8)
    curve = VRQ().curve(weight.split(700), 3000, 8, counts=counts, sensitivity=sensitivity)
    assert len({setting.nbytes(3000, 8) for setting, _ in curve}) > 30
    most = max(expected for _, expected in curve)
    for setting, expected in curve[5::25]:
        table = setting.build(3000, 8)
        table.weigh(sensitivity)
        found = expected_rise(sensitivity, table.fit(weight, counts).decode().detach() - weight)
        assert found < 1.6 * expected, setting
        is_close = setting.num_centroids == 256 or expected > 0.01 * most  # small books gain by codes chosen together
        assert expected < (1.6 if is_close else 8) * found, setting


def test_a_budget_for_a_single_table_is_used():
    model = nn.Sequential(nn.Embedding.from_pretrained(make_weight(20_000, 16)))
    sizes = Sizes(model, VRQ(), counts={"0": make_counts(20_000)})
    for ratio in (20, 50, 100):
        assert 0.9 * sizes.full / ratio < sizes.plan(ratio=ratio)["0"].nbytes(20_000, 16) <= sizes.full / ratio


def test_tuned_words_come_nearer_to_what_is_wanted_and_stay_as_small():
    weight, counts = make_weight(2000, 16), make_counts(2000)
    table = VRQ(codes_per_1000_rows=2000, num_levels=4, num_centroids=16).build(2000, 16).fit(weight, counts)
    wanted, fitted, codes = weight.flip(1), table.decode(), table.packed_codes.clone()
    table.begin_tuning()
    optimizer = torch.optim.Adam(table.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        (table(torch.arange(2000)) - wanted).square().mean().backward()
        optimizer.step()
    table.finish()
    mean_alone = weighted_error(fitted - fitted.mean(0) + wanted.mean(0), wanted, torch.ones(2000))
    assert weighted_error(table.decode().detach(), wanted, torch.ones(2000)) < 0.8 * mean_alone
    assert torch.equal(table.packed_codes, codes) and table.nbytes == table.method.nbytes(2000, 16)


def test_a_sample_of_the_rows_is_enough(monkeypatch):
    weight, counts, method = make_weight(30_000, 8), make_counts(30_000), VRQ(codes_per_1000_rows=1500, num_centroids=32)
    whole = method.build(30_000, 8).fit(weight, counts)
    monkeypatch.setattr(vrq, "_FIT_ROWS", 3000)
    part = method.build(30_000, 8).fit(weight, counts)
    assert not torch.equal(part.borders, whole.borders)
    importance = counts.float() ** 0.75
    assert weighted_error(part.decode(), weight, importance) < 1.25 * weighted_error(whole.decode(), weight, importance)


def test_rows_of_any_order_are_as_good_as_sorted_ones():
    weight, counts, mixed = make_weight(2000, 8), make_counts(2000), torch.randperm(2000, generator=seeded(3))
    method = VRQ(sorted_rows=False)
    table = method.build(2000, 8).fit(weight[mixed], counts[mixed])
    assert weighted_error(table.decode(), weight[mixed], counts[mixed]) < 1.05 * weighted_error(
        method.build(2000, 8).fit(weight, counts).decode(), weight, counts
    )
    with pytest.raises(ValueError, match="sorted_rows=False"):
        VRQ().build(2000, 8).fit(weight[mixed], counts[mixed])


def test_refining_lowers_the_error(monkeypatch):
    weight, counts, method = make_weight(4000, 16), make_counts(4000), VRQ(num_centroids=16)
    refined = method.build(4000, 16).fit(weight, counts).decode()
    monkeypatch.setattr(vrq, "_REFINE_ROUNDS", 0)
    plain = method.build(4000, 16).fit(weight, counts).decode()
    importance = counts.float() ** 0.75
    assert weighted_error(refined, weight, importance) < 0.95 * weighted_error(plain, weight, importance)


@pytest.mark.parametrize("wrong", ["num_levels=0", "num_levels=33", "codes_per_1000_rows=0", "codes_per_1000_rows=8001", "num_centroids=1"])
def test_settings_out_of_range_are_an_error_that_names_them(wrong):
    name, value = wrong.split("=")
    with pytest.raises(ValueError, match=wrong):
        VRQ(**{name: int(value)}).nbytes(1000, 16)
