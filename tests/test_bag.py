import pytest
import torch
from torch import nn

from leanrec.bag import TableBag
from leanrec.methods.full import Full

V, D = 50, 6


def pair(**settings):
    """torch's module and ours over the same rows."""
    reference = nn.EmbeddingBag(V, D, **settings)
    with torch.no_grad():
        reference.weight.copy_(torch.randn(V, D, generator=torch.Generator().manual_seed(0)))
    table = Full().build(V, D).fit(reference.weight.detach())
    return reference, TableBag(table, **settings)


def draw(*shape, high=V):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("padding_idx", [None, 0, 3])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize(
    ("ids", "offsets"),
    [
        (draw(4, 5, high=6), None),
        (draw(0, 5), None),
        (draw(12, high=6), torch.tensor([0, 3, 3, 7, 12])),  # an empty bag inside and one at the end
        (draw(12, high=6), torch.tensor([0, 5], dtype=torch.int32)),
        (draw(12, high=6).int(), torch.tensor([0, 5], dtype=torch.int32)),
        (draw(0), torch.tensor([0, 0, 0])),
        (draw(0), torch.tensor([], dtype=torch.int64)),
        (torch.tensor([[3, 3], [0, 0]]), None),  # bags of nothing but padding
    ],
)
def test_pooled_rows_equal_torch(mode, padding_idx, ids, offsets):
    reference, bag = pair(mode=mode, padding_idx=padding_idx)
    pooled = bag(ids, offsets)
    torch.testing.assert_close(pooled, reference(ids, offsets))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_last_offset_is_the_end_where_asked(mode):
    reference, bag = pair(mode=mode, include_last_offset=True)
    ids, offsets = draw(10), torch.tensor([0, 4, 4, 9])
    assert torch.equal(bag(input=ids, offsets=offsets), reference(input=ids, offsets=offsets))
    assert bag(ids, offsets).shape == (3, D)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_per_sample_weights_scale_the_rows(padding_idx):
    reference, bag = pair(mode="sum", padding_idx=padding_idx)
    ids, weights = draw(4, 3, high=5), torch.rand(4, 3, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(bag(ids, per_sample_weights=weights), reference(ids, per_sample_weights=weights))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_gradients_equal_torch(mode):
    reference, bag = pair(mode=mode, padding_idx=1)
    ids = draw(6, 4, high=5)
    reference(ids).square().sum().backward()
    bag(ids).square().sum().backward()
    torch.testing.assert_close(bag.table.weight.grad, reference.weight.grad)


def test_gradient_reaches_the_sample_weights():
    reference, bag = pair(mode="sum")
    ids = draw(4, 3)
    ours, theirs = (torch.ones(4, 3, requires_grad=True) for _ in range(2))
    bag(ids, per_sample_weights=ours).square().sum().backward()
    reference(ids, per_sample_weights=theirs).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ("mode", "ids", "settings"),
    [
        ("sum", draw(2, 3), {"offsets": torch.tensor([0])}),
        ("sum", draw(6), {}),
        ("sum", draw(6), {"offsets": torch.tensor([[0]])}),
        ("sum", draw(2, 3, 4), {}),
        ("sum", draw(2, 3), {"per_sample_weights": torch.ones(2, 2)}),
        ("mean", draw(2, 3), {"per_sample_weights": torch.ones(2, 3)}),
        ("sum", draw(6), {"offsets": torch.tensor([1, 3])}),
        ("sum", draw(6), {"offsets": torch.tensor([0, 9])}),
        ("sum", draw(6), {"offsets": torch.tensor([0.0, 2.0])}),
    ],
)
@pytest.mark.parametrize("learns", [True, False])
def test_errors_are_torchs(mode, ids, settings, learns):
    reference, bag = (each.requires_grad_(learns) for each in pair(mode=mode))
    with pytest.raises((ValueError, NotImplementedError, RuntimeError)) as theirs:
        reference(ids, **settings)
    with pytest.raises(theirs.type) as ours:
        bag(ids, **settings)
    assert str(ours.value) == str(theirs.value)


def test_offsets_of_no_bags():
    reference, bag = (each.requires_grad_(False) for each in pair(mode="sum"))
    assert bag(draw(6), draw(0)).shape == reference(draw(6), draw(0)).shape


def test_an_id_outside_the_table_is_an_error():
    _, bag = pair()
    with pytest.raises(IndexError, match="id 50 is outside"):
        bag(torch.tensor([[0, V]]))


def test_settings_out_of_range_are_errors():
    table = Full().build(V, D)
    with pytest.raises(ValueError, match=r"mode='median' is unknown\. Choose one of \['sum', 'mean', 'max'\]"):
        TableBag(table, mode="median")
    with pytest.raises(ValueError, match="padding_idx=50 is outside"):
        TableBag(table, padding_idx=V)


def test_bags_export():
    _, bag = pair(mode="mean", padding_idx=0)
    ids = draw(4, 5, high=6)
    exported = torch.export.export(bag, (ids,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.equal(exported.module()(draw(7, 5, high=6)), bag(draw(7, 5, high=6)))
