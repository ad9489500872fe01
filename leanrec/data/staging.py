"""The first pass over a log: raw rows -> checked, typed rows, one folder of shards per split."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from leanrec.data import cells
from leanrec.data.ahead import ahead
from leanrec.data.columns import Column
from leanrec.data.settings import Settings
from leanrec.data.shards import ShardWriter, read_shards
from leanrec.data.source import BadRows, Chunk, Source

HISTOGRAM_BINS = 1 << 16
Progress = Callable[[str, int], None]


class Reading(NamedTuple):
    """How one staged column is made of a raw one.

    Attributes:
        name: The staged column.
        raw: The raw column.
        type: Of the staged values.
        cells: Type of the raw column -> its cells.
        form: What a raw cell holds.
    """

    name: str
    raw: str
    type: pa.DataType
    cells: Callable[[pl.DataType], cells.Cells]
    form: cells.Form = "one value"


def stage(
    source: Source, folder: Path, columns: Sequence[Column], settings: Settings, *, shares: Mapping[str, float], bad_rows: BadRows, progress: Progress
) -> dict[str, int]:
    """Write the rows of `source` into `folder/SPLIT`, in their order: split at random, or by time where the settings name a column for it.

    Args:
        source: The raw rows.
        folder: Where the splits go.
        columns: What the columns are.
        settings: `seed` decides the draw, together with the order of the rows; `split_by` names the time: the first split gets the oldest rows.
        shares: Split -> its share of the rows.
        bad_rows: Takes the rows that are refused.
        progress: Told the rows read so far.

    Returns:
        Split -> rows written.

    Raises:
        ValueError: A file or a row cannot be read.
    """
    readings = [_reading(column) for column in columns if column.is_field or column.kind == "label"]
    writer = SplitWriter(folder, tuple(shares), readings, progress)
    edges = np.cumsum(list(shares.values()))[:-1]
    if settings.split_by is not None and len(edges):
        return _stage_by_time(source, writer, settings.split_by, edges, bad_rows)
    draw = np.random.default_rng([settings.seed, 0x5B117])  # a stream of its own: a synthetic log is often drawn from the same small seed
    frames = ahead(_typed(chunk, readings, bad_rows) for chunk in source.chunks(bad_rows))
    return writer.write((frame, np.searchsorted(edges, draw.random(len(frame)), side="right")) for frame in frames)


def _stage_by_time(source: Source, writer: SplitWriter, time: str, edges: np.ndarray, bad_rows: BadRows) -> dict[str, int]:
    """Two steps: all rows with their times, and then, the times of the edges known, the splits. Rows of the same time stay together."""
    key = max((reading.name for reading in writer.readings), key=len) + " time"  # longer than the other names, so none of them
    readings = [*writer.readings, Reading(key, time, pa.int64(), lambda dtype: cells.time_cells(time, dtype))]
    frames = ahead(_typed(chunk, readings, bad_rows) for chunk in source.chunks(bad_rows))
    replace(writer, splits=("all",), readings=readings).write((frame, np.zeros(len(frame))) for frame in frames)
    whole = writer.folder / "all"
    times = [_time_at(whole, key, share) for share in edges]
    frames = (pl.DataFrame(batch) for batch in read_shards(whole))
    rows = writer.write((frame, np.searchsorted(times, frame[key].to_numpy(), side="right")) for frame in frames)
    shutil.rmtree(whole)
    return rows


@dataclass(frozen=True)
class SplitWriter:
    """Writes staged rows into `folder/SPLIT`."""

    folder: Path
    splits: tuple[str, ...]
    readings: Sequence[Reading]
    progress: Progress

    def write(self, assigned: Iterable[tuple[pl.DataFrame, np.ndarray]]) -> dict[str, int]:
        """Write all rows, each into the split of its number; returns split -> rows."""
        schema = pa.schema([(reading.name, reading.type) for reading in self.readings])
        with ExitStack() as stack:
            writers = [stack.enter_context(ShardWriter(self.folder / split, schema, temporary=True)) for split in self.splits]
            for frame, split_of_row in assigned:
                for number, writer in enumerate(writers):
                    writer.write(frame.filter(pl.Series(split_of_row == number)).to_arrow())
                self.progress(f"reading {', '.join(self.splits)}", sum(writer.num_rows for writer in writers))
        return {split: writer.num_rows for split, writer in zip(self.splits, writers, strict=True)}


def _reading(column: Column) -> Reading:
    name = column.name
    if column.kind == "label":
        return Reading(name, name, pa.int8(), lambda dtype: cells.label_cells(name, dtype))
    if column.is_list:
        separator, length, keep_last = column.separator, column.max_length, column.kind == "sequence"
        return Reading(
            name,
            name,
            pa.list_(pa.string()),
            lambda dtype: cells.list_cells(name, dtype, separator, max_length=length, keep_last=keep_last),
            form="a list" if separator is None else "one value",
        )
    if column.kind == "categorical":
        return Reading(name, name, pa.large_string(), lambda dtype: cells.text_cells(name, dtype))
    if column.vocabulary is None:
        return Reading(name, name, pa.float64(), lambda dtype: cells.number_cells(name, dtype))
    return Reading(name, name, pa.large_string(), lambda dtype: cells.bucket_cells(name, dtype))


def _typed(chunk: Chunk, readings: Sequence[Reading], bad_rows: BadRows) -> pl.DataFrame:
    """The rows of a chunk without the bad ones, in staged types."""
    schema = chunk.rows.schema
    missing = [reading.raw for reading in readings if reading.raw not in schema]
    if missing:
        raise ValueError(f"{chunk.path}: no column {missing[0]!r}; its columns are {schema.names()}. All files need the columns of the first.")
    for reading in readings:
        dtype = schema[reading.raw]
        if dtype != pl.Null and cells.form_of(dtype) != reading.form:
            fault = f"a cell holds {cells.form_of(dtype)} ({dtype}), but {reading.form} in the first file"
            raise ValueError(f"{chunk.path}: column {reading.raw!r}: {fault}. All files need the types of the first.")
    read = [(reading, reading.cells(schema[reading.raw])) for reading in readings]
    try:
        typed, wrong = _select(chunk.rows, read)
    except pl.exceptions.PolarsError:
        raise ValueError(_unreadable(chunk, read)) from None
    is_bad = reduce(or_, wrong.get_columns())  # there is always a label, which can be wrong
    if not is_bad.any():
        return typed
    for row in is_bad.arg_true():
        reading, cell = next((reading, cell) for reading, cell in read if reading.name in wrong and wrong[reading.name][row])
        reason = f"{reading.raw} {cell.fault}"
        bad_rows.add(chunk.path, int(chunk.numbers[row]), reason, f"{reason}: {chunk.rows[reading.raw][[row]].to_list()[0]!r:.80}", unit=chunk.unit)
    return typed.filter(~is_bad)


def _select(rows: pl.DataFrame, read: Sequence[tuple[Reading, cells.Cells]]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Typed values, and which cells are wrong of the columns where one can be."""
    typed = rows.select(cell.value.alias(reading.name) for reading, cell in read)
    wrong = rows.select(cell.is_wrong.alias(reading.name) for reading, cell in read if isinstance(cell.is_wrong, pl.Expr))
    nulls = [typed[reading.name].is_null() for reading, cell in read if isinstance(cell.is_wrong, str)]
    return typed, pl.DataFrame([*wrong.get_columns(), *nulls])


def _unreadable(chunk: Chunk, read: Sequence[tuple[Reading, cells.Cells]]) -> str:
    """What is wrong with the first column whose type has no such values."""
    for reading, cell in read:
        try:
            _select(chunk.rows, [(reading, cell)])
        except pl.exceptions.PolarsError:
            return f"{chunk.path}: column {reading.raw!r} holds {chunk.rows.schema[reading.raw]}, which {cell.fault}."
    raise AssertionError("each column can be read, but not all of them together")


def _time_at(folder: Path, key: str, share: float) -> int:
    """The earliest time in column `key` that at least `share` of the rows lie before, by histograms that zoom in: exact, in bounded memory."""
    time = pl.scan_parquet(folder / "*.parquet").select(cells.raw_column(key).alias("time"))
    low, high, wanted = time.select(pl.col("time").min().alias("low"), pl.col("time").max().alias("high"), pl.len() * share).collect().row(0)
    before = 0
    while low < high:
        width = -(-(high - low + 1) // HISTOGRAM_BINS)
        inside = time.filter(pl.col("time").is_between(low, high)).select(((pl.col("time") - low) // width).alias("bin"))
        bins = inside.group_by("bin").agg(pl.len().alias("rows")).collect(engine="streaming").sort("bin")
        reached = before + bins["rows"].cum_sum()
        place = min(int((reached < wanted).sum()), len(bins) - 1)
        before = int(reached[place]) - int(bins["rows"][place])
        low, high = low + int(bins["bin"][place]) * width, min(high, low + (int(bins["bin"][place]) + 1) * width - 1)
    return int(low) + 1
