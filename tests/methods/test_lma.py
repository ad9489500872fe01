import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from leanrec.compress import compress
from leanrec.data.loader import Loader
from leanrec.data.schema import Field, Schema
from leanrec.methods import LMA
from leanrec.storage import load, save
from leanrec.train import TrainSettings, train

NUM_SEEDS = 400


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def contexts(*sets):
    """The stream of a log in which id i once stands beside each token of the i-th set."""
    rows = [(number, token) for number, tokens in enumerate(sets) for token in tokens]
    return torch.tensor([number for number, _ in rows]), torch.tensor([[token] for _, token in rows])


def shared_part(table, first, second):
    """Share of the numbers of two rows that lie in one place."""
    places = table.addresses(torch.tensor([first, second]))
    return float((places[0] == places[1]).double().mean())


@pytest.mark.parametrize(("shared", "apart"), [(0, 12), (3, 9), (8, 4), (12, 0)])
def test_ids_share_memory_in_proportion_to_the_jaccard_similarity_of_their_contexts(shared, apart):
    """The paper's property: P(same place) = J + (1 - J) / memory_size, over the choice of hashes, of which there are 500 here."""
    first, second = range(12), range(12 - shared, 24 - shared)
    both = contexts(first, second, sorted(set(first) ^ set(second)))  # the third makes all tokens occur alike
    parts = []
    for seed in range(5):
        table = LMA(memory_size=1000, num_signatures=100).build(3, 100, generator=seeded(seed))  # a hash of its own for every number
        table.observe(*both)
        table.begin()
        parts.append(shared_part(table, 0, 1))
    similarity = shared / (shared + 2 * apart)
    deviation = math.sqrt(similarity * (1 - similarity) / 500)
    assert sum(parts) / 5 == pytest.approx(similarity + (1 - similarity) / 1000, abs=4 * deviation + 0.005)


def test_ids_that_were_not_observed_share_memory_as_hashing_has_it():
    table = LMA(memory_size=50).build(2000, 16, generator=seeded(0))
    table.observe(*contexts(range(3), range(3)))
    before = table.packed_signatures.clone()
    table.begin()
    assert torch.equal(table.packed_signatures[4 * 2 * 2 :], before[4 * 2 * 2 :])  # two ids have signatures, of 4 x 16 bits
    assert not torch.equal(table.packed_signatures, before)
    assert shared_part(table, 0, 1) == 1
    parts = [shared_part(table, number, number + 1) for number in range(2, 1998)]
    assert sum(parts) / len(parts) == pytest.approx(1 / 50, abs=0.003)  # four deviations of 2000 x 16 draws


def test_without_a_log_nothing_changes_at_the_beginning():
    table = LMA().build(100, 8, generator=seeded(0))
    before = table.packed_signatures.clone()
    table.begin()
    assert torch.equal(table.packed_signatures, before)


def test_running_minima_are_gone_once_training_begins():
    table = LMA().build(100, 8, generator=seeded(0))
    announced = LMA().nbytes(100, 8)
    table.observe(*contexts(range(5), range(9)))
    assert table.nbytes == announced
    table.begin()
    tensors = [value for value in vars(table).values() if isinstance(value, torch.Tensor)]
    assert table._met is None and tensors == [] and table.nbytes == announced


def test_a_number_is_read_at_the_place_of_its_columns_signature():
    table = LMA(memory_size=500, num_signatures=3, signature_bits=5).build(40, 8, generator=seeded(0)).fit(torch.randn(40, 8, generator=seeded(1)))
    bits = np.unpackbits(table.packed_signatures.numpy(), bitorder="little")
    signatures = bits[: 40 * 3 * 5].reshape(40, 3, 5) @ (2 ** np.arange(5))
    places = table.addresses(torch.arange(40))
    for column in range(8):
        chosen = {}
        for row in range(40):
            chosen.setdefault(int(signatures[row, column % 3]), set()).add(int(places[row, column]))
        assert all(len(found) == 1 for found in chosen.values()) and len(chosen) > 5
    torch.testing.assert_close(table.decode(), table.memory.detach()[places] + table.mean.detach())


def test_all_of_the_memory_is_used():
    table = LMA(memory_size=1000).build(5000, 16, generator=seeded(0))
    used = torch.bincount(table.addresses(torch.arange(5000)).flatten(), minlength=1000)
    assert used.min() > 30 and used.max() < 150  # 80 on average


def test_a_place_holds_the_weighted_mean_of_the_numbers_that_are_read_there():
    weight, counts = torch.randn(300, 8, generator=seeded(1)) + 3, torch.randint(0, 50, (300,), generator=seeded(2))
    table = LMA(memory_size=200, signature_bits=4).build(300, 8, generator=seeded(0)).fit(weight, counts)
    shares = counts.double().clamp(min=0.1)
    mean = shares @ weight.double() / shares.sum()
    places = table.addresses(torch.arange(300)).numpy().ravel()
    numbers, weights = (weight.double() - mean).numpy().ravel(), np.repeat(shares.numpy(), 8)
    sums, totals = np.bincount(places, numbers * weights, minlength=200), np.bincount(places, weights, minlength=200)
    used = totals > 0
    np.testing.assert_allclose(table.memory.detach().numpy()[used], (sums[used] / totals[used]), atol=1e-5)
    torch.testing.assert_close(table.mean.detach().double(), mean, rtol=1e-5, atol=1e-6)


def test_fitted_rows_share_memory_as_the_angle_between_them_has_it():
    """Charikar: a random plane has two rows on one side with probability 1 - angle / pi; all bits have to agree."""
    angle, parts = math.pi / 8, []
    first, second = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([math.cos(angle), math.sin(angle), 0.0, 0.0])
    weight = torch.stack([first, second, -first, -second])  # of mean zero
    method = LMA(memory_size=4 * 64, num_signatures=2, signature_bits=3)
    for seed in range(NUM_SEEDS):
        parts.append(shared_part(method.build(4, 4, generator=seeded(seed)).fit(weight), 0, 1))
    expected = (1 - angle / math.pi) ** 3
    assert sum(parts) / NUM_SEEDS == pytest.approx(expected + (1 - expected) / 256, abs=4 * math.sqrt(0.25 / 2 / NUM_SEEDS))


def test_a_fit_with_like_rows_together_beats_one_by_chance():
    weight = torch.randn(20, 8, generator=seeded(1)).repeat_interleave(50, 0) + 0.1 * torch.randn(1000, 8, generator=seeded(2))
    alike = LMA(memory_size=1000).build(1000, 8, generator=seeded(0)).fit(weight)
    error = float((alike.decode() - weight).square().mean() / weight.var())
    by_chance = 1 - 1000 / 8000  # about a number per eight that share a place
    assert error < by_chance / 3


def test_bytes_are_signatures_memory_mean_and_seed():
    assert LMA(memory_size=100, num_signatures=2, signature_bits=5).nbytes(1001, 16) == -(-1001 * 2 * 5 // 8) + 4 * (100 + 16) + 8
    assert LMA(num_signatures=4).nbytes(100, 1) == LMA(num_signatures=1).nbytes(100, 1)


def test_a_fit_uses_about_twice_as_many_values_as_there_are_places_for_a_column():
    assert [LMA(memory_size=size).sign_bits(16) for size in (1, 15, 16, 32, 4096, 2**30)] == [0, 0, 1, 2, 9, 16]


@pytest.mark.parametrize("settings", [{"memory_size": 0}, {"num_signatures": 0}, {"signature_bits": 0}, {"signature_bits": 17}])
def test_settings_out_of_range_are_errors(settings):
    [(name, value)] = settings.items()
    with pytest.raises(ValueError, match=rf"{name}={value}\b.*Choose at least 1 number and 1 signature, and 1 to 16 bits"):
        LMA(**settings).build(1000, 8)


NUM_USERS, NUM_GROUPS = 400, 8
SETTINGS = TrainSettings(epochs=5, batch_size=100, learning_rate=3e-2, patience=5)


@pytest.fixture(scope="module")
def group_log(tmp_path_factory) -> tuple[Path, Schema]:
    """A log of users in groups. A user sees pages of the group's and clicks on the kinds that the group likes; nothing names the group."""
    folder = tmp_path_factory.mktemp("log")
    sizes = {"user": NUM_USERS, "page": NUM_GROUPS * 6, "kind": 12}
    schema = Schema(tuple(Field(name, "categorical", vocabulary=name, num_embeddings=size + 2) for name, size in sizes.items()))
    draw = np.random.default_rng(0)
    likes = draw.random((NUM_GROUPS, 12)) < 0.5
    for split, num_rows in (("train", 3000), ("valid", 3000)):
        users, kinds = draw.integers(0, NUM_USERS, num_rows), draw.integers(0, 12, num_rows)
        pages = users % NUM_GROUPS * 6 + draw.integers(0, 6, num_rows)
        clicks = draw.random(num_rows) < np.where(likes[users % NUM_GROUPS, kinds], 0.9, 0.1)
        (folder / split).mkdir()
        ids = {"user": users, "page": pages, "kind": kinds}
        columns = {name: (2 + column).astype(np.int32) for name, column in ids.items()} | {"label": clicks.astype(np.int8)}
        pq.write_table(pa.table(columns), folder / split / "part-00000.parquet")
    return folder, schema


class Taste(nn.Module):
    """Logits from user and kind alone: the page, which is looked up too, can help only by telling which users are alike."""

    def __init__(self, schema):
        super().__init__()
        torch.manual_seed(0)
        self.tables = nn.ModuleDict({field.name: nn.Embedding(field.num_embeddings, 8, sparse=True) for field in schema.fields})

    def forward(self, features):
        user, page, kind = (self.tables[name](features[name]) for name in ("user", "page", "kind"))
        return (user * kind + 0 * page).sum(1)


def trained(log, *, watched):
    """Best validation AUC, and the model, with users in a memory of a seventh of their numbers."""
    folder, schema = log
    model = compress(Taste(schema), {"tables.user": LMA(memory_size=450, num_signatures=8)}, fit=False)
    loader = Loader(folder, "train", schema, batch_size=100, seed=0)
    return train(model, loader, Loader(folder, "valid", schema, batch_size=3000), SETTINGS, from_scratch=watched).best_auc, model


def test_memory_shared_by_what_the_log_shows_learns_better_than_memory_shared_by_chance(group_log, tmp_path):
    by_context, model = trained(group_log, watched=True)
    by_chance, _ = trained(group_log, watched=False)
    assert by_context > by_chance + 0.03
    same = [shared_part(model.tables.user, 2 + user, 2 + user + NUM_GROUPS) for user in range(100)]
    other = [shared_part(model.tables.user, 2 + user, 3 + user) for user in range(100)]
    assert sum(same) > 2 * sum(other)
    assert model.tables.user.nbytes == LMA(memory_size=450, num_signatures=8).nbytes(NUM_USERS + 2, 8)
    save(model, tmp_path / "m")
    assert torch.equal(load(Taste(group_log[1]), tmp_path / "m").tables.user.decode(), model.tables.user.decode())
