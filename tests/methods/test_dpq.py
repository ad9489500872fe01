from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import leanrec
from leanrec.methods import DPQ, PQ
from leanrec.methods.dpq import REVIVE_STEPS
from leanrec.train.row_adam import RowAdam

V, D, M, K = 300, 4, 2, 16
VQ, SX = DPQ(num_subspaces=M, num_centroids=K), DPQ(num_subspaces=M, num_centroids=K, variant="sx")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_target():
    draws = seeded(0)
    return torch.randn(V, D, generator=draws) @ torch.randn(D, D, generator=draws) * 0.1


def begun(method, *, spread=0.0):
    """A table in training, its queries moved off the centroids by some noise."""
    table = method.build(V, D, generator=seeded(0))
    table.begin()
    with torch.no_grad():
        table.queries += spread * torch.randn(V, D, generator=seeded(9))
    return table


def regress(table, target, *, num_steps=200):
    """Train a table to answer the target's rows."""
    table.sparse = True
    optimizer, draws = RowAdam(table.parameters(), lr=0.02), seeded(1)
    for step in range(num_steps):
        ids = torch.randint(V, (128,), generator=draws)
        ((table(ids) - target[ids]).square().sum(1).mean() + table.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        table.maintain(step)


def squared_error(table, target):
    return float((table.decode() - target).square().sum(1).mean())


@pytest.mark.parametrize("method", [VQ, SX], ids=["vq", "sx"])
def test_training_from_scratch_learns_codes_nearly_as_good_as_those_of_k_means(method):
    target = make_target()
    table = begun(method)
    regress(table, target)
    table.eval()
    answers = table.decode()
    table.finish()
    assert torch.equal(table.decode(), answers)
    best = squared_error(PQ(num_subspaces=M, num_centroids=K).build(V, D).fit(target), target)
    fixed = PQ(num_subspaces=M, num_centroids=K).build(V, D, generator=seeded(0))
    regress(fixed, target, num_steps=150)
    assert squared_error(table, target) < min(2.5 * best, 0.5 * squared_error(fixed, target))


@pytest.mark.parametrize("method", [VQ, SX], ids=["vq", "sx"])
def test_a_finished_table_is_a_plain_pq_table(method):
    table = begun(method, spread=0.05)
    assert table.nbytes > V * D * 4
    table.finish()
    assert table.nbytes == method.nbytes(V, D) == PQ(num_subspaces=M, num_centroids=K).nbytes(V, D)
    plain = PQ(num_subspaces=M, num_centroids=K).build(V, D)
    plain.load_state_dict(table.state_dict())
    assert torch.equal(plain.decode(), table.decode())


@pytest.mark.parametrize("method", [VQ, SX], ids=["vq", "sx"])
def test_a_model_may_start_with_it_from_scratch(method):
    table = leanrec.compress(torch.nn.Embedding(V, D), method, fit=False)
    assert table.method == method


@pytest.mark.parametrize("method", [VQ, SX], ids=["vq", "sx"])
def test_begin_changes_no_answer_and_training_answers_as_evaluation_does(method):
    table = begun(method)
    assert torch.equal(table.eval().decode(), method.build(V, D, generator=seeded(0)).decode())
    table = begun(method, spread=0.05)
    training = table.decode()
    torch.testing.assert_close(training, table.eval().decode())


def test_vq_takes_the_nearest_centroid_of_each_part():
    table = begun(VQ, spread=0.05).eval()
    for subspace in range(M):
        distances = torch.cdist(table.queries[:, 2 * subspace : 2 * subspace + 2], table.codebooks[subspace])
        assert torch.equal(table.codes()[:, subspace], distances.argmin(1))


def test_vq_passes_the_gradient_to_the_queries_and_the_centroids_follow_them():
    table, ids = begun(VQ, spread=0.05), torch.tensor([3, 5, 3])
    upstream = torch.randn(3, D, generator=seeded(2))
    (table(ids) * upstream).sum().backward(retain_graph=True)
    torch.testing.assert_close(table.queries.grad, torch.zeros(V, D).index_add(0, ids, upstream))
    assert table.codebooks.grad is None or not table.codebooks.grad.any()
    table.queries.grad = None
    table.penalty().backward()
    queries, codes = table.queries.detach()[ids], table.eval().codes()[ids]
    words = table.codebooks.detach().clone().requires_grad_()
    taken = torch.cat([words[subspace, codes[:, subspace]] for subspace in range(M)], dim=1)
    ((taken - queries).square().sum() / 3).backward()
    torch.testing.assert_close(table.codebooks.grad, words.grad)
    pull = 2 * VQ.commitment * (queries - taken.detach()) / 3
    torch.testing.assert_close(table.queries.grad, torch.zeros(V, D).index_add(0, ids, pull))


def test_a_loss_without_the_penalty_leaves_nothing_behind():
    table = DPQ(num_subspaces=2, num_centroids=4).build(50, 8)
    table.begin()
    for step in range(2):
        table(torch.arange(50)).sum().backward()
        table.maintain(step)
    assert table.penalty() == 0.0


def test_penalty_is_of_the_look_ups_since_the_last_one_and_leaves_padding_out():
    table = begun(VQ, spread=0.05)
    table.padding_idx = 3
    table(torch.tensor([5, 3]))
    with_padding = float(table.penalty().detach())
    table(torch.tensor([5]))
    assert with_padding == pytest.approx(float(table.penalty().detach()) / 2)
    assert table.penalty() == 0.0


def test_sx_passes_the_gradient_of_a_softmax_over_keys():
    table, ids = begun(SX, spread=0.05), torch.tensor([3, 5, 7])
    with torch.no_grad():
        table.keys += 0.01
    upstream = torch.randn(3, D, generator=seeded(2))
    (table(ids) * upstream).sum().backward()
    queries, keys = table.queries.detach().clone().requires_grad_(), table.keys.detach().clone().requires_grad_()
    values = table.codebooks.detach().clone().requires_grad_()
    soft, hard = [], []
    for subspace in range(M):
        distances = torch.cdist(queries[ids, 2 * subspace : 2 * subspace + 2], keys[subspace]).square()
        shares = F.softmax(-distances / (0.1 * distances.detach().mean()), dim=1)
        soft.append(shares @ values[subspace].detach())
        hard.append(values[subspace][distances.argmin(1)])
    ((torch.cat(soft, 1) + torch.cat(hard, 1)) * upstream).sum().backward()
    torch.testing.assert_close(table.queries.grad, queries.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(table.keys.grad, keys.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(table.codebooks.grad, values.grad)


def test_a_gradient_touches_the_queries_of_the_batch_only():
    table = begun(VQ)
    table.sparse = True
    (table(torch.tensor([3, 5])).sum() + table.penalty()).backward()
    assert table.queries.grad.is_sparse
    assert table.queries.grad.coalesce().indices().tolist() == [[3, 5]]


@pytest.mark.parametrize("method", [VQ, SX], ids=["vq", "sx"])
def test_codes_that_no_row_takes_start_again_at_the_worst_rows(method):
    table = begun(method)
    far = torch.full((D,), 5.0)
    with torch.no_grad():
        table.queries[7] = far
        table.codebooks[:, 3] = 99.0
        if table.keys is not None:
            table.keys[:, 3] = 99.0
    for step in range(REVIVE_STEPS):
        table(torch.arange(V))
        table.maintain(step)
    torch.testing.assert_close(table.eval()(torch.tensor(7)), far)
    assert not table.used.any()


def test_training_goes_on_from_its_state():
    target, table = make_target(), begun(VQ)
    regress(table, target, num_steps=20)
    resumed = begun(VQ)
    resumed.load_state_dict(table.state_dict())
    for each in (table, resumed):
        regress(each, target, num_steps=60)
    assert torch.equal(table.eval().decode(), resumed.eval().decode())


def test_fit_is_that_of_product_quantization():
    target = make_target()
    assert torch.equal(VQ.build(V, D).fit(target).decode(), PQ(num_subspaces=M, num_centroids=K).build(V, D).fit(target).decode())


@pytest.mark.parametrize("settings", [{"variant": "gumbel"}, {"commitment": -0.1}, {"temperature": 0.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        replace(VQ, **settings).build(V, D)
