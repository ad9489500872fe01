"""The second pass over a log: training counts -> vocabularies, typed rows -> ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from leanrec.data.columns import Column
from leanrec.data.schema import Field, Kind, Schema
from leanrec.data.shards import ShardWriter, read_shards
from leanrec.data.staging import Progress
from leanrec.data.vocabulary import Vocabulary, count_values, vocabulary_path


def build_vocabularies(staged: Path, out: Path, columns: Sequence[Column], progress: Progress) -> dict[str, Vocabulary]:
    """Vocabulary of each column of ids, counted on the training split and written to `out/vocabulary`.

    Args:
        staged: Folder of typed rows, one folder per split.
        out: Folder of the prepared log.
        columns: What the columns are.
        progress: Told the values found so far.
    """
    train, found = pl.scan_parquet(staged / "train" / "*.parquet"), 0
    vocabularies = {}
    for name in dict.fromkeys(column.vocabulary for column in columns if column.vocabulary is not None):
        sharing = [column for column in columns if column.vocabulary == name]
        values = [train.select(_values(column)) for column in sharing]
        table = count_values(values, min_count=_min_count(sharing))
        path = vocabulary_path(out, name)
        path.parent.mkdir(exist_ok=True)
        table.write_parquet(path)
        vocabularies[name] = Vocabulary(table)
        found += len(table)
        progress("counting values", found)
    return vocabularies


def describe_fields(staged: Path, columns: Sequence[Column], vocabularies: Mapping[str, Vocabulary], *, splits: Sequence[str]) -> Schema:
    """The schema of the prepared log; means and deviations are those of the training split."""
    fields = [_field(column, staged, vocabularies, splits) for column in columns if column.is_field]
    return Schema(tuple(fields), next(column.name for column in columns if column.kind == "label"))


def encode(staged: Path, out: Path, schema: Schema, vocabularies: Mapping[str, Vocabulary], progress: Progress) -> None:
    """Write the rows of one split as ids, in their order."""
    with ShardWriter(out, _encoded_schema(schema)) as writer:
        for batch in read_shards(staged, dictionary=[path for field in schema.fields for path in _text_paths(field)]):
            encoded = {field.name: _encode(field, batch[field.name], vocabularies) for field in schema.fields}
            writer.write(pa.table({**encoded, schema.label: batch[schema.label]}))
            progress(f"writing {out.name}", writer.num_rows)


def _values(column: Column) -> pl.Expr:
    return pl.col(column.name).list.explode().drop_nulls() if column.is_list else pl.col(column.name)


def _min_count(sharing: Sequence[Column]) -> int:
    """The threshold of the column that the vocabulary is named after, else the lowest."""
    own = [column.min_count for column in sharing if column.name == column.vocabulary]
    return own[0] if own else min(column.min_count for column in sharing)


def _field(column: Column, staged: Path, vocabularies: Mapping[str, Vocabulary], splits: Sequence[str]) -> Field:
    if column.vocabulary is None:
        return Field(column.name, "numeric", transform=_standardization(staged, column.name))
    num_embeddings = vocabularies[column.vocabulary].num_embeddings
    if column.is_list:
        longest = [
            pl.scan_parquet(staged / split / "*.parquet").select(pl.col(column.name).list.len().max()).collect(engine="streaming").item()
            for split in splits
        ]
        kind: Kind = "sequence" if column.kind == "sequence" else "multivalued"
        return Field(column.name, kind, column.vocabulary, num_embeddings, max_length=max(1, *(length or 0 for length in longest)))
    transform = {"name": "log_bucket"} if column.kind == "numeric" else None
    return Field(column.name, "categorical", column.vocabulary, num_embeddings, transform=transform)


def _standardization(staged: Path, name: str) -> dict[str, Any]:
    values = pl.scan_parquet(staged / "train" / "*.parquet").select(pl.col(name).mean().alias("mean"), pl.col(name).std(ddof=0).alias("std"))
    mean, std = values.collect(engine="streaming").row(0)
    return {"name": "standardize", "mean": mean or 0.0, "std": std or 1.0}


def _encoded_schema(schema: Schema) -> pa.Schema:
    types = {"categorical": pa.int32(), "numeric": pa.float32(), "multivalued": pa.list_(pa.int32()), "sequence": pa.list_(pa.int32())}
    return pa.schema([*((field.name, types[field.kind]) for field in schema.fields), (schema.label, pa.int8())])


def _text_paths(field: Field) -> Iterator[str]:
    if field.vocabulary is not None:
        yield f"{field.name}.list.element" if field.is_list else field.name


def _encode(field: Field, cells: pa.Array, vocabularies: Mapping[str, Vocabulary]) -> pa.Array:
    if field.vocabulary is None:
        assert field.transform is not None
        numbers = cells.to_numpy(zero_copy_only=False)  # null -> NaN
        return pa.array(((numbers - field.transform["mean"]) / field.transform["std"]).astype(np.float32))
    vocabulary = vocabularies[field.vocabulary]
    if not field.is_list:
        return pa.array(vocabulary.ids(cells))
    ends = np.cumsum(cells.value_lengths().to_numpy(), dtype=np.int32)
    offsets = np.concatenate([np.zeros(1, dtype=np.int32), ends])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(vocabulary.ids(cells.flatten())))
