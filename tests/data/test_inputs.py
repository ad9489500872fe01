"""Which files a path, a folder or a pattern stands for."""

import json
import os

import pytest

from leanrec.data.inputs import find_files, find_splits
from leanrec.data.prepare import prepare

LINES = ["label,user", *(f"{i % 2},u{i % 7}" for i in range(60))]


@pytest.fixture
def log(tmp_path, monkeypatch):
    """A folder `in` of three files, in the folder where the test runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for name in ("m1", "m2", "n"):
        write(tmp_path / "in" / f"{name}.csv")
    return tmp_path / "in"


def write(path):
    path.write_text("\n".join(LINES) + "\n")


@pytest.mark.parametrize("name", ["valid.csv", "val.csv", "validation.parquet", "dev.csv.gz"])
def test_the_validation_split_has_many_names(tmp_path, name):
    for file in ("train.csv", name, "test.csv", "validate.csv"):
        (tmp_path / file).touch()
    assert find_splits([tmp_path]) == {"train": [tmp_path / "train.csv"], "valid": [tmp_path / name], "test": [tmp_path / "test.csv"]}
    (tmp_path / "test.csv").unlink()
    assert find_splits([tmp_path]) == {"train": [tmp_path / "train.csv"], "valid": [tmp_path / name]}


def test_rows_of_a_validation_file_of_any_name_are_the_validation_split(tmp_path):
    (tmp_path / "log").mkdir()
    for name in ("train", "val", "test"):
        write(tmp_path / "log" / f"{name}.csv")
    assert prepare(tmp_path / "log", tmp_path / "out").rows == {"train": 60, "valid": 60, "test": 60}


def test_two_names_of_one_split_are_refused(tmp_path):
    for file in ("train.csv", "dev.csv", "valid.a.csv", "valid.b.csv"):
        (tmp_path / file).touch()
    with pytest.raises(ValueError, match="'dev' and 'valid' each name the validation split"):
        find_splits([tmp_path])
    (tmp_path / "dev.csv").unlink()
    assert len(find_splits([tmp_path])["valid"]) == 2


@pytest.mark.parametrize("inputs", [["in/n.csv", "in/n.csv"], ["in", "in/n.csv"], ["in/m*", "in/n.csv", "in/n*"], ["in/n.csv", "in/../in/n.csv"]])
def test_a_file_that_is_named_twice_is_refused(log, inputs):
    with pytest.raises(ValueError, match=r"^in/(\.\./in/)?n\.csv: named twice.*Name each file once") as caught:
        prepare(inputs, "out")
    assert "\n" not in str(caught.value)
    assert sum(prepare(["in/m*", "in/n.csv"], "out").rows.values()) == 180


def test_another_name_of_a_file_is_that_file(log):
    os.symlink(log / "m1.csv", log / "o.csv")
    with pytest.raises(ValueError, match=r"o\.csv: named twice, also as in/m1\.csv"):
        find_files(["in"])


def test_a_file_that_is_in_two_splits_of_a_folder_is_refused(log):
    os.rename(log / "m1.csv", log / "train.csv")
    os.symlink(log / "train.csv", log / "test.csv")
    with pytest.raises(ValueError, match=r"test\.csv: named twice, also as .*train\.csv"):
        prepare(log, "out")


@pytest.mark.parametrize("out", ["prepared", "deep/er"])
def test_output_below_the_input_is_no_input(log, out):
    first = prepare(log, log / out)
    assert prepare(log, log / out) == first
    (log / out / "run.json").rename(log / out / "settings.json")
    (log / out).rename(log / f"{out}.partial")  # as a run that was killed leaves it
    assert prepare(log, log / out).fingerprint == first.fingerprint


def test_output_that_is_named_like_a_split_is_none(log):
    os.rename(log / "m1.csv", log / "train.csv")
    os.rename(log / "m2.csv", log / "test.csv")
    first = prepare(log, log / "train.prepared")
    assert prepare(log, log / "train.prepared") == first


def test_a_folder_of_runs_holds_no_data(log):
    prepare(log, "runs/a")
    with pytest.raises(ValueError, match=r"runs: no file in this folder, but in folders that leanrec wrote such as runs/a, ends in"):
        find_files(["runs"])
    assert len(find_files(["runs/a/train"])) == 1  # who names it wants it


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"name": "mine"})])
def test_settings_of_others_hide_no_data(log, text):
    (log / "more").mkdir()
    write(log / "more" / "a.csv")
    (log / "more" / "settings.json").write_text(text)
    assert len(find_files([log])) == 4


def test_a_file_of_two_splits_is_named_twice(log):
    with pytest.raises(ValueError, match="named twice"):
        prepare(log / "n.csv", "out", test=log / "n.csv")
