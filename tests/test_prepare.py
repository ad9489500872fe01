import gzip
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from pyarrow import parquet

from leanrec import runs
from leanrec.data.prepare import load_prepared, prepare
from leanrec.data.schema import Schema
from leanrec.data.vocabulary import read_counts, vocabulary_nbytes

HEADER = "label,user,item"
ROWS = [f"{i % 2},u{i % 7},i{i % 5}" for i in range(100)]


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def clicks(folder: Path, *extra: str, name: str = "clicks.csv") -> Path:
    return write(folder / name, HEADER, *ROWS, *extra)


def rows(folder: Path, split: str = "train") -> pl.DataFrame:
    return pl.read_parquet(folder / split / "*.parquet")


def vocabulary(folder: Path, name: str) -> pl.DataFrame:
    return pl.read_parquet(folder / "vocabulary" / f"{name}.parquet")


def decoded(folder: Path, name: str, split: str = "train") -> list:
    values = vocabulary(folder, name)["value"].to_list()
    return [[values[i] for i in cell] if isinstance(cell, list) else values[cell] for cell in rows(folder, split)[name].to_list()]


def splits(folder: Path, header: str, train: list[str], valid: list[str], test: list[str]) -> Path:
    folder.mkdir()
    for name, lines in (("train", train), ("valid", valid), ("test", test)):
        write(folder / f"{name}.csv", header, *lines)
    return folder


# Ids


def test_ids_go_by_falling_training_count_and_ties_by_value(tmp_path):
    train = ["1,b", "0,c", "1,c", "0,a", "1,d", "0,d"]
    prepared = prepare(splits(tmp_path / "log", "label,x", train, ["1,c"] * 9, ["0,a"]), tmp_path / "out")
    table = vocabulary(prepared.folder, "x")
    assert table["value"].to_list() == [None, None, "c", "d", "a", "b"]
    assert table["id"].to_list() == [0, 1, 2, 3, 4, 5]
    assert table["count"].to_list() == [0, 0, 2, 2, 1, 1]  # the nine "c" of the validation split are not counted


def test_values_below_min_count_and_values_unseen_in_training_are_unknown(tmp_path):
    train = ["1,often", "0,often", "1,once", "0,twice", "1,twice"]
    prepared = prepare(splits(tmp_path / "log", "label,x", train, ["1,once", "0,new", "1,often"], ["0,twice"]), tmp_path / "out", min_count=2)
    assert rows(prepared.folder, "valid")["x"].to_list() == [1, 1, 2]
    assert rows(prepared.folder)["x"].to_list() == [2, 2, 1, 3, 3]
    assert read_counts(prepared.folder, prepared.schema)["x"].tolist() == [0, 1, 2, 2]


def test_min_count_of_one_column_leaves_the_others(tmp_path):
    log = splits(tmp_path / "log", "label,x,z", ["1,a,a", "0,b,b"], ["1,a,a"], ["1,a,a"])
    prepared = prepare(log, tmp_path / "out", min_count=["z=2"])
    assert prepared.schema.vocabularies == {"x": 4, "z": 2}


def test_integers_beyond_double_precision_keep_their_digits(tmp_path):
    big = [2**63 - 1, 2**63 - 2, 2**53 + 1, 2**53]
    table = pa.table({"label": pa.array([0, 1, 0, 1], pa.int8()), "item": pa.array(big, pa.int64())})
    for split in ("train", "valid", "test"):
        parquet.write_table(table, tmp_path / f"{split}.parquet")
    prepared = prepare(tmp_path, tmp_path / "out")
    assert decoded(prepared.folder, "item") == [str(value) for value in big]


def test_every_cell_reads_back_from_its_id(tmp_path):
    prepared = prepare(clicks(tmp_path), tmp_path / "out", split="0.5,0.25,0.25")
    kept = {
        split: list(zip(decoded(tmp_path / "out", "user", split), decoded(tmp_path / "out", "item", split), strict=True)) for split in prepared.rows
    }
    given = Counter((user, item) for _, user, item in (row.split(",") for row in ROWS))
    assert Counter(pair for pairs in kept.values() for pair in pairs) == given
    assert {split: len(pairs) for split, pairs in kept.items()} == prepared.rows


def test_a_missing_category_is_a_value_of_its_own(tmp_path):
    table = pa.table({"label": [0, 1, 1], "x": pa.array([7, None, None], pa.int32())})
    for split in ("train", "valid", "test"):
        parquet.write_table(table, tmp_path / f"{split}.parquet")
    prepared = prepare(tmp_path, tmp_path / "out")
    assert decoded(prepared.folder, "x") == ["7", "", ""]


# Lists


def test_lists_are_cut_and_looked_up(tmp_path):
    log = splits(tmp_path / "log", "label,tags,history", ["1,a|b|c,1 2 3", "0,,", "1,c,3"], ["0,z|a,9"], ["1,b,1"])
    prepared = prepare(log, tmp_path / "out", kinds={"tags": "multivalued:|", "history": "sequence: "}, max_length=2)
    assert decoded(prepared.folder, "tags") == [["a", "b"], [], ["c"]]
    assert decoded(prepared.folder, "history") == [["2", "3"], [], ["3"]]  # a sequence keeps its newest elements
    assert rows(prepared.folder, "valid")["tags"].to_list() == [[1, 2]]
    assert {field.name: (field.kind, field.max_length) for field in prepared.schema.fields} == {
        "tags": ("multivalued", 2),
        "history": ("sequence", 2),
    }


def test_a_sequence_shares_the_vocabulary_of_a_column(tmp_path):
    log = splits(tmp_path / "log", "label,item,history", ["1,a,b;a", "0,b,b"], ["0,a,c"], ["1,b,a"])
    prepared = prepare(log, tmp_path / "out", kinds=["history=sequence:;@item"])
    assert prepared.schema.vocabularies == {"item": 4}
    assert dict(zip(*vocabulary(prepared.folder, "item").select("value", "count").to_dict(as_series=False).values(), strict=True))["b"] == 3
    assert decoded(prepared.folder, "item") == ["a", "b"]
    history = [[vocabulary(prepared.folder, "item")["value"][i] for i in cell] for cell in rows(prepared.folder)["history"].to_list()]
    assert history == [["b", "a"], ["b"]]


def test_lists_in_parquet_are_multivalued(tmp_path):
    table = pa.table({"label": [1, 0, 1], "genres": [["x", "y"], None, ["y", None]]})
    for split in ("train", "valid", "test"):
        parquet.write_table(table, tmp_path / f"{split}.parquet")
    prepared = prepare(tmp_path, tmp_path / "out")
    assert decoded(prepared.folder, "genres") == [["x", "y"], [], ["y"]]
    assert prepared.columns[1]["kind"] == "multivalued"


# Numbers


def test_standardization_is_that_of_the_training_split_and_missing_stays_missing(tmp_path):
    log = splits(tmp_path / "log", "label,price", ["1,1.5", "0,4.5", "1,", "0,NA"], ["0,3.0"], ["1,9.0"])
    prepared = prepare(log, tmp_path / "out", kinds={"price": "numeric"})
    np.testing.assert_allclose(rows(prepared.folder)["price"].to_numpy(), [-1.0, 1.0, math.nan, math.nan])
    assert rows(prepared.folder, "valid")["price"].to_list() == [0.0]
    assert prepared.schema.fields[0].transform == {"name": "standardize", "mean": 3.0, "std": 1.5}
    assert rows(prepared.folder)["price"].dtype == pl.Float32


def test_log_bucket_follows_the_practice_for_criteo(tmp_path):
    numbers = [-2, 0, 1, 2, 3, 10, 1000, 5_000_000]
    log = splits(tmp_path / "log", "label,n", [f"1,{n}" for n in numbers] + ["0,"], ["0,4"], ["1,3"])
    prepared = prepare(log, tmp_path / "out", kinds={"n": "numeric"}, numeric="log-bucket")
    expected = [str(n) if n <= 2 else f"b{math.floor(math.log(n) ** 2)}" for n in numbers] + [""]
    assert decoded(prepared.folder, "n") == expected
    assert rows(prepared.folder, "valid")["n"].to_list() == rows(prepared.folder, "test")["n"].to_list()  # floor(ln(3)^2) = floor(ln(4)^2) = 1
    assert prepared.schema.fields[0].kind == "categorical"


# Splits


def test_a_random_split_depends_on_the_seed_alone(tmp_path):
    log = clicks(tmp_path)
    first, again, other = (rows(prepare(log, tmp_path / f"out{n}", seed=seed).folder) for n, seed in enumerate((1, 1, 2)))
    assert first.equals(again)
    assert not first.equals(other)


def test_rows_keep_their_order_across_shards_and_row_groups(tmp_path):
    n = 150_000
    pl.DataFrame({"label": np.arange(n) % 2, "x": np.arange(n)}).write_csv(tmp_path / "log.csv")
    prepared = prepare(tmp_path / "log.csv", tmp_path / "out", valid=clicks_of_x(tmp_path, "v.csv"), test=clicks_of_x(tmp_path, "t.csv"))
    assert decoded(prepared.folder, "x") == [str(i) for i in range(n)]
    metadata = parquet.ParquetFile(prepared.folder / "train" / "part-00000.parquet").metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [65_536, 65_536, n - 2 * 65_536]


def clicks_of_x(folder: Path, name: str) -> Path:
    return write(folder / name, "label,x", "1,5", "0,6")


@pytest.mark.parametrize("step", [1, 10**15])
def test_a_split_by_time_puts_the_newest_rows_last_and_never_parts_one_moment(tmp_path, step):
    times = np.random.default_rng(0).integers(0, 40, 400) * step + 2 * 10**9
    pl.DataFrame({"label": np.arange(400) % 2, "x": times.astype(str), "moment": times}).write_csv(tmp_path / "log.csv")
    prepared = prepare(
        tmp_path / "log.csv", tmp_path / "out", split_by="moment", split=(0.5, 0.25, 0.25), kinds={"x": "categorical", "moment": "timestamp"}
    )
    ordered = np.sort(times)
    edges = [int(ordered[199]), int(ordered[299])]  # the moments of the 200th and 300th row end their splits
    expected = {"train": (times <= edges[0]).sum(), "valid": ((times > edges[0]) & (times <= edges[1])).sum(), "test": (times > edges[1]).sum()}
    assert prepared.rows == {name: int(count) for name, count in expected.items()}
    assert decoded(prepared.folder, "x") == [str(t) for t in times if t <= edges[0]]


def test_times_as_text_split_as_well(tmp_path):
    lines = [f"{i % 2},u{i % 3},2024-01-{1 + i % 10:02d} 10:00:00" for i in range(100)]
    prepared = prepare(write(tmp_path / "log.csv", "label,user,time", *lines), tmp_path / "out", split_by="time")
    assert prepared.rows == {"train": 80, "valid": 10, "test": 10}
    assert [row["kind"] for row in prepared.columns] == ["label", "categorical", "timestamp"]


def test_shares_are_for_the_splits_without_files(tmp_path):
    prepared = prepare(clicks(tmp_path), tmp_path / "out", test=clicks(tmp_path, name="test.csv"))
    assert prepared.rows["train"] + prepared.rows["valid"] == prepared.rows["test"] == 100
    with pytest.raises(ValueError, match="2 shares are needed, for train, valid"):
        prepare(clicks(tmp_path), tmp_path / "other", test=clicks(tmp_path, name="test.csv"), split="0.8,0.1,0.1")


# Formats


@pytest.mark.parametrize("name", ["clicks.csv.gz", "clicks.csv.zst", "clicks.parquet", "clicks.tsv", "bom.csv", "crlf.csv"])
def test_the_same_rows_in_another_format_give_the_same_ids(tmp_path, name):
    plain = clicks(tmp_path)
    expected, path = prepare(plain, tmp_path / "expected"), tmp_path / "in" / name
    path.parent.mkdir()
    text = plain.read_bytes()
    if name.endswith("gz"):
        path.write_bytes(gzip.compress(text))
    elif name.endswith("zst"):
        with pa.output_stream(path, compression="zstd") as file:
            file.write(text)
    elif name.endswith("parquet"):
        pl.read_csv(plain).write_parquet(path)
    else:
        path.write_bytes({"clicks.tsv": text.replace(b",", b"\t"), "bom.csv": b"\xef\xbb\xbf" + text, "crlf.csv": text.replace(b"\n", b"\r\n")}[name])
    prepared = prepare(path, tmp_path / "out")
    assert prepared.rows == expected.rows
    for split in prepared.rows:
        assert rows(prepared.folder, split).equals(rows(expected.folder, split))


def test_many_files_folders_and_patterns_are_one_log(tmp_path):
    whole = prepare(clicks(tmp_path), tmp_path / "whole")
    parts = tmp_path / "parts"
    parts.mkdir()
    write(parts / "a.csv", HEADER, *ROWS[:40])
    write(parts / "b.csv", HEADER, *ROWS[40:])
    for number, inputs in enumerate((parts, f"{parts}/*.csv", [parts / "a.csv", parts / "b.csv"])):
        prepared = prepare(inputs, tmp_path / f"out{number}")
        assert rows(prepared.folder).equals(rows(whole.folder))


def test_text_without_a_header_takes_the_names_given(tmp_path):
    path = write(tmp_path / "log.txt", *(row.replace(",", ";") for row in ROWS))
    prepared = prepare(path, tmp_path / "out", format="csv", delimiter=";", columns="click,user,item")
    assert [row["column"] for row in prepared.columns] == ["click", "user", "item"]
    assert sum(prepared.rows.values()) == 100
    unnamed = prepare(path, tmp_path / "unnamed", format="csv", delimiter=";", header=False, kinds=["column_1=label"])
    assert [field.name for field in unnamed.schema.fields] == ["column_2", "column_3"]


def test_a_tab_can_be_written_with_a_backslash(tmp_path):
    path = write(tmp_path / "log.txt", *(row.replace(",", "\t") for row in [HEADER, *ROWS]))
    assert sum(prepare(path, tmp_path / "out", format="csv", delimiter="\\t").rows.values()) == 100


def test_quoted_cells_hold_the_separator(tmp_path):
    log = splits(tmp_path / "log", "label,x", ['1,"a,b"', '0,"say ""hi"""'], ["1,c"], ["1,c"])
    assert decoded(prepare(log, tmp_path / "out").folder, "x") == ["a,b", 'say "hi"']


def test_libsvm_rows_of_one_length_are_columns(tmp_path):
    path = write(tmp_path / "log.libfm", *(f"{'-1' if i % 2 else '1'} {i % 3}:1 {10 + i % 4}:1" for i in range(60)))
    prepared = prepare(path, tmp_path / "out")
    assert [field.name for field in prepared.schema.fields] == ["f0", "f1"]
    whole = pl.concat([rows(prepared.folder, split) for split in prepared.rows])
    assert Counter(whole["label"]) == {0: 30, 1: 30}
    assert set(decoded(prepared.folder, "f1")) == {"10", "11", "12", "13"}


def test_libsvm_rows_of_many_lengths_are_a_list(tmp_path):
    path = write(tmp_path / "log.svm", *(f"{i % 2} " + " ".join(f"{j}:1" for j in range(1 + i % 3)) for i in range(60)))
    prepared = prepare(path, tmp_path / "out")
    assert [(field.name, field.kind, field.max_length) for field in prepared.schema.fields] == [("features", "multivalued", 3)]


# Kinds


def test_kinds_are_inferred_from_names_types_and_values(tmp_path):
    n = 100
    frame = pl.DataFrame(
        {
            "clicked": [i % 2 for i in range(n)],
            "user": [f"u{i}" for i in range(n)],
            "price": [i + 0.25 for i in range(n)],
            "grade": [(i % 5) / 2 for i in range(n)],
            "age": list(range(n)),
            "event_time": [1_700_000_000 + i for i in range(n)],
            "daytime": [i % 4 for i in range(n)],
        }
    )
    frame.write_csv(tmp_path / "log.csv")
    prepared = prepare(tmp_path / "log.csv", tmp_path / "out")
    assert {row["column"]: row["kind"] for row in prepared.columns} == {
        "clicked": "label",
        "user": "categorical",
        "price": "numeric",
        "grade": "categorical",
        "age": "categorical",
        "event_time": "timestamp",
        "daytime": "categorical",
    }
    assert [field.name for field in prepared.schema.fields] == ["user", "price", "grade", "age", "daytime"]


def test_arguments_win_over_the_file_of_options(tmp_path):
    config = write(
        tmp_path / "prepare.toml", "min_count = 3", "seed = 5", "[fields]", 'user = {kind = "ignore"}', 'item = {min_count = 1, kind = "categorical"}'
    )
    prepared = prepare(clicks(tmp_path), tmp_path / "out", config=config, kinds={"user": "categorical"}, seed=6)
    settings = runs.load(prepared.folder)["settings"]
    assert (settings["min_count"], settings["seed"]) == (3, 6)
    assert settings["fields"]["user"]["kind"] == "categorical"
    assert [field.name for field in prepared.schema.fields] == ["user", "item"]


# What is handed on


def test_the_result_reads_back_and_a_finished_run_is_not_repeated(tmp_path):
    prepared = prepare(clicks(tmp_path), tmp_path / "out")
    before = (tmp_path / "out" / "run.json").stat().st_mtime_ns
    assert prepare(clicks(tmp_path), tmp_path / "out") == prepared == load_prepared(tmp_path / "out")
    assert (tmp_path / "out" / "run.json").stat().st_mtime_ns == before
    assert Schema.load(tmp_path / "out" / "schema.json") == prepared.schema
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["run.json", "schema.json", "test", "train", "valid", "vocabulary"]


def test_input_that_changed_since_is_noticed(tmp_path):
    prepare(clicks(tmp_path), tmp_path / "out")
    with pytest.raises(ValueError, match="before they changed"):
        prepare(clicks(tmp_path, "1,new,new"), tmp_path / "out")


def test_bytes_of_the_vocabulary_are_those_of_values_and_ids(tmp_path):
    prepared = prepare(clicks(tmp_path), tmp_path / "out")
    without_counts = 0
    for name in ("user", "item"):
        vocabulary(prepared.folder, name).drop("count").write_parquet(tmp_path / "two_columns.parquet")
        group = parquet.ParquetFile(tmp_path / "two_columns.parquet").metadata.row_group(0)
        without_counts += sum(group.column(i).total_compressed_size for i in range(2))
    assert vocabulary_nbytes(prepared.folder) == prepared.vocabulary_nbytes == without_counts


def test_progress_counts_the_rows(tmp_path):
    told: dict[str, int] = {}
    prepare(clicks(tmp_path), tmp_path / "out", progress=lambda what, done: told.__setitem__(what, done))
    assert told["reading train, valid, test"] == 100
    assert told["writing train"] + told["writing valid"] + told["writing test"] == 100


# Bad rows

BAD_LINES = {
    "too few columns": (b"1,u1", "2 columns, expected 3"),
    "too many columns": (b"1,u1,i1,9", "4 columns, expected 3"),
    "label": (b"2,u1,i1", "label is neither 0 nor 1: '2'"),
    "no label": (b",u1,i1", "label is neither 0 nor 1: ''"),
    "bytes": (b"1,u\xff,i1", "byte 0xff at place 4 of the line is no UTF-8 text"),
    "open quote": (b'1,"u1,i1', "columns, expected 3|does not end on its line"),
}


@pytest.mark.parametrize("fault", BAD_LINES)
def test_a_bad_row_is_an_error_with_file_and_line(tmp_path, fault):
    line, words = BAD_LINES[fault]
    path = clicks(tmp_path)
    lines = path.read_bytes().split(b"\n")
    lines.insert(40, line)  # after a header and 39 rows: line 41
    lines.insert(20, b"")  # an empty line counts, so it is line 42
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=rf"clicks\.csv:42: .*({words})"):
        prepare(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", BAD_LINES)
def test_skipped_rows_are_counted_and_the_others_kept(tmp_path, fault):
    path = clicks(tmp_path)
    path.write_bytes(path.read_bytes() + b"\n".join([BAD_LINES[fault][0], *[row.encode() for row in ROWS[:10]]]))
    prepared = prepare(path, tmp_path / "out", on_bad_row="skip")
    assert sum(prepared.rows.values()) == 110
    assert sum(prepared.skipped.values()) == 1
    assert "clicks.csv:102: " in prepared.skipped_first[0]


def test_a_cell_that_is_no_number_is_a_bad_row(tmp_path):
    lines = [f"{i % 2},{i + 0.5}" for i in range(50)] + ["1,cheap"]
    with pytest.raises(ValueError, match=r"log\.csv:52: price is no number: 'cheap'"):
        prepare(write(tmp_path / "log.csv", "label,price", *lines), tmp_path / "out", kinds={"price": "numeric"})


def test_a_bad_row_of_parquet_is_named_by_its_row(tmp_path):
    parquet.write_table(pa.table({"label": [0, 1, 5, 1], "x": [1, 2, 3, 4]}), tmp_path / "log.parquet")
    with pytest.raises(ValueError, match=r"log\.parquet, row 3: label is neither 0 nor 1: 5"):
        prepare(tmp_path / "log.parquet", tmp_path / "out")


def test_a_bad_row_of_libsvm_is_named_by_its_line(tmp_path):
    lines = [f"{i % 2} 1:1 2:1" for i in range(50)]
    for line, words in (("1 3:1", "1 indices, expected 2"), ("1 3:0.5 4:1", "a value is not 1"), ("1 3 4", "not of the form")):
        with pytest.raises(ValueError, match=rf"log\.svm:51: {words}"):
            prepare(write(tmp_path / "log.svm", *lines, line), tmp_path / "out")


def test_only_bad_rows_leave_nothing_to_prepare(tmp_path):
    with pytest.raises(ValueError, match=r"No rows in the input; .*log\.csv:2: 1 columns, expected 3"):
        prepare(write(tmp_path / "log.csv", HEADER, "1;2;3", "0;2;3"), tmp_path / "out", on_bad_row="skip")


# Bad input


def refused(tmp_path: Path, path: object, words: str, **options: object) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        prepare(path, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_input_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty.csv").touch()
    (tmp_path / "empty.parquet").touch()
    (tmp_path / "folder").mkdir()
    refused(tmp_path, tmp_path / "absent.csv", "absent.csv: no such file or folder")
    refused(tmp_path, f"{tmp_path}/*.tsv", "no file matches this pattern")
    refused(tmp_path, tmp_path / "folder", "no file in this folder ends in one of")
    refused(tmp_path, tmp_path / "empty.csv", "empty.csv: the file is empty")
    refused(tmp_path, tmp_path / "empty.parquet", "empty.parquet: the file is empty")
    (tmp_path / "utf16.csv").write_bytes("\n".join([HEADER, *ROWS]).encode("utf-16"))
    refused(tmp_path, tmp_path / "utf16.csv", "utf16.csv: the first line is no UTF-8 text", on_bad_row="skip")
    refused(tmp_path, write(tmp_path / "header.csv", HEADER), "No rows in the input")
    refused(tmp_path, write(tmp_path / "semicolons.csv", "label;user", "1;2"), "one column, 'label;user', with the separator ','; ';' would part it")
    refused(tmp_path, write(tmp_path / "nolabel.csv", "a,b", "1,2"), r"No label \(0 or 1\) among the columns \['a', 'b'\]")
    refused(tmp_path, write(tmp_path / "labels.csv", "label,click", "1,0"), r"\['label', 'click'\] could each be the label")
    refused(tmp_path, write(tmp_path / "twice.csv", "label,x,x", "1,2,3"), "two columns have the name 'x'")
    refused(tmp_path, write(tmp_path / "clicks.dat", HEADER, *ROWS), "the name does not tell the format")
    refused(tmp_path, write(tmp_path / "few.csv", HEADER, ROWS[0]), "split has no rows")


def test_bad_options_are_refused_in_one_line(tmp_path):
    log = clicks(tmp_path)
    refused(tmp_path, log, r"Column 'prize' is not in the input. Its columns are \['label', 'user', 'item'\]", kinds=["prize=numeric"])
    refused(tmp_path, log, "Column 'day' is not in the input", split_by="day")
    refused(tmp_path, log, r"log.*|clicks.csv:2: user is no time", split_by="user")
    refused(tmp_path, log, "kind 'category' is unknown. Choose one of", kinds={"user": "category"})
    refused(tmp_path, log, "Say what separates its elements, e.g. 'multivalued:|'", kinds={"user": "multivalued"})
    refused(tmp_path, log, "no other column has the vocabulary 'itme'", kinds={"user": "categorical@itme"})
    refused(tmp_path, log, "sum to 1", split="0.8,0.1")
    refused(tmp_path, log, "format='excel' is unknown", format="excel")
    refused(tmp_path, log, "on_bad_row='ignore' is unknown", on_bad_row="ignore")
    refused(tmp_path, log, "min_count=0: a whole number from 1", min_count=0)
    refused(tmp_path, log, "option 'min_cuont' does not exist", config=write(tmp_path / "bad.toml", "min_cuont = 2"))
    refused(tmp_path, log, "not TOML", config=write(tmp_path / "worse.toml", "min_count 2"))
    refused(tmp_path, log, "absent.toml", config=tmp_path / "absent.toml")


@pytest.mark.parametrize("name", ["log.parquet", "log.csv.gz", "log.csv.zst"])
def test_a_truncated_file_is_refused_by_name(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 10**9, 5000)
    frame = pl.DataFrame({"label": noise % 2, "x": noise})
    path = tmp_path / name
    if name == "log.parquet":
        frame.write_parquet(path)
    elif name == "log.csv.gz":
        path.write_bytes(gzip.compress(frame.write_csv().encode()))
    else:
        with pa.output_stream(path, compression="zstd") as file:
            file.write(frame.write_csv().encode())
    path.write_bytes(path.read_bytes()[:-2000])
    refused(tmp_path, path, rf"{name}: .*truncated")


def test_files_with_other_columns_are_refused(tmp_path):
    write(tmp_path / "a.csv", HEADER, *ROWS)
    refused(
        tmp_path,
        [tmp_path / "a.csv", write(tmp_path / "b.csv", "label,item,user", *ROWS)],
        r"b.csv: columns \['label', 'item', 'user'\], but .*a.csv has",
    )
    refused(tmp_path, tmp_path / "a.csv", "v.csv: no column 'user'", valid=write(tmp_path / "v.csv", "label,item", "1,2"))


# Whole or not at all, and small


def test_a_killed_run_leaves_nothing_that_looks_finished(tmp_path):
    rng, n = np.random.default_rng(0), 200_000
    pl.DataFrame({"label": rng.integers(0, 2, n), **{f"c{i}": rng.integers(0, 10**6, n) for i in range(4)}}).write_csv(tmp_path / "log.csv")
    code = f"from leanrec.data.prepare import prepare; prepare({str(tmp_path / 'log.csv')!r}, {str(tmp_path / 'out')!r})"
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.partial/train/*")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="interrupted"):
        load_prepared(tmp_path / "out")
    prepared = prepare(tmp_path / "log.csv", tmp_path / "out")
    assert sum(prepared.rows.values()) == n
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc, which this system lacks")
def test_peak_memory_does_not_grow_with_the_rows(tmp_path):
    rng, peaks = np.random.default_rng(0), {}
    texts = {f"c{i}": np.char.add("a value of forty characters in all ", rng.integers(10_000, 12_000, 50_000).astype(str)) for i in range(6)}
    header, body = pl.DataFrame({"label": np.arange(50_000) % 2, **texts}).write_csv().split("\n", 1)
    for pieces in (4, 16):
        with (tmp_path / f"{pieces}.csv").open("w") as file:
            file.writelines([header + "\n", *[body] * pieces])
        code = f"""
from leanrec.data.prepare import prepare
assert sum(prepare("{tmp_path}/{pieces}.csv", "{tmp_path}/out{pieces}").rows.values()) == 50_000 * {pieces}
print(open("/proc/self/status").read())
"""
        status = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        # Not ru_maxrss: a child begins with its parent's.
        peaks[pieces] = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    growth_of_file = (tmp_path / "16.csv").stat().st_size - (tmp_path / "4.csv").stat().st_size
    assert growth_of_file > 100 << 20
    assert peaks[16] - peaks[4] < 0.5 * growth_of_file  # the rows in memory would take all of it, and their columns more


# Real logs


@pytest.mark.parametrize("name", ["frappe", "kdd12"])
def test_prepared_splits_of_a_real_log_read_back(data_dir, tmp_path, name):
    prepared = prepare(data_dir / name, tmp_path / "out")
    for split in prepared.rows:
        raw = pl.read_parquet(data_dir / name / f"{split}.parquet")
        encoded = rows(prepared.folder, split)
        assert encoded["label"].to_list() == raw["label"].to_list()
        for field in prepared.schema.fields:
            known = vocabulary(prepared.folder, field.name)["value"].drop_nulls().to_list()
            expected = {value: number for number, value in enumerate(known, start=2)}
            assert encoded[field.name].to_list() == [expected.get(str(value), 1) for value in raw[field.name].to_list()]


def test_raw_criteo_and_avazu_rows_are_read_by_their_presets(data_dir, tmp_path):
    criteo = prepare(data_dir / "raw" / "criteo_10k.tsv", tmp_path / "criteo", format="criteo")
    assert sum(criteo.rows.values()) == 10_000
    assert [field.name for field in criteo.schema.fields] == [f"I{i}" for i in range(1, 14)] + [f"C{i}" for i in range(1, 27)]
    avazu = prepare(data_dir / "raw" / "avazu_10k.csv.gz", tmp_path / "avazu", format="avazu")
    assert sum(avazu.rows.values()) == 9_999
    kinds = {row["column"]: row["kind"] for row in avazu.columns}
    assert (kinds["id"], kinds["click"], kinds["hour"], kinds["hour_of_day"], kinds["weekday"]) == (
        "ignore",
        "label",
        "timestamp",
        "categorical",
        "categorical",
    )


def test_raw_libfm_rows_are_ten_columns(data_dir, tmp_path):
    prepared = prepare(data_dir / "raw" / "frappe_200.libfm", tmp_path / "out")
    assert len(prepared.schema.fields) == 10
    assert sum(prepared.rows.values()) == 200
