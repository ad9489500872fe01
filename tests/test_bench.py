import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from sklearn.metrics import roc_auc_score

import leanrec
import leanrec.bench.run
from leanrec import runs
from leanrec.bench import Experiment, bench, cells, read_results, write_plots, write_readme
from leanrec.bench.methods_page import methods_page
from leanrec.bench.run import opponent
from leanrec.bench.table import core_hours, difference, readme
from leanrec.data.loader import Loader
from leanrec.methods import METHODS
from leanrec.recommender import open_run, predict
from leanrec.train import Teacher, TrainSettings, train_recommender, train_run
from leanrec.tune import TUNING, compress_run

REPOSITORY = Path(__file__).parents[1]
TOML = """
dataset = "small"
embedding_dim = 8
seeds = [0, 1]
methods = ["PQ()"]
ratios = [20]
restarted = ["PQ()"]
scratch = ["Hash()", "LowRank()"]
settings = ["Scalar(num_bits=8)"]
small_dims = [2]
small_methods = ["Scalar(num_bits=8)"]
dense_ratios = [1.2]
tuned_full = true
[model]
hidden_units = [8]
[train]
epochs = 1
batch_size = 500
[tuning]
epochs = 1
"""


@pytest.fixture(scope="module")
def suite(small_log, tmp_path_factory):
    """A benchmark of two seeds on a small log, run once; its work folder already holds the prepared log."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "experiments" / "tiny").mkdir(parents=True)
    toml = folder / "experiments" / "tiny" / "small.toml"
    toml.write_text(TOML)
    (folder / "logs").mkdir()
    (folder / "logs" / "small").symlink_to(raw_log(small_log, folder / "raw"))
    run(folder)
    return folder


def raw_log(prepared: Path, folder: Path) -> Path:
    """The splits of a prepared log as the single files of a raw one."""
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}.parquet").write_bytes((prepared / split / "part-00000.parquet").read_bytes())
    return folder


def run(folder: Path, seen=None):
    experiments = sorted((folder / "experiments" / "tiny").glob("*.toml"))
    arguments = {"logs": folder / "logs", "results": folder / "results", "work": folder / "work"}
    return bench(experiments, **arguments, on_result=lambda *state: seen.append(state) if seen is not None else None)


def test_every_combination_of_an_experiment_is_one_result_with_the_keys_of_a_run(suite):
    results = read_results(suite / "results" / "tiny")
    assert len(results) == 2 * 10
    assert {result["run"]["family"] for result in results} == {"Full", "Tuned", "Smaller", "Dense", "Restarted", "Scalar", "PQ", "Hash", "LowRank"}
    for result in results:
        assert {"run", "quality", "size", "seconds", "peak_memory", "speed", "machine", "versions", "commit", "settings"} <= result.keys()
        assert {"dataset", "backbone", "method", "family", "embedding_dim", "seed"} <= result["run"].keys()
        assert {"auc", "logloss", "calibration", "auc_diff", "auc_diff_low", "auc_diff_high"} == result["quality"].keys()
        assert {"tables", "tables_full", "model", "model_full", "file", "vocabulary", "opponent"} == result["size"].keys()
        assert {"pretrain", "fit", "tune", "evaluate"} == result["seconds"].keys()
        assert result["quality"]["auc_diff_low"] <= result["quality"]["auc_diff"] <= result["quality"]["auc_diff_high"]


def test_differences_are_to_the_full_model_of_the_same_seed(suite):
    results = read_results(suite / "results" / "tiny")
    full = {result["run"]["seed"]: result["quality"]["auc"] for result in results if result["run"]["family"] == "Full"}
    for result in results:
        assert result["quality"]["auc"] - full[result["run"]["seed"]] == pytest.approx(result["quality"]["auc_diff"], abs=1e-9)


def test_the_tuned_full_model_is_the_full_model_after_the_fine_tuning(suite):
    for result in (result for result in read_results(suite / "results" / "tiny") if result["run"]["family"] == "Tuned"):
        run = open_run(next((suite / "work" / "runs").glob(f"*-d8-seed{result['run']['seed']}-*")))
        settings = replace(TUNING, epochs=1, seed=result["run"]["seed"])
        teacher = Teacher(copy.deepcopy(run.model), 0.5)
        assert train_recommender(run, settings, teacher=teacher).history == result["tuning"]
        labels, logits = predict(run.model, Loader(run.data, "test", run.schema, batch_size=4096))
        assert roc_auc_score(labels, logits) == pytest.approx(result["quality"]["auc"], abs=1e-6)
        assert result["size"]["tables"] == result["size"]["tables_full"]


def test_a_restarted_model_is_a_new_one_trained_with_fitted_tables(suite, tmp_path):
    results = [result for result in read_results(suite / "results" / "tiny") if result["run"]["family"] == "Restarted"]
    assert len(results) == 2
    for result in results:
        seed = result["run"]["seed"]
        full = next((suite / "work" / "runs").glob(f"*-d8-seed{seed}-*"))
        compress_run(full, tmp_path / f"fitted{seed}", method="PQ()", ratio=20, tuning=None, seed=seed)
        settings = TrainSettings(epochs=1, batch_size=500, seed=seed)
        model = {"hidden_units": [8], "embedding_dim": 8}
        train_run(suite / "work/data/small", tmp_path / f"new{seed}", model_settings=model, settings=settings, tables=tmp_path / f"fitted{seed}")
        new = open_run(tmp_path / f"new{seed}")
        labels, logits = predict(new.model, Loader(new.data, "test", new.schema, batch_size=4096))
        assert roc_auc_score(labels, logits) == pytest.approx(result["quality"]["auc"], abs=1e-6)
    alone = tmp_path / "results" / "tiny"
    alone.mkdir(parents=True)
    for kind in ("Full-d8", "PQ-restarted"):
        for path in (suite / "results" / "tiny").glob(f"small-deepfm-{kind}*"):
            shutil.copy(path, alone)
    page = readme(tmp_path)
    assert "`PQ() at 20x in a new model`" in page
    assert "teacher's share 0" not in page
    assert "teacher's share 0.5" in readme(suite)


def test_the_ratio_is_met_and_the_opponent_is_the_smallest_plain_model_that_is_as_good(suite):
    results = read_results(suite / "results" / "tiny")
    for result in (result for result in results if result["run"]["family"] == "PQ"):
        assert result["size"]["tables"] <= result["size"]["tables_full"] / 20
        plain = [
            other for other in results if other["run"]["family"] in ("Full", "Smaller", "Scalar") and other["run"]["seed"] == result["run"]["seed"]
        ]
        as_good = [other["size"]["tables"] for other in plain if other["quality"]["auc"] >= result["quality"]["auc"]]
        assert result["size"]["opponent"] == min(as_good, default=None)


def test_the_page_looks_for_the_opponent_among_all_results_that_there_are_now(suite, tmp_path):
    shutil.copytree(suite / "results" / "tiny", tmp_path / "results" / "tiny")
    row = next(line for line in readme(tmp_path).splitlines() if "`PQ() at 20x`" in line)
    assert not row.endswith(" 1,234 |")
    (tmp_path / "results" / "other").mkdir()
    for path in (tmp_path / "results" / "tiny").glob("*Full-d8-*.json"):
        later = json.loads(path.read_text())
        later["size"]["tables"], later["quality"]["auc"] = 1234, 0.99
        (tmp_path / "results" / "other" / path.name).write_text(json.dumps(later))
    assert next(line for line in readme(tmp_path).splitlines() if "`PQ() at 20x`" in line).endswith(" 1,234 |")


def test_smaller_models_of_earlier_results_are_not_taken_for_the_method_of_that_name(tmp_path):
    earlier = {"run": {"family": "SmallDim", "method": "SmallDim(embedding_dim=4)", "embedding_dim": 4}}
    method = {"run": {"family": "SmallDim", "method": "SmallDim(small_dim=4)", "embedding_dim": 32}}
    for name, result in {"1.json": earlier, "2.json": method}.items():
        (tmp_path / name).write_text(json.dumps(result))
    assert read_results(tmp_path) == [{"run": {"family": "Smaller", "method": "Full()", "embedding_dim": 4}}, method]


def test_the_full_model_teaches_unless_the_experiment_says_otherwise(suite, tmp_path, monkeypatch):
    teachers = []

    def spy(recommender, settings, *, teacher=None, **others):
        teachers.append(teacher)
        return train_recommender(recommender, settings, teacher=teacher, **others)

    monkeypatch.setattr(leanrec.bench.run, "train_recommender", spy)
    (tmp_path / "tiny").mkdir()
    for name, share in (("taught", ""), ("alone", "teacher_share = 0.0\n")):
        toml = tmp_path / "tiny" / f"{name}.toml"
        toml.write_text(f'dataset = "small"\nseeds = [0]\nsettings = ["PQ()"]\n[train]\nepochs = 1\n[tuning]\nepochs = 1\n{share}')
        bench([toml], logs=suite / "logs", results=tmp_path / "results", work=suite / "work")
    assert all(f"; teacher's share {share}; " in readme(tmp_path) for share in ("0", "0.5"))
    taught, alone = teachers
    assert alone is None and taught.share == 0.5
    assert all(isinstance(table, torch.nn.Embedding | torch.nn.EmbeddingBag) for table in leanrec.tables(taught.model).values())


def test_the_log_is_prepared_as_the_experiment_says(suite, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "rare.toml").write_text('dataset = "small"\nseeds = [0]\n[prepare]\nmin_count = 20\n[train]\nepochs = 1\n')
    bench([tmp_path / "tiny" / "rare.toml"], logs=suite / "logs", results=tmp_path / "results", work=suite / "work")
    [result] = read_results(tmp_path / "results" / "tiny")
    whole = next(other for other in read_results(suite / "results" / "tiny") if other["run"]["family"] == "Full")
    assert result["settings"]["prepare"] == {"min_count": 20}
    assert result["size"]["vocabulary"] < whole["size"]["vocabulary"]


def test_opponents_are_models_of_the_same_test_rows(suite):
    plain = next(result for result in read_results(suite / "results" / "tiny") if result["run"]["family"] == "Full")
    poor = {**plain, "quality": {"auc": 0.0}}
    for options, expected in [({"min_count": 5}, plain["size"]["tables"]), ({"split_by": "time"}, None)]:
        assert opponent(poor, [{**plain, "settings": {"prepare": options}}]) == expected


def test_hours_count_a_training_once(suite):
    results = [result for result in read_results(suite / "results" / "tiny") if result["run"]["seed"] == 0]
    assert core_hours([results[0]] * 3) < 3 * core_hours(results[:1])
    whole, scratch = ([r for r in results if bool(r["run"]["from_scratch"]) == own] for own in (False, True))
    trained = {(r["run"]["embedding_dim"], r["seconds"]["pretrain"]) for r in whole}
    expected = sum(seconds for _, seconds in trained) + sum(r["seconds"]["pretrain"] for r in scratch)
    expected += sum(r["seconds"][part] for r in results for part in ("fit", "tune", "evaluate"))
    assert core_hours(results) == pytest.approx(expected / 3600)


def test_a_finished_run_is_skipped_and_a_missing_one_is_made_again(suite):
    paths = sorted((suite / "results" / "tiny").glob("*.json"))
    before = {path: path.read_text() for path in paths}
    missing = next(path for path in paths if "PQ" in path.name)
    missing.unlink()
    seen = []
    run(suite, seen)
    assert seen == [(missing.name, 20, 20)]
    after = {path: path.read_text() for path in sorted((suite / "results" / "tiny").glob("*.json"))}
    assert {path for path in before if before[path] == after[path]} >= set(before) - {missing}
    assert json.loads(after[missing])["quality"] == json.loads(before[missing])["quality"]


def test_the_page_has_a_row_for_each_method_and_size_and_a_picture(suite):
    pictures = write_plots(suite)
    text = write_readme(suite).read_text()
    assert [picture.name for picture in pictures] == ["tiny-small-deepfm.png"]
    assert all(picture.stat().st_size > 5000 for picture in pictures)
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1].split("(")[0] for row in rows] == [
        "Full",
        "Full",
        "Full",
        "Hash",
        "LowRank",
        "PQ",
        "PQ",
        "Scalar",
        "Full of dimension 2",
        "Scalar",
    ]
    assert any("`Hash() at 20x from scratch`" in row for row in rows)
    assert any("`PQ() at 20x in a new model`" in row for row in rows)
    assert rows[1].startswith("| `Full(), fine-tuned` | ")
    assert "pictures/tiny-small-deepfm.png" in text
    results = [result for result in read_results(suite / "results" / "tiny") if result["run"]["family"] == "PQ"]
    mean = sum(result["quality"]["auc"] for result in results) / 2
    assert f"{mean:.4f}" in next(row for row in rows if "PQ" in row)


def test_the_picture_shows_each_method_at_its_difference_with_its_interval(suite, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    write_plots(suite)
    drawn = next(each for each in figures[0].axes[0].containers if each.get_label() == "PQ")
    results = read_results(suite / "results" / "tiny")
    of_pq = [result for result in results if result["run"]["family"] == "PQ"]
    full = fmean(result["quality"]["auc"] for result in results if result["run"]["family"] == "Full")
    value, low, high = (full + float(text) for text in re.findall(r"[+-]\d+\.\d+", difference(of_pq)))
    assert drawn.lines[0].get_xydata()[0] == pytest.approx([fmean(result["size"]["tables"] for result in of_pq), value], abs=1e-4)
    assert drawn.lines[2][0].get_segments()[0][:, 1] == pytest.approx([low, high], abs=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('datasett = "x"', "unknown keys"),
        ("seeds = [0]", "no dataset"),
        ("dataset = [", "cannot be read"),
        ('dataset = "x"\nprepare = 3', "prepare = 3 must be dict"),
        ('dataset = "x"\nseeds = 3', "seeds = 3 must be a list of int"),
        ('dataset = "x"\nratios = ["10x"]', r"ratios = \['10x'\] must be a list of int | float"),
        ('dataset = "x"\nembedding_dim = "32"', "embedding_dim = '32' must be int"),
        ('dataset = "x"\nmethods = ["PQX()"]', "unknown method 'PQX'"),
        ('dataset = "x"\nsmall_methods = ["Scalar(bits=8)"]', "unknown argument 'bits'"),
        ('dataset = "x"\n[train]\nepochs = 0', r"\[train\] epochs=0 must be at least 1"),
        ('dataset = "x"\n[tuning]\nepochs = "two"', r"\[tuning\] '<' not supported between instances of 'str' and 'int'"),
        ('dataset = "x"\n[tuning]\nteacher_share = "half"', r"\[tuning\] '<=' not supported between instances of 'int' and 'str'"),
        ('dataset = "x"\n[tuning]\nteacher_share = 1.5', r"\[tuning\] teacher_share=1.5 must be from 0 to 1"),
        ('dataset = "x"\n[train]\nepoch = 3', r"\[train\] epoch is unknown. It takes .*'epochs'"),
        ('dataset = "x"\ntuning = 3', "tuning = 3 must be dict | bool"),
        ('dataset = "x"\n[tuning]\nteacher_shar = 0', r"\[tuning\] teacher_shar is unknown. It takes .*'teacher_share'"),
        ('dataset = "x"\n[prepare]\nmin_counts = 3', r"\[prepare\] min_counts is unknown. It takes .*'min_count'"),
    ],
)
def test_a_bad_experiment_is_one_line(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Experiment.load(path)
    assert str(path) in str(error.value)


def test_the_committed_page_is_what_the_committed_results_say():
    folder = REPOSITORY / "benchmarks"
    assert (folder / "README.md").read_text() == readme(folder), "run `leanrec bench --table`"
    assert (folder / "METHODS.md").read_text() == methods_page(folder), "run `leanrec bench --table`"


def test_committed_experiments_can_be_read_and_every_committed_result_belongs_to_one():
    folder = REPOSITORY / "benchmarks"
    expected = {(toml.parent.name, cell.file_name) for toml in (folder / "experiments").glob("*/*.toml") for cell in cells(Experiment.load(toml))}
    results = {(path.parent.name, path.name) for path in (folder / "results").glob("*/*.json")}
    assert results <= expected
    assert {cell.family for toml in (folder / "experiments").glob("*/*.toml") for cell in cells(Experiment.load(toml))} <= {
        *METHODS,
        "Tuned",
        "Smaller",
        "Dense",
        "Restarted",
    }


def test_a_method_that_cannot_become_so_small_becomes_as_small_as_it_can(suite):
    results = [result for result in read_results(suite / "results" / "tiny") if result["run"]["family"] == "LowRank"]
    assert {result["run"]["ratio"] for result in results} == {20}
    assert all(5 < result["size"]["tables_full"] / result["size"]["tables"] < 8 for result in results)  # rank 1 of 8 dimensions


def test_a_row_with_fewer_seeds_than_its_table_says_so(suite, tmp_path):
    (tmp_path / "results").mkdir()
    shutil.copytree(suite / "results" / "tiny", tmp_path / "results" / "tiny")
    next((tmp_path / "results" / "tiny").glob("*PQ-20x*seed1.json")).unlink()
    rows = [line for line in readme(tmp_path).splitlines() if "seeds" in line and line.startswith("| `")]
    assert [row.split("|")[1].strip() for row in rows] == ["`PQ() at 20x`, 1 of 2 seeds"]


def test_at_a_glance_the_default_method_stands_beside_the_full_model_and_the_best_of_the_others(suite, tmp_path):
    folder = tmp_path / "results" / "tiny"
    folder.mkdir(parents=True)
    full = json.loads(next((suite / "results" / "tiny").glob("*-Full-d8-*seed0.json")).read_text())

    def write(family, gain, *, ratio=None, width=1e-4, logloss=0.4, scratch=False, family_name=None):
        for seed in (0, 1):
            run = full["run"] | {"method": f"{family}()", "family": family_name or family, "ratio": ratio, "seed": seed, "from_scratch": scratch}
            quality = full["quality"] | {"auc": 0.7 + gain, "auc_diff": gain, "auc_diff_low": gain - width, "auc_diff_high": gain + width}
            result = full | {"run": run, "quality": quality | {"logloss": logloss}}
            (folder / f"{family_name or family}-{ratio}-{scratch}-{seed}.json").write_text(json.dumps(result))

    write("Full", 0.0)
    write("Full", 0.0012, family_name="Tuned")
    expected = {20: ("-0.0004", "+0.4%", "yes"), 40: ("-0.0006", "+0.0%", "no"), 80: ("+0.0000", "+0.6%", "no"), 160: ("+0.0010", "-1.0%", "no")}
    for (ratio, (gain, logloss, _)), width in zip(expected.items(), (1e-4, 1e-4, 1e-4, 0.005), strict=True):
        write("VRQ", float(gain), ratio=ratio, width=width, logloss=0.4 * (1 + float(logloss[:-1]) / 100))
        write("PQ", -0.002, ratio=ratio)
        write("RQ", {40: 0.0, 160: 0.002}.get(ratio, -0.003), ratio=ratio)
        write("CCE", 0.01, ratio=ratio, scratch=True)
    write("VRQ", 0.0, ratio=320)
    write("PQ", 0.0, ratio=320)
    rows = [line.split(" | ") for line in readme(tmp_path).splitlines() if line.startswith("| tiny | ")]
    assert [(row[6].split()[0], row[7], row[8]) for row in rows] == list(expected.values())
    assert [" ".join(row[9].split()[:2]) for row in rows] == ["`PQ()` -0.0020", "`RQ()` +0.0000", "`PQ()` -0.0020", "`RQ()` +0.0020"]
    assert [row[10] for row in rows] == ["none", "`RQ()`", "none", "none"]  # at 160x the interval of ours holds it
    assert all(row[11].startswith("+0.0012 [") for row in rows)


def test_a_difference_to_another_full_model_than_that_of_the_table_is_marked_and_all_machines_are_named(suite, tmp_path):
    (tmp_path / "results").mkdir()
    shutil.copytree(suite / "results" / "tiny", tmp_path / "results" / "tiny")
    assert "]‡" not in readme(tmp_path)
    path = next((tmp_path / "results" / "tiny").glob("*PQ-20x*seed1.json"))
    result = json.loads(path.read_text())
    result["quality"]["auc_diff"] += 0.0001
    path.write_text(json.dumps(result | {"machine": "an abacus"}))
    rows = [line for line in readme(tmp_path).splitlines() if "]‡" in line]
    assert [row.split("`")[1] for row in rows] == ["PQ() at 20x"]
    assert f"{' or '.join(sorted(['an abacus', runs.machine()]))}, " in readme(tmp_path)


def test_look_ups_of_codes_without_the_kernel_are_marked(suite, tmp_path):
    (tmp_path / "results").mkdir()
    shutil.copytree(suite / "results" / "tiny", tmp_path / "results" / "tiny")
    for built in (True, False):
        for path in (tmp_path / "results" / "tiny").glob("*.json"):
            result = json.loads(path.read_text())
            result["speed"]["kernel"] = built
            path.write_text(json.dumps(result))
        marked = {line.split("`")[1] for line in readme(tmp_path).splitlines() if line.startswith("| `") and "x†" in line}
        assert marked == (set() if built else {"PQ() at 20x", "PQ() at 20x in a new model", "Scalar()", "Scalar() of dimension 2"})
