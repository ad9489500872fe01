"""`leanrec prepare`: raw click logs -> ids, counts and Parquet shards, in memory that the rows do not decide."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leanrec import runs
from leanrec.data.columns import Column, describe_columns
from leanrec.data.encode import build_vocabularies, describe_fields, encode
from leanrec.data.formats import open_source
from leanrec.data.inputs import find_files, find_splits, refuse_repeats
from leanrec.data.options import resolve_settings
from leanrec.data.schema import Schema
from leanrec.data.settings import SPLITS, Settings
from leanrec.data.source import BadRows, read_sample
from leanrec.data.staging import Progress, stage
from leanrec.data.vocabulary import vocabulary_nbytes

COMMAND = "prepare"
Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Prepared:
    """A prepared log.

    Attributes:
        folder: Where it lies.
        schema: Its fields.
        columns: What each raw column was read as, in input order: rows of `column`, `kind`, `why`, `vocabulary`, `num_embeddings`.
        rows: Split -> rows.
        skipped: Reason -> rows that were left out.
        skipped_first: The first few of them, in words.
        vocabulary_nbytes: Bytes on disk of the raw value -> id maps.
        fingerprint: SHA-256 of the input files.
    """

    folder: Path
    schema: Schema
    columns: tuple[dict[str, Any], ...]
    rows: dict[str, int]
    skipped: dict[str, int]
    skipped_first: tuple[str, ...]
    vocabulary_nbytes: int
    fingerprint: str


def prepare(
    inputs: Paths,
    out: str | Path,
    *,
    valid: Paths | None = None,
    test: Paths | None = None,
    config: str | Path | None = None,
    format: str | None = None,
    delimiter: str | None = None,
    header: bool | None = None,
    columns: str | Sequence[str] | None = None,
    kinds: Mapping[str, str] | Sequence[str] | None = None,
    min_count: int | str | Sequence[str] | None = None,
    max_length: int | None = None,
    numeric: str | None = None,
    split: str | Sequence[float] | None = None,
    split_by: str | None = None,
    seed: int | None = None,
    on_bad_row: str | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Turn a raw click log into ids.

    Every option but the first ones may also stand in the TOML file `config`; an argument wins over it. None leaves the default.
    If `out` already holds the result of the same call on the same input, that is returned.

    Args:
        inputs: Files, folders or patterns; or one folder with `train`, `valid` and `test` files, which are then the splits.
        out: The folder to write. It appears when the work is done.
        valid: Files of the validation split; None to take it out of `inputs`.
        test: Files of the test split; None to take it out of `inputs`.
        config: TOML file of options.
        format: "csv", "tsv", "parquet", "libsvm", "criteo" or "avazu"; by default the names of the files tell.
        delimiter: What separates the columns of text; by default a comma for csv, a tab for tsv and criteo.
        header: Whether the first line of text names the columns (default, but for criteo).
        columns: Names of the columns of text without a header, as a list or as "a,b,c".
        kinds: Column or pattern -> kind, as a mapping or as "COLUMN=KIND" texts. Kinds are categorical, numeric, multivalued, sequence, label,
            timestamp and ignore; "multivalued:|" says what separates the elements, "sequence:,@item" that they are values of the column `item`.
        min_count: Values that are rarer in training become unknown (default 1): a number, or texts of a number or "COLUMN=NUMBER".
        max_length: Elements kept of a list, the first of a multivalued cell and the last of a sequence (default 50).
        numeric: "standardize" (default, but for criteo) or "log-bucket".
        split: Shares of the splits that have no files of their own, as numbers or as "0.8,0.1,0.1" (the default).
        split_by: Column of a time: the oldest rows are for training and the newest for the test. By default rows are split at random.
        seed: Decides the random split (default 0).
        on_bad_row: "error" (default), or "skip" to leave out and count rows that cannot be read.
        progress: Called with what is being done and the rows done so far.

    Raises:
        ValueError: An option, a file or a row is wrong; the message says which, and what would be right.
    """
    splits = _find_inputs(inputs, valid, test)
    settings = resolve_settings(
        Path(config) if config is not None else None,
        format=format,
        delimiter=delimiter,
        header=header,
        columns=columns,
        kinds=kinds,
        min_count=min_count,
        max_length=max_length,
        numeric=numeric,
        split=split,
        split_by=split_by,
        seed=seed,
        on_bad_row=on_bad_row,
    )
    out = Path(out)
    recorded = {"inputs": {name: list(map(str, paths)) for name, paths in splits.items()}, **asdict(settings)}
    fingerprint = runs.fingerprint([path for paths in splits.values() for path in paths])
    if not runs.is_finished(out, command=COMMAND, settings=recorded):
        with runs.create(out, command=COMMAND, settings=recorded) as run:
            run.results["fingerprint"] = fingerprint
            run.results.update(_write(run.folder, splits, settings, progress or _silent))
    prepared = load_prepared(out)
    if prepared.fingerprint != fingerprint:
        raise ValueError(f"{out}: was made of these files before they changed. Choose another --out or delete it.")
    return prepared


def load_prepared(folder: Path) -> Prepared:
    """What `prepare` wrote into `folder`.

    Raises:
        ValueError: It holds no finished run of `prepare`.
    """
    record = runs.load(folder)
    if record["command"] != COMMAND:
        raise ValueError(f"{folder}: holds the result of `leanrec {record['command']}`. Give a folder that `leanrec prepare` wrote.")
    return Prepared(
        folder=folder,
        schema=Schema.load(folder / "schema.json"),
        columns=tuple(record["columns"]),
        rows=record["rows"],
        skipped=record["skipped"],
        skipped_first=tuple(record["skipped_first"]),
        vocabulary_nbytes=record["vocabulary_nbytes"],
        fingerprint=record["fingerprint"],
    )


def _find_inputs(inputs: Paths, valid: Paths | None, test: Paths | None) -> dict[str, list[Path]]:
    """Split -> its files; those of the training split are divided among the splits that have none."""
    splits = find_splits(_listed(inputs)) or {"train": find_files(_listed(inputs))}
    given = {"valid": valid, "test": test}
    splits |= {name: find_files(_listed(paths)) for name, paths in given.items() if paths is not None}
    refuse_repeats([file for files in splits.values() for file in files])
    return splits


def _listed(paths: Paths) -> Sequence[str | Path]:
    return [paths] if isinstance(paths, str | Path) else paths


def _write(folder: Path, splits: Mapping[str, Sequence[Path]], settings: Settings, progress: Progress) -> dict[str, Any]:
    """Everything but `run.json`, and what belongs there."""
    bad_rows, staged = BadRows(settings.on_bad_row), folder / "staged"
    sources = {name: open_source(paths, settings) for name, paths in splits.items()}
    columns = describe_columns(read_sample(sources["train"]), settings)
    shares = _shares(settings, [name for name in SPLITS if name == "train" or name not in splits])
    rows: dict[str, int] = {}
    for name, source in sources.items():
        parts = shares if name == "train" else {name: 1.0}
        rows |= stage(source, staged, columns, settings, shares=parts, bad_rows=bad_rows, progress=progress)
    rows = {name: rows[name] for name in SPLITS}
    empty = [name for name, count in rows.items() if not count]
    if empty:
        raise ValueError(f"The {empty[0]} split has no rows (rows per split: {rows}). More rows, another split or files of its own are needed.")
    vocabularies = build_vocabularies(staged, folder, columns, progress)
    schema = describe_fields(staged, columns, vocabularies, splits=list(rows))
    schema.save(folder / "schema.json")
    for name in rows:
        encode(staged / name, folder / name, schema, vocabularies, progress)
    shutil.rmtree(staged)
    return {
        "rows": rows,
        "skipped": dict(bad_rows.counts),
        "skipped_first": bad_rows.first,
        "columns": [_row(column, schema) for column in columns],
        "vocabulary_nbytes": vocabulary_nbytes(folder),
    }


def _shares(settings: Settings, names: Sequence[str]) -> dict[str, float]:
    """Split -> share of the rows of `inputs`."""
    defaults = {1: (1.0,), 2: (0.9, 0.1), 3: (0.8, 0.1, 0.1)}
    shares = settings.split or defaults[len(names)]
    if len(shares) != len(names):
        raise ValueError(f"split={','.join(map(str, shares))}: {len(names)} shares are needed, for {', '.join(names)}; the other splits have files.")
    return dict(zip(names, shares, strict=True))


def _row(column: Column, schema: Schema) -> dict[str, Any]:
    num_embeddings = schema.vocabularies.get(column.vocabulary) if column.vocabulary else None
    return {"column": column.name, "kind": column.kind, "why": column.why, "vocabulary": column.vocabulary, "num_embeddings": num_embeddings}


def _silent(description: str, rows: int) -> None:
    """Progress that nobody asked for."""
