"""`leanrec evaluate`: a run's model on one split, and against another run."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from leanrec import runs
from leanrec.data.loader import Loader
from leanrec.data.schema import Schema
from leanrec.data.vocabulary import read_counts
from leanrec.evaluate.predictions import Comparison, Evaluation, compare_predictions, evaluate_predictions
from leanrec.recommender import MODEL_FILE, PREDICT_BATCH, Recommender, open_run, predict


def evaluate_run(
    run: Path,
    *,
    out: Path | None = None,
    against: Path | None = None,
    split: str = "test",
    popularity: str | None = None,
    seed: int = 0,
) -> tuple[Evaluation, Comparison | None]:
    """Quality of a run's model and, with `against`, its paired difference to another run's model on the same rows.

    Args:
        run: Run folder that `leanrec train` or `leanrec compress` wrote.
        out: Folder to write; None takes one inside `run`, named after split and baseline, of which the last evaluation is kept.
        against: Run folder of the baseline, made for the same prepared log.
        split: Rows to look at.
        popularity: Categorical field whose ids' popularity sorts the rows into head, torso, tail and unseen; None takes the one with the most ids.
        seed: Of the bootstrap.

    Raises:
        ValueError: A run cannot be opened, the runs are of different logs, or the field is not there.
    """
    recommender, baseline = open_run(run), open_run(against) if against is not None else None
    if baseline is not None and baseline.data != recommender.data:
        raise ValueError(
            f"{against}: was trained on {baseline.data}, {run} on {recommender.data}. Rows can be compared only within one prepared log."
        )
    field = _popularity_field(recommender.schema, popularity)
    models = [runs.fingerprint([folder / MODEL_FILE]) for folder in (run, against) if folder is not None]
    settings = {"run": run.resolve(), "against": against and against.resolve(), "split": split, "popularity": field, "seed": seed, "models": models}
    place = out or run / ("evaluate-" + split + (f"-against-{against.name}" if against else ""))
    try:
        is_finished = runs.is_finished(place, command="evaluate", settings=settings)
    except ValueError:
        if out is not None or not (place / runs.RUN_FILE).is_file():
            raise
        shutil.rmtree(place)
        is_finished = False
    if is_finished:
        record = runs.load(place)
        return Evaluation.from_dict(record["evaluation"]), record["comparison"] and Comparison.from_dict(record["comparison"])
    loader = Loader(recommender.data, split, recommender.schema, batch_size=PREDICT_BATCH)
    with runs.create(place, command="evaluate", settings=settings) as current:
        labels, logits = predict(recommender.model, loader)
        ids, counts = (None, None) if field is None else _popularity(recommender, loader, field)
        evaluation = evaluate_predictions(labels, logits, bucket_ids=ids, counts=counts)
        comparison = None if baseline is None else compare_predictions(labels, logits, predict(baseline.model, loader)[1], seed=seed)
        current.results.update(evaluation=evaluation.to_dict(), comparison=comparison and comparison.to_dict())
    return evaluation, comparison


def _popularity(recommender: Recommender, loader: Loader, name: str) -> tuple[Tensor, Tensor]:
    """Each row's id in a field, and how often each id of the field occurs in the training split."""
    vocabulary = next(field.vocabulary for field in recommender.schema.fields if field.name == name)
    assert vocabulary is not None
    ids = torch.cat([batch.features[name] for batch in loader.batches()])
    return ids, read_counts(recommender.data, recommender.schema)[vocabulary]


def _popularity_field(schema: Schema, name: str | None) -> str | None:
    """The field that sorts rows by popularity: the one asked for, or the categorical one with the most ids; None where there is none."""
    sizes = {field.name: field.num_embeddings for field in schema.fields if field.kind == "categorical"}
    if name is not None and name not in sizes:
        raise ValueError(f"popularity={name!r}: no categorical field of that name. Choose one of {list(sizes)}.")
    return name or max(sizes, key=lambda each: sizes[each], default=None)
