import re
from pathlib import Path

import leanrec

DOCS = "\n".join(path.read_text() for path in [Path(__file__).parents[1] / "README.md", *(Path(__file__).parents[1] / "docs").glob("*.md")])


def test_every_public_name_is_there_and_documented():
    for name in leanrec.__all__:
        assert hasattr(leanrec, name)
        assert re.search(rf"\b{name}\b", DOCS), f"{name} stands in no page of docs/"


def test_nothing_else_is_public():
    modules = {path.stem if path.suffix else path.name for path in Path(leanrec.__file__).parent.iterdir()}
    assert {name for name in vars(leanrec) if not name.startswith("_")} <= {*leanrec.__all__, *modules}
