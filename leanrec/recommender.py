"""A model with the log it was made for: what `train` and `compress` leave in a run folder and the later verbs open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanrec import models, runs, storage
from leanrec.data.loader import Loader
from leanrec.data.schema import Schema
from leanrec.data.vocabulary import read_counts
from leanrec.embeddings import tables
from leanrec.models.layers import module_names

MODEL_FILE, SCHEMA_FILE = "model.safetensors", "schema.json"
PREDICT_BATCH = 16_384


@dataclass
class Recommender:
    """A recommender and where it comes from.

    Attributes:
        model: Takes a batch's features, gives logits (B,).
        schema: The fields that the model reads.
        data: Folder of the prepared log.
        name: The model as `models.build` takes it.
        settings: The model's settings, literals.
    """

    model: nn.Module
    schema: Schema
    data: Path
    name: str
    settings: Mapping[str, Any]

    def save(self, folder: Path) -> None:
        """Write model and schema into a run folder; `open_run` also needs the folder's `run.json`."""
        storage.save(self.model, folder / MODEL_FILE)
        self.schema.save(folder / SCHEMA_FILE)


def build(data: Path, name: str, settings: Mapping[str, Any], *, seed: int) -> Recommender:
    """A model with fresh weights for a prepared log, drawn from `seed`; the global random state stays as it was."""
    schema = Schema.load(data / SCHEMA_FILE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.build(name, schema, **settings)
    return Recommender(model, schema, data, name, settings)


def open_run(folder: Path) -> Recommender:
    """The recommender that `leanrec train` or `leanrec compress` wrote.

    Raises:
        ValueError: The folder holds no such run, or its files are damaged.
    """
    record = runs.load(folder)
    if not (folder / MODEL_FILE).is_file():
        raise ValueError(
            f"{folder}: holds the result of `leanrec {record['command']}`, no model. Give a run of `leanrec train` or `leanrec compress`."
        )
    recommender = record["recommender"]
    schema = Schema.load(folder / SCHEMA_FILE)
    with torch.device("meta"):
        model = models.build(recommender["name"], schema, **recommender["settings"])
    model = storage.load(model, folder / MODEL_FILE)
    return Recommender(model, schema, Path(recommender["data"]), recommender["name"], recommender["settings"])


def describe(recommender: Recommender) -> dict[str, Any]:
    """What `run.json` keeps of a recommender so that `open_run` can build it again."""
    return {"name": recommender.name, "settings": dict(recommender.settings), "data": str(recommender.data.resolve())}


def table_counts(recommender: Recommender) -> dict[str, Tensor]:
    """Path of each table -> (V,) int64 occurrences of its ids in the training split.

    The field layer names a table after its vocabulary; tables of a user's own model that are named otherwise have no counts.
    """
    names = module_names(list(recommender.schema.vocabularies))
    counts = {names[vocabulary]: count for vocabulary, count in read_counts(recommender.data, recommender.schema).items()}
    named = {path: counts.get(path.rsplit(".", 1)[-1]) for path in tables(recommender.model)}
    return {path: count for path, count in named.items() if count is not None}


@torch.no_grad()
def predict(model: nn.Module, loader: Loader) -> tuple[Tensor, Tensor]:
    """Labels and logits of a split, in the loader's order: (N,) float32 each. The model is left in the mode it was in."""
    training = model.training
    model.eval()
    outputs = [(batch.labels, model(batch.features)) for batch in loader.batches()]
    model.train(training)
    labels, logits = zip(*outputs, strict=True)
    return torch.cat(labels), torch.cat(logits).float()
