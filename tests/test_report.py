import copy
import json

import pytest
import torch
from torch import nn

from leanrec.compress import compress
from leanrec.methods.pq import PQ
from leanrec.report import report

METHOD = PQ(num_subspaces=2, num_centroids=8)
# 50 rows x 2 codes x 3 bits = 300 bits, 38 bytes; 8 centroids x 8 numbers x 4 bytes
NBYTES = 38 + 256


def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"user": nn.Embedding(50, 8), "item": nn.Embedding(20, 4), "head": nn.Linear(8, 1)})


def test_bytes_of_an_uncompressed_model():
    size = report(model())
    assert (size.tables, size.tables_full, size.ratio) == (50 * 8 * 4 + 20 * 4 * 4,) * 2 + (1.0,)
    assert size.model == size.model_full == size.tables + 9 * 4
    assert [(row.path, row.method, row.error) for row in size.rows] == [("user", "-", None), ("item", "-", None)]


def test_bytes_are_those_of_the_state_dict():
    network = compress(model(), {"user": METHOD})
    size = report(network)
    user, item = size.rows
    assert (user.nbytes, user.nbytes_full, item.nbytes) == (NBYTES, 1600, 320)
    assert user.ratio == pytest.approx(1600 / NBYTES)
    assert (size.tables, size.tables_full) == (NBYTES + 320, 1920)
    assert size.model == sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    assert size.model_full == 1920 + 9 * 4
    assert user.method == METHOD.short()


def test_shared_table_is_counted_once():
    network = model()
    network["friend"] = network["user"]
    network["twin"] = nn.Embedding(50, 8)
    network["twin"].weight = network["user"].weight
    assert report(network).tables_full == 1920
    size = report(compress(network, {"user": METHOD, "twin": METHOD}))
    assert (size.tables, size.model) == (NBYTES + 320, NBYTES + 320 + 36)
    assert [row.path for row in size.rows] == ["user", "item"]


def test_bytes_of_bfloat16_are_as_stored_and_the_ratio_is_to_float32():
    size = report(model().bfloat16())
    assert (size.tables, size.ratio) == (960, 2.0)


def test_error_is_what_compress_measured():
    network = compress(model(), {"user": METHOD})
    size = report(network)
    assert size.rows[0].error == network["user"].fit_error > 0
    assert size.error == pytest.approx(network["user"].fit_error * 1600 / 1920)  # the other table loses nothing


def test_error_against_an_original_is_measured_now():
    original = model()
    counts = torch.arange(50)
    network = compress(copy.deepcopy(original), {"user": METHOD})
    with torch.no_grad():
        network["user"].codebooks.zero_()
    error = report(network, original=original, counts={"user": counts}).rows[0].error
    weight, shares = original["user"].weight.detach(), (counts / counts.sum())[:, None]
    mean = (shares * weight).sum(0)
    assert error == pytest.approx(float((shares * weight**2).sum() / (shares * (weight - mean) ** 2).sum()), rel=1e-5)
    assert report(network, original=original).rows[1].error == 0


def test_original_with_other_tables_is_an_error():
    with pytest.raises(ValueError, match=r"Table 'item' \(20 x 4\): the original model has no such table\. Its tables are 'user' \(50 x 8\)"):
        report(model(), original=nn.ModuleDict({"user": nn.Embedding(50, 8)}))


def test_vocabulary_stands_beside():
    size = report(model(), vocabulary_nbytes=12_345)
    assert size.vocabulary == 12_345 and size.tables == 1920
    assert str(size).splitlines()[-1].split() == ["vocabulary", "12,345"]


def test_text_puts_the_ratio_beside_bytes_rows_and_dimension():
    text = str(report(compress(model(), {"user": METHOD})))
    lines = [line.split("  ") for line in text.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells[0] == ["table", "rows", "dim", "method", "bytes", "as float32", "ratio", "error"]
    assert cells[1][:7] == ["user", "50", "8", METHOD.short(), "294", "1,600", "5.4x"]
    assert cells[2] == ["item", "20", "4", "-", "320", "320", "1.0x", "-"]
    assert cells[3][:4] == ["all tables", "614", "1,920", "3.1x"]
    assert cells[4] == ["whole model", "650", "1,956", "3.0x"]


def test_dict_is_json_with_the_ratios():
    size = report(compress(model(), {"user": METHOD}), vocabulary_nbytes=7)
    values = json.loads(json.dumps(size.to_dict()))
    assert values["ratio"] == size.ratio and values["rows"][0]["ratio"] == size.rows[0].ratio
    assert (values["tables"], values["vocabulary"], values["rows"][0]["method"]) == (614, 7, METHOD.short())


def test_model_without_tables_has_an_empty_report():
    size = report(nn.Linear(3, 1))
    assert (size.rows, size.tables, size.model, size.ratio) == ((), 0, 16, 1.0)
    assert "whole model" in str(size)
