import importlib.util
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from leanrec.data.vocabulary import vocabulary_path
from leanrec.demo import Demo, DemoSettings, demo, draw_clicks, run_demo
from leanrec.demo import run as demo_run
from leanrec.recommender import open_run
from leanrec.report import report

SMALL = DemoSettings(num_rows=20_000, num_users=3_000, num_items=2_000, seed=3)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def log():
    """The log that `leanrec demo` draws."""
    settings = DemoSettings()
    return draw_clicks(settings.num_rows, num_users=settings.num_users, num_items=settings.num_items, seed=settings.seed)


def run_small(folder: Path, progress=None) -> Demo:
    """A demo on a small log, with fewer and quicker fits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_run, "RATIO", 20)
        patch.setattr(demo_run, "KNOBS", {"Scalar": (8, 4), "PQ": (2, 1)})
        return run_demo(folder, SMALL, progress=progress)


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory) -> Demo:
    return run_small(tmp_path_factory.mktemp("small") / "demo")


def test_log_is_as_large_as_promised(log):
    num_ids = sum(log.rows[name].n_unique() for name in log.rows.columns if name != "click")
    assert log.rows.height >= 300_000 and num_ids >= 200_000
    assert log.rows.head(1)["user"][0].startswith("u")


@pytest.mark.parametrize("column", ["user", "item"])
def test_few_ids_have_most_of_the_rows_and_most_ids_have_few(log, column):
    counts = np.sort(log.rows[column].value_counts()["count"].to_numpy())[::-1]
    assert 0.35 < counts[: len(counts) // 100].sum() / log.rows.height < 0.65
    assert np.median(counts) <= 3
    # Zipf's law: the count falls as 1 / rank, so ten times the rank has about a tenth of the rows.
    assert 5 < counts[300:400].mean() / counts[3000:4000].mean() < 15


def test_clicks_follow_the_probabilities_that_the_log_tells(log):
    clicks = log.rows["click"].to_numpy()
    assert abs(clicks.mean() - log.probabilities.mean()) < 0.003  # six standard errors of a million draws
    assert 0.8 < roc_auc_score(clicks, log.probabilities) < 0.9


def test_users_disagree_about_categories(log):
    """Rows and columns of the table user x category taken out, the greater part of its variance is left: an interaction, not two biases."""
    logits = np.log(log.probabilities / (1 - log.probabilities))
    frame = log.rows.select("user", "category").with_columns(logit=pl.Series(logits))
    hot = {name: frame[name].value_counts(sort=True)[name].head(20).to_list() for name in ("user", "category")}
    frame = frame.filter(pl.col("user").is_in(hot["user"]), pl.col("category").is_in(hot["category"]))
    means = frame.group_by("user", "category").agg(pl.col("logit").mean()).pivot("category", index="user", values="logit").drop("user").to_numpy()
    means = means - np.nanmean(means)
    left = means - np.nanmean(means, axis=0) - np.nanmean(means, axis=1, keepdims=True)
    assert np.nanvar(left) > 0.5 * np.nanvar(means)


def test_same_seed_gives_the_same_bytes(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        draw_clicks(2_000, num_users=500, num_items=300, seed=seed).rows.write_csv(tmp_path / name)
    first, again, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == again != other


def test_demo_writes_all_it_names(small_demo):
    folder = small_demo.folder
    assert (folder / "quality_over_bytes.png").read_bytes().startswith(PNG)
    assert pl.read_csv(folder / "clicks.csv").shape == (20_000, 6)
    assert {path.name for path in (folder / "runs").iterdir()} >= {"base", "small", "untuned-pq-2", "untuned-scalar-8"}
    for path in ("quality_over_bytes.png", "demo.json"):
        assert str(folder / path) in str(small_demo)


def test_sizes_are_those_of_the_models_on_disk(small_demo):
    full, small = (report(open_run(small_demo.folder / "runs" / name).model) for name in ("base", "small"))
    assert (small_demo.size["tables"], small_demo.size["tables_full"]) == (small.tables, full.tables)
    assert (small_demo.size["model"], small_demo.size["model_full"]) == (small.model, full.model)
    assert f"{small.tables:,}" in str(small_demo) and f"{full.tables:,}" in str(small_demo)


def test_difference_is_that_of_the_two_models(small_demo):
    difference = small_demo.comparison.auc
    assert difference.difference == pytest.approx(small_demo.compressed.auc - small_demo.full.auc, abs=1e-12)
    assert difference.low <= difference.difference <= difference.high
    assert f"{difference.low:+.4f} to {difference.high:+.4f}" in str(small_demo)


def test_numbers_are_kept_as_json(small_demo):
    numbers = json.loads((small_demo.folder / "demo.json").read_text())
    assert numbers["settings"] == {"num_rows": 20_000, "num_users": 3_000, "num_items": 2_000, "seed": 3}
    assert numbers["compressed"]["auc"] == small_demo.compressed.auc
    assert [point["method"] for point in numbers["points"]] == ["Scalar", "Scalar", "PQ", "PQ", "VRQ"]
    assert numbers["ratio"] == pytest.approx(numbers["size"]["tables_full"] / numbers["size"]["tables"])


def test_rows_of_a_user_fall_into_all_splits(small_demo):
    """A log drawn from the very random numbers that split it would put all rows of a user into one split."""
    users = pl.read_csv(small_demo.folder / "clicks.csv")["user"].value_counts(sort=True).head(20)
    counts = pl.read_parquet(vocabulary_path(small_demo.folder / "data", "user")).select("value", "count")
    shares = users.join(counts, left_on="user", right_on="value").select(pl.col("count_right") / pl.col("count")).to_series()
    assert len(shares) == 20 and shares.is_between(0.6, 0.95).all()


def test_finished_demo_is_not_repeated(small_demo):
    files = {path: path.stat().st_mtime_ns for path in small_demo.folder.glob("**/*") if path.name in ("run.json", "clicks.csv", "model.safetensors")}
    lines: list[str] = []
    again = run_small(small_demo.folder, progress=lines.append)
    assert again == small_demo
    assert files and all(path.stat().st_mtime_ns == time for path, time in files.items())
    assert [line.split(":")[0] for line in lines] == ["draw", "prepare", "train", "compress", "picture", "picture", "evaluate"]


def test_folder_of_another_demo_is_refused(tmp_path):
    (tmp_path / "demo.json").write_text(json.dumps({"settings": {"seed": 0}}))
    with pytest.raises(ValueError, match="holds a demo with the settings"):
        demo(tmp_path, seed=1)


@pytest.mark.parametrize(("name", "text"), [("notes.txt", "mine"), ("demo.json", "[]"), ("demo.json", "no JSON")])
def test_folder_of_something_else_is_refused_and_left_alone(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"not a (folder|file)"):
        demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == text


def test_without_matplotlib_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'leanrec\[plot\]'"):
        demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_demo_compresses_fifty_times_at_little_cost(tmp_path: Path):
    result = demo(tmp_path / "demo")
    assert result.ratio >= 50
    assert 0.75 < result.full.auc < result.truth_auc - 0.05
    assert result.comparison.auc.difference > -0.005
    assert {point.method for point in result.points} == {"Scalar", "PQ", "RQ", "MEC", "VRQ"}
