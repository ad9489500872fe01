import pytest
import torch

from leanrec.methods import CpRec
from leanrec.methods.cprec import AdaptiveOutput


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_output(num_embeddings=2100, *, sorted_rows=True):
    """A softmax whose every parameter, the order too, is random."""
    table = CpRec(first_dim=16, num_blocks=3, dim_factor=4, sorted_rows=sorted_rows).build(num_embeddings, 16)
    table.order.fit(None if sorted_rows else torch.randint(1000, (num_embeddings,), generator=seeded(1)))
    output = AdaptiveOutput(table)
    for parameter in output.parameters():
        torch.nn.init.normal_(parameter, generator=seeded(2))
    return output


def make_hidden(num_states=30):
    return torch.randn(num_states, 16, generator=seeded(3))


def torchs_softmax(output):
    """The same in torch, whose linear layers have no bias: ours, in the blocks of the tail, are to make no difference."""
    head, *tails = output.table.blocks
    other = torch.nn.AdaptiveLogSoftmaxWithLoss(16, 2100, cutoffs=[100, 500], div_value=4.0)
    with torch.no_grad():
        other.head.weight.copy_(torch.cat([head.rows, output.tokens]))
        for theirs, ours in zip(other.tail, tails, strict=True):
            theirs[0].weight.copy_(ours.projection)
            theirs[1].weight.copy_(ours.rows)
    return other


def test_blocks_grow_and_their_dimensions_fall_by_fixed_factors():
    shapes = CpRec(first_dim=8, num_blocks=4, dim_factor=2, row_factor=4).shapes(85_000, 16)
    assert [(shape.num_rows, shape.width) for shape in shapes] == [(1000, 8), (4000, 4), (16_000, 2), (64_000, 1)]


@pytest.mark.parametrize(("min_dim", "widths"), [(1, [2, 1, 1, 1]), (0, [2, 1, 0, 0])])
def test_dimensions_end_at_the_smallest(min_dim, widths):
    assert [shape.width for shape in CpRec(first_dim=2, min_dim=min_dim).shapes(85_000, 16)] == widths


def test_bytes_are_coordinates_projections_and_biases():
    expected = [(1000 * 8 + 8 * 16 + 16), (4000 * 4 + 4 * 16 + 16), (16_000 * 2 + 2 * 16 + 16), (64_000 + 16 + 16)]
    assert CpRec(first_dim=8).nbytes(85_000, 16) == 4 * sum(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"first_dim": 17}, r"first_dim=17, but embedding_dim=16\. Choose 1 to 16"), ({"dim_factor": 0}, "dim_factor=0"), ({"min_dim": 2}, "min_dim=2")],
)
def test_settings_out_of_range_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        CpRec(**settings).build(1000, 16)


def test_log_probabilities_are_those_of_torchs_adaptive_softmax():
    output, hidden = make_output(), make_hidden()
    theirs = torchs_softmax(output)
    torch.testing.assert_close(output.log_prob(hidden), theirs.log_prob(hidden), rtol=1e-4, atol=1e-4)
    ids = torch.randint(2100, (30,), generator=seeded(4))
    torch.testing.assert_close(output(hidden, ids), theirs(hidden, ids).output, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_torchs_adaptive_softmax():
    output, hidden, ids = make_output(), make_hidden(), torch.tensor([3, 99, 100, 101, 600, 2099] * 5)
    theirs = torchs_softmax(output)
    (-output(hidden, ids).mean()).backward()
    theirs(hidden, ids).loss.backward()
    torch.testing.assert_close(torch.cat([output.table.blocks[0].rows.grad, output.tokens.grad]), theirs.head.weight.grad)
    for ours, other in zip(output.table.blocks[1:], theirs.tail, strict=True):
        torch.testing.assert_close(ours.projection.grad, other[0].weight.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.rows.grad, other[1].weight.grad, rtol=1e-4, atol=1e-5)


def test_probabilities_stand_at_their_ids_whatever_the_order_of_the_rows():
    output, hidden = make_output(sorted_rows=False), make_hidden(2100)
    everything = output.log_prob(hidden)
    torch.testing.assert_close(everything.exp().sum(1), torch.ones(2100), rtol=1e-4, atol=0)
    ids = torch.arange(2100)
    torch.testing.assert_close(output(hidden, ids), everything[ids, ids], rtol=1e-4, atol=1e-4)
    # Within a block, log-probabilities differ as the inner products with the rows of the table do.
    popular = torch.where(output.table.order(ids) < 100)[0][:2]
    scores = hidden @ output.table(popular).T
    torch.testing.assert_close(scores[:, 0] - scores[:, 1], everything[:, popular[0]] - everything[:, popular[1]], rtol=1e-3, atol=1e-3)


def test_rows_that_share_a_vector_share_the_probability_of_their_block():
    output = AdaptiveOutput(CpRec(first_dim=1, num_blocks=2, min_dim=0).build(500, 16))
    probabilities = output.log_prob(make_hidden()).exp()
    torch.testing.assert_close(probabilities[:, 100:], probabilities[:, 100:].mean(1, keepdim=True).expand(-1, 400))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(30))


def test_tied_to_the_table_it_trains_the_rows_that_embed_the_items():
    table = CpRec(first_dim=16, num_blocks=3).build(300, 16, generator=seeded(5))
    output = AdaptiveOutput(table)
    assert [name for name, _ in output.named_parameters() if not name.startswith("table.")] == ["tokens"]
    items = torch.arange(300)
    following = (items + 1) % 300
    optimizer = torch.optim.Adam(output.parameters(), lr=0.02)
    mix = torch.linalg.qr(torch.randn(16, 16, generator=seeded(6)))[0] * 3
    for _ in range(300):
        optimizer.zero_grad()
        loss = -output(table(items) @ mix, following).mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * torch.tensor(300.0).log()
