"""`leanrec train`: from a prepared log to a run folder with a trained model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from leanrec import runs
from leanrec.data.loader import Loader
from leanrec.move import move_tables
from leanrec.ops.metrics import log_loss
from leanrec.recommender import PREDICT_BATCH, Recommender, build, compress_tables, describe, log_identity, open_run, predict
from leanrec.train.loop import Teacher, train
from leanrec.train.settings import TrainSettings
from leanrec.train.state import Progress

CHECKPOINT_FILE = "checkpoint.safetensors"


def train_run(
    data: Path,
    out: Path,
    *,
    model: str = "deepfm",
    model_settings: Mapping[str, Any] | None = None,
    settings: TrainSettings | None = None,
    tables: Path | None = None,
    method: str | Mapping[str, str | None] | None = None,
    ratio: float | None = None,
    nbytes: int | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """The record of a model trained on a prepared log; the run folder holds model, schema and `run.json`.

    A killed run goes on where it was when called again with the same arguments; a finished one is not repeated.

    Args:
        data: Folder that `leanrec prepare` wrote, with the splits train and valid.
        out: Run folder to write.
        model: Name of a reference model, or package.module:function.
        model_settings: Of the model; None takes its defaults.
        settings: Of the training; None takes the defaults.
        tables: Run whose tables, compressed or not, the new model starts from.
        method: Compression that the tables have from the first step on, as in `leanrec.tune.compress_run`; None trains them as they are.
        ratio: With a method: bytes of all tables before / after; or
        nbytes: with a method: bytes of all tables.
        on_step: Called after every step.

    Raises:
        ValueError: Data, model, settings, tables or method do not fit; `out` holds something else.
    """
    settings = settings or TrainSettings()
    arguments = {"data": data, "log": log_identity(data), "model": model, "model_settings": dict(model_settings or {}), "tables": tables}
    arguments |= asdict(settings)
    if method is not None:
        arguments |= {"method": method, "ratio": ratio, "nbytes": nbytes}
    elif ratio is not None or nbytes is not None:
        raise ValueError("ratio and nbytes say how small a method makes the tables; give a method as well.")
    if method is not None and tables is not None:
        raise ValueError("tables of another run are trained already and a method from scratch starts at random: give one of them.")
    if runs.is_finished(out, command="train", settings=arguments):
        return runs.load(out)
    prepared = runs.load(data)
    recommender = build(data, model, model_settings or {}, seed=settings.seed)
    if tables is not None:
        move_tables(open_run(tables).model, recommender.model)
    if method is not None:
        compress_tables(recommender, method, ratio=ratio, nbytes=nbytes, fit=False, seed=settings.seed)
    with runs.create(out, command="train", settings=arguments, resumable=True) as run:
        # Tables of another run have learned already: beginning anew would throw away what they hold.
        from_scratch, checkpoint = tables is None, run.folder / CHECKPOINT_FILE
        progress = train_recommender(recommender, settings, checkpoint=checkpoint, from_scratch=from_scratch, on_step=on_step)
        recommender.save(run.folder)
        run.results.update(recommender=describe(recommender), input=prepared["fingerprint"], **summary(recommender, progress))
        checkpoint.unlink()
    return runs.load(out)


def train_recommender(
    recommender: Recommender,
    settings: TrainSettings,
    *,
    checkpoint: Path | None = None,
    from_scratch: bool = False,
    teacher: Teacher | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> Progress:
    """Train a recommender on the splits train and valid of its own log, in place; for the arguments see `train`."""
    loader = Loader(recommender.data, "train", recommender.schema, batch_size=settings.batch_size, seed=settings.seed)
    validation = Loader(recommender.data, "valid", recommender.schema, batch_size=PREDICT_BATCH)
    return train(recommender.model, loader, validation, settings, checkpoint=checkpoint, from_scratch=from_scratch, teacher=teacher, on_step=on_step)


def summary(recommender: Recommender, progress: Progress) -> dict[str, Any]:
    """What a run keeps of its training: steps, the validation history and the quality of the weights that were kept."""
    labels, logits = predict(recommender.model, Loader(recommender.data, "valid", recommender.schema, batch_size=PREDICT_BATCH))
    return {"steps": progress.step, "history": progress.history, "valid": {"auc": progress.best_auc, "logloss": log_loss(labels, logits)}}
