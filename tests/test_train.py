import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leanrec import runs
from leanrec.compress import compress
from leanrec.data.loader import Loader
from leanrec.methods import PQ
from leanrec.ops.metrics import auc
from leanrec.recommender import build, open_run, predict
from leanrec.train import RowAdam, Teacher, TrainSettings, state, train, train_recommender, train_run
from leanrec.tune import compress_run

FAST = TrainSettings(epochs=4, batch_size=256, learning_rate=3e-3, table_learning_rate=3e-2, patience=4)
MODEL = {"embedding_dim": 8, "hidden_units": [16], "dropout": 0.2}


def loaders(folder, schema, settings=FAST):
    train_rows = Loader(folder, "train", schema, batch_size=settings.batch_size, seed=settings.seed, buffer_rows=2000)
    return train_rows, Loader(folder, "valid", schema, batch_size=1000)


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    states = first.state_dict(), second.state_dict()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def random_steps(optimizer_of, *, sparse, num_steps=5):
    """Weights of a 50 x 4 table after a few steps on random look-ups of the first 20 rows."""
    draw = torch.Generator().manual_seed(0)
    table = nn.Embedding(50, 4, sparse=sparse, _weight=torch.randn(50, 4, generator=draw))
    optimizer = optimizer_of(table.parameters())
    for _ in range(num_steps):
        optimizer.zero_grad()
        table(torch.randint(20, (30,), generator=draw)).pow(3).sum().backward()
        optimizer.step()
    return table.weight.detach()


def test_row_adam_agrees_with_torch_on_sparse_and_on_dense_gradients():
    # SparseAdam adds eps before the bias correction, Adam (and so RowAdam) after it: with a tiny eps they are one formula.
    sparse = random_steps(lambda parameters: torch.optim.SparseAdam(list(parameters), lr=0.1, eps=1e-30), sparse=True)
    assert torch.allclose(random_steps(lambda parameters: RowAdam(parameters, lr=0.1, eps=1e-30), sparse=True), sparse, atol=1e-6)
    dense = random_steps(lambda parameters: torch.optim.Adam(parameters, lr=0.1), sparse=False)
    assert torch.allclose(random_steps(lambda parameters: RowAdam(parameters, lr=0.1), sparse=False), dense, atol=1e-6)


@pytest.mark.parametrize("sparse", [True, False])
def test_row_adagrad_is_its_formula(sparse):
    def optimizer(parameters):
        return RowAdam([{"params": list(parameters), "row_adagrad": True}], lr=0.1)

    draw = torch.Generator().manual_seed(0)
    weight, sums = torch.randn(50, 4, generator=draw), torch.zeros(50)
    for _ in range(5):
        ids = torch.randint(20, (30,), generator=draw)
        gradient = torch.zeros(50, 4).index_add(0, ids, 3 * weight[ids].square())
        sums += gradient.square().mean(1)
        weight -= 0.1 * gradient / (sums.sqrt() + 1e-8).unsqueeze(1)
    assert torch.allclose(random_steps(optimizer, sparse=sparse), weight, atol=1e-5)


def test_row_adagrad_keeps_one_number_per_row():
    table = nn.Embedding(50, 4, sparse=True)
    optimizer = RowAdam([{"params": [table.weight], "row_adagrad": True}], lr=0.1)
    for _ in range(2):
        table(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
    assert {name: tensor.shape for name, tensor in optimizer.state[table.weight].items()} == {"step": (), "sum": (50,)}
    assert optimizer.state[table.weight]["sum"].nonzero().flatten().tolist() == [1, 2]
    optimizer.forget(table.weight, torch.tensor([1]))
    assert optimizer.state[table.weight]["sum"].nonzero().flatten().tolist() == [2]


def test_adagrad_is_for_the_tables_alone(small_log):
    recommender = build(small_log, "deepfm", MODEL, seed=0)
    optimizer = state.State(recommender.model, TrainSettings(table_optimizer="adagrad")).optimizer
    tables = {parameter for path, parameter in recommender.model.named_parameters() if "tables" in path}
    assert tables
    for group in optimizer.param_groups:
        assert all((parameter in tables) == group.get("row_adagrad", False) for parameter in group["params"])


def test_an_unknown_optimizer_of_tables_is_an_error():
    with pytest.raises(ValueError, match=r"table_optimizer='sgd' is unknown. Choose one of \['adam', 'adagrad'\]"):
        TrainSettings(table_optimizer="sgd")


def test_a_step_leaves_rows_outside_the_batch_alone():
    table = nn.Embedding(50, 4, sparse=True)
    optimizer = RowAdam(table.parameters(), lr=0.1)
    for ids in ([1, 2], [2, 3]):
        before = table.weight.detach().clone()
        table(torch.tensor(ids)).sum().backward()
        optimizer.step()
        assert (table.weight != before).any(1).nonzero().flatten().tolist() == ids
    assert (optimizer.state[table.weight]["exp_avg"] != 0).any(1).nonzero().flatten().tolist() == [1, 2, 3]


def test_training_finds_the_planted_effects_and_keeps_the_best_weights(small_log):
    recommender = build(small_log, "deepfm", MODEL, seed=0)
    progress = train_recommender(recommender, FAST)
    assert progress.best_auc > 0.7
    assert progress.best_auc == max(entry["auc"] for entry in progress.history)
    labels, logits = predict(recommender.model, Loader(small_log, "valid", recommender.schema, batch_size=500))
    assert auc(labels, logits) == pytest.approx(progress.best_auc, abs=1e-12)


def test_training_stops_when_patience_is_out_and_lowers_the_learning_rate(small_log):
    recommender = build(small_log, "deepfm", {**MODEL, "dropout": 0.0}, seed=0)
    rates = []

    def stop_learning(progress):
        rates.append(progress.failures)

    settings = TrainSettings(epochs=50, batch_size=256, table_learning_rate=0.1, evaluations_per_epoch=2, patience=2, learning_rate_decay=0.1)
    progress = train(recommender.model, *loaders(small_log, recommender.schema, settings), settings, on_step=stop_learning)
    assert progress.failures == 2
    assert progress.epoch < 49
    best = max(range(len(progress.history)), key=lambda index: progress.history[index]["auc"])
    assert best == len(progress.history) - 1 - 2
    assert [entry["step"] for entry in progress.history[:4]] == [12, 24, 36, 48]


def test_tuning_never_ends_below_where_it_began(small_log):
    recommender = build(small_log, "deepfm", MODEL, seed=0)
    train_recommender(recommender, FAST)
    before = {name: tensor.clone() for name, tensor in recommender.model.state_dict().items()}
    harmful = TrainSettings(epochs=1, batch_size=256, learning_rate=10.0, patience=1, keep_initial=True)
    progress = train_recommender(recommender, harmful)
    assert len(progress.history) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in recommender.model.state_dict().items())


def test_tuning_that_went_too_far_is_taken_back_part_of_the_way_and_goes_on_from_where_it_was(small_log, monkeypatch):
    """Tried are all of the way, that of the tables alone, half and a quarter. A log loss higher by a thousandth is no reason against any."""
    start = build(small_log, "deepfm", MODEL, seed=0)
    train_recommender(start, FAST)
    start.model.register_buffer("mask", torch.tensor([0.0, -math.inf]))  # as of an attention: has no mean with itself
    settings = TrainSettings(epochs=1, batch_size=256, learning_rate=1e-2, evaluations_per_epoch=2)

    def tuned(qualities, **changed):
        """The history of a tuning whose evaluations have these AUCs and log losses, and the model's weights afterwards."""
        recommender = copy.deepcopy(start)
        aucs, losses = iter([auc for auc, _ in qualities]), iter([loss for _, loss in qualities])
        monkeypatch.setattr(state, "auc", lambda labels, logits: next(aucs))
        monkeypatch.setattr(state, "log_loss", lambda labels, logits: next(losses))
        progress = train_recommender(recommender, replace(settings, **changed))
        assert next(aucs, None) is None
        return progress.history, recommender.model.state_dict()

    before, (_, half), (_, whole) = start.model.state_dict(), tuned([(0.9, 0.5), (0.8, 0.5)]), tuned([(0.8, 0.5), (0.9, 0.5)])
    first = [(0.7, 0.5), (0.9, 0.5006), (0.9, 0.5006), (0.6, 0.4), (0.8, 0.5004)]
    history, kept = tuned([*first, (0.8, 0.4), (0.6, 0.4), (0.7, 0.4), (0.8, 0.5)], keep_initial=True)
    assert [(entry["auc"], entry["logloss"], entry.get("share")) for entry in history] == [(0.7, 0.5, None), (0.8, 0.5004, 0.25), (0.8, 0.4, None)]
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * half[name])
    history, kept = tuned([*first, (0.9, 0.4)], keep_initial=True)
    assert [entry.get("share") for entry in history] == [None, 0.25, None]
    assert all(torch.equal(tensor, whole[name]) for name, tensor in kept.items())
    history, kept = tuned([*first[:2], (0.8, 0.5004), (0.6, 0.4), (0.9, 0.4)], keep_initial=True)
    assert [(entry.get("share"), entry.get("table_share")) for entry in history] == [(None, None), (None, 1.0), (None, 1.0)]
    for name, tensor in kept.items():
        of_table = isinstance(start.model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
        assert torch.equal(tensor, (whole if of_table else before)[name])
    assert any(not torch.equal(tensor, before[name]) for name, tensor in kept.items())


def test_a_gain_that_may_be_chance_is_not_kept(small_log, monkeypatch):
    """The AUCs are made up, but not the error of their differences, which is that of a bootstrap."""
    start = build(small_log, "deepfm", MODEL, seed=0)
    train_recommender(start, FAST)
    validation = loaders(small_log, start.schema)[1]
    labels, logits = predict(start.model, validation)
    settings = TrainSettings(epochs=1, batch_size=256, learning_rate=1e-3, keep_initial=True)  # four looks, of 1/4000 each: 3.481 standard errors
    monkeypatch.setattr(state, "log_loss", lambda labels, logits: 0.5)

    def tuned(*aucs):
        recommender, left = copy.deepcopy(start), iter(aucs)
        monkeypatch.setattr(state, "auc", lambda labels, logits: next(left))
        progress = train_recommender(recommender, settings)
        assert next(left, None) is None
        return recommender.model, progress

    model, progress = tuned(0.7, 0.9)
    error = progress.history[1]["gain_error"]
    after, draws = predict(model, validation)[1], torch.randint(len(labels), (500, len(labels)), generator=torch.Generator().manual_seed(0))
    differences = torch.tensor([auc(labels[rows], after[rows]) - auc(labels[rows], logits[rows]) for rows in draws])
    assert error == pytest.approx(differences.std().item(), rel=0.15)
    model, progress = tuned(0.7, 0.7 + 3.49 * error)
    assert progress.best_step == 24
    assert not same_weights(model, start.model)
    model, progress = tuned(0.7, 0.7 + 3.47 * error, 0.7, 0.7, 0.7)
    assert progress.best_step == 0
    assert same_weights(model, start.model)


def test_a_teacher_has_its_share_in_the_labels(small_log):
    teacher = build(small_log, "deepfm", MODEL, seed=7)
    settings = replace(FAST, epochs=1)
    pupil, reader = (build(small_log, "deepfm", MODEL, seed=0) for _ in range(2))
    train_recommender(pupil, settings, teacher=Teacher(teacher.model.train(), 0.25))

    class Softened(Loader):
        def batches(self, **place):
            for batch in super().batches(**place):
                yield batch._replace(labels=0.75 * batch.labels + 0.25 * torch.sigmoid(teacher.model.eval()(batch.features).detach()))

    rows = Softened(small_log, "train", reader.schema, batch_size=settings.batch_size, seed=settings.seed)
    train(reader.model, rows, Loader(small_log, "valid", reader.schema, batch_size=1000), settings)
    for ours, theirs in zip(pupil.model.parameters(), reader.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_l2_is_the_squared_norm_of_the_looked_up_rows_per_row_of_the_batch(small_log):
    """One step of plain gradient descent by hand against the loop, with an optimizer whose first step is the sign of the gradient."""
    recommender = build(small_log, "lr", {}, seed=0)
    settings = TrainSettings(epochs=1, batch_size=6000, l2=0.3, learning_rate=1e-3)
    loader, validation = loaders(small_log, recommender.schema, settings)
    reference = build(small_log, "lr", {}, seed=0).model
    batch = next(loader.batches())
    looked_up = []
    hooks = [
        module.register_forward_hook(lambda _, __, rows: looked_up.append(rows)) for module in reference.modules() if isinstance(module, nn.Embedding)
    ]
    loss = F.binary_cross_entropy_with_logits(reference(batch.features), batch.labels)
    (loss + 0.3 * sum(rows.pow(2).sum() for rows in looked_up) / len(batch.labels)).backward()
    for hook in hooks:
        hook.remove()
    expected = {name: parameter.grad.to_dense() for name, parameter in reference.named_parameters()}

    seen = {}

    class Recording(RowAdam):
        def step(self, closure=None):
            if not seen:
                seen.update({name: parameter.grad.to_dense().clone() for name, parameter in recommender.model.named_parameters()})
            super().step()

    import leanrec.train.state as state

    original, state.RowAdam = state.RowAdam, Recording
    try:
        train(recommender.model, Loader(small_log, "train", recommender.schema, batch_size=6000, seed=0, buffer_rows=2000), validation, settings)
    finally:
        state.RowAdam = original
    assert expected.keys() == seen.keys()
    for name, gradient in expected.items():
        assert torch.allclose(seen[name], gradient, atol=1e-7), name


def test_training_leaves_the_global_random_state_alone(small_log):
    state = torch.get_rng_state()
    recommender = build(small_log, "deepfm", MODEL, seed=0)
    train_recommender(recommender, TrainSettings(epochs=1, batch_size=1000))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_seed_gives_the_same_model_and_another_seed_another(small_log):
    models = []
    for seed in (0, 0, 1):
        recommender = build(small_log, "deepfm", MODEL, seed=seed)
        train_recommender(recommender, TrainSettings(epochs=1, batch_size=500, seed=seed))
        models.append(recommender.model)
    assert same_weights(models[0], models[1])
    assert not same_weights(models[0], models[2])


@pytest.mark.parametrize(("steps", "table_optimizer"), [(1, "adam"), (30, "adam"), (30, "adagrad")])
def test_an_interrupted_training_goes_on_to_the_same_weights(small_log, tmp_path, steps, table_optimizer):
    settings = TrainSettings(**{**vars(FAST), "checkpoint_steps": 7, "l2": 1e-3, "table_optimizer": table_optimizer})
    undisturbed = build(small_log, "deepfm", MODEL, seed=0)
    train(undisturbed.model, *loaders(small_log, undisturbed.schema, settings), settings)

    class Interrupted(Exception):
        pass

    def interrupt(progress):
        if progress.step == 7 + steps:
            raise Interrupted

    checkpoint = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Interrupted):
        first = build(small_log, "deepfm", MODEL, seed=0)
        train(first.model, *loaders(small_log, first.schema, settings), settings, checkpoint=checkpoint, on_step=interrupt)
    second = build(small_log, "deepfm", MODEL, seed=0)
    seen = []
    progress = train(
        second.model, *loaders(small_log, second.schema, settings), settings, checkpoint=checkpoint, on_step=lambda step: seen.append(step.step)
    )
    assert seen[0] > 7
    assert progress.step == 4 * 24
    assert same_weights(second.model, undisturbed.model)


@pytest.mark.parametrize("fault", ["cut short", "of a larger model", "of a plain training"])
def test_a_checkpoint_that_fits_no_more_is_named_with_what_to_do(small_log, tmp_path, fault):
    checkpoint = tmp_path / "checkpoint.safetensors"

    def stopped(embedding_dim, *, keep_initial):
        def stop(progress):
            if checkpoint.exists():
                raise KeyboardInterrupt

        settings = TrainSettings(**{**vars(FAST), "checkpoint_steps": 2, "keep_initial": keep_initial})
        recommender = build(small_log, "deepfm", {**MODEL, "embedding_dim": embedding_dim}, seed=0)
        train(recommender.model, *loaders(small_log, recommender.schema, settings), settings, checkpoint=checkpoint, on_step=stop)

    with pytest.raises(KeyboardInterrupt):
        stopped(8 if fault == "of a larger model" else 4, keep_initial=fault != "of a plain training")
    if fault == "cut short":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"^[^\n]*checkpoint.safetensors: not a checkpoint that this run can go on from \([^\n]+Delete it, .*$"):
        stopped(4, keep_initial=True)


SCRIPT = """
import sys, time
from pathlib import Path
import torch
from leanrec.train import TrainSettings, train_run
torch.set_num_threads(1)
settings = TrainSettings(epochs=3, batch_size=256, table_learning_rate=3e-2, checkpoint_steps=5)
pause = float(sys.argv[3])
train_run(Path(sys.argv[1]), Path(sys.argv[2]), model="deepfm", model_settings={"embedding_dim": 8, "hidden_units": [16], "dropout": 0.2},
    settings=settings, on_step=lambda progress: time.sleep(pause))
"""


def test_a_run_killed_with_sigkill_and_given_again_ends_with_the_same_weights(small_log, tmp_path):
    def command(out, pause):
        return [sys.executable, "-c", SCRIPT, str(small_log), str(out), str(pause)]

    subprocess.run(command(tmp_path / "undisturbed", 0), check=True)
    killed = tmp_path / "killed"
    process = subprocess.Popen(command(killed, 0.05))
    checkpoint = tmp_path / "killed.partial" / "checkpoint.safetensors"
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not killed.exists()
    with pytest.raises(ValueError, match="the run was interrupted; give the same command again"):
        open_run(killed)
    subprocess.run(command(killed, 0), check=True)
    assert same_weights(open_run(killed).model, open_run(tmp_path / "undisturbed").model)
    assert runs.load(killed)["history"] == runs.load(tmp_path / "undisturbed")["history"]


def test_a_finished_run_is_not_repeated_and_other_settings_are_refused(small_log, tmp_path):
    settings, out = TrainSettings(epochs=1, batch_size=1000), tmp_path / "run"
    steps = []
    record = train_run(small_log, out, model="fm", model_settings={"embedding_dim": 4}, settings=settings, on_step=steps.append)
    assert record["input"] == "small"
    assert record["valid"]["auc"] == record["history"][-1]["auc"]
    done = len(steps)
    assert train_run(small_log, out, model="fm", model_settings={"embedding_dim": 4}, settings=settings, on_step=steps.append) == record
    assert len(steps) == done > 0
    with pytest.raises(ValueError, match=r"holds a run with other settings .model: 'fm' there, 'lr' now"):
        train_run(small_log, out, model="lr", model_settings={"embedding_dim": 4}, settings=settings)


def test_a_log_that_was_prepared_anew_is_not_taken_for_the_old_one(small_log, tmp_path):
    log, out = tmp_path / "log", tmp_path / "run"
    shutil.copytree(small_log, log)
    fm = {"model": "fm", "model_settings": {"embedding_dim": 4}, "settings": TrainSettings(epochs=1, batch_size=1000)}
    train_run(log, out, **fm)
    compress_run(out, tmp_path / "small", method="PQ()", tuning=None)
    record = json.loads((log / "run.json").read_text())
    (log / "run.json").write_text(json.dumps(record | {"settings": {"inputs": {"train": ["/elsewhere/log.csv"]}}}))
    with pytest.raises(ValueError, match=r"other settings .log: "):
        train_run(log, out, **fm)
    for run in (out, tmp_path / "small"):
        with pytest.raises(ValueError, match=f"was trained on another log than the one that lies at {log} now"):
            open_run(run)
    record["settings"]["inputs"] = {"train": ["/moved/log.csv"]}
    (log / "run.json").write_text(json.dumps(record))
    train_run(log, tmp_path / "again", **fm)
    record["settings"]["inputs"] = {"train": ["/back/log.csv"]}
    (log / "run.json").write_text(json.dumps(record))
    assert open_run(tmp_path / "again")


def test_a_run_that_was_trained_anew_is_compressed_anew(small_log, tmp_path):
    fm = {"model": "fm", "model_settings": {"embedding_dim": 4}}
    train_run(small_log, tmp_path / "run", **fm, settings=TrainSettings(epochs=1, batch_size=1000))
    compress_run(tmp_path / "run", tmp_path / "small", method="PQ()", tuning=None)
    shutil.rmtree(tmp_path / "run")
    train_run(small_log, tmp_path / "run", **fm, settings=TrainSettings(epochs=1, batch_size=1000, seed=1))
    with pytest.raises(ValueError, match=r"holds a run with other settings .record: "):
        compress_run(tmp_path / "run", tmp_path / "small", method="PQ()", tuning=None)


def test_a_model_starts_from_the_tables_of_another_run(small_log, tmp_path):
    settings = TrainSettings(epochs=1, batch_size=1000)
    source = tmp_path / "source"
    train_run(small_log, source, model="fm", model_settings={"embedding_dim": 8}, settings=settings)
    tiny = TrainSettings(epochs=1, batch_size=6000, learning_rate=1e-12)
    train_run(small_log, tmp_path / "target", model="deepfm", model_settings=MODEL, settings=tiny, tables=source)
    given, taken = open_run(source).model, open_run(tmp_path / "target").model
    ids = torch.arange(202)
    assert torch.allclose(taken.get_submodule(path_of(taken, "user"))(ids), given.get_submodule(path_of(given, "user"))(ids), atol=1e-9)


def path_of(model: nn.Module, name: str) -> str:
    return next(path for path, _ in model.named_modules() if path.endswith(f"tables.{name}"))


def test_codes_stay_frozen_and_code_books_move_in_tuning(small_log):
    recommender = build(small_log, "deepfm", MODEL, seed=0)
    compress(recommender.model, {"*.user": PQ(num_subspaces=2, num_centroids=16)})
    table = recommender.model.get_submodule(path_of(recommender.model, "user"))
    before = {name: tensor.clone() for name, tensor in table.state_dict().items()}
    train_recommender(recommender, FAST)
    after = table.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {name for name, _ in table.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [
        {"patience": 0},
        {"epochs": 0},
        {"learning_rate": -1.0},
        {"learning_rate": float("nan")},
        {"l2": -1.0},
        {"learning_rate_decay": 0.0},
    ],
)
def test_bad_settings_are_refused(settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f"{name}={value} must be"):
        TrainSettings(**settings)


@pytest.mark.slow
def test_frappe_trains_to_a_good_auc_within_three_epochs(data_dir, tmp_path):
    from leanrec.data.prepare import prepare

    prepare([data_dir / "frappe"], tmp_path / "frappe")
    settings = TrainSettings(epochs=3, table_learning_rate=1e-2, l2=0.01)
    record = train_run(Path(tmp_path / "frappe"), tmp_path / "run", model="deepfm", model_settings={"embedding_dim": 10}, settings=settings)
    assert record["valid"]["auc"] > 0.93  # DeepFM on this split: .9325, .9368, .9427 after one, two and three epochs
