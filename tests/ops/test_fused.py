"""The C++ kernel against the same look-ups in plain torch."""

import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

from leanrec.bag import TableBag
from leanrec.methods import MEC, PQ, RQ, VRQ, LowRank, Scalar
from leanrec.ops import fused

V = 1000
TABLES = [
    *(PQ(num_subspaces=3, num_centroids=2**bits) for bits in (1, 2, 3, 4, 7, 8)),
    PQ(num_subspaces=1, num_centroids=1000),
    PQ(num_subspaces=24, num_centroids=700),
    PQ(num_subspaces=2, num_centroids=100),  # 7 bits, of which 28 stand for nothing
    MEC(num_steps=2),
    *(RQ(num_levels=levels, num_centroids=centroids) for levels, centroids in [(1, 256), (5, 32), (8, 2), (32, 20), (3, 600)]),
    *(RQ(num_levels=levels, num_centroids=centroids, word_bits=8) for levels, centroids in [(1, 256), (5, 32), (32, 256)]),
    VRQ(),
    VRQ(codes_per_1000_rows=2500, num_levels=16, num_centroids=16),
    VRQ(codes_per_1000_rows=1, num_levels=1),
    VRQ(codes_per_1000_rows=5000, num_levels=32, num_centroids=256, sorted_rows=False),
    *(Scalar(num_bits=bits, group_size=group) for bits in (2, 4, 8) for group in (0, 8)),
    Scalar(group_size=7),
]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_table(method, *, rows=V, columns=24):
    """Random codes and values: a table that no fit has made tidy."""
    table = method.build(rows, columns, generator=seeded(1))
    for tensor in table.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=seeded(2)))
    if isinstance(method, VRQ):
        spread = torch.sort(torch.randint(rows + 1, (method.num_levels,), generator=seeded(3)), descending=True).values
        table.borders.copy_((spread * int(table.borders.sum()) // max(int(spread.sum()), 1)).clamp(max=rows))
        if not method.sorted_rows:
            table.order.fit(torch.randint(1000, (rows,), generator=seeded(4)))
    return table


def by_torch(table, ids):
    with fused.plain_torch():
        return table(ids)


def kernel_reads(table):
    coded = table.coded()
    return coded is not None and fused.takes(coded, torch.arange(1))


def test_the_kernel_is_built():
    assert fused._kernel is not None, "it is built when leanrec is installed"


@pytest.mark.parametrize("method", TABLES, ids=lambda method: method.short())
@pytest.mark.parametrize("num_ids", [1, 7, 5000])
def test_rows_are_those_of_plain_torch(method, num_ids):
    table = make_table(method)
    assert kernel_reads(table)
    ids = torch.randint(V, (num_ids,), generator=seeded(5))
    ids[-1] = V - 1  # its codes end where the stream does
    expected = by_torch(table, ids)
    with torch.no_grad():
        torch.testing.assert_close(table(ids), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(table(ids.int()), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(table(ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_ids", [50, 1000])
@pytest.mark.parametrize("method", [PQ(num_subspaces=1), RQ(), RQ(word_bits=8), VRQ(codes_per_1000_rows=3000, num_levels=8), Scalar()], ids=repr)
@pytest.mark.parametrize("columns", [2, 4, 10, 17, 32, 33, 64, 66, 100, 130])
def test_any_number_of_columns(method, columns, num_ids):
    table = make_table(method, columns=columns)
    assert kernel_reads(table) == (not isinstance(method, VRQ) or columns % 2 == 0)
    ids = torch.randint(V, (num_ids,), generator=seeded(5))
    with torch.no_grad():
        torch.testing.assert_close(table(ids), by_torch(table, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [PQ(num_centroids=8), RQ(num_centroids=8), VRQ(codes_per_1000_rows=2000, num_levels=4, num_centroids=8)], ids=repr)
def test_codes_of_less_than_eight_bytes(method):
    table = make_table(method, rows=4)
    assert table.packed_codes.nbytes < 8
    with torch.no_grad():
        torch.testing.assert_close(table(torch.arange(4)), by_torch(table, torch.arange(4)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [PQ(), RQ(), VRQ(), Scalar()], ids=repr)
def test_ids_of_any_shape_and_layout_with_padding(method):
    table = make_table(method)
    table.padding_idx = 3
    ids = torch.randint(6, (4, 5, 2), generator=seeded(6)).transpose(0, 2)
    with torch.no_grad():
        assert table(ids).shape == (2, 5, 4, 24) and not table(ids)[ids == 3].any()
        torch.testing.assert_close(table(ids), by_torch(table, ids), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(table(ids.to(torch.uint8)), by_torch(table, ids), rtol=1e-5, atol=1e-5)
        assert table(torch.tensor(5)).shape == (24,) and table(torch.empty(0, 2, dtype=torch.int64)).shape == (0, 2, 24)


@pytest.mark.parametrize("method", [PQ(), RQ(), VRQ(sorted_rows=False), Scalar()], ids=repr)
@pytest.mark.parametrize("wrong", [-1, V, 2**40, -(2**40)])
@pytest.mark.parametrize("num_ids", [3, 100_000])
def test_an_id_outside_the_table_is_an_error_in_every_thread(method, wrong, num_ids):
    table = make_table(method)
    ids = torch.zeros(num_ids, dtype=torch.int64)
    ids[-2] = wrong
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad(), pytest.raises(IndexError, match=f"id {wrong} is outside the table's rows 0 to {V - 1}"):
            table(ids)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("method", [PQ(num_subspaces=4, num_centroids=200), RQ(num_levels=3), RQ(word_bits=8), VRQ()], ids=repr)
@pytest.mark.parametrize("padding", [None, 3])
def test_gradients_are_those_of_plain_torch(method, padding):
    table = make_table(method)
    table.padding_idx = padding
    ids = torch.randint(20, (3000, 2), generator=seeded(7))
    mixture = torch.randn(3000, 2, 24, generator=seeded(8))
    found, expected = (
        torch.autograd.grad((read(ids) * mixture).sum(), list(table.parameters())) for read in (table, lambda ids: by_torch(table, ids))
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().sum() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [PQ(num_subspaces=4, num_centroids=200), RQ(num_levels=3), RQ(word_bits=8), VRQ()], ids=repr)
def test_gradients_of_gradients_are_those_of_plain_torch(method):
    table = make_table(method)
    table.padding_idx = 3
    values, ids = next(table.parameters()), torch.randint(20, (300,), generator=seeded(7))

    def penalty_gradient(read):
        [first] = torch.autograd.grad(read(ids).sin().sum(), values, create_graph=True)
        return torch.autograd.grad(first.square().sum(), values)[0]

    torch.testing.assert_close(penalty_gradient(table), penalty_gradient(lambda ids: by_torch(table, ids)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [PQ(), RQ(), RQ(word_bits=8), VRQ(), Scalar(num_bits=4)], ids=repr)
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("last", [False, True])
def test_bags_are_those_of_torch(method, mode, padding, last, monkeypatch):
    table = make_table(method)
    bag = TableBag(table, mode=mode, padding_idx=padding, include_last_offset=last)
    rows = table.decode()
    calls = []
    monkeypatch.setattr(fused, "_read", lambda *given, read=fused._read, **named: calls.append(1) or read(*given, **named))
    flat = torch.randint(8, (40,), generator=seeded(9))
    offsets = torch.tensor([0, 0, 5, 6, 30, 40] if last else [0, 0, 5, 6, 30])
    with torch.no_grad():
        weights = torch.randn(40, generator=seeded(10)) if mode == "sum" else None
        found = bag(flat.int(), offsets.int(), per_sample_weights=weights)
        expected = F.embedding_bag(flat, rows, offsets, mode=mode, padding_idx=padding, include_last_offset=last, per_sample_weights=weights)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        if not last:
            torch.testing.assert_close(
                bag(flat.view(8, 5)), F.embedding_bag(flat.view(8, 5), rows, mode=mode, padding_idx=padding), rtol=1e-5, atol=1e-5
            )
    assert len(calls) == (1 if last else 2)


def test_who_listens_to_the_table_of_a_bag_hears_its_rows():
    bag, heard = TableBag(make_table(Scalar()), mode="sum"), []
    bag.table.register_forward_hook(lambda table, ids, rows: heard.append(rows))
    with torch.no_grad():
        pooled = bag(torch.tensor([[1, 2]]))
    torch.testing.assert_close(heard[0].sum(0, keepdim=True), pooled)


@pytest.mark.parametrize("offsets", [[1, 5], [0, 7, 5], [0, 50], [0, -1, 5]])
def test_offsets_that_do_not_fit_are_an_error(offsets):
    bag = TableBag(make_table(PQ()), mode="sum")
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match="offsets"):
        bag(torch.zeros(20, dtype=torch.int64), torch.tensor(offsets))
    with torch.no_grad(), pytest.raises(IndexError, match=f"id {V} is outside"):
        bag(torch.tensor([0, V]), torch.tensor([0]))


@pytest.mark.parametrize("borders", [[V + 1] + [0] * 7, [0, 1] + [0] * 6, [V] * 8, [-1] * 8])
def test_borders_of_a_damaged_file_are_an_error(borders):
    table = make_table(VRQ(codes_per_1000_rows=1000))
    table.borders.copy_(torch.tensor(borders))
    with torch.no_grad(), pytest.raises(ValueError, match="borders"):
        table(torch.arange(5))


@pytest.mark.parametrize("method", [PQ(), RQ(), RQ(word_bits=8), VRQ(), Scalar()], ids=repr)
def test_other_precisions_go_by_torch(method):
    assert not kernel_reads(make_table(method).bfloat16())


def test_compiled_training_sees_through_the_operator():
    torch.compiler.reset()
    table = make_table(PQ())
    ids = torch.arange(6)
    step = torch.compile(lambda: table(ids).square().sum(), fullgraph=True, backend="aot_eager")
    [found] = torch.autograd.grad(step(), [table.codebooks])
    [expected] = torch.autograd.grad(by_torch(table, ids).square().sum(), [table.codebooks])
    torch.testing.assert_close(found, expected)


def test_an_exported_program_holds_the_operator_or_none_as_one_likes():
    table = make_table(PQ()).eval()
    program = torch.export.export(table, (torch.arange(5),))
    assert "leanrec.rows" in program.graph_module.code
    with fused.plain_torch():
        assert "leanrec" not in torch.export.export(table, (torch.arange(5),)).graph_module.code


def test_a_saved_program_runs_where_the_operator_was_imported(tmp_path):
    table = make_table(PQ()).eval()
    torch.export.save(torch.export.export(table, (torch.arange(5),)), tmp_path / "table.pt2")
    program = f"import torch, leanrec.ops.fused; print(torch.export.load({str(tmp_path / 'table.pt2')!r}).module()(torch.arange(5)).sum().item())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(float(table(torch.arange(5)).detach().sum()), rel=1e-5)


@pytest.mark.parametrize("method", [RQ(num_levels=2, num_centroids=8), VRQ(), Scalar()], ids=repr)
def test_a_traced_table_reads_the_ids_that_it_is_given_later(method):
    table = make_table(method)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(table, (torch.arange(7),))
        torch.testing.assert_close(traced(torch.arange(90, 101)), table(torch.arange(90, 101)))


def test_torch_checks_the_operator():
    table = make_table(PQ())
    coded = table.coded()
    torch.library.opcheck(fused._rows, (torch.arange(5), coded.tensors, coded.numbers, coded.layout, coded.width, V, -1))


def test_without_the_kernel_one_line_says_so_once_and_torch_answers(monkeypatch):
    table, ids = make_table(PQ()), torch.arange(5)
    expected = by_torch(table, ids)
    monkeypatch.setattr(fused, "_kernel", None)
    monkeypatch.setattr(fused, "_said", False)
    with pytest.warns(UserWarning, match="kernel was not built") as said:
        torch.testing.assert_close(table(ids), expected)
    assert "\n" not in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table(ids)
        LowRank(rank=2).build(V, 8)(ids)  # no table that the kernel would have read


def test_a_process_that_forks_can_look_up():
    code = """
import os, torch
from leanrec.methods import PQ
torch.set_num_threads(2)
table, ids = PQ().build(1000, 64), torch.zeros(50_000, dtype=torch.int64)
with torch.no_grad():
    table(ids)
    child = os.fork()
    if child == 0:
        table(ids)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
