import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from leanrec import storage
from leanrec.bag import TableBag
from leanrec.compress import compress, tables
from leanrec.dense import compress_dense
from leanrec.methods import METHODS, PQ, Full
from leanrec.methods.pq import PQTable
from leanrec.report import report
from leanrec.storage import load, read_metadata, save

METHOD = PQ(num_subspaces=2, num_centroids=8)  # 3-bit codes, packed across bytes


class Model(nn.Module):
    """A table, a pooled one, a table left alone, a table in two places, and layers with a buffer."""

    def __init__(self, num_users=100):
        super().__init__()
        self.user = nn.Embedding(num_users, 8, padding_idx=0)
        self.tags = nn.EmbeddingBag(30, 8, mode="max", padding_idx=0)
        self.plain = nn.Embedding(10, 8)
        self.again = nn.ModuleDict({"user": self.user})
        self.norm = nn.BatchNorm1d(8)

    def forward(self, users, tags):
        rows = self.user(users) + self.again["user"](users.flip(0)) + self.tags(tags) + self.plain(users % 10)
        return self.norm(rows)


def compressed(seed=0):
    torch.manual_seed(seed)
    model = compress(Model(), {"user": METHOD, "tags": METHOD})
    model(*batch())  # moves the running statistics
    return model.eval()


def batch():
    draws = torch.Generator().manual_seed(1)
    return torch.randint(100, (12,), generator=draws), torch.randint(30, (12, 3), generator=draws)


def meta_model():
    with torch.device("meta"):
        return Model()


@pytest.mark.parametrize("build", [Model, meta_model])
def test_loaded_model_answers_the_same(tmp_path, build):
    model = compressed()
    save(model, tmp_path / "model.safetensors")
    loaded = load(build(), tmp_path / "model.safetensors")
    assert torch.equal(loaded.eval()(*batch()), model(*batch()))
    assert {path: type(module) for path, module in tables(loaded).items()} == {path: type(module) for path, module in tables(model).items()}
    assert loaded.again["user"] is loaded.user
    assert (loaded.user.fit_error, loaded.user.padding_idx) == (model.user.fit_error, 0)
    assert all(not tensor.is_meta for tensor in loaded.state_dict().values())


@pytest.mark.parametrize("build", [Model, meta_model])
def test_uncompressed_model_comes_back(tmp_path, build):
    model = Model().eval()
    save(model, tmp_path / "m")
    loaded = load(build().eval(), tmp_path / "m")
    assert isinstance(loaded.user, nn.Embedding) and torch.equal(loaded(*batch()), model(*batch()))


def test_loading_makes_no_full_table_and_fits_nothing(tmp_path, monkeypatch):
    save(compressed(), tmp_path / "m")
    build, built = PQ.build, []

    def watched(self, *size, **settings):
        built.append(build(self, *size, **settings))
        return built[-1]

    devices = []
    allocate = storage._allocate
    monkeypatch.setattr(PQ, "build", watched)
    monkeypatch.setattr(storage, "_allocate", lambda *args: devices.extend(table.codebooks.device.type for table in built) or allocate(*args))
    monkeypatch.delattr(PQTable, "fit_sample")
    load(meta_model(), tmp_path / "m")
    assert len(built) == 2 and devices[:2] == ["meta", "meta"]


def test_training_mode_stays_that_of_the_given_model(tmp_path):
    save(compressed(), tmp_path / "m")
    assert all(module.training for module in load(Model(), tmp_path / "m").modules())
    assert not any(module.training for module in load(Model().eval(), tmp_path / "m").modules())


@pytest.mark.parametrize("places", [[], ["user"], ["tags", "plain", "head"], ["user", "tags", "plain", "head"]])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_takes_the_place_of_something_frozen_is_frozen(tmp_path, places, device):
    def build(device="cpu"):
        with torch.device(device):
            model = Model()
            model.head = nn.Linear(8, 8)
        for place in places:
            model.get_submodule(place).requires_grad_(False)
        return model

    torch.manual_seed(0)
    model = compress(build(), {"user": METHOD, "tags": METHOD})
    model.head = compress_dense(model.head, [torch.randn(50, 8)], rank=1)
    save(model, tmp_path / "m")
    loaded = load(build(device), tmp_path / "m")
    flags = {name: parameter.requires_grad for name, parameter in loaded.named_parameters()}
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name for name, flag in flags.items() if not flag} == {name for name in flags if name.startswith(tuple(places))}


def test_loaded_model_trains(tmp_path):
    save(compressed(), tmp_path / "m")
    loaded = load(meta_model(), tmp_path / "m").train()
    loaded(*batch()).square().sum().backward()
    assert {name for name, parameter in loaded.named_parameters() if parameter.grad is not None} == {
        "user.codebooks",
        "tags.table.codebooks",
        "plain.weight",
        "norm.weight",
        "norm.bias",
    }


def test_settings_of_bags_come_back(tmp_path):
    model = compress(nn.ModuleDict({"tags": nn.EmbeddingBag(30, 8, mode="sum", padding_idx=3, include_last_offset=True)}), METHOD)
    save(model, tmp_path / "m")
    bag = load(nn.ModuleDict({"tags": nn.EmbeddingBag(30, 8)}), tmp_path / "m")["tags"]
    assert isinstance(bag, TableBag) and (bag.mode, bag.padding_idx, bag.include_last_offset) == ("sum", 3, True)


def test_table_itself_comes_back(tmp_path):
    table = compress(nn.Embedding(50, 8), METHOD)
    save(table, tmp_path / "m")
    assert torch.equal(load(nn.Embedding(50, 8), tmp_path / "m").decode(), table.decode())


def test_two_modules_over_one_table_come_back_as_such(tmp_path):
    def build():
        model = nn.ModuleDict({"user": nn.Embedding(50, 8), "friends": nn.EmbeddingBag(50, 8)})
        model["friends"].weight = model["user"].weight
        return model

    save(compress(build(), METHOD), tmp_path / "m")
    loaded = load(build(), tmp_path / "m")
    assert loaded["friends"].table is loaded["user"]


def test_shared_tensors_are_stored_once_and_stay_tied(tmp_path):
    def build():
        model = nn.ModuleDict({"user": nn.Embedding(1000, 8), "head": nn.Linear(8, 1000, bias=False)})
        model["head"].weight = model["user"].weight
        return model

    model = build()
    save(model, tmp_path / "m")
    assert os.path.getsize(tmp_path / "m") < 1.1 * 1000 * 8 * 4
    with torch.device("meta"):
        loaded = build()
    load(loaded, tmp_path / "m")
    assert loaded["head"].weight is loaded["user"].weight and torch.equal(loaded["user"].weight, model["user"].weight)
    untied = nn.ModuleDict({"user": nn.Embedding(1000, 8), "head": nn.Linear(8, 1000, bias=False)})
    save(untied, tmp_path / "untied")
    with pytest.raises(ValueError, match=r"'user.weight' and 'head.weight' are one tensor in the model and two in the file"):
        load(build(), tmp_path / "untied")


def test_parts_of_one_memory_are_stored_as_their_own(tmp_path):
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            whole = torch.arange(10.0)
            self.register_buffer("low", whole[:5])
            self.register_buffer("high", whole[5:])

    save(Halves(), tmp_path / "m")
    assert load(Halves(), tmp_path / "m").high.tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("build", [Model, meta_model])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_comes_back(tmp_path, method, build):
    model = compress(Model(), {"user": METHODS[method]()}).eval()
    save(model, tmp_path / "m")
    loaded = load(build(), tmp_path / "m").eval()
    assert torch.equal(loaded(*batch()), model(*batch()))
    assert report(loaded) == report(model)
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_comes_back_in_bfloat16(tmp_path, method):
    model = compress(nn.Embedding(100, 8).bfloat16(), METHODS[method]())
    save(model, tmp_path / "m")
    loaded = load(nn.Embedding(100, 8).bfloat16(), tmp_path / "m")
    assert loaded.decode().dtype == torch.bfloat16 and torch.equal(loaded.decode(), model.decode())


def test_bfloat16_comes_back_as_bfloat16(tmp_path):
    model = compressed().bfloat16()
    save(model, tmp_path / "m")
    loaded = load(Model().bfloat16(), tmp_path / "m").eval()
    assert loaded.user.codebooks.dtype == torch.bfloat16 and torch.equal(loaded(*batch()), model(*batch()))
    with pytest.raises(ValueError, match=r"'plain.weight' is \(10, 8\) torch.bfloat16 in the file and \(10, 8\) torch.float32 in the model"):
        load(Model(), tmp_path / "m")


def test_file_is_as_large_as_what_the_model_holds(tmp_path):
    model = compress(nn.Embedding(100_000, 16), PQ(num_subspaces=4))
    save(model, tmp_path / "m")
    assert model.nbytes <= os.path.getsize(tmp_path / "m") < model.nbytes + 2000


def test_file_opens_with_safetensors_alone(tmp_path):
    model = compressed()
    save(model, tmp_path / "m")
    assert torch.equal(load_file(tmp_path / "m")["user.packed_codes"], model.user.packed_codes)


def test_metadata_comes_back(tmp_path):
    save(compressed(), tmp_path / "m", metadata={"auc": 0.75, "fields": ["user"]})
    assert read_metadata(tmp_path / "m") == {"auc": 0.75, "fields": ["user"]}
    save(compressed(), tmp_path / "m")
    assert read_metadata(tmp_path / "m") == {}


@pytest.mark.parametrize("notes", [{"a": torch.zeros(2)}, {(1, 2): 3}, {"a": {1}}, [1], 5])
def test_metadata_that_is_no_json_is_refused(tmp_path, notes):
    with pytest.raises(ValueError, match="metadata cannot be written as JSON") as error:
        save(compressed(), tmp_path / "m", metadata=notes)
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("found", "altered"),
    [
        (b'"metadata"', b'"metadatb"'),
        (rb'"{\"note\"', rb'"[\"note\"'),
        (rb"{\"note\": [[1]]}", b"[[1]]"),
    ],
)
def test_damaged_metadata_is_refused(tmp_path, found, altered):
    path = tmp_path / "m"
    save(compressed(), path, metadata={"note": [[1]]})
    content = path.read_bytes()
    assert found in content
    path.write_bytes(content.replace(found, altered.ljust(len(found))))
    with pytest.raises(ValueError, match="its metadata is damaged") as error:
        read_metadata(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("position", ["header", "first byte", "last byte"])
def test_altered_file_is_refused(tmp_path, position):
    path = tmp_path / "m"
    save(compressed(), path, metadata={"note": "aaaa"})
    content = bytearray(path.read_bytes())
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    index = {"header": content.index(b"aaaa"), "first byte": header_end, "last byte": len(content) - 1}[position]
    content[index] ^= 1
    path.write_bytes(content)
    refused(path, "is damaged or was altered since it was written")


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_truncated_file_is_refused(tmp_path, size):
    path = tmp_path / "m"
    save(compressed(), path)
    path.write_bytes(path.read_bytes()[:size])
    refused(path, "is missing, truncated or no safetensors file")


def test_missing_file_and_folder_are_refused(tmp_path):
    refused(tmp_path / "nothing", "is missing")
    refused(tmp_path, "is missing, truncated or no safetensors file")


def test_safetensors_file_of_another_program_is_refused(tmp_path):
    save_file({"user.weight": torch.zeros(2)}, tmp_path / "m")
    refused(tmp_path / "m", "was not written by leanrec.save")


def test_other_version_of_the_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "FORMAT_VERSION", "999")
    save(compressed(), tmp_path / "m")
    monkeypatch.undo()
    refused(tmp_path / "m", "is of format '999', but this version of leanrec reads '1'")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method": "Magic(rank=3)"}, "Magic"),
        ({"method": "__import__('os').system('true')"}, "table 'user': "),
        ({"method": "PQ(num_subspaces=3)"}, "table 'user': PQ splits a row into num_subspaces=3"),
        ({"method": "PQ(num_subspaces=4, num_centroids=8)"}, "it does not fit the model: 'user."),
        ({"method": "Full()"}, "it does not fit the model: of the model's tensors it lacks 'again.user.weight', 'user.weight'"),
        ({"method": 7}, "malformed"),
        ({"num_embeddings": 101}, "it holds the table 'user' (101 x 8), but the model's tables are 'user' (100 x 8), "),
        ({"num_embeddings": "100"}, "it holds the table 'user' (100 x 8), but"),
        ({"places": {"usr": None}}, "it holds the table 'usr' (100 x 8), but the model's tables are"),
        ({"places": {"norm": None}}, "it holds the table 'norm' (100 x 8), but"),
        ({"places": {"user": {"mode": "sum", "color": 3}}}, "malformed"),
        ({"places": {"user": {"mode": "median"}}}, "mode='median' is unknown"),
        ({"places": None}, "malformed"),
        ({"dtype": "int8"}, "malformed"),
        ({"num_embeddings": 100.0}, "it holds the table 'user' (100.0 x 8), but"),
        ({"places": {}, "method": "Magic"}, "Magic"),
        ({"places": {"user": {"mode": "sum", "padding_idx": 1.5}}}, "table 'user': padding_idx=1.5 is neither null nor one of the rows 0 to 99."),
        ({"places": {"user": {"mode": "sum", "include_last_offset": "no"}}}, "table 'user': include_last_offset='no' is neither"),
        *(({"padding_idx": value}, f"table 'user': padding_idx={value!r} is neither null nor") for value in ("a", 1.5, 10**9, 100, -3, True, [0])),
        *(({"fit_error": value}, f"table 'user': fit_error={value!r} is neither null nor a number.") for value in ("x", [0.5], True)),
        *(({"method": text}, "table 'user': ") for text in ("PQ(weight_power=1" + "0" * 400 + ")", "PQ" + "()" * 490, "-" * 5000 + "1")),
        ({"method": "PQ(num_centroids=" + "9" * 900 + ")"}, "table 'user': "),
    ],
)
def test_header_that_lies_is_refused(tmp_path, monkeypatch, changes, reason):
    describe = storage._describe
    monkeypatch.setattr(storage, "_describe", lambda groups: [describe(groups)[0] | changes, *describe(groups)[1:]])
    save(compressed(), tmp_path / "m")
    refused(tmp_path / "m", reason)


@pytest.mark.parametrize("key", ["tables", "dense", "shared"])
def test_deeply_nested_header_is_refused(tmp_path, monkeypatch, key):
    texts = storage.header_texts
    monkeypatch.setattr(storage, "header_texts", lambda *given, **named: texts(*given, **named) | {key: "[" * 100_000})
    save(compressed(), tmp_path / "m")
    refused(tmp_path / "m", "its header is malformed (RecursionError: ")


def test_model_that_differs_is_named(tmp_path):
    save(compressed(), tmp_path / "m")
    model = Model()
    model.norm, model.extra = nn.Identity(), nn.Linear(1, 1)
    refused(tmp_path / "m", "of the model's tensors it lacks 'extra.bias', 'extra.weight', and the model lacks 'norm.bias', ", model=model)
    model = Model()
    model.norm = nn.BatchNorm1d(9)
    refused(tmp_path / "m", "'norm.weight' is (8,) torch.float32 in the file and (9,) torch.float32 in the model", model=model)
    refused(tmp_path / "m", "it holds the table 'user' (100 x 8), but the model's tables are 'user' (90 x 8)", model=Model(num_users=90))
    refused(tmp_path / "m", "the model's tables are none", model=nn.Linear(1, 1))


def refused(path, reason, model=None):
    model = model or Model()
    before = dict(model.named_modules())
    with pytest.raises(ValueError) as error:
        load(model, path)
    assert str(error.value).startswith(f"{path}: ") and reason in str(error.value) and "\n" not in str(error.value)
    assert dict(model.named_modules()) == before


def test_buffer_that_is_never_saved_needs_a_real_device(tmp_path):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("ids", torch.arange(3), persistent=False)

    save(Positions(), tmp_path / "m")
    assert load(Positions(), tmp_path / "m").ids.tolist() == [0, 1, 2]
    with torch.device("meta"):
        model = Positions()
    refused(tmp_path / "m", "the model's buffer 'ids' is never saved and has no values on the meta device", model=model)


def test_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "m"
    save(compressed(), path, metadata={"run": 1})

    def disk_full(tensors, temporary, header):
        Path(temporary).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "save_file", disk_full)
    with pytest.raises(OSError, match=r"cannot be written \(.*No space left on device\)\. Nothing was changed\."):
        save(compressed(seed=1), path)
    assert os.listdir(tmp_path) == ["m"] and read_metadata(path) == {"run": 1}
    load(Model(), path)


def test_reader_of_the_old_file_is_not_disturbed(tmp_path):
    path = tmp_path / "m"
    save(compressed(), path)
    before = path.read_bytes()
    with path.open("rb") as reader:
        save(compressed(seed=1), path)
        assert reader.read() == before != path.read_bytes()


def test_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "m"
    save(compressed(), path)
    before = path.read_bytes()

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(compressed(seed=1), path)
    assert os.listdir(tmp_path) == ["m"] and path.read_bytes() == before


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(OSError, match="cannot be written"):
        save(compressed(), tmp_path / "nowhere" / "m")


def test_state_that_is_no_tensor_is_named(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(ValueError, match="'_extra_state' of its state is a dict, not a tensor"):
        save(Extra(1, 1), tmp_path / "m")
    with pytest.raises(ValueError, match=r"'user.weight' of its state is on the meta device"):
        save(meta_model(), tmp_path / "m")
    assert os.listdir(tmp_path) == []


def test_header_holds_the_text_of_the_methods(tmp_path):
    save(compress(Model(), {"user": Full(), "tags": METHOD}), tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])["__metadata__"]
    assert [entry["method"] for entry in json.loads(header["tables"])] == [repr(Full()), repr(METHOD)]
