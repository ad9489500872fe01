"""What a table is shown of the log before it is trained from scratch."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from leanrec.bag import TableBag
from leanrec.methods import Hash
from leanrec.methods.hash import HashTable
from leanrec.train import observe as observing
from leanrec.train.observe import observe


class Watching(HashTable):
    """A table that keeps what it is shown."""

    def __init__(self, num_embeddings):
        super().__init__(Hash(num_buckets=4), num_embeddings, 2)
        self.seen = []

    def observe(self, ids, context):
        self.seen.append((ids, context))


class Model(nn.Module):
    """Users, items (a list) and a plain table of ads; `more` is called with the model and a batch's features."""

    def __init__(self, more=lambda model, features: 0.0, **modules):
        super().__init__()
        self.user, self.item, self.ad = Watching(9), Watching(9), nn.Embedding(9, 2)
        self.extra, self.more = nn.ModuleDict(modules), more

    def forward(self, features):
        assert not self.training and not torch.is_grad_enabled()
        rows = self.user(features["user"]) + self.item(features["item"]).sum(1) + self.ad(features["ad"])
        return rows + self.more(self, features)


class Log:
    """Batches of a loader."""

    def __init__(self, *batches, batch_size=2):
        self.batch_size, self.given = batch_size, [SimpleNamespace(features=batch, labels=torch.zeros(len(batch["user"]))) for batch in batches]
        self.read = 0

    def batches(self, *, epoch):
        for batch in self.given:
            self.read += 1
            yield batch


def rows(user, item, ad):
    return {"user": torch.tensor(user), "item": torch.tensor(item), "ad": torch.tensor(ad)}


BATCH = rows([1, 2], [[3, 4, 0], [4, 5, 6]], [7, 7])


def shown(model, *batches):
    observe(model, [model.user, model.item], Log(*(batches or [BATCH])))
    return model.user.seen, model.item.seen


def test_a_table_sees_beside_its_ids_what_other_tables_were_asked_for_in_the_row():
    [(users, beside_users)], [(items, beside_items)] = shown(Model())
    assert users.tolist() == [1, 2] and beside_users.shape == (2, 4)
    assert items.tolist() == [3, 4, 0, 4, 5, 6] and beside_items.shape == (6, 2)
    first, second = (set(row.tolist()) for row in beside_users)
    assert len(first) == len(second) == 4
    assert len(first & second) == 2  # item 4 and ad 7
    [ad] = {*beside_items.flatten().tolist()} & first & second
    assert all(ad in row for row in beside_items.tolist())
    assert torch.equal(beside_items[0], beside_items[1]) and not torch.equal(beside_items[0], beside_items[3])


def test_a_token_is_the_same_in_every_batch_and_for_every_table():
    users, items = shown(Model(), BATCH, BATCH)
    assert len(users) == len(items) == 2
    assert torch.equal(users[0][1], users[1][1]) and torch.equal(items[0][1], items[1][1])


def test_ids_of_different_tables_are_different_tokens():
    model = Model()
    everything = rows(list(range(9)), [[8 - row] for row in range(9)], [*range(1, 9), 0])
    [(_, beside)], _ = shown(model, everything)
    assert len(beside.unique()) == 18


def test_another_table_asked_for_the_very_same_ids_is_no_context():
    [(_, beside_users)], [(_, beside_items)] = shown(Model())
    twin = Model(lambda model, features: model.extra["weight"](features["user"]).sum(), weight=nn.Embedding(9, 1))
    [(_, users_with_twin)], [(_, items_with_twin)] = shown(twin)
    assert users_with_twin.shape == beside_users.shape
    assert items_with_twin.shape[1] == beside_items.shape[1] + 1


def test_bags_of_rows_take_part_and_flat_bags_do_not():
    def more(model, features):
        starts = torch.tensor([0, 1])
        return sum(bag(features["tags"]) + bag(features["tags"][:, 0], starts) for bag in model.extra.values())

    model = Model(more, plain=nn.EmbeddingBag(9, 2), packed=TableBag(Watching(9)))
    packed = model.extra["packed"].table
    observe(model, [model.user, packed], Log(BATCH | {"tags": torch.tensor([[1, 2], [3, 3]])}))
    [(_, beside_users)], [(tags, beside_tags)] = model.user.seen, packed.seen
    assert beside_users.shape == (2, 3 + 1 + 2 + 2)  # items, ad and both bags
    assert tags.tolist() == [1, 2, 3, 3]
    assert beside_tags.shape == (4, 1 + 3 + 1)  # the other bag is asked for the same ids


def test_a_look_up_that_is_not_by_rows_of_the_batch_is_left_out():
    model = Model(
        lambda model, features: model.extra["all"](torch.arange(9)).sum() + model.extra["all"](torch.tensor(3)).sum(), all=nn.Embedding(9, 2)
    )
    [(_, beside)], _ = shown(model)
    assert beside.shape == (2, 4)


def test_a_table_in_two_places_is_shown_both_and_is_no_context_of_its_own():
    model = Model(lambda model, features: model.extra["friend"](features["ad"]))
    model.extra["friend"] = model.user
    users, _ = shown(model)
    assert [ids.tolist() for ids, _ in users] == [[1, 2], [7, 7]]
    # The ad is left out: it is asked for by the very ids of the friend.
    assert all(beside.shape == (2, 3) for _, beside in users)


def test_the_model_is_left_as_it_was():
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    shown(model)
    assert model.training and model.ad.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module.training for module in model.eval().modules())
    shown(model)
    assert not model.training


def test_hooks_go_when_the_model_fails():
    model = Model()
    with pytest.raises(KeyError, match="item"):
        shown(model, {"user": torch.tensor([1])})
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_the_log_is_not_read_where_no_table_observes():
    log, model = Log(BATCH), Model()
    observe(model, [Hash().build(9, 2)], log)
    observe(model, [], log)
    assert log.read == 0


def test_only_the_first_rows_of_a_long_log_are_read(monkeypatch):
    monkeypatch.setattr(observing, "MOST_ROWS", 4)
    users, _ = shown(Model(), *[BATCH] * 5)
    assert len(users) == 2


def test_a_model_with_one_table_has_no_context():
    table = Watching(9)

    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.user = table

        def forward(self, features):
            return self.user(features["user"])

    observe(Alone(), [table], Log(BATCH))
    assert table.seen == []
