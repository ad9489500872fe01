"""Vocabularies: raw value -> id by falling training count, as Parquet files that hold the counts as well."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np
import polars as pl
import pyarrow as pa
from pyarrow import parquet

from leanrec.data.schema import FIRST_ID, UNKNOWN_ID, Schema

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "vocabulary"
LONGEST_FILE_NAME = 255  # bytes, in the usual file systems


_SEEDS = 8  # of a billion values, two share 64 bits of hash once in 37 vocabularies
MERGED_VALUES = 1 << 20  # values of pieces that wait to be counted together


class Vocabulary:
    """Raw value -> id, for looking up many values at once.

    Attributes:
        num_embeddings: V, padding and unknown included.
    """

    def __init__(self, table: pl.DataFrame) -> None:
        self.num_embeddings = len(table)
        self._values = table["value"].slice(FIRST_ID)
        self._seed, hashes = _distinct_hashes(self._values)
        self._places = np.argsort(hashes).astype(np.int32)
        self._hashes = hashes[self._places]

    def ids(self, values: pa.DictionaryArray) -> np.ndarray:
        """(N,) int32 ids of N values of text without nulls; 1 where a value is not in the vocabulary.

        Only the distinct values of a batch are searched for: in the sorted hashes of the vocabulary, in their own order, so that neighbours find
        each other's memory in the cache. Exact: a value counts as found where the text is the same, and no two of the vocabulary share a hash.
        """
        indices = pl.Series(values.indices).to_numpy()
        if not len(self._values):
            return np.full(len(indices), UNKNOWN_ID, dtype=np.int32)
        distinct = pl.Series(pa.chunked_array([values.dictionary]), dtype=pl.String)
        hashes = distinct.hash(self._seed).to_numpy()
        order = np.argsort(hashes)
        places = np.empty(len(order), dtype=np.int32)
        places[order] = self._places[np.searchsorted(self._hashes, hashes[order]).clip(max=len(self._hashes) - 1)]
        is_known = (self._values.gather(places) == distinct).to_numpy()
        return np.where(is_known, places + FIRST_ID, UNKNOWN_ID).astype(np.int32)[indices]


def _distinct_hashes(values: pl.Series) -> tuple[int, np.ndarray]:
    """A seed with which no two of some different values have the same 64 bits of hash, and those hashes."""
    for seed in range(_SEEDS):
        hashes = values.hash(seed)
        if hashes.n_unique() == len(values):
            return seed, hashes.to_numpy()
    raise ValueError("a vocabulary holds a value twice. Run `leanrec prepare` again.")


def vocabulary_of(counts: pl.DataFrame, *, min_count: int) -> pl.DataFrame:
    """Vocabulary of some counted values: `value` (text, null for ids 0 and 1), `id` (int32) and `count` (int64), V rows sorted by id.

    Args:
        counts: `value`, text without nulls, and `count`, each value once; see `merge_counts`.
        min_count: Rarer values are left out; the count of unknown is how often they occurred.
    """
    known = _by_count(counts.filter(pl.col("count") >= min_count))
    dropped = int(counts["count"].sum()) - int(known["count"].sum())
    special = pl.DataFrame({"value": [None, None], "count": [0, dropped]}, schema={"value": pl.String, "count": pl.Int64})
    return pl.concat([special, known.select("value", "count")]).select("value", pl.int_range(pl.len(), dtype=pl.Int32).alias("id"), "count")


def _by_count(counts: pl.DataFrame) -> pl.DataFrame:
    """Rows of `value` and `count` by falling count, and where that is equal by the bytes of the text."""
    beginnings, falling = _first_bytes(counts["value"]), -counts["count"].to_numpy()
    order = np.lexsort((beginnings, falling))
    beginnings, falling = beginnings[order], falling[order]
    if ((beginnings[1:] == beginnings[:-1]) & (falling[1:] == falling[:-1])).any():  # the first bytes do not decide
        return counts.sort("count", "value", descending=[True, False])
    return counts[order]


def _first_bytes(texts: pl.Series) -> np.ndarray:
    """(N,) uint64 in the order of the first 8 bytes of each text, a shorter one filled up with zeros."""
    array = texts.to_arrow().cast(pa.large_binary())
    offsets = np.frombuffer(array.buffers()[1], dtype=np.int64)[array.offset :][: len(array) + 1]
    data = np.frombuffer(array.buffers()[2] or b"", dtype=np.uint8)
    ends, first = offsets[1:], np.zeros(len(array), dtype=np.uint64)
    for place in range(8):
        places = offsets[:-1] + place
        bytes_here = np.where(places < ends, data[np.minimum(places, max(len(data) - 1, 0))], 0) if len(data) else 0
        first = first << np.uint64(8) | np.asarray(bytes_here, dtype=np.uint64)
    return first


def count_piece(values: pa.DictionaryArray) -> pl.DataFrame:
    """`value` and `count` of one piece of a column."""
    counts = np.bincount(pl.Series(values.indices).to_numpy(), minlength=len(values.dictionary))
    table = pl.DataFrame({"value": pl.Series(pa.chunked_array([values.dictionary]), dtype=pl.String), "count": counts.astype(np.int64)})
    return table if counts.all() else table.filter(pl.col("count") > 0)


def merge_counts(tables: Iterable[pl.DataFrame]) -> pl.DataFrame:
    """`value` and `count` of all pieces together, each value once, in no order. A piece may itself be merged, of another shard or worker."""
    waiting, num_waiting = [pl.DataFrame(schema={"value": pl.String, "count": pl.Int64})], 0
    for table in tables:
        waiting.append(table)
        num_waiting += len(table)
        # As much waits as is merged already: so every value is merged a number of times that grows with the logarithm of the rows.
        if num_waiting > max(MERGED_VALUES, len(waiting[0])):
            waiting, num_waiting = [_merged(waiting)], 0
    return _merged(waiting)


def _merged(tables: Sequence[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(tables).lazy().group_by("value").agg(pl.col("count").sum()).collect(engine="streaming")


def vocabulary_path(folder: Path, name: str) -> Path:
    """Where the vocabulary `name` of a prepared log lies: under its name, of which a hash stands for the end where it is too long for a file."""
    file = f"{quote(name, safe=' ')}.parquet"
    if len(file) > LONGEST_FILE_NAME:
        file = f"{file[:200]}-{hashlib.sha256(name.encode()).hexdigest()[:32]}.parquet"
    return folder / FOLDER / file


def read_counts(folder: Path, schema: Schema) -> dict[str, Tensor]:
    """Vocabulary -> (V,) int64 occurrences of each id in the training split; what was too rare counts for unknown (1).

    Raises:
        ValueError: A vocabulary is missing, damaged or of another size than the schema says.
    """
    import torch  # preparing a log needs none

    counts = {}
    for name, num_embeddings in schema.vocabularies.items():
        path = vocabulary_path(folder, name)
        column = _read(path, ["count"])["count"].to_numpy()
        if len(column) != num_embeddings:
            raise ValueError(f"{path}: {len(column)} rows, but the schema has {num_embeddings}. Run `leanrec prepare` again.")
        counts[name] = torch.from_numpy(column.copy())
    return counts


def vocabulary_nbytes(folder: Path) -> int:
    """Bytes on disk of the value -> id maps of all vocabularies of a prepared log, counts left out.

    Raises:
        ValueError: The log or a vocabulary of it is missing or damaged.
    """
    total = 0
    for name in Schema.load(folder / "schema.json").vocabularies:
        metadata = _metadata(vocabulary_path(folder, name))
        for group in range(metadata.num_row_groups):
            chunks = [metadata.row_group(group).column(column) for column in range(metadata.num_columns)]
            total += sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema in ("value", "id"))
    return total


def _metadata(path: Path) -> parquet.FileMetaData:
    with _readable(path):
        return parquet.read_metadata(path)


def _read(path: Path, columns: list[str]) -> pa.Table:
    with _readable(path):
        return parquet.read_table(path, columns=columns)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path}: not found. Is {path.parents[1]} a folder that `leanrec prepare` wrote?") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: damaged Parquet file ({' '.join(str(error).split())}).") from None
