"""Tables that are compressed from the first step of training on."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leanrec.compress import compress
from leanrec.data.loader import Loader
from leanrec.embeddings import tables
from leanrec.methods import METHODS, DropRare
from leanrec.methods.base import Method, Table
from leanrec.ops.metrics import auc
from leanrec.recommender import open_run, predict
from leanrec.train import RowAdam, TrainSettings, train_run

SETTINGS = TrainSettings(epochs=3, batch_size=256, learning_rate=3e-3, table_learning_rate=3e-2, patience=4, checkpoint_steps=5)
MODEL = {"embedding_dim": 8, "hidden_units": [16], "dropout": 0.2}


@dataclass(frozen=True)
class Rounded(Method):
    """Learns float32 rows and stores them times `steps`, rounded to whole numbers, in 16 bits."""

    knob: ClassVar[str] = "steps"
    steps: int = 64

    def knob_values(self, num_embeddings, embedding_dim):
        return [16, 64]

    def nbytes(self, num_embeddings, embedding_dim):
        return num_embeddings * embedding_dim * 2

    def build(self, num_embeddings, embedding_dim, *, generator=None):
        return RoundedTable(self, num_embeddings, embedding_dim, generator=generator)

    def expected_error(self, spread):
        return 0.0


class RoundedTable(Table):
    def __init__(self, method, num_embeddings, embedding_dim, *, generator=None):
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        self.register_buffer("stored", torch.zeros(num_embeddings, embedding_dim, dtype=torch.int16))
        self.weight = None
        self.observed = []

    def fit(self, weight, counts=None):
        raise AssertionError("training from scratch fits nothing")

    def observe(self, ids, context):
        self.observed.append((ids, context))

    def begin(self):
        assert self.weight is None
        draws = torch.Generator().manual_seed(self.seed)
        self.weight = nn.Parameter(torch.randn(self.num_embeddings, self.embedding_dim, generator=draws) * 0.01)

    def lookup(self, ids):
        if self.weight is None:
            return self.stored[ids].float() / self.method.steps
        rows = F.embedding(ids, self.weight, sparse=self.sparse)
        return rows + ((rows * self.method.steps).round() / self.method.steps - rows).detach()

    def finish(self):
        if self.weight is not None:
            self.stored.copy_((self.weight * self.method.steps).round())
            self.weight = None


@pytest.fixture(autouse=True)
def rounded(monkeypatch):
    monkeypatch.setitem(METHODS, "Rounded", Rounded)


def test_tables_learn_in_one_form_and_are_stored_in_another(small_log, tmp_path):
    record = train_run(small_log, tmp_path / "run", model_settings=MODEL, settings=SETTINGS, method="Rounded(steps=256)")
    assert record["valid"]["auc"] > 0.7
    assert record["valid"]["auc"] == max(entry["auc"] for entry in record["history"])
    for table in tables(open_run(tmp_path / "run").model).values():
        assert table.method == Rounded(steps=256) and table.weight is None
        assert table.nbytes == table.num_embeddings * 8 * 2
        assert table.stored.any()


def test_methods_go_by_table_and_a_budget_sets_them(small_log, tmp_path):
    train_run(small_log, tmp_path / "mixed", model_settings=MODEL, settings=SETTINGS, method={"*.user": "Hash(num_buckets=8)", "*.item": None})
    found = {path.rsplit(".", 1)[1]: type(table).__name__ for path, table in tables(open_run(tmp_path / "mixed").model).items()}
    assert found["user"] == "HashTable" and found["item"] == "Embedding"
    train_run(small_log, tmp_path / "small", model_settings=MODEL, settings=SETTINGS, method="Hash()", ratio=4)
    found = tables(open_run(tmp_path / "small").model).values()
    full = sum(table.num_embeddings * table.embedding_dim * 4 for table in found)
    assert sum(table.nbytes if isinstance(table, Table) else table.weight.nbytes for table in found) <= full / 4


def test_a_run_that_stopped_goes_on_to_the_same_tables(small_log, tmp_path):
    class Killed(Exception):
        pass

    def kill(progress):
        if progress.step == 7:
            raise Killed

    arguments = {"model_settings": MODEL, "settings": SETTINGS, "method": "Rounded()"}
    with pytest.raises(Killed):
        train_run(small_log, tmp_path / "killed", **arguments, on_step=kill)
    train_run(small_log, tmp_path / "killed", **arguments)
    train_run(small_log, tmp_path / "whole", **arguments)
    states = [open_run(tmp_path / name).model.state_dict() for name in ("killed", "whole")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_another_method_is_another_run(small_log, tmp_path):
    train_run(small_log, tmp_path / "run", model_settings=MODEL, settings=SETTINGS, method="Rounded()")
    with pytest.raises(ValueError, match="holds a run with other settings"):
        train_run(small_log, tmp_path / "run", model_settings=MODEL, settings=SETTINGS, method="Rounded(steps=16)")


@pytest.mark.parametrize(("arguments", "message"), [({"ratio": 5}, "give a method"), ({"method": "PQ()", "tables": "x"}, "give one of them")])
def test_what_does_not_go_together_is_refused(small_log, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        train_run(small_log, tmp_path / "run", model_settings=MODEL, settings=SETTINGS, **arguments)
    assert not (tmp_path / "run").exists()


def test_an_optimizer_that_forgets_rows_treats_them_as_new():
    weight = nn.Parameter(torch.ones(4, 2))
    optimizer = RowAdam([weight], lr=0.1)
    optimizer.forget(weight, torch.tensor([1]))  # before the first step there is nothing to forget
    for _ in range(3):
        weight.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = optimizer.state[weight]["exp_avg"].clone()
    optimizer.forget(weight, torch.tensor([1, 3]))
    assert not optimizer.state[weight]["exp_avg"][[1, 3]].any() and not optimizer.state[weight]["exp_avg_sq"][[1, 3]].any()
    assert torch.equal(optimizer.state[weight]["exp_avg"][[0, 2]], kept[[0, 2]])


def test_a_step_on_a_compressed_table_costs_what_the_batch_touches_also_after_loading(small_log, tmp_path):
    train_run(small_log, tmp_path / "run", model_settings=MODEL, settings=SETTINGS, method="LowRank(rank=2)")
    model = open_run(tmp_path / "run").model
    table = tables(model)["embedding.tables.user"]
    table(torch.tensor([3, 5, 3])).sum().backward()
    assert table.coordinates.grad.is_sparse
    assert table.coordinates.grad.coalesce().indices().tolist() == [[3, 5]]


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if "scratch" in kind.gaps])
def test_a_method_that_cannot_learn_from_scratch_says_why(small_log, tmp_path, method):
    with pytest.raises(ValueError, match=f"{method} cannot be trained from scratch: {METHODS[method].gaps['scratch']}"):
        train_run(small_log, tmp_path / "run", model_settings=MODEL, settings=SETTINGS, method=method)


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if "scratch" not in kind.gaps])
def test_every_other_method_learns_and_its_file_answers_as_validation_saw(small_log, tmp_path, method):
    settings = replace(SETTINGS, epochs=2)
    record = train_run(small_log, tmp_path / "run", model_settings=MODEL, settings=settings, method=method)
    assert record["valid"]["auc"] > 0.6
    recommender = open_run(tmp_path / "run")
    labels, logits = predict(recommender.model, Loader(small_log, "valid", recommender.schema, batch_size=1000))
    assert auc(labels, logits) == pytest.approx(max(entry["auc"] for entry in record["history"]), abs=1e-4)
    for table in tables(recommender.model).values():
        assert sum(tensor.nbytes for tensor in table.state_dict().values()) == METHODS[method]().nbytes(table.num_embeddings, table.embedding_dim)


def test_tables_that_start_at_random_know_which_rows_are_popular():
    counts = torch.tensor([0, 5, 1, 9, 9, 2])
    table = compress(nn.Embedding(6, 2), DropRare(num_kept=2, sorted_rows=False), counts={"": counts}, fit=False)
    rows = table.decode()
    assert len(rows.unique(dim=0)) == 3
    assert (rows == rows[0]).all(1).tolist() == [True, True, True, False, False, True]
    with pytest.raises(ValueError, match="Set sorted_rows=False"):
        compress(nn.Embedding(600, 2), DropRare(), counts={"": torch.arange(600)}, fit=False)


@pytest.mark.parametrize("method", ["Rounded(steps=256)", "DPQ()", "MixedPrecision()"])
def test_tables_of_another_run_go_on_from_what_they_hold(small_log, tmp_path, method):
    train_run(small_log, tmp_path / "source", model_settings=MODEL, settings=replace(SETTINGS, epochs=1), method=method)
    still = replace(SETTINGS, epochs=1, learning_rate=1e-12, table_learning_rate=1e-12)
    train_run(small_log, tmp_path / "target", model_settings=MODEL, settings=still, tables=tmp_path / "source")
    given, taken = (tables(open_run(tmp_path / name).model)["embedding.tables.user"] for name in ("source", "target"))
    torch.testing.assert_close(taken.decode(), given.decode(), rtol=0, atol=1e-6)
