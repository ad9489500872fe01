"""`leanrec compress`: the tables and the linear layers of a trained run made small, and the rest of it fitted to them again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from leanrec import runs, storage
from leanrec.data.loader import Loader
from leanrec.data.vocabulary import vocabulary_nbytes
from leanrec.dense import check_dense_ratio, compress_dense, factored_layers
from leanrec.embeddings import tables, unpooled
from leanrec.methods.base import Table
from leanrec.ops.metrics import auc, log_loss
from leanrec.recommender import PREDICT_BATCH, Recommender, Work, compress_tables, describe, open_run, predict
from leanrec.report import Report, report
from leanrec.search import Trial, search_summary, smallest_ratio
from leanrec.train import Progress, Teacher, TrainSettings, train_recommender
from leanrec.train.run import CHECKPOINT_FILE

FITTED_FILE, TRIALS_FILE = "fitted.safetensors", "trials.json"
DENSE_BATCHES = 16  # of PREDICT_BATCH rows: a hundred and more rows for each output of the widest usual layer

METHOD = "VRQ()"
"""What compresses, where nothing else is asked for."""

TUNING = TrainSettings(epochs=2, learning_rate=1e-4, evaluations_per_epoch=4, patience=4, keep_initial=True)
"""Careful by default: small steps, looked at often, and the model stays as it was unless validation prefers the tuned one."""

TEACHER_SHARE = 0.5
"""What the model before compression has to say in the fine-tuning: it holds back the over-fitting, which shows in the log loss first."""


def compress_run(
    run: Path,
    out: Path,
    *,
    method: str | Mapping[str, str | None] = METHOD,
    ratio: float | None = None,
    nbytes: int | None = None,
    max_auc_drop: float | None = None,
    dense_ratio: float | None = None,
    tuning: TrainSettings | None = TUNING,
    teacher_share: float | None = None,
    seed: int = 0,
    on_trial: Callable[[Trial], None] | None = None,
    on_work: Work | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """The record of a run with its tables compressed, its linear layers too if so asked, and, unless `tuning` is None, fine-tuned.

    The weights that are kept are the best on the validation split, or those before the first step of tuning where the others gained no more than
    chance can. A killed run goes on where it was, and a finished one is not repeated.

    Args:
        run: Run folder that `leanrec train` or `leanrec compress` wrote.
        out: Run folder to write.
        method: Text form of one method for all tables, or glob on the tables' paths -> text form; None leaves a table alone.
        ratio: Bytes of all tables before / after, reached by choosing the method's settings for each table; or
        nbytes: bytes of all tables after. With neither, the method is taken as it stands.
        max_auc_drop: Or as small as the validation AUC, before any tuning, stays no more than this below that of `run`; see `smallest_ratio`.
        dense_ratio: Bytes of all linear layers before / after, by `compress_dense` on rows of the training split once the tables are
            compressed; None leaves the layers as they are.
        tuning: How to fine-tune with the click loss.
        teacher_share: Share that what the model of `run` predicts has in the labels of the fine-tuning, 0 to 1; the clicks have the
            rest. None: `TEACHER_SHARE`, where there is a fine-tuning. It costs a look at the whole model for every batch; 0 leaves it out.
        seed: Source of the random draws of fit and tuning.
        on_trial: Called with every size that the search for `max_auc_drop` tries.
        on_work: Called with (what is done, how much of it, of how much) as tables are measured, weighed for the budget and fitted.
        on_step: Called after every step of tuning.

    Raises:
        ValueError: The run cannot be opened, a method does not fit, the budget is out of reach, or `out` holds something else.
    """
    if teacher_share is None:
        teacher_share = TEACHER_SHARE if tuning else 0.0
    arguments = {
        "run": run,
        "record": runs.identity(run),
        "method": method,
        "ratio": ratio,
        "nbytes": nbytes,
        "max_auc_drop": max_auc_drop,
        "dense_ratio": dense_ratio,
        "tuning": tuning and asdict(tuning),
        "teacher_share": teacher_share,
        "seed": seed,
    }
    if not 0 <= teacher_share <= 1:
        raise ValueError(f"teacher_share={teacher_share} must be from 0 to 1.")
    if teacher_share and tuning is None:
        raise ValueError(f"teacher_share={teacher_share} is for the fine-tuning, and there is none: tune for an epoch or more, or leave it out.")
    if max_auc_drop is not None:
        _check_search(method, ratio, nbytes, max_auc_drop)
    if runs.is_finished(out, command="compress", settings=arguments):
        return runs.load(out)
    recommender = open_run(run)
    if dense_ratio is not None:
        check_dense_ratio(recommender.model, dense_ratio)
    with runs.create(out, command="compress", settings=arguments, resumable=True) as current:
        fitted, trials = current.folder / FITTED_FILE, current.folder / TRIALS_FILE
        if fitted.exists():
            recommender.model = storage.load(recommender.model, fitted)
        else:
            if max_auc_drop is not None:
                assert isinstance(method, str)
                ratio = smallest_ratio(run, method, max_auc_drop=max_auc_drop, seed=seed, found=trials, on_trial=on_trial, on_work=on_work).ratio
            compress_tables(recommender, method, ratio=ratio, nbytes=nbytes, seed=seed, on_work=on_work)
            if dense_ratio is not None:
                compress_layers(recommender, dense_ratio, seed=seed)
            storage.save(recommender.model, fitted)
        sizes = size_report(recommender)
        progress = None
        if tuning is not None:
            settings, checkpoint = replace(tuning, seed=seed, keep_initial=True), current.folder / CHECKPOINT_FILE
            teacher = Teacher(open_run(run).model, teacher_share) if teacher_share else None
            progress = train_recommender(recommender, settings, checkpoint=checkpoint, teacher=teacher, on_step=on_step)
            checkpoint.unlink(missing_ok=True)  # there is none where the tuning diverged before its first
        recommender.save(current.folder)
        fitted.unlink()
        if max_auc_drop is not None:
            current.results.update(search_summary(trials))
            trials.unlink()
        current.results.update(
            recommender=describe(recommender),
            methods=methods_of(recommender),
            ranks={path: layer.rank for path, layer in factored_layers(recommender.model).items()},
            report=sizes.to_dict(),
            **_quality(recommender, progress),
        )
    return runs.load(out)


def _check_search(method: str | Mapping[str, str | None], ratio: float | None, nbytes: int | None, max_auc_drop: float) -> None:
    if ratio is not None or nbytes is not None or not isinstance(method, str):
        raise ValueError("max_auc_drop goes with one method for all tables, and with neither ratio nor nbytes: it looks for the ratio itself.")
    if not 0 <= max_auc_drop < 0.5:
        raise ValueError(f"max_auc_drop={max_auc_drop} must be at least 0 and below 0.5, such as 0.0005.")


def size_report(recommender: Recommender) -> Report:
    """Bytes and error of a recommender's tables, the vocabulary of its log included."""
    return report(recommender.model, vocabulary_nbytes=vocabulary_nbytes(recommender.data))


def methods_of(recommender: Recommender) -> dict[str, str | None]:
    """Path of each table -> text form of its method, None where the table is as it was."""
    found = {path: unpooled(module) for path, module in tables(recommender.model).items()}
    return {path: repr(table.method) if isinstance(table, Table) else None for path, table in found.items()}


def compress_layers(recommender: Recommender, ratio: float, *, seed: int) -> None:
    """Factor the linear layers of a recommender, in place, by what they put out on rows of the training split; see `compress_dense`."""
    loader = Loader(recommender.data, "train", recommender.schema, batch_size=PREDICT_BATCH, seed=seed)
    features = (batch.features for batch in islice(loader.batches(), DENSE_BATCHES))
    recommender.model = compress_dense(recommender.model, features, ratio=ratio)


def _quality(recommender: Recommender, progress: Progress | None) -> dict[str, Any]:
    """Validation quality of what is kept, and of what there was before tuning."""
    labels, logits = predict(recommender.model, Loader(recommender.data, "valid", recommender.schema, batch_size=PREDICT_BATCH))
    value = auc(labels, logits)
    valid = {"auc": value, "logloss": log_loss(labels, logits), "auc_untuned": progress.history[0]["auc"] if progress else value}
    tuning = {"steps": progress.step, "kept": progress.best_step, "history": progress.history} if progress else None
    return {"valid": valid, "tuning": tuning}
