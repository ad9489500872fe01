import math

import pytest
import torch

from leanrec.ops import minhash
from leanrec.ops.minhash import MinHashes

NUM_HASHES = 2000


def min_hashes(num_ids, *, num_hashes=NUM_HASHES, **settings):
    return MinHashes(num_ids, torch.randint(2**62, (num_hashes,), generator=torch.Generator().manual_seed(0)), **settings)


def stream(sets):
    """One row for each token of each set: ids (N,), tokens (N, 1)."""
    rows = [(number, token) for number, tokens in enumerate(sets) for token in tokens]
    return torch.tensor([number for number, _ in rows]), torch.tensor([[token] for _, token in rows])


def agreement(values, first, second):
    return float((values[first] == values[second]).double().mean())


@pytest.mark.parametrize(("shared", "apart"), [(0, 20), (5, 15), (10, 10), (18, 2), (20, 0)])
def test_two_sets_agree_as_often_as_their_jaccard_similarity_says(shared, apart):
    first, second = range(20), range(20 - shared, 40 - shared)
    # A third set holds whatever only one of the two does, so that all tokens occur alike and weigh the same.
    hashes = min_hashes(3)
    hashes.add(*stream([first, second, sorted(set(first) ^ set(second))]))
    similarity = shared / (2 * apart + shared)
    assert agreement(hashes.value(), 0, 1) == pytest.approx(similarity, abs=4 * math.sqrt(0.25 / NUM_HASHES))  # four standard deviations


def test_tokens_weigh_by_how_rare_they_are():
    sets = [range(10), range(5, 15), *[range(5, 10)] * 20]  # what both hold is common, what sets them apart is rare
    ids, tokens = stream(sets)
    counts = torch.bincount(tokens.flatten())
    weight = {token: math.log((len(ids) + 1) / count) for token, count in enumerate(counts.tolist())}
    expected = sum(weight[token] for token in range(5, 10)) / sum(weight[token] for token in range(15))
    hashes = min_hashes(len(sets))
    hashes.add(ids, tokens)
    assert expected < 0.2  # 1 / 3 without weights
    assert agreement(hashes.value(), 0, 1) == pytest.approx(expected, abs=4 * math.sqrt(0.25 / NUM_HASHES))


def test_what_stands_in_every_row_says_next_to_nothing():
    hashes = min_hashes(2)
    ids, tokens = stream([range(100), range(100, 200)])
    hashes.add(ids, torch.cat([tokens, torch.full_like(tokens, 777), torch.full_like(tokens, 777)], dim=1))
    assert agreement(hashes.value(), 0, 1) < 0.01


def test_pieces_and_their_order_make_no_difference():
    ids, tokens = stream([range(10), range(5, 30), range(20, 60)])
    at_once, in_pieces = min_hashes(3, num_hashes=20), min_hashes(3, num_hashes=20)
    at_once.add(ids, tokens)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    for piece in order.split(7):
        in_pieces.add(ids[piece], tokens[piece])
    assert torch.equal(at_once.value(), in_pieces.value())


def test_weights_stay_those_of_the_first_rows():
    ids, tokens = stream([range(10), range(5, 15)])
    whole, sampled = min_hashes(2, num_hashes=100), min_hashes(2, num_hashes=100, sample_values=20)
    for hashes in (whole, sampled):
        hashes.add(ids, tokens)
    for _ in range(5):
        sampled.add(ids[-1:], tokens[-1:])
    assert torch.equal(whole.value(), sampled.value())
    sampled.add(ids[:1], torch.tensor([[99]]))  # a new token counts, with the weight of one that stands in one row
    assert (sampled.value()[0] <= whole.value()[0]).all() and not torch.equal(whole.value(), sampled.value())


def test_an_id_that_meets_nothing_has_no_hash():
    hashes = min_hashes(3, num_hashes=5)
    hashes.add(torch.tensor([0, 2]), torch.empty(2, 0, dtype=torch.int64))
    hashes.add(torch.tensor([1]), torch.tensor([[5]]))
    assert hashes.value().isfinite().all(1).tolist() == [False, True, False]
    assert not min_hashes(2, num_hashes=5).value().isfinite().any()


def test_long_rows_are_taken_in_pieces(monkeypatch):
    ids, tokens = torch.arange(30) % 7, torch.arange(30 * 20).view(30, 20) % 50
    whole, pieces = min_hashes(7, num_hashes=3), min_hashes(7, num_hashes=3)
    whole.add(ids, tokens)
    expected = whole.value()
    monkeypatch.setattr(minhash, "_CHUNK_VALUES", 50)
    pieces.add(ids, tokens)
    assert torch.equal(pieces.value(), expected)
