"""Which lines of delimited text are rows, and what the first one names."""

import pytest

from leanrec.data import lines as lines_module
from leanrec.data.delimited import DelimitedSource
from leanrec.data.source import BadRows

HEADER = b"label,a,b"
SOUND = b"1,2,3"


def read(tmp_path, *lines, on_bad_row="skip", header=True, columns=(), delimiter=","):
    """Rows with their line numbers, and the bad rows, of a file of these lines."""
    path = tmp_path / "log.csv"
    path.write_bytes(b"\n".join(lines) + b"\n")
    bad_rows = BadRows(on_bad_row)
    chunks = list(DelimitedSource([path], delimiter=delimiter, header=header, columns=columns).chunks(bad_rows))
    return [(int(number), row) for chunk in chunks for number, row in zip(chunk.numbers, chunk.rows.rows(), strict=True)], bad_rows


LEGAL = {
    "a quote within a cell": (b'1,5" pipe,3', ("1", '5" pipe', "3")),
    "text after a quoted cell": (b'1,"a"x"y,3', ("1", 'ax"y', "3")),
    "doubled quotes": (b'"1","a""",""', ("1", 'a"', "")),
    "a carriage return in quotes": (b'1,"a\rb",3', ("1", "a\rb", "3")),
    "several at the end": (b"1,2,3\r\r", ("1", "2", "3")),
}
BROKEN = {
    "open": (b'1,"open,3', "a quoted cell does not end on its line"),
    "open in the last cell": (b'1,2,"open', "a quoted cell does not end on its line"),
    "open after a quote within a cell": (b'1,5" pipe,"open', "a quoted cell does not end on its line"),
    "open after doubled quotes": (b'1,2,"open""', "a quoted cell does not end on its line"),
    "return within a cell": (b"1,a\rb,3", "a carriage return within the line"),
    "return between rows": (b"1,2,3\r1,2,3", "a carriage return within the line"),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("legal", LEGAL)
def test_a_broken_line_takes_no_sound_one_with_it(tmp_path, legal, broken, place):
    (line, cells), (broken_line, fault) = LEGAL[legal], BROKEN[broken]
    others = [(line, cells), (SOUND, ("1", "2", "3"))]
    lines = [text for text, _ in others]
    lines.insert(place, broken_line)
    rows, bad_rows = read(tmp_path, HEADER, *lines)
    expected = [number for number in (2, 3, 4) if number != place + 2]
    assert rows == [(number, cells) for number, (_, cells) in zip(expected, others, strict=True)]
    assert bad_rows.first == [f"{tmp_path / 'log.csv'}:{place + 2}: {fault}"]
    with pytest.raises(ValueError, match=rf"log\.csv:{place + 2}: {fault}"):
        read(tmp_path, HEADER, *lines, on_bad_row="error")


def test_two_broken_lines_whose_rows_add_up_are_both_found(tmp_path):
    """The one is two rows to the parser, and the other is one row with its neighbour."""
    rows, bad_rows = read(tmp_path, HEADER, b"1,2,3\r1,2,3", SOUND, b'1,2,"open', SOUND, SOUND)
    assert [number for number, _ in rows] == [3, 5, 6]
    assert bad_rows.counts == {"carriage return": 1, "open quote": 1}


def test_a_block_of_nothing_but_broken_lines_is_passed(tmp_path, monkeypatch):
    monkeypatch.setattr(lines_module, "BLOCK_BYTES", 12)
    rows, bad_rows = read(tmp_path, HEADER, SOUND, *[b'1,2,"open'] * 5, SOUND)
    assert [number for number, _ in rows] == [2, 8]
    assert bad_rows.counts == {"open quote": 5}


def test_a_first_line_that_is_broken_does_not_decide_the_columns(tmp_path):
    rows, bad_rows = read(tmp_path, b'1,"open,3', SOUND, header=False)
    assert rows == [(2, ("1", "2", "3"))]
    assert bad_rows.counts == {"open quote": 1}


def test_a_line_of_carriage_returns_is_empty(tmp_path):
    rows, bad_rows = read(tmp_path, HEADER, SOUND, b"\r\r", SOUND)
    assert [number for number, _ in rows] == [2, 4]
    assert not bad_rows.counts


def test_quotes_mean_nothing_between_tabs(tmp_path):
    rows, bad_rows = read(tmp_path, b"label\ta", b'1\t"open', b"1\ta\rb", b"1\t2", delimiter="\t")
    assert rows == [(2, ("1", '"open')), (4, ("1", "2"))]
    assert bad_rows.counts == {"carriage return": 1}


def test_names_are_the_text_of_the_first_line(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text('label,001,true,NA,2024-01-01,1.50,"a,""b""",N"A\r\n1,2,3,4,5,6,7,8\r\n')
    [chunk] = DelimitedSource([path], delimiter=",", header=True, columns=()).chunks(BadRows("error"))
    assert chunk.rows.columns == ["label", "001", "true", "NA", "2024-01-01", "1.50", 'a,"b"', 'N"A']


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b",label,a", r"log\.csv: column 1 of 3 has no name; is it the index of a pandas table\?.* index=False.* --kind NAME=ignore"),
        (b"label,a,", r"log\.csv: column 3 of 3 has no name\. Name it\."),
        (b"label, ,", r"log\.csv: column 2 of 3 has no name"),
        (b'label,"a,b', r"log\.csv: a quoted name in the first line does not end on it"),
        (b"label,a,b\r1,2,3", r"log\.csv: lines end in a carriage return alone"),
    ],
)
def test_a_first_line_that_does_not_name_every_column_is_refused(tmp_path, header, words):
    with pytest.raises(ValueError, match=words) as caught:
        read(tmp_path, header, SOUND)
    assert "\n" not in str(caught.value)


def test_names_that_are_given_are_names_too(tmp_path):
    with pytest.raises(ValueError, match=r"column 1 of 3 has no name\. Name it\."):
        read(tmp_path, SOUND, header=False, columns=["", "a", "b"])
