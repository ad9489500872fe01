"""A model with the log it was made for: what `train` and `compress` leave in a run folder and the later verbs open."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from leanrec import models, runs, storage
from leanrec.budget import Sizes, fit_budget
from leanrec.compress import choose, compress
from leanrec.data.loader import Loader
from leanrec.data.schema import Schema
from leanrec.data.vocabulary import read_counts
from leanrec.embeddings import tables
from leanrec.methods import Method, parse
from leanrec.models.layers import module_names
from leanrec.ops.sensitivity import Sensitivity
from leanrec.sensitivity import measure_sensitivity

MODEL_FILE, SCHEMA_FILE = "model.safetensors", "schema.json"
PREDICT_BATCH = 16_384
SENSITIVITY_BATCH, SENSITIVITY_BATCHES = 4096, 128  # half a million rows of the log at most, from all over it
HELD_OUT_BATCHES = 16  # of PREDICT_BATCH rows

Work: TypeAlias = Callable[[str, int, int], None]
"""Who is told of long work: what it is, how much of it is done, and of how much."""


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
        ValueError: The folder holds no such run, its files are damaged, or its log was prepared anew, so that ids stand for other values.
    """
    record = runs.load(folder)
    if not (folder / MODEL_FILE).is_file():
        kind = (
            "a table without a model, of which run.json has the figures"
            if "table" in record
            else f"the result of `leanrec {record['command']}`, no model"
        )
        raise ValueError(f"{folder}: holds {kind}. Give a run of `leanrec train` or of `leanrec compress` on a model.")
    recommender = record.get("recommender")
    if not recommender:
        raise ValueError(f'{folder}: its run.json does not say what model lies here ("recommender"). Train or compress again.')
    data = Path(recommender["data"])
    if (data / runs.RUN_FILE).is_file() and log_identity(data) != recommender.get("log"):
        raise ValueError(f"{folder}: was trained on another log than the one that lies at {data} now. Prepare that one again, or train anew.")
    schema = Schema.load(folder / SCHEMA_FILE)
    with torch.device("meta"):
        model = models.build(recommender["name"], schema, **recommender["settings"])
    model = storage.load(model, folder / MODEL_FILE)
    return Recommender(model, schema, data, recommender["name"], recommender["settings"])


def describe(recommender: Recommender) -> dict[str, Any]:
    """What `run.json` keeps of a recommender so that `open_run` can build it again."""
    data = recommender.data.resolve()
    return {"name": recommender.name, "settings": dict(recommender.settings), "data": str(data), "log": log_identity(data)}


def log_identity(data: Path) -> str:
    """The same text for the same prepared log, whose ids stand for the same values: input files and all settings, but not where they lie.

    Raises:
        ValueError: `data` is no prepared log.
    """
    record = runs.load(data)
    inputs = {split: [Path(path).name for path in paths] for split, paths in record["settings"].get("inputs", {}).items()}
    text = json.dumps([record.get("fingerprint"), record["settings"] | {"inputs": inputs}], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def table_counts(recommender: Recommender) -> dict[str, Tensor]:
    """Path of each table -> (V,) int64 occurrences of its ids in the training split.

    The field layer names a table after its vocabulary; tables of a user's own model that are named otherwise have no counts.
    """
    names = module_names(list(recommender.schema.vocabularies))
    counts = {names[vocabulary]: count for vocabulary, count in read_counts(recommender.data, recommender.schema).items()}
    named = {path: counts.get(path.rsplit(".", 1)[-1]) for path in tables(recommender.model)}
    return {path: count for path, count in named.items() if count is not None}


def compress_tables(
    recommender: Recommender,
    method: str | Mapping[str, str | None],
    *,
    ratio: float | None = None,
    nbytes: int | None = None,
    fit: bool = True,
    seed: int = 0,
    on_work: Work | None = None,
) -> None:
    """Compress the tables of a recommender, in place, with the counts of its log.

    Args:
        recommender: Its model is changed.
        method: Text form of one method for all tables, or glob on the tables' paths -> text form; None leaves a table alone.
        ratio: Bytes of all tables before / after, reached by choosing the method's settings for each table; or
        nbytes: bytes of all tables after. With neither, the method is taken as it stands.
        fit: Whether the tables take over the rows that are there, or start at random.
        seed: Source of the random draws.
        on_work: Told as tables are measured, weighed for the budget and fitted.

    Raises:
        ValueError: No such method or table, a method does not fit, or the budget is out of reach.
    """
    plan: Method | dict[str, Method | None]
    plan = parse(method) if isinstance(method, str) else {glob: None if text is None else parse(text) for glob, text in method.items()}
    choose(recommender.model, plan)  # raises what is wrong with it before anything is measured
    methods, has_budget = [plan] if isinstance(plan, Method) else list(plan.values()), ratio is not None or nbytes is not None
    if has_budget:
        if not isinstance(plan, Method):
            raise ValueError("A ratio or a number of bytes goes with one method for all tables, not with a method for each.")
        Sizes(recommender.model, plan).budget(ratio=ratio, nbytes=nbytes)  # raises before anything is measured
    counts = table_counts(recommender)
    sensitivities = table_sensitivities(recommender, methods, seed=seed, on_work=on_work) if fit else None
    if has_budget:
        sizing = told_of_tables(on_work, "sizes of table")
        held_out = None if sensitivities is None else HeldOut(recommender, seed)
        plan = fit_budget(
            recommender.model,
            plan,
            ratio=ratio,
            nbytes=nbytes,
            counts=counts,
            sensitivities=sensitivities,
            held_out=held_out,
            seed=seed,
            progress=sizing,
        )
    fitting = told_of_tables(on_work, "table")
    recommender.model = compress(recommender.model, plan, counts=counts, sensitivities=sensitivities, fit=fit, seed=seed, progress=fitting)


@dataclass(frozen=True)
class HeldOut:
    """Rows of the validation split as `fit_budget` takes them: features and labels."""

    recommender: Recommender
    seed: int

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        loader = Loader(self.recommender.data, "valid", self.recommender.schema, batch_size=PREDICT_BATCH, seed=self.seed)
        for batch in islice(loader.batches(), HELD_OUT_BATCHES):
            yield batch.features, batch.labels


def table_sensitivities(
    recommender: Recommender, methods: Iterable[Method | None], *, seed: int, on_work: Work | None = None
) -> dict[str, Sensitivity] | None:
    """Of all tables, measured on rows of the training split; None where no method uses them."""
    if not any(method is not None and method.uses_sensitivity for method in methods):
        return None
    loader = Loader(recommender.data, "train", recommender.schema, batch_size=SENSITIVITY_BATCH, seed=seed)

    def features() -> Iterator[Any]:
        total = min(len(loader), SENSITIVITY_BATCHES)
        for done, batch in enumerate(islice(loader.batches(), SENSITIVITY_BATCHES)):
            if on_work is not None:
                on_work("sensitivity of the tables", done, total)
            yield batch.features

    return measure_sensitivity(recommender.model, features(), counts=table_counts(recommender), seed=seed)


def told_of_tables(on_work: Work | None, what: str) -> Work | None:
    """What a call that goes table by table tells: the table's path after what is done with it."""
    return on_work and (lambda path, done, total: on_work(f"{what} {path}", done, total))


@torch.no_grad()
def predict(model: nn.Module, loader: Loader) -> tuple[Tensor, Tensor]:
    """Labels and logits of a split, in the loader's order: (N,) float32 each. The model is left in the mode it was in."""
    training = model.training
    model.eval()
    outputs = [(batch.labels, model(batch.features)) for batch in loader.batches()]
    model.train(training)
    labels, logits = zip(*outputs, strict=True)
    return torch.cat(labels), torch.cat(logits).float()
