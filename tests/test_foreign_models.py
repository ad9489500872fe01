"""Models that nobody here wrote: compressed, run, trained, saved and loaded."""

import copy
import threading
from typing import ClassVar

import pytest
import torch
from torch import nn

from leanrec import cli
from leanrec.budget import fit_budget
from leanrec.compress import compress, tables
from leanrec.data.loader import Loader
from leanrec.data.schema import Schema
from leanrec.embeddings import table_groups, unpooled
from leanrec.methods.base import Table
from leanrec.methods.pq import PQ
from leanrec.report import report
from leanrec.storage import load, save
from leanrec.train import TrainSettings, train

V, D, B = 300, 8, 32
METHOD = PQ(num_subspaces=4, num_centroids=32)


def library(name):
    return pytest.importorskip(name, reason=f"{name} is not installed; `make test` installs the dev extra that has it")


def draw(*shape, high=V, low=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(len(shape)))


class Rechub:
    """torch-rechub's DeepFM: a user, an item and a list of items that shares the item's table."""

    method = METHOD

    def __init__(self):
        library("torch_rechub")

    def build(self):
        from torch_rechub.basic.features import SequenceFeature, SparseFeature
        from torch_rechub.basic.initializers import RandomNormal
        from torch_rechub.models.ranking import DeepFM

        normal = RandomNormal(0, 1)
        user = SparseFeature("user", vocab_size=V, embed_dim=D, initializer=normal)
        item = SparseFeature("item", vocab_size=V, embed_dim=D, padding_idx=0, initializer=normal)
        history = SequenceFeature("history", vocab_size=V, embed_dim=D, pooling="mean", shared_with="item", padding_idx=0)
        return DeepFM([user, item, history], [user, item], {"dims": [16], "dropout": 0.0, "activation": "relu"})

    def run(self, model):
        return model({"user": draw(B), "item": draw(B, low=1), "history": draw(B, 5)})


class DeepCTR:
    """DeepCTR-Torch's DeepFM: V x 8 tables for vectors, V x 1 tables for first-order weights, two fields over one table."""

    method: ClassVar = {"embedding_dict.*": METHOD, "linear_model.*": PQ(num_subspaces=1, num_centroids=32)}

    def __init__(self):
        library("requests")  # which deepctr-torch imports
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(threading.Thread, "start", lambda thread: None)  # at its import it asks PyPI for its newest version in a thread
            library("deepctr_torch")

    def build(self):
        from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat
        from deepctr_torch.models import DeepFM

        columns = [
            SparseFeat("user", V, embedding_dim=D),
            SparseFeat("item", V, embedding_dim=D),
            SparseFeat("ad", V, embedding_dim=D, embedding_name="item"),
            VarLenSparseFeat(SparseFeat("tags", V, embedding_dim=D), maxlen=4, combiner="mean"),
            DenseFeat("price", 1),
        ]
        return DeepFM(columns, columns, dnn_hidden_units=(16,), init_std=1.0, device="cpu")

    def run(self, model):
        ids = torch.cat([draw(B, 3), draw(B, 4, high=20)], dim=1)
        return model(torch.cat([ids.float(), torch.rand(B, 1, generator=torch.Generator().manual_seed(0))], dim=1))


class TorchRec:
    """torchrec's EmbeddingBagCollection: two features over one pooled table, weighted, from a KeyedJaggedTensor, empty bags included."""

    method = METHOD

    def __init__(self):
        library("torchrec")

    def build(self):
        from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, PoolingType

        user = EmbeddingBagConfig(name="user", embedding_dim=D, num_embeddings=V, feature_names=["user"], pooling=PoolingType.SUM)
        item = EmbeddingBagConfig(name="item", embedding_dim=D, num_embeddings=V, feature_names=["click", "cart"], pooling=PoolingType.SUM)
        return EmbeddingBagCollection(tables=[user, item], is_weighted=True)

    def run(self, model):
        from torchrec import KeyedJaggedTensor

        lengths = draw(3 * B, high=4)
        ids = draw(int(lengths.sum()))
        weights = torch.rand(len(ids), generator=torch.Generator().manual_seed(0))
        return model(KeyedJaggedTensor(keys=["user", "click", "cart"], values=ids, lengths=lengths, weights=weights)).values()


class Bert:
    """Hugging Face's BERT from a config: words with a padding row, positions and a table of two rows."""

    method = METHOD

    def __init__(self):
        library("transformers")

    def build(self):
        from transformers import BertConfig, BertModel

        config = BertConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, hidden_dropout_prob=0.0)
        return BertModel(config)

    def run(self, model):
        return model(input_ids=draw(4, 10, low=1)).last_hidden_state


class GPT2:
    """Hugging Face's GPT-2 from a config, its head not tied to its words."""

    method: ClassVar = {"transformer.wte": METHOD, "transformer.wpe": None}

    def __init__(self):
        library("transformers")

    def build(self, *, tied=False):
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=V, n_embd=16, n_layer=1, n_head=2, n_positions=40, tie_word_embeddings=tied, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        )
        return GPT2LMHeadModel(config)

    def run(self, model):
        return model(input_ids=draw(4, 10)).logits


@pytest.fixture(params=[Rechub, DeepCTR, TorchRec, Bert, GPT2], ids=lambda case: case.__name__)
def case(request):
    case = request.param()
    torch.manual_seed(0)
    return case


def test_compressed_model_answers_as_with_the_decoded_rows(case):
    model = case.build().eval()
    decoded = copy.deepcopy(model)
    full = case.run(model)
    compress(model, case.method)
    compressed = [group for group in table_groups(model).values() if isinstance(unpooled(next(iter(group.values()))), Table)]
    assert len(compressed) >= 1 and report(model).ratio > 1
    with torch.no_grad():
        for group in compressed:
            for path, module in group.items():
                decoded.get_submodule(path).weight.copy_(unpooled(module).decode())
    answer = case.run(model)
    torch.testing.assert_close(answer, case.run(decoded), rtol=1e-4, atol=1e-5)
    assert not torch.equal(answer, full)
    assert (answer - full).square().mean() < full.var()  # compressed, not broken


def test_training_moves_the_compressed_tables(case):
    model = compress(case.build(), case.method)
    codebooks = {name: parameter for name, parameter in model.named_parameters() if name.endswith("codebooks")}
    before = {name: parameter.detach().clone() for name, parameter in codebooks.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = case.run(model).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0]
    assert codebooks and all(not torch.equal(parameter, before[name]) for name, parameter in codebooks.items())


def test_saved_model_answers_the_same_when_loaded(case, tmp_path):
    model = compress(case.build(), case.method).eval()
    save(model, tmp_path / "model.safetensors")
    loaded = load(case.build(), tmp_path / "model.safetensors").eval()
    assert torch.equal(case.run(loaded), case.run(model))
    assert list(tables(loaded)) == list(tables(model))


def test_model_fits_a_budget(case):
    model = case.build().eval()
    method = {path: None if chosen is None else PQ() for path, chosen in case.method.items()} if isinstance(case.method, dict) else PQ()
    compress(model, fit_budget(model, method, ratio=3))
    assert report(model).ratio >= 3
    assert case.run(model).isfinite().all()


def test_head_tied_to_the_words_is_refused():
    model = GPT2().build(tied=True)
    with pytest.raises(ValueError, match=r"Table 'transformer\.wte' \(300 x 16\): its weight is also the parameter 'lm_head\.weight'"):
        compress(model, METHOD)


class OfItems(nn.Module):
    """A number for each item of the small log, turned by a function into what its forward gives."""

    def __init__(self, output=lambda logits: logits, *, value=0.0, sparse=True):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.full((102, 1), value), freeze=False, sparse=sparse)
        self.output = output

    def forward(self, features):
        return self.output(self.table(features["item"]).squeeze(1))


def trained(model, log, *, validation=None, **settings):
    schema = Schema.load(log / "schema.json")
    settings = TrainSettings(**{"epochs": 1, "batch_size": 1000, **settings})
    rows = Loader(log, "train", schema, batch_size=settings.batch_size, seed=0)
    return train(model, rows, validation or Loader(log, "valid", schema, batch_size=1000), settings)


@pytest.mark.parametrize(
    ("output", "given"),
    [
        (lambda logits: (logits, None), "a tuple"),
        (lambda logits: {"logits": logits}, "a dict"),
        (lambda logits: logits.detach(), r"\(1000,\) float32 without gradients"),
        (lambda logits: logits.unsqueeze(1), r"\(1000, 1\) float32"),
        (lambda logits: logits.sum(), r"\(\) float32"),
        (lambda logits: logits > 0, r"\(1000,\) bool"),
    ],
)
def test_training_asks_for_one_logit_a_row(small_log, output, given):
    with pytest.raises(
        ValueError, match=rf"^Model OfItems gives {given}.* for a batch of 1000 rows. Its forward must give a float tensor of shape \(1000,\)"
    ):
        trained(OfItems(output), small_log)


def test_a_model_without_parameters_cannot_be_trained(small_log):
    with pytest.raises(ValueError, match="Model OfItems has no parameters to train"):
        trained(OfItems().requires_grad_(requires_grad=False), small_log)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (OfItems(), {"learning_rate": 1e38}, "learning rate 1e[+]38 gives steps that float32 cannot hold. Lower it"),
        (OfItems(sparse=False), {"learning_rate": 1e38}, "learning rate 1e[+]38 gives steps that float32 cannot hold. Lower it"),
        (
            OfItems(lambda logits: logits * 1e5),
            {"learning_rate": 3e37},
            "diverged: after step 1, the loss is .*Lower the learning rate, 3e[+]37",
        ),
        (OfItems(value=float("nan")), {}, "^In the first batch, before any step, the loss is nan. Look at the model's initial values"),
    ],
)
def test_training_that_diverges_is_an_error_with_the_remedy(small_log, model, settings, message):
    with pytest.raises(ValueError, match=message):
        trained(copy.deepcopy(model), small_log, **settings)


def test_weights_that_no_batch_shows_must_stay_finite_too(small_log):
    model = OfItems()
    with torch.no_grad():
        model.table.weight[0] = torch.inf  # padding, which is no item
    with pytest.raises(
        ValueError, match=r"diverged: after step 6, weights of table.weight are NaN or infinite. Lower the learning rate, 0.5 \(of the tables: 0.25"
    ):
        trained(model, small_log, learning_rate=0.5, table_learning_rate=0.25)


class OfFewLabels(Loader):
    """Rows of one label, but for some of the first batch."""

    def __init__(self, folder, *, label, num_others):
        super().__init__(folder, "valid", Schema.load(folder / "schema.json"), batch_size=1000)
        self.label, self.num_others = label, num_others

    def batches(self, **place):
        for number, batch in enumerate(super().batches(**place)):
            labels = torch.full_like(batch.labels, self.label)
            labels[: self.num_others * (number == 0)] = 1 - self.label
            yield batch._replace(labels=labels)


@pytest.mark.parametrize("label", [0, 1])
def test_validation_rows_of_one_label_are_an_error_before_the_first_step(small_log, label):
    model = OfItems()
    message = f"The validation split has 2000 rows, 2000 with label {label}: their AUC, .* needs 1 or more of each"
    with pytest.raises(ValueError, match=message):
        trained(model, small_log, validation=OfFewLabels(small_log, label=label, num_others=0))
    message = f"The validation split has 2000 rows, .*1999 with label {label}.*: their AUC, .* needs 2 or more of each"
    with pytest.raises(ValueError, match=message):
        trained(model, small_log, validation=OfFewLabels(small_log, label=label, num_others=1), keep_initial=True)
    assert not model.table.weight.any()
    trained(model, small_log, validation=OfFewLabels(small_log, label=label, num_others=1))
    trained(model, small_log, validation=OfFewLabels(small_log, label=label, num_others=2), keep_initial=True)


def test_more_threads_than_torch_can_start_are_wrong_usage(small_log, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: pytest.fail(f"torch was to start {number} threads"))
    assert cli.run(["train", str(small_log), "--threads", "1025", "--out", str(tmp_path / "run")]) == 2
    assert "'--threads'" in capsys.readouterr().err
