import pytest
import torch

from leanrec.data.schema import Field, Schema


@pytest.fixture
def schema() -> Schema:
    """One field of every kind; `history` shares the table of `item`."""
    return Schema(
        (
            Field("user", "categorical", "user", 30),
            Field("item", "categorical", "item", 20),
            Field("tags", "multivalued", "tag", 9, max_length=4),
            Field("history", "sequence", "item", 20, max_length=6),
            Field("price", "numeric"),
        )
    )


@pytest.fixture
def features() -> dict[str, torch.Tensor]:
    """64 rows of `schema`: full, short and empty lists, some prices missing."""
    generator = torch.Generator().manual_seed(7)

    def ids(num_embeddings: int, *shape: int) -> torch.Tensor:
        return torch.randint(1, num_embeddings, shape, generator=generator)

    def ids_of_lists(num_embeddings: int, max_length: int) -> torch.Tensor:
        lengths = torch.arange(64).unsqueeze(1) % (max_length + 1)
        return ids(num_embeddings, 64, max_length).masked_fill(torch.arange(max_length) >= lengths, 0)

    price = torch.randn(64, generator=generator)
    price[::5] = torch.nan
    return {"user": ids(30, 64), "item": ids(20, 64), "tags": ids_of_lists(9, 4), "history": ids_of_lists(20, 6), "price": price}
