import re
from pathlib import Path

import pytest

import leanrec

DOCS = "\n".join(path.read_text() for path in [Path(__file__).parents[1] / "README.md", *(Path(__file__).parents[1] / "docs").glob("*.md")])


def test_every_public_name_is_there_and_documented():
    for name in leanrec.__all__:
        assert hasattr(leanrec, name)
        assert re.search(rf"\b{name}\b", DOCS), f"{name} stands in no page of docs/"


def test_nothing_else_is_shown():
    assert dir(leanrec) == sorted(leanrec.__all__)
    with pytest.raises(AttributeError, match="'leanrec' has no attribute 'pq'"):
        _ = leanrec.pq
