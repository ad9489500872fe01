import pytest
import torch

from leanrec.methods.hotsketch import HotSketch, sketch_nbytes
from leanrec.ops.hashing import hash_buckets


def make_sketch(num_buckets=16, num_slots=8, medium_share=0.2):
    return HotSketch(num_buckets, num_slots, medium_share=medium_share, generator=torch.Generator().manual_seed(0))


def zipf_batches(num_ids=3000, num_steps=150, batch_size=256):
    shares = 1 / (1 + torch.arange(num_ids, dtype=torch.float64))
    draws = torch.Generator().manual_seed(1)
    return [torch.multinomial(shares, batch_size, replacement=True, generator=draws) for _ in range(num_steps)]


def add(sketch, batch):
    ids, counts = batch.unique(return_counts=True)
    return sketch.add(ids, counts.float())


def test_scores_bound_the_true_counts_of_all_ids():
    sketch, truth = make_sketch(), torch.zeros(3000)
    for batch in zipf_batches():
        add(sketch, batch)
        truth += torch.bincount(batch, minlength=3000)
    held = sketch.ids[sketch.ids >= 0].long()
    assert len(held) == len(held.unique()) == sketch.ids.numel()
    assert (sketch.certain(torch.arange(16))[sketch.ids >= 0] <= truth[held]).all()
    assert (truth[held] <= sketch.scores[sketch.ids >= 0]).all()
    lowest = sketch.scores[:, 4:].amin(1)[hash_buckets(torch.arange(3000), sketch.seed, 16).squeeze(1)]
    absent = torch.isin(torch.arange(3000), held, invert=True)
    assert (truth <= lowest)[absent].all()
    assert float(sketch.total) == truth.sum()


def test_ids_that_make_up_much_of_their_bucket_are_hot():
    sketch = make_sketch()
    for batch in zipf_batches():
        add(sketch, batch)
    shares = 1 / (1 + torch.arange(3000))
    buckets = hash_buckets(torch.arange(3000), sketch.seed, 16).squeeze(1)
    of_bucket = shares / torch.zeros(16).index_add_(0, buckets, shares)[buckets]
    heavy = of_bucket > 1 / 4  # the waiting slots of a bucket are 4: SpaceSaving holds what exceeds this share
    assert heavy.sum() >= 5
    assert sketch.find(heavy.nonzero().squeeze(1))[1].all()


def test_an_id_that_comes_in_for_another_inherits_its_score():
    sketch = make_sketch(num_buckets=1, num_slots=4)
    for number, score in [(5, 10.0), (6, 8.0), (7, 3.0), (8, 2.0), (9, 1.0)]:
        sketch.add(torch.tensor([number]), torch.tensor([score]))
    assert dict(zip(sketch.ids[0].tolist(), sketch.scores[0].tolist(), strict=True)) == {5: 10, 6: 8, 7: 3, 9: 3}
    assert sketch.inherited[0, sketch.ids[0] == 9].tolist() == [2.0]


def test_what_an_id_inherited_does_not_make_it_hot():
    sketch = make_sketch(num_buckets=1, num_slots=2)
    for number in range(20):
        sketch.add(torch.tensor([5, 100 + number]), torch.tensor([1.5, 1.0]))
    assert sketch.ids[0].tolist() == [5, 119]
    assert sketch.scores[0].tolist() == [30.0, 20.5]  # 19 after the first, whose slot was left with the 1.5 of id 5
    for _ in range(3):
        sketch.add(torch.tensor([119]), torch.tensor([5.0]))
    assert sketch.ids[0, 0] == 5  # 119 has 35.5 with what it inherited, but 16 for certain


def test_swaps_tell_who_took_the_place_of_whom():
    sketch = make_sketch(num_buckets=1, num_slots=2)
    first = sketch.add(torch.tensor([5]), torch.tensor([2.0]))
    assert (first.hot_slots.tolist(), first.promoted.tolist(), first.demoted.tolist()) == ([0], [5], [-1])
    assert not len(sketch.add(torch.tensor([6]), torch.tensor([2.1])).promoted)  # not enough more than 2.0
    second = sketch.add(torch.tensor([6]), torch.tensor([1.0]))
    assert (second.promoted.tolist(), second.promoted_medium.tolist(), second.demoted.tolist()) == ([6], [True], [5])
    assert second.demoted_scores.tolist() == [2.0]


def test_ids_are_medium_from_a_share_of_the_lowest_hot_score_on():
    sketch = make_sketch(num_buckets=1, num_slots=6, medium_share=0.5)
    sketch.fill(torch.tensor([0.0, 10, 30, 20, 6, 5, 4, 1]))
    _, hot, medium = sketch.find(torch.arange(8))
    assert hot.nonzero().flatten().tolist() == [1, 2, 3]
    assert medium.nonzero().flatten().tolist() == [4, 5]


def test_hot_slots_are_numbered_without_gaps():
    sketch = make_sketch()
    sketch.fill(torch.rand(3000, generator=torch.Generator().manual_seed(2)))
    slots, hot, _ = sketch.find(torch.arange(3000))
    assert slots[hot].sort().values.tolist() == list(range(64))


@pytest.mark.parametrize(("num_buckets", "num_slots"), [(1, 2), (16, 8)])
def test_bytes_are_those_of_all_buffers(num_buckets, num_slots):
    stored = sum(tensor.nbytes for tensor in make_sketch(num_buckets, num_slots).state_dict().values())
    assert sketch_nbytes(num_buckets, num_slots) == stored
