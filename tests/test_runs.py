import hashlib
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from leanrec import runs

SETTINGS = {"data": Path("data/frappe"), "epochs": 3, "hidden_units": (400, 400)}


def _finish(out, settings=SETTINGS, *, command="train"):
    with runs.create(out, command=command, settings=settings) as run:
        (run.folder / "model.txt").write_text("weights")
        run.results["quality"] = {"auc": 0.75}


def _interrupt(out, settings=SETTINGS, *, resumable=True):
    """A run that wrote a checkpoint and failed."""
    with pytest.raises(RuntimeError, match="power cut"), runs.create(out, command="train", settings=settings, resumable=resumable) as run:
        (run.folder / "checkpoint.txt").write_text("step 7")
        raise RuntimeError("power cut")


def _start_python(script, *arguments):
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def test_run_appears_whole_and_only_at_its_end(tmp_path):
    out = tmp_path / "runs" / "base"
    with runs.create(out, command="train", settings=SETTINGS) as run:
        (run.folder / "model.txt").write_text("weights")
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["base"]
    assert sorted(path.name for path in out.iterdir()) == ["model.txt", "run.json"]


def test_record_holds_what_decided_the_run_and_what_it_cost(tmp_path):
    _finish(tmp_path / "base")
    record = runs.load(tmp_path / "base")
    assert record["command"] == "train"
    assert record["settings"] == {"data": "data/frappe", "epochs": 3, "hidden_units": [400, 400]}
    assert record["quality"] == {"auc": 0.75}
    assert 0 <= record["seconds"] < 60
    assert 2**24 < record["peak_memory"] < 2**40
    assert {"python", "torch", "leanrec"} <= record["versions"].keys()
    assert f"{os.cpu_count()} cores" in record["machine"]
    assert record["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", record["commit"])


def test_missing_run_is_not_finished(tmp_path):
    assert not runs.is_finished(tmp_path / "base", command="train", settings=SETTINGS)


def test_same_command_and_settings_are_finished(tmp_path):
    _finish(tmp_path / "base")
    assert runs.is_finished(tmp_path / "base", command="train", settings=SETTINGS)
    reordered = dict(reversed(SETTINGS.items()))
    assert runs.is_finished(tmp_path / "base", command="train", settings=reordered)


def test_other_settings_are_an_error_that_names_each_of_them(tmp_path):
    _finish(tmp_path / "base")
    with pytest.raises(ValueError, match=r"other settings \(epochs: 3 there, 5 now, seed: None there, 1 now\)\. Choose another --out or delete it"):
        runs.is_finished(tmp_path / "base", command="train", settings={**SETTINGS, "epochs": 5, "seed": 1})


def test_setting_that_is_gone_is_another_setting(tmp_path):
    _finish(tmp_path / "base")
    with pytest.raises(ValueError, match="epochs: 3 there, None now"):
        runs.is_finished(tmp_path / "base", command="train", settings={key: value for key, value in SETTINGS.items() if key != "epochs"})


def test_result_of_another_command_is_an_error(tmp_path):
    _finish(tmp_path / "base", command="compress")
    with pytest.raises(ValueError, match="holds the result of `leanrec compress`"):
        runs.is_finished(tmp_path / "base", command="train", settings=SETTINGS)


def test_folder_of_the_user_is_never_taken_for_a_run(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match=r"exists and is not a run folder \(no run.json\)"):
        runs.is_finished(tmp_path / "photos", command="train", settings=SETTINGS)


def test_failed_run_leaves_only_its_partial_folder(tmp_path):
    _interrupt(tmp_path / "base")
    assert [path.name for path in tmp_path.iterdir()] == ["base.partial"]
    assert not runs.is_finished(tmp_path / "base", command="train", settings=SETTINGS)


@pytest.mark.parametrize(("written", "left"), [(False, []), (True, ["base.partial"])])
def test_refused_run_leaves_nothing_unless_there_is_work_to_keep(tmp_path, written, left):
    with pytest.raises(ValueError, match="out of reach"), runs.create(tmp_path / "base", command="train", settings=SETTINGS, resumable=True) as run:
        if written:
            (run.folder / "checkpoint.txt").write_text("step 7")
        raise ValueError("out of reach")
    assert [path.name for path in tmp_path.iterdir()] == left


def test_resumable_run_goes_on_from_what_was_left(tmp_path):
    _interrupt(tmp_path / "base")
    with runs.create(tmp_path / "base", command="train", settings=SETTINGS, resumable=True) as run:
        assert run.resumed
        assert (run.folder / "checkpoint.txt").read_text() == "step 7"
    assert runs.is_finished(tmp_path / "base", command="train", settings=SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("settings", [SETTINGS, {**SETTINGS, "epochs": 5}])
def test_run_that_cannot_resume_starts_afresh(tmp_path, settings):
    _interrupt(tmp_path / "base")
    with runs.create(tmp_path / "base", command="train", settings=settings, resumable=False) as run:
        assert not run.resumed
        assert not (run.folder / "checkpoint.txt").exists()


@pytest.mark.parametrize(
    ("settings", "command", "reason"),
    [
        ({**SETTINGS, "epochs": 5}, "train", "holds an interrupted run with other settings (epochs: 3 there, 5 now). Go on with those, delete it"),
        (SETTINGS, "compress", "holds an interrupted `leanrec train`. Delete it"),
    ],
)
def test_what_an_interrupted_run_left_is_not_lost_to_another(tmp_path, settings, command, reason):
    _interrupt(tmp_path / "base")
    with pytest.raises(ValueError) as error, runs.create(tmp_path / "base", command=command, settings=settings, resumable=True):
        pass
    assert str(error.value) == f"{tmp_path / 'base.partial'}: {reason}, or choose another --out."
    assert (tmp_path / "base.partial" / "checkpoint.txt").read_text() == "step 7"


@pytest.mark.parametrize("resumable", [True, False])
@pytest.mark.parametrize("name", ["chapter.txt", "settings.json"])
def test_a_folder_of_ones_own_in_the_place_of_a_partial_one_is_left_alone(tmp_path, name, resumable):
    (tmp_path / "base.partial" / "thesis").mkdir(parents=True)
    (tmp_path / "base.partial" / name).write_text("precious")
    with (
        pytest.raises(ValueError, match=r"base.partial: is in the way"),
        runs.create(tmp_path / "base", command="train", settings=SETTINGS, resumable=resumable),
    ):
        pass
    assert (tmp_path / "base.partial" / name).read_text() == "precious"


def test_first_run_is_not_resumed(tmp_path):
    with runs.create(tmp_path / "base", command="train", settings=SETTINGS, resumable=True) as run:
        assert not run.resumed


def test_kill_leaves_only_the_partial_folder_and_the_next_run_resumes(tmp_path):
    script = """
import sys, time
from pathlib import Path
from leanrec import runs
with runs.create(Path(sys.argv[1]), command="train", settings={"epochs": 3}, resumable=True) as run:
    runs.write_atomically(run.folder / "checkpoint.txt", "step 7")
    print("written", flush=True)
    time.sleep(60)
"""
    with _start_python(script, tmp_path / "base") as process:
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["base.partial"]
    with pytest.raises(ValueError, match="the run was interrupted; give the same command again"):
        runs.load(tmp_path / "base")
    with runs.create(tmp_path / "base", command="train", settings={"epochs": 3}, resumable=True) as run:
        assert run.resumed
        assert (run.folder / "checkpoint.txt").read_text() == "step 7"


def test_kill_before_the_last_rename_is_no_finished_run(tmp_path, monkeypatch):
    def cut(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", cut)
        with pytest.raises(KeyboardInterrupt):
            _finish(tmp_path / "base")
    assert not runs.is_finished(tmp_path / "base", command="train", settings=SETTINGS)
    _finish(tmp_path / "base")
    assert runs.is_finished(tmp_path / "base", command="train", settings=SETTINGS)


def test_load_of_no_run_says_what_to_give(tmp_path):
    with pytest.raises(ValueError, match=r"no finished run here \(run.json not found\); give a folder that a leanrec command wrote"):
        runs.load(tmp_path / "base")


def test_damaged_record_is_named(tmp_path):
    _finish(tmp_path / "base")
    (tmp_path / "base" / "run.json").write_text('{"command": "tr')
    with pytest.raises(ValueError, match=r"base/run\.json: not JSON"):
        runs.load(tmp_path / "base")


@pytest.mark.parametrize("text", ["[]", "{}", "5", "null", '{"command": "train", "settings": []}', '{"command": 1, "settings": {}}'])
def test_json_that_is_no_record_is_named(tmp_path, text):
    _finish(tmp_path / "base")
    (tmp_path / "base" / "run.json").write_text(text)
    for read in (runs.load, partial(runs.is_finished, command="train", settings=SETTINGS)):
        with pytest.raises(ValueError, match=r"base/run\.json: not the record of a run") as error:
            read(tmp_path / "base")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000], ids=["no text", "nested"])
def test_a_record_that_cannot_be_read_is_named(tmp_path, content):
    _finish(tmp_path / "base")
    (tmp_path / "base" / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"base/run\.json: not JSON"):
        runs.load(tmp_path / "base")


def test_failed_write_keeps_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "progress.json"
    runs.write_atomically(path, "old")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        runs.write_atomically(path, "new")
    assert path.read_text() == "old"


def test_reader_sees_the_old_text_or_the_new_whole_even_across_a_kill(tmp_path):
    script = """
import sys
from pathlib import Path
from leanrec import runs
while True:
    for letter in "ab":
        runs.write_atomically(Path(sys.argv[1]), letter * 1_000_000)
        print(letter, flush=True)
"""
    path = tmp_path / "text"
    with _start_python(script, path) as process:
        for _ in range(4):
            process.stdout.readline()
            text = path.read_text()
            assert text in ("a" * 1_000_000, "b" * 1_000_000)
        process.send_signal(signal.SIGKILL)
    assert path.read_text() in ("a" * 1_000_000, "b" * 1_000_000)


def test_reader_that_opened_the_old_text_keeps_it(tmp_path):
    path = tmp_path / "text"
    runs.write_atomically(path, "old")
    with path.open() as reader:
        runs.write_atomically(path, "new text")
        assert reader.read() == "old"
    assert path.read_text() == "new text"


def test_replace_moves_a_finished_file_into_its_place(tmp_path):
    (tmp_path / "model.tmp").write_bytes(b"new")
    (tmp_path / "model").write_bytes(b"old")
    runs.replace(tmp_path / "model.tmp", tmp_path / "model")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"model": b"new"}


def test_fingerprint_is_of_names_sizes_and_all_bytes(tmp_path):
    big = bytes(range(256)) * 20_000  # 5 MB: more than one read
    (tmp_path / "a.csv").write_bytes(big)
    (tmp_path / "b.csv").write_bytes(b"x")
    expected = hashlib.sha256(b"a.csv\x005120000\x00" + big + b"b.csv\x001\x00x").hexdigest()
    assert runs.fingerprint([tmp_path / "a.csv", tmp_path / "b.csv"]) == expected


def test_fingerprint_sees_a_changed_byte_a_changed_name_and_a_moved_border(tmp_path):
    def fingerprint_of(**contents):
        for name, content in contents.items():
            (tmp_path / name).write_text(content)
        return runs.fingerprint([tmp_path / name for name in contents])

    variants = [{"a": "12", "b": "3"}, {"a": "12", "b": "4"}, {"a": "1", "b": "23"}, {"a": "12", "c": "3"}, {"a": "12"}]
    assert len({fingerprint_of(**variant) for variant in variants}) == len(variants)


def test_fingerprint_does_not_depend_on_the_folder(tmp_path):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "log.csv").write_text("1,2\n")
    assert runs.fingerprint([tmp_path / "here" / "log.csv"]) == runs.fingerprint([tmp_path / "there" / "log.csv"])
