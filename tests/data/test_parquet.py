"""What Parquet files may hold, and how `prepare` refuses what they may not."""

import datetime

import polars as pl
import pyarrow as pa
import pytest
from pyarrow import parquet

from leanrec.cli import run
from leanrec.data import cells
from leanrec.data.prepare import prepare

NUM_ROWS = 40
LABEL = [row % 2 for row in range(NUM_ROWS)]
ITEM = [f"i{row % 5}" for row in range(NUM_ROWS)]


def write(path, **columns):
    parquet.write_table(pa.table({"label": LABEL, "item": ITEM} | columns), path)
    return path


def decoded(folder, name, split="train"):
    values = pl.read_parquet(folder / "vocabulary" / f"{name}.parquet")["value"].to_list()
    ids = pl.read_parquet(folder / split / "*.parquet", glob=True)[name].to_list()
    return [[values[i] for i in cell] if isinstance(cell, list) else values[cell] for cell in ids]


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs `leanrec prepare`, which must fail, and gives its one line."""

    def refuse(*arguments):
        assert run(["prepare", *map(str, arguments), "--out", str(tmp_path / "out")]) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return refuse


NESTED = {
    "lists of lists": pa.array([[["a"], ["b"]]] * NUM_ROWS),
    "a map": pa.array([[("k", 1)]] * NUM_ROWS, pa.map_(pa.string(), pa.int64())),
    "structs": pa.array([{"k": 1}] * NUM_ROWS),
    "lists of structs": pa.array([[{"k": 1}]] * NUM_ROWS),
    "lists of arrays": pa.array([[[1, 2]]] * NUM_ROWS, pa.list_(pa.list_(pa.int64(), 2))),
}


@pytest.mark.parametrize("column", NESTED.values(), ids=NESTED)
def test_nested_columns_are_ignored_and_cannot_be_fields(tmp_path, refused, column):
    log = write(tmp_path / "log.parquet", x=column)
    prepared = prepare(log, tmp_path / "data")
    assert [(row["column"], row["kind"], row["why"]) for row in prepared.columns][2] == ("x", "ignore", "nested")
    assert [field.name for field in prepared.schema.fields] == ["item"]
    for kind in ("multivalued", "categorical"):
        assert "Column 'x': a cell holds nested values" in refused(log, "--kind", f"x={kind}")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("categorical", [b"caf\xc3\xa9"], b"\xff"),
        ("numeric", [b"1.5"], b"\xff"),
        ("multivalued:|", [b"a|b"], b"a|\xff"),
        ("multivalued", [[b"a", None], None], [b"a", b"\xff"]),
        ("label", [b"1", b"0"], b"\xff"),
        ("timestamp", [b"2024-05-%02d" % day for day in range(1, 31)], b"\xff"),
    ],
)
def test_binary_that_is_no_text_is_a_bad_row(tmp_path, refused, kind, good, bad):
    name = "label" if kind == "label" else "x"
    log = write(tmp_path / "log.parquet", **{name: [bad if row == 16 else good[row % len(good)] for row in range(NUM_ROWS)]})
    options = ["--kind", f"{name}={kind}", *(["--split-by", name] if kind == "timestamp" else [])]
    error = refused(log, *options)
    assert f"log.parquet, row 17: {name} is n" in error
    assert r"\xff" in error
    assert run(["prepare", str(log), *options, "--on-bad-row", "skip", "--out", str(tmp_path / "out")]) == 0
    assert len(pl.read_parquet(tmp_path / "out" / "*" / "part-*.parquet", columns=["item"])) == NUM_ROWS - 1


def test_good_rows_beside_binary_that_is_no_text_keep_their_values(tmp_path):
    values = [b"\xff" if row in (0, 3, 39) else None if row == 5 else f"é{row}".encode() for row in range(NUM_ROWS)]
    assert cells._decoded(pl.Series(values)).to_list() == [
        None if value is None else value.decode() if value != b"\xff" else None for value in values
    ]
    lists = [[b"a", None, b"\xff"], [b"a", None, b"b"], None, []]
    cell = cells.list_cells("x", pl.List(pl.Binary()), None, max_length=9, keep_last=False)
    frame = pl.DataFrame({"x": lists}).select(cell.value.alias("value"), cell.is_wrong.alias("is_wrong"))
    assert frame["is_wrong"].to_list() == [True, False, False, False]
    assert frame["value"].to_list()[1:] == [["a", "b"], [], []]


def test_dictionary_encoded_columns_are_those_of_their_values(tmp_path):
    plain = {
        "label": [str(value) for value in LABEL],
        "price": [f"{row}.5" for row in range(NUM_ROWS)],
        "tags": [["a", f"b{row % 3}"] for row in range(NUM_ROWS)],
    }
    encoded = {name: pa.array(plain[name]).dictionary_encode() for name in ("label", "price")}
    encoded |= {"item": pa.array(ITEM).dictionary_encode(), "tags": pa.array(plain["tags"], pa.list_(pa.dictionary(pa.int32(), pa.string())))}
    expected = prepare(write(tmp_path / "plain.parquet", **plain), tmp_path / "plain")
    prepared = prepare(write(tmp_path / "encoded.parquet", **encoded), tmp_path / "encoded")
    assert prepared.columns == expected.columns
    assert prepared.schema == expected.schema
    for name in ("item", "tags"):
        assert decoded(prepared.folder, name) == decoded(expected.folder, name)


LISTS, TEXTS, STRUCTS = [["a"]] * NUM_ROWS, ["a"] * NUM_ROWS, [{"k": 1}] * NUM_ROWS


@pytest.mark.parametrize(
    ("first", "second", "fault"),
    [(LISTS, TEXTS, "one value (String), but a list"), (TEXTS, LISTS, "a list (List(String)), but one value"), (TEXTS, STRUCTS, "nested values")],
)
def test_a_file_with_lists_where_another_has_values_is_refused_by_name(tmp_path, refused, first, second, fault):
    logs = [write(tmp_path / "a.parquet", x=first), write(tmp_path / "b.parquet", x=second)]
    assert f"b.parquet: column 'x': a cell holds {fault}" in refused(*logs)
    assert f"b.parquet: column 'x': a cell holds {fault}" in refused(logs[0], "--valid", logs[1])


def test_a_file_whose_lists_are_all_missing_has_them_empty(tmp_path):
    write(tmp_path / "a.parquet", x=LISTS)
    write(tmp_path / "b.parquet", x=pa.nulls(NUM_ROWS))
    prepared = prepare([tmp_path / "a.parquet"], tmp_path / "out", valid=tmp_path / "b.parquet")
    assert decoded(prepared.folder, "x", "valid") == [[]] * NUM_ROWS


@pytest.mark.parametrize("value", [datetime.timedelta(seconds=5), datetime.time(12, 30)])
def test_a_split_by_a_duration_or_a_time_of_day_is_refused_with_file_and_column(tmp_path, refused, value):
    log = write(tmp_path / "log.parquet", age=[value] * NUM_ROWS)
    assert f"log.parquet: column 'age' holds {pl.Series([value]).dtype}, which is no time" in refused(log, "--split-by", "age")


def test_a_name_of_two_columns_is_refused(tmp_path, refused):
    parquet.write_table(pa.table([LABEL, ITEM, ITEM], names=["label", "x", "x"]), tmp_path / "log.parquet")
    assert "log.parquet: two columns have the name 'x'" in refused(tmp_path / "log.parquet")


@pytest.mark.parametrize("time", ["*", "^a$", "a", "leanrec time"])
def test_names_that_look_like_patterns_are_names(tmp_path, time):
    names = ["a", "^a$", "*", "a/b", "leanrec time", "^t$", "^n$"]
    columns = {name: list(range(100 * number, 100 * number + NUM_ROWS)) for number, name in enumerate(names[:5])}
    columns |= {
        "^t$": [[f"t{row}"] * (1 + row % 3) for row in range(NUM_ROWS)],
        "^n$": [row / 8 for row in range(NUM_ROWS)],
        "t": LISTS,
        "n": pa.array(ITEM).dictionary_encode(),
    }
    prepared = prepare(write(tmp_path / "log.parquet", **columns), tmp_path / "out", split_by=time)
    sizes = {field.name: (field.kind, field.max_length) for field in prepared.schema.fields}
    assert sizes["^t$"] == ("multivalued", 3)
    assert sizes["^n$"] == ("numeric", 0)
    assert prepared.rows["valid"] == 4
    files = {"a": (0, "a.parquet"), "*": (200, "%2A.parquet")}
    for first, file in (files[name] for name in files.keys() - {time}):
        values = pl.read_parquet(tmp_path / "out" / "vocabulary" / file)["value"].to_list()[2:]
        assert sorted(values) == sorted(str(first + row) for row in range(32))


@pytest.mark.parametrize("dtype", [pl.String, pl.Binary])
def test_a_number_of_which_the_bucket_is_taken_may_be_missing_but_not_wrong(dtype):
    texts = ["3", None, "", "NA ", "0", "x", "inf", "3"]
    series = pl.Series("x", texts).cast(dtype)
    expected = ["b1", "", "", "", "0", None, None, "b1"]
    if dtype == pl.Binary:
        series, expected = pl.concat([series, pl.Series("x", [b"\xff"])]), [*expected, None]
    cell = cells.bucket_cells("x", dtype)
    assert cell.is_wrong == "null" and series.to_frame().select(cell.value).to_series().to_list() == expected
