import itertools

import numpy as np
import pytest
import torch

from leanrec.methods.mixedprecision import MixedPrecision
from leanrec.ops.rounding import GAUSSIAN_ERRORS, GAUSSIAN_SCALES
from leanrec.train.row_adam import RowAdam

V, D = 256, 8


def make_weight(num_embeddings=V, embedding_dim=D, seed=0):
    return torch.randn(num_embeddings, embedding_dim, generator=torch.Generator().manual_seed(seed))


def make_counts(num_embeddings=V):
    return (1_000_000 / (1 + torch.arange(num_embeddings)) ** 1.5).long()


def widths(table):
    return table.starts.diff().tolist()


@pytest.mark.parametrize("bits_per_64_values", [3, 24, 64, 160, 320])
def test_widths_are_the_best_of_all_that_spend_the_same_bits(bits_per_64_values):
    weight, counts = make_weight(32), make_counts(32).float()
    table = MixedPrecision(bits_per_64_values=bits_per_64_values, group_size=8).build(32, D).fit(weight, counts)
    energies = ((weight - counts @ weight / counts.sum()).square().sum(1) * counts).view(4, 8).sum(1).tolist()

    def error(choice):
        return sum(energy * GAUSSIAN_ERRORS[bits] for energy, bits in zip(energies, choice, strict=True))

    best = min((choice for choice in itertools.product(range(9), repeat=4) if sum(choice) == max(1, 4 * bits_per_64_values // 64)), key=error)
    assert widths(table) == list(best)


def test_rows_are_what_numpy_reads_from_the_bytes():
    weight = make_weight()
    table = MixedPrecision(bits_per_64_values=160, group_size=32).build(V, D).fit(weight, make_counts())
    bits = np.unpackbits(table.packed_codes.numpy(), bitorder="little")
    rows, first = [], 0
    for group, num_bits in enumerate(widths(table)):
        codes = bits[first : first + 32 * D * num_bits].reshape(32, D, num_bits) @ (1 << np.arange(num_bits))
        first += 32 * D * num_bits
        levels = np.linspace(-1, 1, 2**num_bits)[codes] if num_bits else np.zeros((32, D))
        rows.append(levels * table.scales[group].item() * GAUSSIAN_SCALES[num_bits] + table.zero.detach().numpy())
    assert first == len(bits)
    np.testing.assert_allclose(table.decode().numpy(), np.concatenate(rows), rtol=1e-5, atol=1e-5)


def test_values_are_at_the_nearest_levels():
    weight = make_weight()
    table = MixedPrecision(bits_per_64_values=256).build(V, D).fit(weight)
    steps = (2 * table.scales * GAUSSIAN_SCALES[4] / 15).repeat_interleave(128, 0)
    inside = (weight - table.zero).abs() < table.scales.repeat_interleave(128, 0) * GAUSSIAN_SCALES[4]
    assert (((table.decode() - weight).abs() < steps / 2 * 1.001) | ~inside).all()
    assert inside.float().mean() > 0.95


def test_popular_rows_get_more_bits_wherever_they_stand():
    weight, counts = make_weight(), make_counts()
    shuffled = torch.randperm(V, generator=torch.Generator().manual_seed(1))
    method = MixedPrecision(bits_per_64_values=128, group_size=32, sorted_rows=False)
    table = method.build(V, D).fit(weight[shuffled], counts[shuffled])
    plain = MixedPrecision(bits_per_64_values=128, group_size=32).build(V, D).fit(weight, counts)
    torch.testing.assert_close(table.decode(), plain.decode()[shuffled])
    assert widths(table) == sorted(widths(table), reverse=True)
    assert table.nbytes == method.nbytes(V, D) == plain.nbytes + V  # 8 bits of rank per row


@pytest.mark.parametrize(("num_embeddings", "sizes"), [(1, (1, 8)), (128, (1, 128)), (129, (2, 72)), (1000, (8, 128)), (300_000, (2344, 128))])
def test_groups_are_of_a_size_and_cover_the_table(num_embeddings, sizes):
    num_groups, group_rows = MixedPrecision().groups(num_embeddings)
    assert (num_groups, group_rows) == sizes
    assert (num_groups - 1) * group_rows < num_embeddings <= num_groups * group_rows


def test_bytes_are_codes_starts_scales_and_the_shared_row():
    assert MixedPrecision(bits_per_64_values=96).nbytes(1024, 16) == 1024 * 16 * 96 // 64 // 8 + 9 * 4 + 8 * 4 + 16 * 4


def train(table, targets, *, num_steps, rates):
    """Adam on noisy looks at the rows of `targets`, asked for in proportion to `rates`."""
    draws = torch.Generator().manual_seed(2)
    table.begin()
    optimizer = RowAdam(table.parameters(), lr=0.01)
    for step in range(num_steps):
        ids = torch.multinomial(rates, 256, replacement=True, generator=draws)
        noise = torch.randn(256, D, generator=draws) * 0.1
        (table(ids) - targets[ids] - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for parameter, rows in table.maintain(step):
            optimizer.forget(parameter, rows)


@pytest.mark.parametrize("sparse", [False, True])
def test_training_from_scratch_learns_rows_and_widths_and_ends_in_the_stored_form(sparse):
    targets, rates = make_weight() * 0.3, 1 / (1 + torch.arange(V)) ** 0.5
    targets[:64] = 0.1  # nothing tells the most popular rows apart: the shared row serves them
    method = MixedPrecision(bits_per_64_values=192, group_size=32)
    table = method.build(V, D)
    table.sparse = sparse
    train(table, targets, num_steps=600, rates=rates)
    learned = table.eval().decode()
    table.finish()
    torch.testing.assert_close(table.decode(), learned, rtol=0, atol=1e-6)
    assert table.nbytes == method.nbytes(V, D)
    assert widths(table)[0] < widths(table)[2] > 0  # against the order of popularity
    lost = (rates @ (learned - targets).square().sum(1)) / (rates @ (targets - rates @ targets / rates.sum()).square().sum(1))
    assert lost < 0.12  # what 2 bits lose at best, for the 3 bits that are spent and noisy looks
    loaded = method.build(V, D)
    loaded.load_state_dict(table.state_dict())
    assert torch.equal(loaded.decode(), table.decode())


def test_what_a_group_is_worth_is_the_squared_gradient_times_the_squared_value_over_its_look_ups():
    table = MixedPrecision(group_size=64).build(V, D)
    table.begin()
    ids, gradients = torch.tensor([3, 200, 3, 60]), make_weight(4)
    for _ in range(2):
        (table(ids) * gradients).sum().backward()
    expected = torch.zeros(4).index_add_(0, ids // 64, (gradients * table.weight.detach()[ids]).square().sum(1))
    torch.testing.assert_close(table.energies, 2 * expected)


def test_a_checkpoint_of_training_holds_all_that_goes_on():
    method = MixedPrecision(bits_per_64_values=192, group_size=32)
    table, resumed = method.build(V, D), method.build(V, D)
    train(table, make_weight() * 0.3, num_steps=150, rates=torch.ones(V))
    resumed.begin()
    resumed.load_state_dict(table.state_dict())
    torch.testing.assert_close(resumed.decode(), table.decode())
    for one in (table, resumed):
        one.maintain(199)
        one.finish()
    assert torch.equal(resumed.decode(), table.decode())


def test_a_group_without_rows_is_an_error():
    with pytest.raises(ValueError, match=r"group_size=0\. Choose at least 1 row"):
        MixedPrecision(group_size=0).build(V, D)
