import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from leanrec import recommender, runs
from leanrec.compress import compress, tables
from leanrec.data.loader import Loader
from leanrec.evaluate import evaluate_run
from leanrec.methods import PQ
from leanrec.recommender import compress_tables, open_run, predict, table_counts
from leanrec.report import report
from leanrec.train import TrainSettings, state, train_recommender, train_run
from leanrec.tune import TUNING, compress_run

MODEL = {"embedding_dim": 8, "hidden_units": [16]}
SHORT = replace(TUNING, epochs=1, batch_size=500, evaluations_per_epoch=2)


@pytest.fixture(scope="module")
def base(small_log, tmp_path_factory):
    """A trained run on the small log."""
    out = tmp_path_factory.mktemp("runs") / "base"
    train_run(small_log, out, model="deepfm", model_settings=MODEL, settings=TrainSettings(epochs=3, batch_size=256, table_learning_rate=3e-2))
    return out


def test_a_compressed_run_opens_with_its_tables_and_keeps_its_record(base, tmp_path):
    record = compress_run(base, tmp_path / "small", method="PQ(num_subspaces=2, num_centroids=16)", tuning=SHORT)
    assert set(record["methods"].values()) == {"PQ(num_subspaces=2, num_centroids=16, weight_power=0.5)"}
    asked = {"method", "ratio", "nbytes", "max_auc_drop", "dense_ratio", "tuning", "teacher_share", "seed"}
    assert record["settings"].keys() == {"run", "record"} | asked
    small, full = open_run(tmp_path / "small"), open_run(base)
    assert report(small.model).tables == record["report"]["tables"] < report(full.model).tables / 2
    assert record["report"]["vocabulary"] > 0
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["model.safetensors", "run.json", "schema.json"]


def test_tuning_keeps_the_best_of_the_untuned_and_the_tuned(base, tmp_path):
    record = compress_run(base, tmp_path / "tuned", method="PQ(num_subspaces=2, num_centroids=4)", tuning=SHORT)
    entries = record["tuning"]["history"]
    history = [entry["auc"] for entry in entries]
    assert record["valid"]["auc"] == max(history) > history[0] + 2 * entries[-1]["gain_error"]
    assert record["tuning"]["kept"] == entries[history.index(max(history))]["step"]
    assert record["valid"]["auc_untuned"] == history[0]
    untuned = compress_run(base, tmp_path / "untuned", method="PQ(num_subspaces=2, num_centroids=4)", tuning=None)
    assert untuned["valid"]["auc"] == pytest.approx(history[0], abs=1e-12)
    assert untuned["tuning"] is None


def test_tuning_learns_from_the_model_before_compression(base, tmp_path):
    full = open_run(base)
    rows = Loader(full.data, "valid", full.schema, batch_size=1000)

    def distance(run, teacher_share):
        settings = replace(SHORT, epochs=3, learning_rate=1e-2)
        compress_run(base, run, method="PQ(num_subspaces=1, num_centroids=4)", tuning=settings, teacher_share=teacher_share)
        return float((predict(open_run(run).model, rows)[1].sigmoid() - predict(full.model, rows)[1].sigmoid()).square().mean())

    assert distance(tmp_path / "taught", 1.0) < 0.95 * distance(tmp_path / "alone", 0.0)
    with pytest.raises(ValueError, match=r"teacher_share=1\.5 must be from 0 to 1"):
        compress_run(base, tmp_path / "wrong", teacher_share=1.5)
    with pytest.raises(ValueError, match=r"teacher_share=0\.5 is for the fine-tuning, and there is none"):
        compress_run(base, tmp_path / "wrong", teacher_share=0.5, tuning=None)


def test_a_ratio_is_reached_by_choosing_settings_for_each_table(base, tmp_path):
    record = compress_run(base, tmp_path / "small", method="PQ()", ratio=6, tuning=None)
    assert record["report"]["tables"] <= record["report"]["tables_full"] / 6
    with pytest.raises(ValueError, match="goes with one method for all tables"):
        compress_run(base, tmp_path / "other", method={"*": "PQ()"}, ratio=6, tuning=None)


def test_methods_by_glob_leave_other_tables_alone(base, tmp_path):
    record = compress_run(base, tmp_path / "small", method={"*.user": "PQ(num_subspaces=2, num_centroids=16)", "*.item": None}, tuning=None)
    assert {path.rsplit(".", 1)[1]: text is None for path, text in record["methods"].items()} == {"user": False, "item": True, "tags": True}


def test_counts_of_the_log_reach_the_fit(base):
    """Rows that are looked up often are represented better: the look-up-weighted error is lower with counts than without."""
    recommender, original = open_run(base), open_run(base)
    assert {path.rsplit(".", 1)[1] for path in table_counts(recommender)} == {"user", "item", "tags"}
    compress_tables(recommender, "PQ(num_subspaces=2, num_centroids=8)")
    counts = table_counts(original)
    weighted = report(recommender.model, original=original.model, counts=counts)
    unweighted = report(compress(open_run(base).model, PQ(num_subspaces=2, num_centroids=8)), original=original.model, counts=counts)
    user = next(index for index, row in enumerate(weighted.rows) if row.path.endswith("user"))
    assert weighted.rows[user].error < unweighted.rows[user].error


@pytest.mark.parametrize("method", ["PQ(num_subspaces=2, num_centroids=16)", "VRQ(codes_per_1000_rows=1000, num_levels=2)"])
def test_a_run_killed_in_tuning_goes_on_from_the_fitted_model(method, base, tmp_path):
    class Killed(Exception):
        pass

    def kill(progress):
        if progress.step == 3:
            raise Killed

    tables, settings = [], replace(SHORT, checkpoint_steps=2)
    undisturbed = compress_run(base, tmp_path / "undisturbed", method=method, tuning=settings)
    with pytest.raises(Killed):
        compress_run(base, tmp_path / "small", method=method, tuning=settings, on_step=kill)
    assert not (tmp_path / "small").exists()
    steps = []
    record = compress_run(
        base,
        tmp_path / "small",
        method=method,
        tuning=settings,
        on_work=lambda *state: tables.append(state),
        on_step=lambda state: steps.append(state.step),
    )
    assert tables == []
    assert steps[0] == 3
    assert record["tuning"] == undisturbed["tuning"]


def test_tuning_moves_the_code_words_of_vrq_and_leaves_its_codes(base):
    found = open_run(base)
    compress_tables(found, "VRQ(codes_per_1000_rows=1000, num_levels=2, num_centroids=4)")
    before = {name: tensor.clone() for name, tensor in found.model.state_dict().items()}
    train_recommender(found, replace(SHORT, learning_rate=0.05, keep_initial=False))
    after = found.model.state_dict()
    moved = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert {"packed_words", "scales", "mean"} <= moved and not {"packed_codes", "borders"} & moved


def test_all_that_takes_long_before_the_tuning_is_told(base, tmp_path):
    told = []
    compress_run(base, tmp_path / "small", method="VRQ()", ratio=6, tuning=None, on_work=lambda *state: told.append(state))
    assert told[0][:2] == ("sensitivity of the tables", 0)
    paths = list(tables(open_run(base).model))
    assert [state for state in told if state[0] != "sensitivity of the tables"] == [
        *2 * [(f"sizes of table {path}", done, 3) for done, path in enumerate(paths, start=1)],  # as expected, and on held-out rows
        *((f"table {path}", done, 3) for done, path in enumerate(paths, start=1)),
    ]


def test_a_finished_compression_is_not_repeated(base, tmp_path):
    first = compress_run(base, tmp_path / "small", method="Scalar()", tuning=None)
    tables = []
    assert compress_run(base, tmp_path / "small", method="Scalar()", tuning=None, on_work=lambda *state: tables.append(state)) == first
    assert tables == []


def test_settings_that_differ_are_named_one_by_one(base, tmp_path):
    compress_run(base, tmp_path / "small", method="Scalar()", tuning=SHORT)
    with pytest.raises(ValueError, match=r"with other settings .tuning.batch_size: 500 there, 250 now, tuning.epochs: 1 there, 2 now.\. Choose"):
        compress_run(base, tmp_path / "small", method="Scalar()", tuning=replace(SHORT, epochs=2, batch_size=250))


def test_a_compressed_run_gives_its_tables_to_another_model_with_the_codes_frozen(small_log, base, tmp_path):
    compress_run(base, tmp_path / "small", method="MEC(num_subspaces=2, num_centroids=16, num_steps=20)", tuning=None)
    train_run(
        small_log,
        tmp_path / "target",
        model="ipnn",
        model_settings=MODEL,
        settings=TrainSettings(epochs=1, batch_size=500),
        tables=tmp_path / "small",
    )
    source, target = (dict(open_run(tmp_path / name).model.named_buffers()) for name in ("small", "target"))
    name = next(name for name in source if name.endswith("user.packed_codes"))
    assert torch.equal(source[name], next(buffer for path, buffer in target.items() if path.endswith("user.packed_codes")))


def test_evaluate_compares_with_another_run_and_keeps_the_answer(base, tmp_path):
    compress_run(base, tmp_path / "small", method="Scalar(num_bits=2)", tuning=None)
    evaluation, comparison = evaluate_run(tmp_path / "small", against=base)
    alone, nothing = evaluate_run(base)
    assert nothing is None
    assert evaluation.auc - alone.auc == pytest.approx(comparison.auc.difference, abs=1e-9)
    assert comparison.auc.low <= comparison.auc.difference <= comparison.auc.high
    assert sum(bucket.rows for bucket in evaluation.buckets.values()) == evaluation.rows == 2000
    assert evaluate_run(tmp_path / "small", against=base) == (evaluation, comparison)
    assert runs.load(tmp_path / "small" / "evaluate-test-against-base")["command"] == "evaluate"
    with pytest.raises(ValueError, match=r"no categorical field of that name. Choose one of .'user', 'item'"):
        evaluate_run(base, popularity="itme")


def test_the_folder_within_a_run_keeps_the_last_evaluation_and_one_that_is_named_keeps_its_own(base, tmp_path, monkeypatch):
    first, _ = evaluate_run(base, out=tmp_path / "mine", popularity="user")
    evaluate_run(base, popularity="user")
    other, _ = evaluate_run(base, popularity="item")
    assert other.auc == first.auc and other.buckets != first.buckets
    monkeypatch.chdir(base.parent)
    assert evaluate_run(Path(base.name), popularity="item")[0] == other
    with pytest.raises(ValueError, match="holds a run with other settings"):
        evaluate_run(base, out=tmp_path / "mine", popularity="item")
    shutil.rmtree(base / "evaluate-test")
    (base / "evaluate-test").mkdir()
    with pytest.raises(ValueError, match="exists and is not a run folder"):
        evaluate_run(base)
    (base / "evaluate-test").rmdir()


def test_a_fine_tuning_that_diverges_leaves_the_model_as_it_was(base, tmp_path):
    with pytest.warns(UserWarning, match="diverged.*Lower the learning rate.*Kept what was best before"):
        record = compress_run(base, tmp_path / "small", method="PQ()", tuning=replace(SHORT, learning_rate=1e30))
    assert record["valid"]["auc"] == record["valid"]["auc_untuned"] == pytest.approx(runs.load(base)["valid"]["auc"], abs=0.05)
    untuned = compress_run(base, tmp_path / "untuned", method="PQ()", tuning=None)
    assert record["valid"]["logloss"] == untuned["valid"]["logloss"]


def test_runs_of_different_logs_cannot_be_compared(small_log, base, tmp_path):
    copied = tmp_path / "copied"
    copied.mkdir()
    for path in base.iterdir():
        if path.is_file():
            text = path.read_bytes()
            (copied / path.name).write_bytes(text.replace(str(small_log).encode(), b"/elsewhere") if path.name == "run.json" else text)
    with pytest.raises(ValueError, match="can be compared only within one prepared log"):
        evaluate_run(base, against=copied)


def test_a_ratio_of_the_linear_layers_out_of_reach_is_said_before_anything_is_fitted(base, tmp_path):
    seen = []
    with pytest.raises(ValueError, match=r"ratio=500 cannot be met"):
        compress_run(base, tmp_path / "small", method="Scalar()", dense_ratio=500, on_work=lambda *state: seen.append(state))
    assert seen == [] and not list(tmp_path.iterdir())


def test_a_ratio_of_the_tables_out_of_reach_is_said_before_anything_is_measured_and_leaves_nothing(base, tmp_path, monkeypatch):
    monkeypatch.setattr(recommender, "measure_sensitivity", None)
    with pytest.raises(ValueError, match=r"The budget of \d+ bytes cannot be met"):
        compress_run(base, tmp_path / "small", method="VRQ()", ratio=5000)
    assert not list(tmp_path.iterdir())


def test_a_higher_auc_at_the_cost_of_log_loss_is_not_taken(base, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "log_loss", lambda labels, logits: next(losses))
    monkeypatch.setattr(state, "auc", lambda labels, logits: next(aucs))
    losses, aucs = iter([0.5, *[0.6] * 4]), iter([0.7, *[0.9] * 4])
    record = compress_run(base, tmp_path / "small", method="Scalar()", tuning=replace(SHORT, evaluations_per_epoch=1))
    assert [entry["auc"] for entry in record["tuning"]["history"]] == [0.7, 0.9]
    untuned = compress_run(base, tmp_path / "untuned", method="Scalar()", tuning=None)
    assert record["valid"]["auc"] == untuned["valid"]["auc"]
