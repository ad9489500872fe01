"""The Triton kernel against the same look-ups in plain torch: on a GPU where there is one, else in Triton's interpreter, in a process of its own."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from leanrec.methods import PQ, RQ, VRQ, Scalar
from leanrec.ops import fused

V = 500
TABLES = [
    *(PQ(num_subspaces=3, num_centroids=2**bits) for bits in (1, 3, 8)),
    PQ(num_subspaces=24, num_centroids=300),
    RQ(num_levels=5, num_centroids=32),
    RQ(num_levels=2, num_centroids=300),
    RQ(num_levels=5, num_centroids=32, word_bits=8),
    VRQ(codes_per_1000_rows=2500, num_levels=16, num_centroids=16),
    VRQ(codes_per_1000_rows=3000, num_levels=8, num_centroids=100, sorted_rows=False),
    *(Scalar(num_bits=bits, group_size=group) for bits in (2, 4, 8) for group in (0, 8)),
]
NAMES = [method.short() for method in TABLES]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: pip install triton")


@needs_triton
def test_all_layouts_in_the_interpreter():
    """Triton reads the variable when it is imported."""
    if torch.cuda.is_available():
        pytest.skip("the GPU runs them")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", __file__], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split("\n")[:-1] == NAMES


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", TABLES, ids=NAMES)
def test_a_layout_on_a_gpu(method):
    check(method, "cuda")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", [PQ(), RQ(), RQ(word_bits=8), VRQ()], ids=repr)
def test_gradients_on_a_gpu(method):
    table = make_table(method).cuda()
    table.padding_idx = 3
    ids = torch.randint(20, (300,), generator=torch.Generator().manual_seed(4)).cuda()
    mixture = torch.randn(300, 24, device="cuda")
    found = torch.autograd.grad((table(ids) * mixture).sum(), list(table.parameters()))
    with fused.plain_torch():
        expected = torch.autograd.grad((table(ids) * mixture).sum(), list(table.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def make_table(method):
    table = method.build(V, 24, generator=torch.Generator().manual_seed(1))
    for tensor in table.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2)))
    if isinstance(method, VRQ):
        codes = int(table.borders.sum())
        table.borders.copy_(torch.tensor([max(0, min(V, 2 * codes // (level + 4) ** 2)) for level in range(method.num_levels)]))
        if not method.sorted_rows:
            table.order.fit(torch.randint(1000, (V,), generator=torch.Generator().manual_seed(3)))
    return table


def check(method, device):
    """Rows of a table with random codes, padding among them, by the kernel and by torch."""
    from leanrec.ops import fused_gpu

    table = make_table(method).to(device)
    table.padding_idx = 3
    for num_ids in (1, 70):
        ids = torch.randint(V, (num_ids,), generator=torch.Generator().manual_seed(5)).to(device)
        ids[-1], ids[0] = V - 1, 3
        coded = table.coded()
        with fused.plain_torch():
            expected = table(ids)
        found = fused_gpu.rows(ids, coded.tensors, coded.numbers, coded.layout, coded.width, V, 3)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    with torch.no_grad():
        for each in TABLES:
            check(each, "cpu")
            print(each.short())
