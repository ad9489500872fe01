import polars as pl
import pytest

from leanrec.data.columns import describe_columns
from leanrec.data.settings import FieldSettings, Settings

SAMPLE = pl.DataFrame({"label": [0, 1], "item.id": ["a", "b"], "item_id": ["c", "d"]})


def described(**kinds):
    return describe_columns(SAMPLE, Settings(fields={name: FieldSettings(kind=kind) for name, kind in kinds.items()}))


@pytest.mark.parametrize("kind", ["categorical", "numeric"])
def test_two_columns_that_a_model_would_call_the_same_are_refused(kind):
    with pytest.raises(ValueError, match=r"Columns 'item\.id' and 'item_id' would have the same name"):
        described(**{"item*": kind})


@pytest.mark.parametrize("kinds", [{"item.id": "ignore"}, {"item.id": "categorical@item_id"}, {"item.id": "numeric"}])
def test_they_are_taken_where_only_one_of_them_names_a_table(kinds):
    assert len(described(**kinds)) == 3
