import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from leanrec.methods import MEC, PQ
from leanrec.methods.mec import balance_loss, contrastive_loss, popularity, reconstruction_loss, replace_one

V, D, M, K = 600, 8, 2, 16
FAST = MEC(num_subspaces=M, num_centroids=K, num_steps=60, batch_size=128)


def clustered_table(seed=0):
    """A table around 40 centres, and Zipf counts."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, D, generator=draw)
    weight = centres[torch.randint(40, (V,), generator=draw)] + 0.3 * torch.randn(V, D, generator=draw)
    return weight, (5000 / torch.arange(1, V + 1)).long()


def weighted_error(table, weight, counts):
    return float((popularity(counts) * (table.decode() - weight).square().sum(1)).sum() / popularity(counts).sum())


def perplexity(table, counts):
    """Mean over subspaces of exp(entropy) of the popularity-weighted use of the codes."""
    use = [torch.zeros(K).index_add(0, codes, popularity(counts).float()) for codes in table.codes().unbind(1)]
    return sum(float(torch.distributions.Categorical(probs=each).entropy().exp()) for each in use) / len(use)


def test_popularity_is_the_papers_floor_of_log2_and_at_least_one():
    counts = torch.tensor([0, 1, 2, 3, 4, 7, 8, 1023, 1024, 2**40])
    assert popularity(counts).tolist() == [1, 1, 1, 1, 2, 2, 3, 9, 10, 40]


def test_reconstruction_is_squared_error_plus_commitment_with_a_straight_through_gradient():
    draw = torch.Generator().manual_seed(0)
    points = torch.randn(5, D, generator=draw)
    latent = torch.randn(M, 5, D // M, generator=draw, requires_grad=True)
    words = torch.randn(M, 5, D // M, generator=draw, requires_grad=True)
    loss = reconstruction_loss(points, latent, words)
    z = words.detach().transpose(0, 1).reshape(5, D)
    s = latent.detach().transpose(0, 1).reshape(5, D)
    assert float(loss.detach()) == pytest.approx(float(((points - z) ** 2).mean() + 0.25 * ((s - z) ** 2).mean()), rel=1e-6)
    loss.backward()
    to_words = 2 * (z - points) / points.numel()
    assert torch.allclose(words.grad.transpose(0, 1).reshape(5, D), to_words, atol=1e-7)
    assert torch.allclose(latent.grad.transpose(0, 1).reshape(5, D), to_words + 0.5 * (s - z) / points.numel(), atol=1e-7)


def test_balance_is_zero_at_even_use_and_log_k_at_collapse_and_pulls_towards_even_use():
    even = torch.full((1, K, K), 1e6).masked_fill(torch.eye(K, dtype=torch.bool), 1.0)
    assert float(balance_loss(even, 0.1)) == pytest.approx(0.0, abs=1e-5)
    collapsed = torch.full((1, 32, K), 1e6)
    collapsed[..., 0] = 1.0
    assert float(balance_loss(collapsed, 0.1)) == pytest.approx(math.log(K), abs=1e-5)
    distances = torch.rand(1, 50, K, generator=torch.Generator().manual_seed(0)) + torch.arange(K) * 0.05
    distances.requires_grad_()
    balance_loss(distances, 0.5).backward()
    # A step against the gradient brings rows nearer to the rarely used codes and moves them off the popular ones.
    assert distances.grad[0, :, -1].sum() > 0 > distances.grad[0, :, 0].sum()


def test_contrast_is_infonce_of_cosines():
    draw = torch.Generator().manual_seed(1)
    latent, words = torch.randn(M, 6, 4, generator=draw), torch.randn(M, 6, 4, generator=draw)
    replaced = torch.randn(3, M, 6, 4, generator=draw)
    flat = [part.transpose(-3, -2).flatten(-2) for part in (latent, words, replaced)]
    expected = 0.0
    for row in range(6):
        similarities = [F.cosine_similarity(flat[0][row], candidate[row], dim=0) / 0.2 for candidate in (flat[1], *flat[2])]
        expected -= float(similarities[0] - torch.logsumexp(torch.stack(similarities), 0)) / 6
    assert float(contrastive_loss(latent, words, replaced, 0.2)) == pytest.approx(expected, rel=1e-5)


def test_negatives_differ_in_exactly_one_code_of_each_row_and_rows_differ_in_which():
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(K, (4, 2000), generator=draw)
    negatives = replace_one(codes, K, draw)
    changed = negatives != codes
    assert changed.sum(0).tolist() == [1] * 2000
    assert changed.sum(1).min() > 400
    assert negatives.min() >= 0
    assert negatives.max() < K
    shifts = ((negatives - codes) % K)[changed]
    assert shifts.unique().tolist() == list(range(1, K))


def test_without_steps_the_fit_is_popularity_weighted_k_means():
    weight, counts = clustered_table()
    mec = replace(FAST, num_steps=0).build(V, D).fit(weight, counts)
    pq = PQ(num_subspaces=M, num_centroids=K, weight_power=1.0).build(V, D).fit(weight, popularity(counts))
    assert torch.equal(mec.decode(), pq.decode())


def test_learning_keeps_the_error_near_that_of_k_means_and_stores_as_pq_does():
    weight, counts = clustered_table()
    table = FAST.build(V, D).fit(weight, counts)
    start = replace(FAST, num_steps=0).build(V, D).fit(weight, counts)
    assert not torch.equal(table.codes(), start.codes())
    assert weighted_error(table, weight, counts) < 1.1 * weighted_error(start, weight, counts)
    assert table.nbytes == PQ(num_subspaces=M, num_centroids=K).nbytes(V, D)


def test_the_balance_loss_evens_out_the_use_of_codes():
    weight, counts = clustered_table()
    weight[: V // 2] *= 0.3  # half of the rows crowd around the origin
    balanced = replace(FAST, balance=1.0, temperature=0.3, contrastive=0.0, num_steps=200).build(V, D).fit(weight, counts)
    unbalanced = replace(FAST, balance=0.0, contrastive=0.0, num_steps=200).build(V, D).fit(weight, counts)
    assert perplexity(balanced, counts) > perplexity(unbalanced, counts) + 0.3


@pytest.mark.parametrize("switched_off", ["reconstruction", "balance", "contrastive"])
def test_each_loss_can_be_switched_off_and_matters(switched_off):
    weight, counts = clustered_table()
    strong = replace(FAST, balance=0.5, contrastive=0.5)
    with_all = strong.build(V, D).fit(weight, counts)
    without = replace(strong, **{switched_off: 0.0}).build(V, D).fit(weight, counts)
    assert not torch.equal(with_all.codes(), without.codes())


def test_code_words_end_as_the_weighted_means_of_their_rows():
    weight, counts = clustered_table()
    table = FAST.build(V, D).fit(weight, counts)
    for subspace, codes in enumerate(table.codes().unbind(1)):
        part = weight[:, subspace * 4 : subspace * 4 + 4]
        code = int(codes.mode().values)
        shares = popularity(counts)[codes == code].float()
        expected = (shares[:, None] * part[codes == code]).sum(0) / shares.sum()
        assert torch.allclose(table.codebooks[subspace, code], expected, atol=1e-5)


def test_dead_codes_start_again_at_badly_represented_rows():
    from leanrec.methods.mec import _Learner

    draw = torch.Generator().manual_seed(0)
    learner = _Learner(torch.randn(M, K, D // M, generator=draw))
    learner.used[:] = True
    learner.used[0, 3] = False
    points = torch.randn(50, D, generator=draw)
    points[7, :4] = 100.0
    before = learner.codebooks.detach().clone()
    learner.revive(points)
    assert torch.equal(learner.codebooks[0, 3], points[7, :4])
    moved = (learner.codebooks != before).any(-1)
    assert moved.nonzero().tolist() == [[0, 3]]
    assert not learner.used.any()


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"num_steps": -1}, {"num_negatives": 0}, {"balance": -0.1}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        MEC(**settings).build(V, D)
