"""Vocabularies: raw value -> id by falling training count, as Parquet files that hold the counts as well."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from pyarrow import parquet
from torch import Tensor

from leanrec.data.schema import FIRST_ID, UNKNOWN_ID, Schema

FOLDER = "vocabulary"


class Vocabulary:
    """Raw value -> id, for looking up many values at once.

    Attributes:
        num_embeddings: V, padding and unknown included.
    """

    def __init__(self, table: pl.DataFrame) -> None:
        self.num_embeddings = len(table)
        known = table.filter(pl.col("id") >= FIRST_ID).sort("value")
        self._values, self._ids = known["value"], known["id"].to_numpy()

    def ids(self, values: pa.DictionaryArray) -> np.ndarray:
        """(N,) int32 ids of N values of text without nulls; 1 where a value is not in the vocabulary.

        Only the distinct values of a batch are searched for, by bisection in the sorted vocabulary: exact, no larger than the vocabulary itself,
        and no index is built anew for each batch.
        """
        indices = values.indices.to_numpy(zero_copy_only=False)
        if not len(self._values):
            return np.full(len(indices), UNKNOWN_ID, dtype=np.int32)
        distinct = pl.Series(pa.chunked_array([values.dictionary]), dtype=pl.String)
        places = self._values.search_sorted(distinct).clip(0, len(self._values) - 1)
        is_known = (self._values.gather(places) == distinct).to_numpy()
        return np.where(is_known, self._ids[places.to_numpy()], UNKNOWN_ID).astype(np.int32)[indices]


def count_values(columns: Sequence[pl.LazyFrame], *, min_count: int) -> pl.DataFrame:
    """Vocabulary of all values in `columns`: `value` (text, null for ids 0 and 1), `id` (int32) and `count` (int64), V rows sorted by id.

    Args:
        columns: One column of text each, of the training split.
        min_count: Rarer values are left out; the count of unknown is how often they occurred.
    """
    texts = [column.select(pl.all().alias("value")) for column in columns]
    counts = pl.concat(texts).group_by("value").agg(pl.len().cast(pl.Int64).alias("count")).collect(engine="streaming")
    known = counts.filter(pl.col("count") >= min_count).sort("count", "value", descending=[True, False])
    dropped = int(counts["count"].sum()) - int(known["count"].sum())
    special = pl.DataFrame({"value": [None, None], "count": [0, dropped]}, schema={"value": pl.String, "count": pl.Int64})
    return pl.concat([special, known.select("value", "count")]).select("value", pl.int_range(pl.len(), dtype=pl.Int32).alias("id"), "count")


def vocabulary_path(folder: Path, name: str) -> Path:
    """Where the vocabulary `name` of a prepared log lies."""
    return folder / FOLDER / f"{quote(name, safe=' ')}.parquet"


def read_counts(folder: Path, schema: Schema) -> dict[str, Tensor]:
    """Vocabulary -> (V,) int64 occurrences of each id in the training split; what was too rare counts for unknown (1).

    Raises:
        ValueError: A vocabulary is missing, damaged or of another size than the schema says.
    """
    counts = {}
    for name, num_embeddings in schema.vocabularies.items():
        path = vocabulary_path(folder, name)
        column = _read(path, ["count"])["count"].to_numpy()
        if len(column) != num_embeddings:
            raise ValueError(f"{path}: {len(column)} rows, but the schema has {num_embeddings}. Run `leanrec prepare` again.")
        counts[name] = torch.from_numpy(column.copy())
    return counts


def vocabulary_nbytes(folder: Path) -> int:
    """Bytes on disk of the value -> id maps of all vocabularies, counts left out."""
    total = 0
    for path in sorted((folder / FOLDER).glob("*.parquet")):
        metadata = parquet.ParquetFile(path).metadata
        for group in range(metadata.num_row_groups):
            chunks = [metadata.row_group(group).column(column) for column in range(metadata.num_columns)]
            total += sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema in ("value", "id"))
    return total


def _read(path: Path, columns: list[str]) -> pa.Table:
    try:
        return parquet.read_table(path, columns=columns)
    except FileNotFoundError:
        raise ValueError(f"{path}: not found. Is {path.parents[1]} a folder that `leanrec prepare` wrote?") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: damaged Parquet file ({' '.join(str(error).split())}).") from None
