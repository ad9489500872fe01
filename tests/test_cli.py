"""The command line: what it parses, which values reach the functions, and what it prints."""

import inspect
import json
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import typer

from leanrec.cli import run
from leanrec.cli.commands import app
from leanrec.cli.display import Log, show_training
from leanrec.cli.values import methods_from, settings_from, shape_from
from leanrec.data.prepare import prepare
from leanrec.methods import METHODS
from leanrec.train import Progress, TrainSettings
from leanrec.tune import TEACHER_SHARE, TUNING

COMMANDS = {command.callback.__name__: command for command in app.registered_commands}
PROJECT = Path(__file__).parents[1]
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
MECHANICAL_SETTINGS = {"keep_initial", "checkpoint_steps"}  # no user's choice: what tuning does, and how often a run is kept


def _done(capsys, *arguments: str) -> str:
    """What a command prints that ends well and says nothing on stderr."""
    code = run(arguments)
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def _parse(line: str) -> None:
    """Parse a command line as the shell and the program would, and do nothing."""
    name, *arguments = shlex.split(line.replace("\\\n", " "), comments=True)[1:]
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, arguments)


def _examples(name: str) -> list[str]:
    return [line.strip() for line in COMMANDS[name].epilog.splitlines() if line.strip().startswith("leanrec ")]


def _command_lines(page: Path) -> list[str]:
    """The lines of a page's shell blocks that begin with `leanrec`, those that go on with a backslash joined."""
    blocks = re.findall(r"^```(?:bash|sh|console|text)?\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.removeprefix("$ ") for line in lines if re.match(r"(\$ )?leanrec [a-z]", line)]


@pytest.fixture(scope="module")
def base(small_log, tmp_path_factory) -> Path:
    """A small trained run."""
    out = tmp_path_factory.mktemp("runs") / "base"
    assert run(["train", str(small_log), "--model", "fm", "--set", "embedding_dim=8", "--epochs", "2", "--batch-size", "512", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_the_command_accepts(name, capsys):
    help_page = _done(capsys, name, "--help")
    assert _examples(name)
    for example in _examples(name):
        assert example in help_page
        assert example.split()[:2] == ["leanrec", name]
        _parse(example)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_of_the_pages_are_accepted(page):
    for line in _command_lines(page):
        _parse(line)


def test_no_command_prints_the_help(capsys):
    assert _done(capsys) == _done(capsys, "--help")


def test_version_is_that_of_the_package(capsys):
    assert re.fullmatch(r"leanrec \d+\.\d+\.\d+\n", _done(capsys, "--version"))


def test_training_options_are_the_settings_with_their_defaults():
    options = inspect.signature(COMMANDS["train"].callback).parameters
    for setting in fields(TrainSettings):
        if setting.name not in MECHANICAL_SETTINGS:
            assert options[setting.name].default == setting.default, setting.name


def test_tuning_options_name_the_defaults_of_the_library(capsys):
    text = " ".join(_done(capsys, "compress", "--help").split())
    assert f"0 for none. [default: {TUNING.epochs}]" in text
    assert f"Of the fine-tuning. [default: {TUNING.learning_rate}]" in text
    assert f"have in its labels. [default: {TEACHER_SHARE}]" in text


def test_setting_is_a_literal_or_a_word():
    texts = ["embedding_dim=16", "hidden_units=[400, 400]", "structure=stacked", "dropout=0.5", "layer_norm=true", "name='a b'"]
    expected = {"embedding_dim": 16, "hidden_units": [400, 400], "structure": "stacked", "dropout": 0.5, "layer_norm": True, "name": "a b"}
    assert settings_from(texts) == expected


@pytest.mark.parametrize("text", ["embedding_dim", "=3", "hidden_units=[400,", "a b=3", "x=__import__('os')", "x=2x"])
def test_setting_that_is_no_pair_or_no_literal_is_refused(text):
    with pytest.raises(typer.BadParameter, match="--set"):
        settings_from([text])


def test_one_method_is_for_all_tables_and_patterns_keep_their_order():
    assert methods_from(["PQ(num_subspaces=8)"]) == "PQ(num_subspaces=8)"
    assert methods_from(["*.item=PQ(num_subspaces=8)", "*.user = None"]) == {"*.item": "PQ(num_subspaces=8)", "*.user": None}
    assert list(methods_from(["*.b=PQ()", "*=Full()"])) == ["*.b", "*"]
    assert methods_from(["*=Full()"]) == {"*": "Full()"}


def test_several_methods_without_patterns_are_refused():
    with pytest.raises(typer.BadParameter, match=r"'PQ\(\)'.*each needs its tables"):
        methods_from(["*.item=Full()", "PQ()"])


def test_shape_is_rows_by_dimension():
    assert shape_from("1000000x32") == shape_from("1_000_000x32") == shape_from("1,000,000X32") == (1_000_000, 32)
    for wrong in ("1000", "0x8", "8x0", "8 by 8"):
        with pytest.raises(typer.BadParameter, match="ROWSxDIMENSION"):
            shape_from(wrong)


def test_log_tells_every_tenth_of_the_work_once(capsys):
    log = Log(seconds=0)
    for done in range(1, 201):
        log.work("table user", done, 200)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "table user: 1 of 200 (0%)"
    assert lines[1:] == [f"table user: {20 * tenth} of 200 ({tenth}0%)" for tenth in range(1, 11)]


def test_log_tells_every_million_of_rows_that_nobody_counted(capsys):
    log = Log(seconds=0)
    for done in range(400_000, 2_400_000, 400_000):
        log.work("reading", done)
    assert capsys.readouterr().out.splitlines() == ["reading: 400,000", "reading: 1,200,000", "reading: 2,000,000"]


def test_log_is_silent_on_short_work(capsys):
    log = Log(seconds=60)
    log.work("reading", 1_000_000)
    assert capsys.readouterr().out == ""


def test_every_evaluation_is_told_once(small_log, capsys):
    on_step = show_training(Log(seconds=60), lambda: small_log, batch_size=512, epochs=3)
    history = [{"epoch": 0, "step": 0, "loss": 0.0, "auc": 0.5, "logloss": 0.7}, {"epoch": 0, "step": 12, "loss": 0.6, "auc": 0.75, "logloss": 0.5}]
    history.append({"epoch": 0, "step": 24, "loss": 0.5, "auc": 0.76, "logloss": 0.5, "gain_error": 0.0031, "share": 0.25})
    history.append({"epoch": 0, "step": 36, "loss": 0.5, "auc": 0.77, "logloss": 0.4, "gain_error": 0.003, "table_share": 1.0})
    for entries in (history[:1], history[:1], history):
        on_step(Progress(history=entries))
    assert capsys.readouterr().out.splitlines() == [
        "before tuning: validation AUC 0.50000, log loss 0.70000",
        "epoch 1, step 12: training loss 0.60000, validation AUC 0.75000, log loss 0.50000",
        "epoch 1, step 24: training loss 0.50000, validation AUC 0.76000 (gain ±0.00310), log loss 0.50000, 0.25 of the way",
        "epoch 1, step 36: training loss 0.50000, validation AUC 0.77000 (gain ±0.00300), log loss 0.40000, the tables alone",
    ]


def test_bar_knows_the_batches_of_an_epoch(small_log):
    shown = []

    class Recorder:
        def line(self, text):
            raise AssertionError(text)

        def work(self, description, done, total=None):
            shown.append((description, done, total))

    show_training(Recorder(), lambda: small_log, batch_size=512, epochs=3)(Progress(epoch=1, batch=5))
    assert shown == [("epoch 2 of at most 3", 5, 12)]  # 6,000 rows in batches of 512


def test_prepare_prints_what_it_inferred(tmp_path, capsys):
    rows = [f"u{number % 7},i{number % 11},{number / 8},{number % 2}" for number in range(200)]
    (tmp_path / "clicks.csv").write_text("\n".join(["user,item,price,label", *rows]) + "\n")
    out = _done(capsys, "prepare", str(tmp_path / "clicks.csv"), "--out", str(tmp_path / "data"))
    record = json.loads((tmp_path / "data" / "run.json").read_text())
    words = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert words["user"][1] == "categorical" and words["price"][1] == "numeric" and words["label"][1] == "label"
    assert words["user"][-1] == "9"  # 7 users, padding and unknown
    assert f"train {record['rows']['train']}" in out


@pytest.fixture
def passed(monkeypatch, capsys):
    """Runs a command line up to the public function, and gives what the function was called with, callbacks left out."""

    def call(function: str, line: str) -> tuple:
        calls = []

        def record(*arguments, **options):
            calls.append((*arguments, {name: value for name, value in options.items() if not callable(value)}))
            raise ValueError("recorded")

        monkeypatch.setattr(function, record)
        assert run(shlex.split(line)) == 1
        assert capsys.readouterr().err == "error: recorded\n"
        return calls[0]

    return call


def test_prepare_passes_every_option_on(passed):
    line = (
        "prepare a.csv b.csv --out data --valid v.csv --test t.csv --config c.toml --format csv --delimiter ; --no-header --columns x,y "
        "--kind x=label --kind y=numeric --min-count 3 --min-count y=4 --max-length 7 --numeric log-bucket --split 0.7,0.2,0.1 --split-by y "
        "--seed 5 --on-bad-row skip"
    )
    inputs, out, options = passed("leanrec.data.prepare.prepare", line)
    assert (inputs, out) == (["a.csv", "b.csv"], Path("data"))
    assert options == {
        "valid": ["v.csv"],
        "test": ["t.csv"],
        "config": Path("c.toml"),
        "format": "csv",
        "delimiter": ";",
        "header": False,
        "columns": "x,y",
        "kinds": ["x=label", "y=numeric"],
        "min_count": ["3", "y=4"],
        "max_length": 7,
        "numeric": "log-bucket",
        "split": "0.7,0.2,0.1",
        "split_by": "y",
        "seed": 5,
        "on_bad_row": "skip",
    }
    assert options.keys() == inspect.signature(prepare).parameters.keys() - {"inputs", "out", "progress"}


def test_train_passes_every_option_on(passed):
    line = (
        "train data --out run --model fm --set embedding_dim=3 --tables other --method PQ() --ratio 4 --nbytes 5 --epochs 2 --batch-size 3 "
        "--learning-rate 0.4 --table-learning-rate 0.5 --l2 0.6 --evaluations-per-epoch 7 --patience 8 --learning-rate-decay 0.9 --seed 10"
    )
    data, out, options = passed("leanrec.train.train_run", line)
    assert (data, out) == (Path("data"), Path("run"))
    settings = TrainSettings(
        epochs=2,
        batch_size=3,
        learning_rate=0.4,
        table_learning_rate=0.5,
        l2=0.6,
        evaluations_per_epoch=7,
        patience=8,
        learning_rate_decay=0.9,
        seed=10,
    )
    small = {"method": "PQ()", "ratio": 4.0, "nbytes": 5}
    assert options == {"model": "fm", "model_settings": {"embedding_dim": 3}, "settings": settings, "tables": Path("other"), **small}


def test_compress_passes_every_option_on(passed):
    line = "compress base --out run --method PQ() --ratio 4 --nbytes 5 --max-auc-drop 0.01 --dense-ratio 3"
    line += " --tune-epochs 6 --tune-learning-rate 0.7 --tune-teacher-share 0.1 --seed 8"
    run_folder, out, options = passed("leanrec.tune.compress_run", line)
    assert (run_folder, out) == (Path("base"), Path("run"))
    tuning = replace(TUNING, epochs=6, learning_rate=0.7)
    assert options == {
        "method": "PQ()",
        "ratio": 4.0,
        "nbytes": 5,
        "max_auc_drop": 0.01,
        "dense_ratio": 3.0,
        "tuning": tuning,
        "teacher_share": 0.1,
        "seed": 8,
    }


def test_compress_without_epochs_of_tuning_does_not_tune(passed):
    _, _, options = passed("leanrec.tune.compress_run", "compress base --out run --tune-epochs 0")
    assert options == {
        "method": "VRQ()",
        "ratio": None,
        "nbytes": None,
        "max_auc_drop": None,
        "dense_ratio": None,
        "tuning": None,
        "teacher_share": None,
        "seed": 0,
    }


def test_settings_of_a_fine_tuning_that_is_left_out_are_refused(base, tmp_path, capsys):
    for option, code, said in (
        ("--tune-learning-rate 0.1", 2, "--tune-epochs 0 is no fine-tuning"),
        ("--tune-teacher-share 0.3", 1, "there is none"),
    ):
        assert run(f"compress {base} --out {tmp_path / 'small'} --tune-epochs 0 {option}".split()) == code
        assert said in " ".join(capsys.readouterr().err.split())


def test_evaluate_passes_every_option_on(passed):
    run_folder, options = passed(
        "leanrec.evaluate.evaluate_run", "evaluate base --against full --split valid --popularity item --out result --seed 3"
    )
    assert run_folder == Path("base")
    assert options == {"out": Path("result"), "against": Path("full"), "split": "valid", "popularity": "item", "seed": 3}


def test_bench_passes_every_option_on(passed):
    experiments, options = passed("leanrec.bench.bench", "bench a.toml b.toml --logs logs --out here --jobs 3")
    assert experiments == [Path("a.toml"), Path("b.toml")]
    assert options == {"logs": Path("logs"), "results": Path("here/results"), "work": Path("here/work"), "num_jobs": 3}


def test_demo_passes_every_option_on(passed):
    assert passed("leanrec.demo.demo", "demo --out here --seed 4") == (Path("here"), {"seed": 4})


def test_train_prints_what_the_run_keeps(base, small_log, capsys):
    record = json.loads((base / "run.json").read_text())
    same = ["train", str(small_log), "--model", "fm", "--set", "embedding_dim=8", "--epochs", "2", "--batch-size", "512", "--out", str(base)]
    written = (base / "model.safetensors").stat().st_mtime_ns
    out = _done(capsys, *same)
    assert (base / "model.safetensors").stat().st_mtime_ns == written  # a finished run is not repeated
    best = max(record["history"], key=lambda entry: entry["auc"])["step"]
    assert f"validation AUC {record['valid']['auc']:.5f}" in out and f": the best, after {best:,} of {record['steps']:,} steps" in out
    assert record["settings"]["model_settings"] == {"embedding_dim": 8}


def test_train_tells_every_evaluation(small_log, tmp_path, capsys):
    out = _done(capsys, "train", str(small_log), "--model", "lr", "--epochs", "3", "--patience", "9", "--out", str(tmp_path / "lr"))
    history = json.loads((tmp_path / "lr" / "run.json").read_text())["history"]
    assert len(history) == 3
    for entry in history:
        assert f"validation AUC {entry['auc']:.5f}" in out


def test_compress_prints_bytes_and_quality(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("leanrec.tune.TUNING", replace(TUNING, batch_size=256, patience=32))  # more than the two steps an epoch of 4,096 rows
    options = ["--method", "PQ(num_subspaces=2, num_centroids=16)", "--tune-epochs", "4", "--tune-learning-rate", "0.003"]
    out = _done(capsys, "compress", str(base), *options, "--out", str(tmp_path / "pq"))
    record = json.loads((tmp_path / "pq" / "run.json").read_text())
    assert f"{record['report']['tables']:,}" in out
    assert f"validation AUC {record['valid']['auc']:.5f} (before tuning {record['valid']['auc_untuned']:.5f})" in out
    assert record["tuning"]["kept"] > 0
    assert "gained nothing" not in out


def test_compress_says_where_the_fine_tuning_was_in_vain(base, tmp_path, capsys):
    options = ["--method", "Scalar()", "--tune-epochs", "1", "--tune-learning-rate", "1e-9"]
    out = _done(capsys, "compress", str(base), *options, "--out", str(tmp_path / "small"))
    assert "The fine-tuning gained nothing, or no more than chance can" in out
    tuning = json.loads((tmp_path / "small" / "run.json").read_text())["tuning"]
    assert tuning["kept"] == 0
    assert tuning["steps"] > 0


def test_compress_shows_what_it_measures(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("leanrec.cli.commands.display", lambda: nullcontext(Log(seconds=0)))
    out = _done(capsys, "compress", str(base), "--ratio", "4", "--tune-epochs", "0", "--out", str(tmp_path / "small"))
    starts = [line.partition(":")[0] for line in out.splitlines()]
    assert starts[0] == "sensitivity of the tables"
    assert {"sizes of table embedding.tables.user", "table embedding.tables.user"} <= set(starts)


def test_compress_takes_a_method_per_table(base, tmp_path, capsys):
    methods = ["--method", "*item=PQ(num_subspaces=2)", "--method", "*=None"]
    _done(capsys, "compress", str(base), *methods, "--tune-epochs", "0", "--out", str(tmp_path / "mixed"))
    record = json.loads((tmp_path / "mixed" / "run.json").read_text())
    compressed = {path for path, method in record["methods"].items() if method is not None}
    assert compressed == {path for path in record["methods"] if path.endswith("item")}
    assert record["tuning"] is None


def test_compress_reaches_a_ratio(base, tmp_path, capsys):
    _done(capsys, "compress", str(base), "--method", "PQ()", "--ratio", "4", "--tune-epochs", "0", "--out", str(tmp_path / "small"))
    assert json.loads((tmp_path / "small" / "run.json").read_text())["report"]["ratio"] >= 4


def test_compress_tells_every_size_it_tried_and_what_one_step_further_would_have_cost(base, tmp_path, capsys):
    out = _done(
        capsys, "compress", str(base), "--method", "Hash()", "--max-auc-drop", "0.02", "--tune-epochs", "0", "--out", str(tmp_path / "smallest")
    )
    record = json.loads((tmp_path / "smallest" / "run.json").read_text())
    for trial in record["trials"]:
        place = "within" if trial["auc_drop"] <= 0.02 else "beyond"
        assert f"ratio {trial['ratio']:.1f}: validation AUC {trial['auc']:.5f}, a drop of {trial['auc_drop']:.5f}: {place} 0.02\n" in out
    kept, beyond = record["kept"], record["beyond"]
    assert 20 <= kept["ratio"] < beyond["ratio"] <= 40
    assert f"ratio {kept['ratio']:.1f} drops {kept['auc_drop']:.5f} of the validation AUC; one step further, {beyond['ratio']:.1f} would" in out


def test_evaluate_prints_a_table_or_json(base, capsys):
    table = _done(capsys, "evaluate", str(base), "--against", str(base))
    values = json.loads(_done(capsys, "evaluate", str(base), "--against", str(base), "--json"))
    assert f"{values['evaluation']['auc']:.5f}" in table
    assert values["comparison"]["auc"]["difference"] == 0.0
    assert json.loads(_done(capsys, "evaluate", str(base), "--json"))["comparison"] is None


def test_report_counts_the_bytes_of_the_tables(base, capsys):
    values = json.loads(_done(capsys, "report", str(base), "--json"))
    assert f"{values['tables']:,}" in _done(capsys, "report", str(base))
    assert values["tables"] == (202 + 102 + 12) * 8 * 4  # float32 vectors of the three vocabularies


def test_methods_lists_every_method_with_its_bytes(capsys):
    out = _done(capsys, "methods", "--shape", "1000x16")
    assert "64,000 bytes as float32" in out
    for method in METHODS.values():
        assert repr(method()) in out
        assert f"{method().nbytes(1000, 16):,} bytes" in out
        assert method.knob in out


def test_methods_of_an_odd_dimension_say_what_does_not_fit(capsys):
    assert "does not fit as it stands" in _done(capsys, "methods", "--shape", "1000x7")


def test_threads_are_those_that_were_asked_for(small_log, tmp_path):
    before = torch.get_num_threads()
    try:
        assert run(["train", str(small_log), "--model", "lr", "--epochs", "1", "--threads", "2", "--out", str(tmp_path / "lr")]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_own_model_is_found_where_the_command_is_given(small_log, tmp_path):
    source = "from leanrec.models.fm import FM\n\ndef build(schema, embedding_dim=4):\n    return FM(schema, embedding_dim=embedding_dim)\n"
    (tmp_path / "my_models.py").write_text(source)
    # As an installed script, which does not look for modules in the current folder by itself.
    script = "import sys; sys.path.remove(''); from leanrec.cli import main; main()"
    command = [sys.executable, "-c", script, "train", str(small_log), "--model", "my_models:build", "--epochs", "1", "--out", "mine"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "mine" / "run.json").is_file()


def test_reader_that_goes_away_is_no_error():
    script = "import sys; from leanrec.cli import run; sys.exit(run(['methods']))"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(script)} | head -n 1"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert len(result.stdout.splitlines()) == 1
    assert result.stderr == ""


def test_bench_writes_the_table_of_the_results(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    out = _done(capsys, "bench", "--out", str(tmp_path), "--table")
    assert out == f"written: {tmp_path / 'README.md'}\nwritten: {tmp_path / 'METHODS.md'}\n"
    assert (tmp_path / "README.md").read_text().startswith("# Benchmarks")
