"""What a line of libsvm text may hold beside its label and indices."""

import polars as pl
import pytest

from leanrec.data.libsvm import LibsvmSource
from leanrec.data.prepare import prepare
from leanrec.data.source import BadRows


def read(tmp_path, *lines):
    path = tmp_path / "log.svm"
    path.write_text("\n".join(lines) + "\n")
    chunks = list(LibsvmSource([path], as_list=False).chunks(BadRows("error")))
    return pl.concat(chunk.rows for chunk in chunks), [int(number) for chunk in chunks for number in chunk.numbers]


def test_comments_and_qid_are_passed_over(tmp_path):
    lines = ["# label item:1", "1 qid:7 1:1 2:1", "-1 3:1 4:1 # 5:1 seen", "  # again", "0 qid:1 5:1 6:1#qid:2", "1 7:1 8:1"]
    rows, numbers = read(tmp_path, *lines)
    assert rows.rows() == [("1", "1", "2"), ("0", "3", "4"), ("0", "5", "6"), ("1", "7", "8")]
    assert numbers == [2, 3, 5, 6]


@pytest.mark.parametrize("line", ["1 1:1 qid:7 2:1", "1 qid:7 qid:8 1:1 2:1", "qid:7 1:1 2:1 x"])
def test_qid_stands_after_the_label(tmp_path, line):
    with pytest.raises(ValueError, match=r"log\.svm:2: not of the form"):
        read(tmp_path, "1 1:1 2:1", line)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"delimiter": ";"}, "--delimiter"),
        ({"header": True}, "--header"),
        ({"delimiter": ";", "columns": "a,b", "header": False}, "--delimiter, --columns, --no-header"),
    ],
)
def test_options_of_other_text_are_refused(tmp_path, options, named):
    path = tmp_path / "log.libsvm"
    path.write_text("1 1:1 2:1\n0 1:1 2:1\n" * 50)
    with pytest.raises(ValueError, match=rf"log\.libsvm: the format is libsvm, which has no use for {named}\. Leave that out"):
        prepare(path, tmp_path / "out", **options)
    assert sum(prepare(path, tmp_path / "out").rows.values()) == 100
