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


def test_the_column_that_the_log_is_split_by_is_no_field_unless_it_is_asked_for():
    sample = pl.DataFrame({"label": [0, 1], "position": [5, 6], "user": ["a", "b"]})
    kinds = [(column.kind, column.why) for column in describe_columns(sample, Settings(split_by="position"))]
    assert kinds == [("label", "name"), ("timestamp", "split by"), ("categorical", "text")]
    asked = describe_columns(sample, Settings(split_by="position", fields={"position": FieldSettings(kind="categorical")}))
    assert asked[1].kind == "categorical"
