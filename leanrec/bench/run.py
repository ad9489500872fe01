"""Experiments -> one result per run, kept as JSON."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from leanrec import runs
from leanrec.bench.experiment import DENSE, PLAIN, RESTARTED, SMALLER, TUNED, Cell, Experiment, cells
from leanrec.bench.speed import lookups_per_second
from leanrec.budget import least_nbytes
from leanrec.data.loader import Loader
from leanrec.data.prepare import prepare
from leanrec.data.vocabulary import vocabulary_nbytes
from leanrec.methods import parse
from leanrec.move import move_tables
from leanrec.ops import fused
from leanrec.ops.intervals import delong_difference
from leanrec.ops.metrics import auc, calibration_ratio, log_loss
from leanrec.recommender import MODEL_FILE, PREDICT_BATCH, Recommender, build, compress_tables, open_run, predict
from leanrec.report import report
from leanrec.train import Teacher, TrainSettings, train_recommender, train_run
from leanrec.tune import TEACHER_SHARE, TUNING, compress_layers

SPEED_BATCH = 4096


@dataclass(frozen=True)
class Folders:
    """Where a benchmark reads and writes: the logs, prepared logs and trained models (which may be deleted), results of one suite."""

    logs: Path
    work: Path
    results: Path


def bench(
    experiments: Sequence[Path],
    *,
    logs: Path,
    results: Path,
    work: Path,
    num_jobs: int = 1,
    on_result: Callable[[str, int, int], None] | None = None,
) -> list[Path]:
    """Result files of all runs of some experiments; a run whose result exists is skipped, an interrupted one goes on.

    Args:
        experiments: TOML files; the folder of a file names its suite.
        logs: Folder of the logs that the experiments name.
        results: Folder of the results, with one folder for each suite.
        work: Folder for prepared logs and trained models. They are shared by all runs that need them.
        num_jobs: Processes that run at a time, each with one thread.
        on_result: Called with (result's name, runs done, runs in all).
    """
    loaded = [(Experiment.load(path), Folders(logs, work, results / path.resolve().parent.name)) for path in experiments]
    for experiment, folders in loaded:
        _prepare(experiment, folders)
    todo = [(cell, folders) for experiment, folders in loaded for cell in cells(experiment)]
    waiting = [(cell, folders) for cell, folders in todo if not (folders.results / cell.file_name).exists()]
    needed = {
        _train_folder(cell, folders, dim): (cell, folders, dim)
        for cell, folders in waiting
        for dim in {cell.embedding_dim, cell.experiment.embedding_dim}
    }
    done = [folders.results / cell.file_name for cell, folders in todo if (cell, folders) not in waiting]
    for _ in _in_processes(_train, list(needed.values()), num_jobs):
        pass
    # The plain models first: the rest is measured against them.
    for is_plain in (True, False):
        for path in _in_processes(run_cell, [job for job in waiting if (job[0].family in PLAIN) == is_plain], num_jobs):
            done.append(path)
            if on_result is not None:
                on_result(path.name, len(done), len(todo))
    return done


def _in_processes(function: Callable[[Any], Any], jobs: Sequence[Any], num_jobs: int) -> Iterator[Any]:
    """Results of a function, as they come."""
    if num_jobs == 1:
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(num_jobs, mp_context=multiprocessing.get_context("spawn")) as processes:
        for future in as_completed([processes.submit(function, job) for job in jobs]):
            yield future.result()


def run_cell(job: tuple[Cell, Folders]) -> Path:
    """Run one cell and write its result; the models it starts from are trained."""
    torch.set_num_threads(1)
    runs.reset_peak_memory()
    runs.commit()  # now: files may change while the run goes on
    cell, folders = job
    folders.results.mkdir(parents=True, exist_ok=True)
    full_run = _train_folder(cell, folders, cell.experiment.embedding_dim)
    if cell.from_scratch:
        result = _scratch_result(cell, folders, full_run)
    else:
        result = _trained_result(cell, folders, full_run) if cell.is_trained else _compressed_result(cell, folders, full_run)
    path = folders.results / cell.file_name
    runs.write_atomically(path, json.dumps(result, indent=1) + "\n")
    return path


def _prepare(experiment: Experiment, folders: Folders) -> None:
    """Make the experiment's log ids, unless it is done."""
    prepare([folders.logs / experiment.dataset], _data_folder(experiment, folders), **experiment.prepare)


def _data_folder(experiment: Experiment, folders: Folders) -> Path:
    """Where the prepared log lies: one for all experiments that prepare it alike."""
    return folders.work / "data" / (f"{experiment.dataset}-{_digest(experiment.prepare)}" if experiment.prepare else experiment.dataset)


def _train(job: tuple[Cell, Folders, int]) -> None:
    """Train a model that cells start from, unless it is there."""
    torch.set_num_threads(1)
    train_run(**_training(*job), out=_train_folder(*job))


def _training(cell: Cell, folders: Folders, embedding_dim: int) -> dict[str, Any]:
    """How a model of a cell is trained, for `train_run`."""
    return {
        "data": _data_folder(cell.experiment, folders),
        "model": cell.backbone,
        "model_settings": {**cell.experiment.model, "embedding_dim": embedding_dim},
        "settings": TrainSettings(**{**cell.experiment.train, "seed": cell.seed}),
    }


def _train_folder(cell: Cell, folders: Folders, embedding_dim: int) -> Path:
    """Where the trained model of a seed lies: one for all suites that train it alike."""
    experiment = cell.experiment
    digest = _digest([experiment.model, experiment.train])
    return folders.work / "runs" / f"{_data_folder(experiment, folders).name}-{cell.backbone}-d{embedding_dim}-seed{cell.seed}-{digest}"


def _digest(settings: Any) -> str:
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()


def _trained_result(cell: Cell, folders: Folders, full_run: Path) -> dict[str, Any]:
    run = _train_folder(cell, folders, cell.embedding_dim)
    recommender = open_run(run)
    seconds = {"pretrain": runs.load(run)["seconds"], "fit": 0.0, "tune": 0.0}
    return _result(cell, folders, recommender, full_run, seconds=seconds, file=run / MODEL_FILE)


def _scratch_result(cell: Cell, folders: Folders, full_run: Path) -> dict[str, Any]:
    folder = folders.work / "models" / folders.results.name / cell.file_name.removesuffix(".json")
    nbytes = _nbytes(cell, open_run(full_run))
    train_run(**_training(cell, folders, cell.embedding_dim), out=folder, method=cell.method, nbytes=nbytes)
    seconds = {"pretrain": runs.load(folder)["seconds"], "fit": 0.0, "tune": 0.0}
    return _result(cell, folders, open_run(folder), full_run, seconds=seconds, file=folder / MODEL_FILE)


def _nbytes(cell: Cell, full: Recommender) -> int | None:
    """The bytes that a ratio leaves for all tables, or the fewest that the method can do with them; None where no ratio is asked for."""
    if cell.ratio is None:
        return None
    return max(int(report(full.model).tables_full / cell.ratio), least_nbytes(full.model, parse(cell.method)))


def _compressed_result(cell: Cell, folders: Folders, full_run: Path) -> dict[str, Any]:
    experiment = cell.experiment
    base = _train_folder(cell, folders, cell.embedding_dim)
    recommender = open_run(base)
    start = time.perf_counter()
    if cell.family not in (DENSE, TUNED):
        compress_tables(recommender, cell.method, nbytes=_nbytes(cell, recommender), seed=cell.seed)
    if cell.dense_ratio is not None:
        compress_layers(recommender, cell.dense_ratio, seed=cell.seed)
    fitted = time.perf_counter()
    history: list[dict[str, Any]] = []
    if cell.family == RESTARTED:
        recommender, history = _restarted(cell, folders, recommender)
    elif experiment.tuning is not False:
        differences = {} if experiment.tuning is True else dict(experiment.tuning)
        share = differences.pop("teacher_share", TEACHER_SHARE)
        teacher = Teacher(open_run(base).model, share) if share else None
        history = train_recommender(recommender, replace(TUNING, seed=cell.seed, **differences), teacher=teacher).history
    seconds = {"pretrain": runs.load(base)["seconds"], "fit": round(fitted - start, 3), "tune": round(time.perf_counter() - fitted, 3)}
    folder = folders.work / "models" / folders.results.name / cell.file_name.removesuffix(".json")
    folder.mkdir(parents=True, exist_ok=True)
    recommender.save(folder)
    return {**_result(cell, folders, recommender, full_run, seconds=seconds, file=folder / MODEL_FILE), "tuning": history}


def _restarted(cell: Cell, folders: Folders, fitted: Recommender) -> tuple[Recommender, list[dict[str, Any]]]:
    """A new model with fitted tables, trained as the full model was, and its history."""
    training = _training(cell, folders, cell.embedding_dim)
    new = build(training["data"], training["model"], training["model_settings"], seed=cell.seed)
    move_tables(fitted.model, new.model)
    return new, train_recommender(new, training["settings"], from_scratch=False).history


def _result(cell: Cell, folders: Folders, recommender: Recommender, full_run: Path, *, seconds: Mapping[str, float], file: Path) -> dict[str, Any]:
    """The keys of a result, after the one look at the test split."""
    start = time.perf_counter()
    full = open_run(full_run)
    test = Loader(full.data, "test", full.schema, batch_size=PREDICT_BATCH)
    labels, logits = predict(recommender.model, test)
    evaluated = time.perf_counter()
    _, full_logits = predict(full.model, test)
    difference = delong_difference(labels, logits, full_logits)
    sizes, full_sizes = report(recommender.model), report(full.model)
    quality = {
        "auc": auc(labels, logits),
        "logloss": log_loss(labels, logits),
        "calibration": calibration_ratio(labels, logits),
        "auc_diff": difference.difference,
        "auc_diff_low": difference.low,
        "auc_diff_high": difference.high,
    }
    size = {
        "tables": sizes.tables,
        "tables_full": full_sizes.tables,
        "model": sizes.model,
        "model_full": full_sizes.model,
        "file": file.stat().st_size,
        "vocabulary": vocabulary_nbytes(full.data),
    }
    batch = next(Loader(full.data, "test", full.schema, batch_size=SPEED_BATCH).batches())
    speed, full_speed = lookups_per_second([recommender.model, full.model], batch.features)
    result = {
        "run": {
            "suite": folders.results.name,
            "experiment": cell.experiment.name,
            "dataset": cell.experiment.dataset,
            "backbone": cell.backbone,
            "method": cell.method,
            "family": cell.family,
            "ratio": cell.ratio,
            "dense_ratio": cell.dense_ratio,
            "from_scratch": cell.from_scratch,
            "embedding_dim": cell.embedding_dim,
            "seed": cell.seed,
        },
        "settings": {key: getattr(cell.experiment, key) for key in ("prepare", "model", "train", "tuning")},
        "quality": quality,
        "size": size,
        "seconds": {**seconds, "evaluate": round(evaluated - start, 3)},
        "speed": {"lookups_per_second": round(speed), "lookups_per_second_full": round(full_speed), "kernel": fused.is_built()},
        "peak_memory": runs.peak_memory(),
        "machine": runs.machine(),
        "versions": runs.versions(),
        "commit": runs.commit(),
    }
    known = [other for results in read_suites(folders.results.parent).values() for other in results]
    return {**result, "size": {**size, "opponent": opponent(result, known)}}


def opponent(result: Mapping[str, Any], results: Iterable[Mapping[str, Any]]) -> int | None:
    """Bytes of the tables of the smallest plain model of the same log, backbone and seed that is at least as good; None if none is."""
    plain = [other for other in results if other["run"]["family"] in PLAIN and _place(other) == _place(result)]
    return min((other["size"]["tables"] for other in plain if other["quality"]["auc"] >= result["quality"]["auc"]), default=None)


def _place(result: Mapping[str, Any]) -> tuple[str, str, str, int]:
    """Results with the same one have the same test rows: thresholds and transforms change what a model sees of them."""
    run, options = result["run"], result["settings"].get("prepare", {})
    rows = {key: value for key, value in options.items() if key not in ("min_count", "max_length", "numeric")}
    return run["dataset"], json.dumps(rows, sort_keys=True), run["backbone"], run["seed"]


def read_suites(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Name of each suite with a folder in this one -> its results."""
    return {suite.name: read_results(suite) for suite in sorted(folder.iterdir()) if suite.is_dir()}


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results of a suite, in the order of their names."""
    return [_renamed(json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]


def _renamed(result: dict[str, Any]) -> dict[str, Any]:
    """A result in today's words: smaller models were once of the family SmallDim, which now is a method with other settings."""
    run = result["run"]
    if run["method"] == f"SmallDim(embedding_dim={run['embedding_dim']})":
        run |= {"family": SMALLER, "method": "Full()"}
    return result
