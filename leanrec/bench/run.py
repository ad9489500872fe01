"""Experiments -> one result per run, kept as JSON."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from leanrec import runs
from leanrec.bench.experiment import FULL, PLAIN, SMALL_DIM, Cell, Experiment, cells
from leanrec.data.loader import Loader
from leanrec.data.prepare import prepare
from leanrec.data.vocabulary import vocabulary_nbytes
from leanrec.methods import parse
from leanrec.ops.intervals import delong_difference
from leanrec.ops.metrics import auc, calibration_ratio, log_loss
from leanrec.recommender import MODEL_FILE, PREDICT_BATCH, Recommender, open_run, predict
from leanrec.report import report
from leanrec.train import TrainSettings, train_recommender, train_run
from leanrec.tune import TUNING, fit


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
        num_jobs: Runs at a time, each in a process of its own with one thread.
        on_result: Called with (result's name, runs done, runs in all).
    """
    loaded = [(Experiment.load(path), Folders(logs, work, results / path.resolve().parent.name)) for path in experiments]
    for experiment, folders in loaded:
        _prepare(experiment, folders)
    todo, done = [(cell, folders) for experiment, folders in loaded for cell in cells(experiment)], []
    # What others wait for comes first: full models, then the plain ones that the rest is measured against.
    for phase in (lambda cell: cell.family == FULL, lambda cell: cell.family != FULL and cell.family in PLAIN, lambda cell: cell.family not in PLAIN):
        for path in _run_all([job for job in todo if phase(job[0])], num_jobs):
            done.append(path)
            if on_result is not None:
                on_result(path.name, len(done), len(todo))
    return done


def run_cell(job: tuple[Cell, Folders]) -> Path:
    """Run one cell, unless its result is there, and write the result."""
    cell, folders = job
    path = folders.results / cell.file_name
    if path.exists():
        return path
    torch.set_num_threads(1)
    folders.results.mkdir(parents=True, exist_ok=True)
    full_run = _trained(cell, folders, cell.experiment.embedding_dim)
    result = _trained_result(cell, folders, full_run) if cell.family in (FULL, SMALL_DIM) else _compressed_result(cell, folders, full_run)
    runs.write_atomically(path, json.dumps(result, indent=1) + "\n")
    return path


def _run_all(jobs: Sequence[tuple[Cell, Folders]], num_jobs: int) -> Iterator[Path]:
    """Each run in a fresh process: its peak memory is its own."""
    waiting = [job for job in jobs if not (job[1].results / job[0].file_name).exists()]
    yield from (folders.results / cell.file_name for cell, folders in jobs if (folders.results / cell.file_name).exists())
    if waiting:
        with multiprocessing.get_context("spawn").Pool(num_jobs, maxtasksperchild=1) as pool:
            yield from pool.imap_unordered(run_cell, waiting)


def _prepare(experiment: Experiment, folders: Folders) -> None:
    """Make the experiment's log ids, unless it is done."""
    prepare([folders.logs / experiment.dataset], folders.work / "data" / experiment.dataset)


def _trained(cell: Cell, folders: Folders, embedding_dim: int) -> Path:
    """A run folder with the trained model of a seed, shared by all cells that start from it."""
    experiment = cell.experiment
    out = folders.work / "runs" / f"{folders.results.name}-{experiment.name}-{cell.backbone}-d{embedding_dim}-seed{cell.seed}"
    settings = TrainSettings(**{**experiment.train, "seed": cell.seed})
    model = {**experiment.model, "embedding_dim": embedding_dim}
    train_run(folders.work / "data" / experiment.dataset, out, model=cell.backbone, model_settings=model, settings=settings)
    return out


def _trained_result(cell: Cell, folders: Folders, full_run: Path) -> dict[str, Any]:
    run = _trained(cell, folders, cell.embedding_dim)
    recommender = open_run(run)
    seconds = {"pretrain": runs.load(run)["seconds"], "fit": 0.0, "tune": 0.0}
    return _result(cell, folders, recommender, full_run, seconds=seconds, file=run / MODEL_FILE)


def _compressed_result(cell: Cell, folders: Folders, full_run: Path) -> dict[str, Any]:
    experiment = cell.experiment
    recommender = open_run(full_run)
    start = time.perf_counter()
    fit(recommender, parse(cell.method), ratio=cell.ratio, seed=cell.seed)
    fitted, history = time.perf_counter(), []
    if experiment.tuning is not False:
        differences = {} if experiment.tuning is True else dict(experiment.tuning)
        history = train_recommender(recommender, replace(TUNING, seed=cell.seed, **differences)).history
    seconds = {"pretrain": runs.load(full_run)["seconds"], "fit": round(fitted - start, 3), "tune": round(time.perf_counter() - fitted, 3)}
    folder = folders.work / "models" / folders.results.name / cell.file_name.removesuffix(".json")
    folder.mkdir(parents=True, exist_ok=True)
    recommender.save(folder)
    return {**_result(cell, folders, recommender, full_run, seconds=seconds, file=folder / MODEL_FILE), "tuning": history}


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
        "opponent": _opponent(cell, folders, quality["auc"]),
    }
    return {
        "run": {
            "suite": folders.results.name,
            "experiment": cell.experiment.name,
            "dataset": cell.experiment.dataset,
            "backbone": cell.backbone,
            "method": cell.method,
            "family": cell.family,
            "ratio": cell.ratio,
            "embedding_dim": cell.embedding_dim,
            "seed": cell.seed,
        },
        "settings": {key: getattr(cell.experiment, key) for key in ("model", "train", "tuning")},
        "quality": quality,
        "size": size,
        "seconds": {**seconds, "evaluate": round(evaluated - start, 3)},
        "peak_memory": runs.peak_memory(),
        "machine": runs.machine(),
        "versions": runs.versions(),
        "commit": runs.commit(),
    }


def _opponent(cell: Cell, folders: Folders, quality: float) -> int | None:
    """Bytes of the tables of the smallest plain model of the same log, backbone and seed that is at least as good; None if none is."""
    results = read_results(folders.results)
    same = [result for result in results if _place(result) == (cell.experiment.name, cell.backbone, cell.seed) and result["run"]["family"] in PLAIN]
    return min((result["size"]["tables"] for result in same if result["quality"]["auc"] >= quality), default=None)


def _place(result: Mapping[str, Any]) -> tuple[str, str, int]:
    run = result["run"]
    return run["experiment"], run["backbone"], run["seed"]


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results of a suite, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
