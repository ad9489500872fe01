"""What a benchmark runs: small TOML files, differences from defaults only."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

from leanrec.data.prepare import prepare
from leanrec.methods import parse
from leanrec.train import TrainSettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FULL, TUNED, SMALLER, DENSE, RESTARTED = "Full", "Tuned", "Smaller", "Dense", "Restarted"
PLAIN = (FULL, SMALLER, "Scalar", "DropRare")
"""Families that a compressor has to beat: what anybody can do without it."""
METHOD_KEYS = ("methods", "restarted", "scratch", "settings", "small_methods")
LISTS = {"backbones": str, "seeds": int, "ratios": int | float, "small_dims": int, "dense_ratios": int | float} | dict.fromkeys(METHOD_KEYS, str)
VALUES = {"dataset": str, "embedding_dim": int, "tuned_full": bool, "prepare": dict, "model": dict, "train": dict, "tuning": dict | bool}
TRAIN_OPTIONS = {entry.name for entry in fields(TrainSettings)} - {"seed"}
OPTIONS = {
    "prepare": signature(prepare).parameters.keys() - {"inputs", "out", "valid", "test", "config", "progress"},
    "train": TRAIN_OPTIONS,
    "tuning": TRAIN_OPTIONS | {"teacher_share"},
}


@dataclass(frozen=True)
class Experiment:
    """A TOML file: one log and all that is done with it; every combination is one run with one result.

    Attributes:
        name: The file's name without its ending.
        dataset: Folder of a log with splits, below the folder of the logs.
        backbones: Reference models.
        embedding_dim: Of the full model.
        seeds: Of initial weights, order of rows, fit and tuning.
        methods: Text forms whose settings are chosen for each of `ratios`.
        ratios: Bytes of all tables before / after; a method that cannot become so small takes its smallest settings.
        restarted: Text forms of which the fitted tables, at each of `ratios`, go into a new model, whose other weights start at random and which is
            trained as the full model was, codes frozen, in place of the fine-tuning: the third stage of MEC as published (2025).
        scratch: Text forms that the tables have from the first step of training on, at each of `ratios`; as they stand where there are none.
        settings: Text forms that are taken as they stand.
        small_dims: Embedding dimensions of plain smaller models.
        small_methods: Text forms that each of these smaller models is compressed with, as they stand.
        dense_ratios: Bytes of all linear layers before / after, of the full model with its tables as they are.
        tuned_full: Whether the full model is fine-tuned like the compressed ones too, itself its teacher: what of their quality is the fine-tuning's.
        prepare: Options of `leanrec.data.prepare.prepare` beside the log and the folder.
        model, train, tuning: Differences from the defaults; tuning may hold `teacher_share` too. `tuning = false` compresses without fine-tuning.
    """

    name: str
    dataset: str
    backbones: tuple[str, ...] = ("deepfm",)
    embedding_dim: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] = ()
    ratios: tuple[float, ...] = ()
    restarted: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    small_dims: tuple[int, ...] = ()
    small_methods: tuple[str, ...] = ()
    dense_ratios: tuple[float, ...] = ()
    tuned_full: bool = False
    prepare: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    tuning: Mapping[str, Any] | bool = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Experiment:
        """Read a TOML file.

        Raises:
            ValueError: It is missing, no TOML, or has a key or a value that no experiment has.
        """
        try:
            raw = tomllib.loads(path.read_text())
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"{path}: cannot be read as an experiment ({error}).") from None
        try:
            _check(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        settings: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
        return cls(name=path.stem, **settings)


def _check(raw: Mapping[str, Any]) -> None:
    """Raise ValueError for what a TOML file has and no experiment takes, before anything is run."""
    unknown = sorted(raw.keys() - {*LISTS, *VALUES})
    if unknown or "dataset" not in raw:
        raise ValueError(f"unknown keys {unknown} or no dataset. An experiment has {sorted({*LISTS, *VALUES})}.")
    for key, value in raw.items():
        values, kind = (value, LISTS[key]) if key in LISTS else ([value], VALUES[key])
        if not isinstance(values, list) or not all(isinstance(entry, kind) for entry in values):
            raise ValueError(f"{key} = {value!r} must be {'a list of ' * (key in LISTS)}{getattr(kind, '__name__', kind)}.")
    for text in (text for key in METHOD_KEYS for text in raw.get(key, [])):
        parse(text)
    for part, taken in OPTIONS.items():
        options = raw[part] if isinstance(raw.get(part), dict) else {}
        if wrong := sorted(options.keys() - taken):
            raise ValueError(f"[{part}] {', '.join(wrong)} is unknown. It takes {sorted(taken)}.")
        try:
            TrainSettings(**{key: value for key, value in options.items() if key in TRAIN_OPTIONS})
            if not 0 <= options.get("teacher_share", 0) <= 1:
                raise ValueError(f"teacher_share={options['teacher_share']} must be from 0 to 1.")
        except (TypeError, ValueError) as error:
            raise ValueError(f"[{part}] {error}") from None


@dataclass(frozen=True)
class Cell:
    """One run: a method at one size on one model of one seed. `ratio` is None where the settings are taken as they stand.

    `from_scratch`: the model is trained with compressed tables, not compressed after its training. `dense_ratio`: its linear layers are
    factored too.
    """

    experiment: Experiment
    backbone: str
    family: str
    method: str
    embedding_dim: int
    seed: int
    ratio: float | None = None
    from_scratch: bool = False
    dense_ratio: float | None = None

    @property
    def is_trained(self) -> bool:
        """Whether it is a full model of its dimension, as it came out of training."""
        return self.family in (FULL, SMALLER) and self.method == "Full()"

    @property
    def file_name(self) -> str:
        """Name of its result: readable, and one for each cell."""
        size = f"-{self.ratio:g}x" if self.ratio is not None else ""
        # Not the method SmallDim: smaller models had this name in results before there was such a method.
        short = parse(self.method).short()
        if self.family == SMALLER:
            short = f"SmallDim(embedding_dim={self.embedding_dim})" + (f" {short}" if short != "Full()" else "")
        size += f"-dense-{self.dense_ratio:g}x" if self.dense_ratio is not None else ""
        method = re.sub(r"[^A-Za-z0-9.=]+", "-", short).strip("-") + ("-scratch" if self.from_scratch else "")
        method += {TUNED: "-tuned", RESTARTED: "-restarted"}.get(self.family, "")
        return f"{self.experiment.name}-{self.backbone}-{method}{size}-d{self.embedding_dim}-seed{self.seed}.json"


def cells(experiment: Experiment) -> Iterator[Cell]:
    """All runs of an experiment."""
    for backbone in experiment.backbones:
        for seed in experiment.seeds:
            full = Cell(experiment, backbone, FULL, "Full()", experiment.embedding_dim, seed)
            yield full
            if experiment.tuned_full:
                yield replace(full, family=TUNED)
            for dim in experiment.small_dims:
                smaller = replace(full, family=SMALLER, embedding_dim=dim)
                yield smaller
                for text in experiment.small_methods:
                    yield replace(smaller, method=repr(parse(text)))
            for ratio in experiment.dense_ratios:
                yield replace(full, family=DENSE, dense_ratio=ratio)
            for text in experiment.settings:
                yield replace(full, family=type(parse(text)).__name__, method=repr(parse(text)))
            for text in experiment.methods:
                for ratio in experiment.ratios:
                    yield replace(full, family=type(parse(text)).__name__, method=repr(parse(text)), ratio=ratio)
            for text in experiment.restarted:
                for ratio in experiment.ratios:
                    yield replace(full, family=RESTARTED, method=repr(parse(text)), ratio=ratio)
            for text in experiment.scratch:
                for size in experiment.ratios or (None,):
                    yield replace(full, family=type(parse(text)).__name__, method=repr(parse(text)), ratio=size, from_scratch=True)
