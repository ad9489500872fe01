import pytest
import torch
from torch import nn

from leanrec.bag import TableBag
from leanrec.compress import compress
from leanrec.methods.full import Full
from leanrec.methods.pq import PQ
from leanrec.move import move_tables

SMALL = PQ(num_subspaces=2, num_centroids=8)


def embedding(num_embeddings=50, embedding_dim=8, **settings):
    return nn.Embedding(num_embeddings, embedding_dim, **settings)


def model(first, **others):
    """Tables under `first`.tables, the other modules beside it."""
    return nn.ModuleDict({first: nn.ModuleDict({"tables": nn.ModuleDict(others)})})


def test_tables_move_by_the_name_of_their_vocabulary():
    source = compress(model("embedding", user=embedding(), item=embedding(70)), SMALL)
    target = model("vectors", item=embedding(70), user=embedding())
    assert move_tables(source, target) == {"vectors.tables.item": "embedding.tables.item", "vectors.tables.user": "embedding.tables.user"}
    for name in ("user", "item"):
        assert target["vectors"]["tables"][name] is source["embedding"]["tables"][name]


def test_uncompressed_tables_move_too():
    source, target = model("a", user=embedding()), model("b", user=embedding())
    move_tables(source, target)
    assert target["b"]["tables"]["user"] is source["a"]["tables"]["user"]


def test_first_order_weights_without_a_match_stay():
    source = nn.ModuleDict({"vectors": model("x", user=embedding()), "linear": model("x", user=embedding(50, 1))})
    target = model("embedding", user=embedding())
    assert move_tables(source, target) == {"embedding.tables.user": "vectors.x.tables.user"}
    linear = source["linear"]["x"]["tables"]["user"]
    source = model("embedding", user=embedding())
    target = nn.ModuleDict({"vectors": model("x", user=embedding()), "linear": model("x", user=linear)})
    assert move_tables(source, target) == {"vectors.x.tables.user": "embedding.tables.user"}
    assert target["linear"]["x"]["tables"]["user"] is linear


def test_tables_of_one_name_and_shape_meet_by_path():
    def wide_and_deep():
        return nn.ModuleDict({"wide": model("x", user=embedding()), "deep": model("x", user=embedding())})

    source, target = wide_and_deep(), wide_and_deep()
    assert move_tables(source, target) == {"wide.x.tables.user": "wide.x.tables.user", "deep.x.tables.user": "deep.x.tables.user"}


def test_table_is_pooled_where_the_target_pools():
    source = compress(model("a", tags=embedding()), SMALL)
    target = model("b", tags=nn.EmbeddingBag(50, 8, mode="max", padding_idx=0))
    move_tables(source, target)
    bag = target["b"]["tables"]["tags"]
    assert isinstance(bag, TableBag) and (bag.mode, bag.padding_idx) == ("max", 0)
    assert bag.table is source["a"]["tables"]["tags"]


def test_places_that_share_a_table_go_on_sharing():
    target = model("b", user=embedding())
    target["again"] = nn.ModuleDict({"user": target["b"]["tables"]["user"]})
    move_tables(compress(model("a", user=embedding()), Full()), target)
    assert target["again"]["user"] is target["b"]["tables"]["user"]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (model("b", user=embedding()), "do not match: 'item' only in the source"),
        (model("b", user=embedding(), item=embedding(), ad=embedding()), "do not match: 'ad' only in the target"),
        (
            model("b", user=embedding(51), item=embedding()),
            "Table 'user': the source has 'a.tables.user' (50 x 8), the target 'b.tables.user' (51 x 8)",
        ),
        (model("b", user=embedding(50, 4), item=embedding()), "(50 x 4); one of each must agree in rows and dimension"),
        (nn.ModuleDict({"c": model("b", user=embedding(), item=embedding()), "d": model("b", user=embedding())}), "Table 'user': the source has"),
        (model("b", item=embedding(), user=embedding(padding_idx=3)), "no pooling, padding_idx=None, the target no pooling, padding_idx=3"),
        (model("b", item=embedding(), user=nn.EmbeddingBag(50, 8)), "the target pooling with mode='mean'"),
    ],
)
def test_what_does_not_match_is_listed_and_nothing_moves(target, reason):
    before = dict(target.named_modules())
    with pytest.raises(ValueError) as error:
        move_tables(model("a", user=embedding(), item=embedding()), target)
    assert reason in str(error.value) and "\n" not in str(error.value)
    assert dict(target.named_modules()) == before


def test_padding_of_a_compressed_table_must_match():
    with pytest.raises(ValueError, match="the source has no pooling, padding_idx=None, the target no pooling, padding_idx=0"):
        move_tables(compress(model("a", user=embedding()), SMALL), model("b", user=embedding(padding_idx=0)))


def test_pooling_of_a_compressed_table_must_match():
    source = compress(model("a", user=nn.EmbeddingBag(50, 8, mode="mean", padding_idx=0)), SMALL)
    with pytest.raises(ValueError, match=r"the source has pooling with mode='mean', padding_idx=0, .* the target pooling with mode='sum'"):
        move_tables(source, model("b", user=nn.EmbeddingBag(50, 8, mode="sum")))
    move_tables(source, model("b", user=nn.EmbeddingBag(50, 8, mode="mean", padding_idx=0)))


def test_moved_table_answers_in_the_target():
    source = compress(model("a", user=embedding()), SMALL)
    target = model("b", user=embedding())
    move_tables(source, target)
    ids = torch.arange(50)
    assert torch.equal(target["b"]["tables"]["user"](ids), source["a"]["tables"]["user"](ids))
