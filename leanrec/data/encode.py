"""The second pass over a log: training counts -> vocabularies, typed rows -> ids."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from leanrec.data.ahead import ahead
from leanrec.data.cells import raw_column
from leanrec.data.columns import Column
from leanrec.data.schema import Field, Kind, Schema
from leanrec.data.shards import ShardWriter, read_shards
from leanrec.data.staging import Progress
from leanrec.data.vocabulary import Vocabulary, count_piece, merge_counts, vocabulary_of, vocabulary_path

LARGEST_DICTIONARY = 16_384  # ids of more different values are written faster, and smaller, as they are
ROUNDING = 1e-12  # numbers that differ by less of their size are one number, computed in different ways


def build_vocabularies(staged: Path, out: Path, columns: Sequence[Column], progress: Progress) -> dict[str, Vocabulary]:
    """Vocabulary of each column of ids, counted on the training split and written to `out/vocabulary`.

    Args:
        staged: Folder of typed rows, one folder per split.
        out: Folder of the prepared log.
        columns: What the columns are.
        progress: Told the values found so far.
    """
    vocabularies, found = {}, 0
    for name in dict.fromkeys(column.vocabulary for column in columns if column.vocabulary is not None):
        sharing = [column for column in columns if column.vocabulary == name]
        pieces = itertools.chain.from_iterable(read_values(staged / "train", column) for column in sharing)
        table = vocabulary_of(merge_counts(map(count_piece, pieces)), min_count=_min_count(sharing))
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
    repeating = [_path(field) for field in schema.fields if field.vocabulary is None or field.num_embeddings <= LARGEST_DICTIONARY]
    with ShardWriter(out, _encoded_schema(schema), dictionary=[*repeating, schema.label]) as writer:
        for table in ahead(_encoded(staged, schema, vocabularies)):
            writer.write(table)
            progress(f"writing {out.name}", writer.num_rows)


def read_values(folder: Path, column: Column) -> Iterator[pa.DictionaryArray]:
    """The values of one column of staged rows, those of lists one after another."""
    for batch in read_shards(folder, columns=[column.name], dictionary=[_path(column)]):
        yield batch[column.name].flatten() if column.is_list else batch[column.name]


def _encoded(staged: Path, schema: Schema, vocabularies: Mapping[str, Vocabulary]) -> Generator[pa.Table, None, None]:
    for batch in read_shards(staged, dictionary=[_path(field) for field in schema.fields if field.vocabulary is not None]):
        ids = {field.name: _encode(field, batch[field.name], vocabularies) for field in schema.fields}
        yield pa.table({**ids, schema.label: batch[schema.label]})


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
            pl.scan_parquet(staged / split / "*.parquet").select(raw_column(column.name).list.len().max()).collect(engine="streaming").item()
            for split in splits
        ]
        kind: Kind = "sequence" if column.kind == "sequence" else "multivalued"
        return Field(column.name, kind, column.vocabulary, num_embeddings, max_length=max(1, *(length or 0 for length in longest)))
    transform = {"name": "log_bucket"} if column.kind == "numeric" else None
    return Field(column.name, "categorical", column.vocabulary, num_embeddings, transform=transform)


def _standardization(staged: Path, name: str) -> dict[str, Any]:
    x = raw_column(name)
    values = pl.scan_parquet(staged / "train" / "*.parquet").select(
        x.mean().alias("mean"), x.std(ddof=0).alias("std"), x.min().alias("low"), x.max().alias("high")
    )
    mean, std, low, high = values.collect(engine="streaming").row(0)
    is_constant = not std or high - low <= ROUNDING * max(abs(low), abs(high))
    return {"name": "standardize", "mean": mean or 0.0, "std": 1.0 if is_constant else std}


def _encoded_schema(schema: Schema) -> pa.Schema:
    types = {"categorical": pa.int32(), "numeric": pa.float32(), "multivalued": pa.list_(pa.int32()), "sequence": pa.list_(pa.int32())}
    return pa.schema([*((field.name, types[field.kind]) for field in schema.fields), (schema.label, pa.int8())])


def _path(column: Column | Field) -> str:
    return f"{column.name}.list.element" if column.is_list else column.name


def _encode(field: Field, cells: pa.Array, vocabularies: Mapping[str, Vocabulary]) -> pa.Array:
    if field.vocabulary is None:
        assert field.transform is not None
        numbers = pl.Series(cells).to_numpy()  # null -> NaN
        return _arrow(((numbers - field.transform["mean"]) / field.transform["std"]).astype(np.float32))
    vocabulary = vocabularies[field.vocabulary]
    if not field.is_list:
        return _arrow(vocabulary.ids(cells))
    ends = np.cumsum(pl.Series(cells.value_lengths()).to_numpy(), dtype=np.int32)
    offsets = np.concatenate([np.zeros(1, dtype=np.int32), ends])
    return pa.ListArray.from_arrays(_arrow(offsets), _arrow(vocabulary.ids(cells.flatten())))


def _arrow(values: np.ndarray) -> pa.Array:
    return pl.Series(values).to_arrow()  # pyarrow's own way imports pandas, where there is one, which takes as long as 30,000 rows
