"""What goes wrong on the command line is told in one line with the fact and the remedy, and leaves nothing that looks finished."""

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leanrec.cli import run

USERS, ITEMS, ROWS = 40, 30, 600


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs a command that must fail with --out, and gives its one line."""

    def refuse(*arguments: object, out: bool = True, code: int = 1) -> str:
        folder = tmp_path / "out"
        target = ["--out", str(folder)] if out else []
        assert run([*map(str, arguments), *target]) == code
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
        assert not folder.exists()
        return err

    return refuse


def _rows() -> list[list[object]]:
    return [[f"u{number * 7 % USERS}", f"i{number * 11 % ITEMS}", number * 0.37, int(number % 3 == 0)] for number in range(ROWS)]


def _write_csv(path: Path, *, separator: str = ",", rows: list[list[object]] | None = None) -> Path:
    lines = [["user", "item", "price", "label"], *(_rows() if rows is None else rows)]
    path.write_text("".join(separator.join(map(str, line)) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A prepared log."""
    folder = tmp_path_factory.mktemp("prepared")
    assert run(["prepare", str(_write_csv(folder / "clicks.csv")), "--out", str(folder / "data")]) == 0
    return folder / "data"


@pytest.fixture(scope="module")
def base(data) -> Path:
    """A trained run on it."""
    out = data.parent / "base"
    assert run(["train", str(data), "--model", "fm", "--set", "embedding_dim=6", "--epochs", "1", "--out", str(out)]) == 0
    return out


@pytest.fixture
def damaged(base, tmp_path) -> Path:
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(base, tmp_path / "damaged"))


# prepare


def test_missing_file(refused):
    assert "nowhere.csv: no such file or folder" in refused("prepare", "nowhere.csv")


def test_pattern_of_files_without_a_match(refused, tmp_path):
    assert "no file matches this pattern" in refused("prepare", tmp_path / "*.csv")


def test_empty_file(refused, tmp_path):
    (tmp_path / "clicks.csv").touch()
    assert "empty" in refused("prepare", tmp_path / "clicks.csv")


def test_header_without_rows(refused, tmp_path):
    assert "no rows" in refused("prepare", _write_csv(tmp_path / "clicks.csv", rows=[])).lower()


def test_wrong_separator(refused, tmp_path):
    line = refused("prepare", _write_csv(tmp_path / "clicks.csv", separator=";"))
    assert "user;item;price;label" in line and "separator" in line


def test_unknown_column(refused, tmp_path):
    line = refused("prepare", _write_csv(tmp_path / "clicks.csv"), "--kind", "clicked=label")
    assert "'clicked' is not in the input" in line and "'label'" in line


def test_unknown_kind(refused, tmp_path):
    line = refused("prepare", _write_csv(tmp_path / "clicks.csv"), "--kind", "user=text")
    assert "'text' is unknown" in line and "'categorical'" in line


def test_unknown_format(refused, tmp_path):
    line = refused("prepare", _write_csv(tmp_path / "clicks.csv"), "--format", "excel")
    assert "'excel' is unknown" in line and "'csv'" in line


def test_name_that_tells_no_format(refused, tmp_path):
    assert "--format" in refused("prepare", _write_csv(tmp_path / "clicks"))


@pytest.mark.parametrize("shares", ["0.8,0.1", "nan,0.1,0.1", "1.2,-0.1,-0.1"])
def test_shares_that_do_not_sum_to_one(refused, tmp_path, shares):
    line = refused("prepare", _write_csv(tmp_path / "clicks.csv"), "--split", shares)
    assert shares in line and "sum to 1" in line


def test_shares_that_are_no_numbers(refused, tmp_path):
    line = refused("prepare", _write_csv(tmp_path / "clicks.csv"), "--split", "most,some,some")
    assert "split='most'" in line and "number" in line


@pytest.mark.parametrize(
    ("row", "fact"),
    [
        (["u1", "i1", 0.5, 2], "label"),
        (["u1", "i1"], "2"),
        (["u1", "i1", "cheap", 1], "price"),
    ],
    ids=["label", "columns", "number"],
)
def test_bad_row_is_named_by_file_and_line(refused, tmp_path, row, fact):
    rows = _rows()
    rows[40] = row  # line 42: lines count from 1, and the header is one
    line = refused("prepare", _write_csv(tmp_path / "clicks.csv", rows=rows), "--kind", "price=numeric")
    assert "clicks.csv:42: " in line and fact in line and "--on-bad-row skip" in line


def test_bytes_that_are_no_text(refused, tmp_path):
    path = _write_csv(tmp_path / "clicks.csv")
    path.write_bytes(path.read_bytes() + b"\xff\xfe\xfa,i1,0.5,1\n")
    assert f"clicks.csv:{ROWS + 2}: " in refused("prepare", path)


def test_file_that_is_no_gzip(refused, tmp_path):
    assert "clicks.csv.gz" in refused("prepare", _write_csv(tmp_path / "clicks.csv.gz"))


def test_truncated_parquet(refused, tmp_path):
    pq.write_table(pa.table({"user": ["a", "b"] * 500, "label": [0, 1] * 500}), tmp_path / "clicks.parquet")
    whole = (tmp_path / "clicks.parquet").read_bytes()
    (tmp_path / "clicks.parquet").write_bytes(whole[: len(whole) // 2])
    assert "clicks.parquet: not a whole Parquet file" in refused("prepare", tmp_path / "clicks.parquet")


def test_settings_file_that_is_no_toml(refused, tmp_path):
    (tmp_path / "clicks.toml").write_text("min_count: 3")
    assert "clicks.toml: not TOML" in refused("prepare", _write_csv(tmp_path / "clicks.csv"), "--config", tmp_path / "clicks.toml")


def test_other_settings_for_a_folder_that_is_written(data, capsys):
    before = (data / "run.json").read_bytes()
    assert run(["prepare", str(data.parent / "clicks.csv"), "--min-count", "3", "--out", str(data)]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "min_count: 1 there, 3 now" in line and "--out" in line
    assert (data / "run.json").read_bytes() == before


# train


def test_data_that_was_not_prepared(refused, tmp_path):
    assert "no finished run here" in refused("train", tmp_path)


def test_unknown_model(refused, data):
    line = refused("train", data, "--model", "deepfms")
    assert "'deepfms' is unknown" in line and "'deepfm'" in line


def test_unknown_setting_of_a_model(refused, data):
    line = refused("train", data, "--model", "fm", "--set", "dimension=8")
    assert "no setting 'dimension'" in line and "'embedding_dim'" in line


def test_setting_that_is_no_pair(refused, data):
    assert "NAME=VALUE" in refused("train", data, "--set", "embedding_dim", code=2)


def test_own_module_that_is_not_there(refused, data):
    assert "no module 'my_model'" in refused("train", data, "--model", "my_model:build")


@pytest.mark.parametrize(("option", "value"), [("--epochs", "0"), ("--batch-size", "0"), ("--patience", "0")])
def test_training_setting_out_of_range(refused, data, option, value):
    line = refused("train", data, option, value)
    assert f"{option.lstrip('-').replace('-', '_')}={value}" in line


def test_truncated_shard_of_a_prepared_log(refused, data, tmp_path):
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    shard = next((copy / "train").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{shard}: not a whole Parquet file" in refused("train", copy)


def test_tables_of_a_model_on_another_log(refused, base, small_log):
    line = refused("train", small_log, "--model", "fm", "--tables", base)
    assert "Table" in line or "table" in line


# compress


def test_unknown_method(refused, base):
    line = refused("compress", base, "--method", "ZIP()")
    assert "'ZIP'" in line and "PQ" in line


def test_unknown_argument_of_a_method(refused, base):
    line = refused("compress", base, "--method", "PQ(num_parts=2)")
    assert "num_parts" in line and "num_subspaces" in line


def test_method_that_is_no_call(refused, base):
    assert "PQ(num_subspaces=" in refused("compress", base, "--method", "PQ(num_subspaces=")


def test_dimension_that_is_not_divisible(refused, base):
    line = refused("compress", base, "--method", "PQ(num_subspaces=4)")
    assert "not divisible by 4" in line and "[1, 2, 3, 6]" in line


def test_pattern_without_a_table(refused, base):
    line = refused("compress", base, "--method", "*.movie=PQ(num_subspaces=2)")
    assert "No table matches the pattern '*.movie'" in line and "item" in line


def test_budget_out_of_reach(refused, base):
    assert "cannot be met" in refused("compress", base, "--method", "PQ()", "--ratio", "100000")


def test_budget_with_a_method_for_each_table(refused, base):
    assert "one method for all tables" in refused("compress", base, "--method", "*=PQ()", "--ratio", "4")


def test_run_that_is_missing(refused, tmp_path):
    assert "no finished run here" in refused("compress", tmp_path / "nowhere")


def test_log_of_a_run_that_was_moved(refused, data, tmp_path):
    moved = Path(shutil.copytree(data, tmp_path / "data"))
    assert run(["train", str(moved), "--model", "lr", "--epochs", "1", "--out", str(tmp_path / "lr")]) == 0
    shutil.rmtree(moved)
    assert str(moved) in refused("compress", tmp_path / "lr", "--method", "Full()")


# artefacts


@pytest.mark.parametrize("verb", ["compress", "evaluate", "report"])
def test_truncated_model(refused, damaged, verb):
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    line = refused(verb, damaged, out=verb == "compress")
    assert f"{path}: is missing, truncated" in line


@pytest.mark.parametrize("verb", ["compress", "evaluate", "report"])
def test_altered_model(refused, damaged, verb):
    path = damaged / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert f"{path}: is damaged or was altered" in refused(verb, damaged, out=verb == "compress")


def test_record_that_is_no_json(refused, damaged):
    (damaged / "run.json").write_text("{")
    assert "run.json: not JSON" in refused("report", damaged, out=False)


def test_record_that_names_no_model(refused, damaged):
    record = json.loads((damaged / "run.json").read_text())
    del record["recommender"]
    (damaged / "run.json").write_text(json.dumps(record))
    assert 'does not say what model lies here ("recommender")' in refused("evaluate", damaged, out=False)


def test_schema_that_was_altered(refused, damaged):
    (damaged / "schema.json").write_text("[]")
    assert "schema.json: not a schema" in refused("evaluate", damaged, out=False)


def test_prepared_log_in_the_place_of_a_run(refused, data):
    assert "no model" in refused("report", data, out=False)


# evaluate and bench


def test_unknown_split(refused, base):
    line = refused("evaluate", base, "--split", "tests")
    assert "tests" in line and "test" in line


def test_unknown_field_of_popularity(refused, base):
    line = refused("evaluate", base, "--popularity", "movie")
    assert "'movie'" in line and "'item'" in line


def test_comparison_of_runs_on_different_logs(refused, base, small_log, tmp_path):
    assert run(["train", str(small_log), "--model", "lr", "--epochs", "1", "--out", str(tmp_path / "other")]) == 0
    assert "within one prepared log" in refused("evaluate", base, "--against", tmp_path / "other")


def test_experiment_that_is_missing(refused, tmp_path):
    assert "nowhere.toml" in refused("bench", tmp_path / "nowhere.toml", "--logs", tmp_path)


def test_experiments_without_logs(refused, tmp_path, monkeypatch):
    monkeypatch.delenv("LEANREC_DATA", raising=False)
    assert "LEANREC_DATA" in refused("bench", tmp_path / "one.toml", code=2)


# wrong usage


@pytest.mark.parametrize("arguments", [["squeeze"], ["train"], ["train", "data", "--rate", "1"], ["compress", "a", "--ratio", "much"], ["--verbose"]])
def test_wrong_usage_points_to_the_help(refused, arguments):
    assert "--help" in refused(*arguments, out=False, code=2)


# the machine


def _start(*arguments: object, **options: object) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "leanrec", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options)


def _one_line(process: subprocess.Popen) -> tuple[int, str]:
    _, err = process.communicate(timeout=120)
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return process.returncode, err


def test_interrupted_training_goes_on(data, tmp_path):
    command = ["train", data, "--model", "lr", "--epochs", "100000", "--patience", "100000", "--out", tmp_path / "lr"]
    process = _start(*command)
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert _one_line(process) == (130, "error: interrupted. The same command goes on where it stopped.\n")
    assert not (tmp_path / "lr").exists() and (tmp_path / "lr.partial").is_dir()

    again = _start(*command)
    lines = [again.stdout.readline() for _ in range(2)]
    again.send_signal(signal.SIGINT)
    assert _one_line(again)[0] == 130
    assert lines[0] == first  # what was done is told again from the checkpoint


def test_interrupted_prepare_starts_over(tmp_path):
    log = _write_csv(tmp_path / "clicks.csv", rows=_rows() * 2000)
    process = _start("prepare", log, "--out", tmp_path / "data")
    while not (tmp_path / "data.partial").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert _one_line(process) == (130, "error: interrupted. The same command starts over.\n")
    assert not (tmp_path / "data").exists()


def test_full_disk_is_told_in_a_sentence(refused, data, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("leanrec.runs.write_atomically", full)
    line = refused("train", data, "--model", "lr", "--epochs", "1")
    assert "the disk is full" in line and "settings.json" in line and "same command again" in line


@pytest.fixture
def full_disk(tmp_path):
    """Runs a command on a disk of so many KiB, mounted at `tmp_path / "disk"` for this command alone, and gives its one line."""
    disk = tmp_path / "disk"
    disk.mkdir()
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mounted = f"mount -t tmpfs -o size=%dk tmpfs {disk} && "
    probe = [*namespace, mounted % 64 + "true"]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here: no user namespaces")

    def refuse(size: int, *arguments: object) -> str:
        words = shlex.join([sys.executable, "-m", "leanrec", *map(str, arguments), "--out", str(disk / "out")])
        script = f"{mounted % size}{words}; code=$?; test ! -e {disk / 'out'} && exit $code"
        result = subprocess.run([*namespace, script], capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert result.returncode == 1, (result.stdout, result.stderr)
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
        return result.stderr

    return refuse


@pytest.mark.parametrize("verb", ["prepare", "train", "compress"])
def test_disk_that_is_full_halfway(full_disk, data, base, tmp_path, verb):
    log = _write_csv(tmp_path / "clicks.csv", rows=[[f"u{number}", f"i{number}", number, number % 2] for number in range(20_000)])
    commands = {
        "prepare": (256, "prepare", log),
        "train": (16, "train", data, "--model", "fm", "--set", "embedding_dim=64", "--epochs", "1"),
        "compress": (8, "compress", base, "--method", "Full()"),
    }
    assert "the disk is full" in full_disk(*commands[verb])
