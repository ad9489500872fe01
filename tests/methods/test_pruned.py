import numpy as np
import pytest
import torch

from leanrec.methods.pruned import Pruned
from leanrec.train.row_adam import RowAdam

V, D = 256, 8


def make_weight(num_embeddings=V, embedding_dim=D):
    return torch.randn(num_embeddings, embedding_dim, generator=torch.Generator().manual_seed(0)) + 0.5


def make_counts(num_embeddings=V):
    return (10_000 / (1 + torch.arange(num_embeddings))).long()


@pytest.mark.parametrize(("num_embeddings", "embedding_dim"), [(1, 1), (1, 8), (13, 3), (256, 8), (1000, 5)])
@pytest.mark.parametrize("kept_per_mille", [1, 30, 400, 1000])
def test_the_largest_values_of_the_rows_times_their_counts_are_kept_and_no_others(num_embeddings, embedding_dim, kept_per_mille):
    weight, counts = make_weight(num_embeddings, embedding_dim), make_counts(num_embeddings)
    table = Pruned(kept_per_mille=kept_per_mille).build(num_embeddings, embedding_dim).fit(weight, counts)
    shares = np.maximum(counts.numpy(), 0.1)
    mean = np.average(weight.numpy(), axis=0, weights=shares)
    distances = weight.numpy() - mean
    scores = shares[:, None] * distances**2
    num_kept = max(1, num_embeddings * embedding_dim * kept_per_mille // 1000)
    kept = scores >= np.sort(scores, axis=None)[-num_kept]
    np.testing.assert_allclose(table.decode().numpy(), mean + distances * kept, rtol=1e-5, atol=1e-5)


def test_rows_are_right_where_a_chunk_of_the_fit_is_a_small_part_of_the_table(monkeypatch):
    whole = Pruned(kept_per_mille=20).build(V, D).fit(make_weight(), make_counts()).decode()
    monkeypatch.setattr("leanrec.methods.pruned._CHUNK_VALUES", 8 * D)
    assert torch.equal(Pruned(kept_per_mille=20).build(V, D).fit(make_weight(), make_counts()).decode(), whole)


@pytest.mark.parametrize(("num_embeddings", "embedding_dim"), [(5, 3), (1000, 16), (10_000_000, 32)])
@pytest.mark.parametrize("kept_per_mille", [1, 50, 1000])
def test_bytes_are_values_positions_and_starts_of_the_best_blocks(num_embeddings, embedding_dim, kept_per_mille):
    num_kept = max(1, num_embeddings * embedding_dim * kept_per_mille // 1000)

    def index(rows):
        starts = -(-num_embeddings // rows) + 1
        return -(-num_kept * max(1, int(np.ceil(np.log2(rows * embedding_dim)))) // 8) + -(-starts * int(np.ceil(np.log2(num_kept + 1))) // 8)

    least = min(index(2**power) for power in range(25) if 2**power < 2 * num_embeddings)
    assert Pruned(kept_per_mille=kept_per_mille).nbytes(num_embeddings, embedding_dim) == 4 * num_kept + 4 * embedding_dim + least


def test_an_index_is_smaller_than_one_of_columns_and_starts_of_rows():
    # 1,000,000 x 16 with 2 in 100 kept: 4 bits per column and 19 bits per row would take 2.5 MB.
    assert Pruned(kept_per_mille=20).nbytes(1_000_000, 16) < 320_000 * 4 + 450_000


def train(table, targets, rates, *, num_steps):
    """Adam on noisy looks at the rows of `targets`, asked for in proportion to `rates`."""
    draws = torch.Generator().manual_seed(2)
    optimizer = RowAdam(table.parameters(), lr=0.01)
    for step in range(num_steps):
        ids = torch.multinomial(rates, 128, replacement=True, generator=draws)
        noise = torch.randn(128, D, generator=draws) * 0.1
        (table(ids) - targets[ids] - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for parameter, rows in table.maintain(step):
            optimizer.forget(parameter, rows)


@pytest.mark.parametrize("sparse", [False, True])
def test_training_from_scratch_finds_the_values_that_matter_and_ends_in_the_stored_form(sparse):
    rates = 1 / (1 + torch.arange(V)) ** 0.5
    matter = torch.rand(V, D, generator=torch.Generator().manual_seed(3)) < 0.2
    targets = torch.where(matter, make_weight().sign(), 0.0)
    method = Pruned(kept_per_mille=200)
    table = method.build(V, D)
    table.sparse = sparse
    table.begin()
    train(table, targets, rates, num_steps=400)
    learned = table.eval().decode()
    assert int(table.kept.sum()) == method.num_kept(V, D)
    table.finish()
    torch.testing.assert_close(table.decode(), learned, rtol=0, atol=1e-6)
    assert table.nbytes == method.nbytes(V, D)
    lost = rates @ (learned - targets).square().sum(1) / (rates @ targets.square().sum(1))
    assert lost < 0.2  # values kept by chance would lose 0.8
    loaded = method.build(V, D)
    loaded.load_state_dict(table.state_dict())
    assert torch.equal(loaded.decode(), table.decode())


def test_rows_in_training_are_those_of_the_papers_soft_threshold():
    table = Pruned(kept_per_mille=300).build(V, D)
    table.begin()
    weight, logits = make_weight(), make_weight(V, 1) - 2
    with torch.no_grad():
        table.weight.copy_(weight)
        table.threshold_logits.copy_(logits)
    table.maintain(99)
    margins = weight.abs() - torch.sigmoid(logits)
    kept = margins >= margins.flatten().sort().values[-Pruned(kept_per_mille=300).num_kept(V, D)]
    torch.testing.assert_close(table.decode(), weight.sign() * margins.relu() * kept)


def test_pruned_values_learn_too_and_thresholds_learn_from_what_is_kept():
    table = Pruned(kept_per_mille=300).build(V, D)
    table.begin()
    table(torch.arange(V)).sum().backward()
    assert torch.equal(table.weight.grad, torch.ones(V, D))
    thresholds = torch.sigmoid(table.threshold_logits.detach())
    expected = -(table.weight.detach().sign() * table.kept).sum(1, keepdim=True) * thresholds * (1 - thresholds)
    torch.testing.assert_close(table.threshold_logits.grad, expected)


def test_a_checkpoint_of_training_holds_all_that_goes_on():
    table, resumed = (Pruned(kept_per_mille=50).build(V, D) for _ in range(2))
    for one in (table, resumed):
        one.begin()
    train(table, make_weight(), torch.ones(V), num_steps=120)
    resumed.load_state_dict(table.state_dict())
    for one in (table, resumed):
        one.maintain(199)
        one.finish()
    assert torch.equal(resumed.decode(), table.decode())


def test_gradients_of_values_are_sparse_where_a_table_s_are():
    table = Pruned().build(V, D).fit(make_weight())
    table.sparse = True
    table(torch.arange(V)).sum().backward()
    assert torch.equal(table.values.grad.to_dense(), torch.ones_like(table.values))


@pytest.mark.parametrize("kept_per_mille", [0, 1001])
def test_a_share_out_of_range_is_an_error(kept_per_mille):
    with pytest.raises(ValueError, match=f"Pruned has kept_per_mille={kept_per_mille}. Choose 1 to 1000"):
        Pruned(kept_per_mille=kept_per_mille).build(V, D)
