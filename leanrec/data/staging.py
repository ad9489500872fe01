"""The first pass over a log: raw rows -> checked, typed rows, one folder of shards per split."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from leanrec.data import cells
from leanrec.data.columns import Column
from leanrec.data.settings import Settings
from leanrec.data.shards import ShardWriter, read_shards
from leanrec.data.source import BadRows, Chunk, Source

TIME = "leanrec time"
HISTOGRAM_BINS = 1 << 16
Progress = Callable[[str, int], None]


def stage(
    source: Source, folder: Path, columns: Sequence[Column], settings: Settings, *, shares: Mapping[str, float], bad_rows: BadRows, progress: Progress
) -> None:
    """Write the rows of `source` into `folder/SPLIT`, in their order: split at random, or by time where the settings name a column for it.

    Args:
        source: The raw rows.
        folder: Where the splits go.
        columns: What the columns are.
        settings: `seed` decides the draw, together with the order of the rows; `split_by` names the time: the first split gets the oldest rows.
        shares: Split -> its share of the rows.
        bad_rows: Takes the rows that are refused.
        progress: Told the rows read so far.

    Raises:
        ValueError: A file or a row cannot be read.
    """
    edges = np.cumsum(list(shares.values()))[:-1]
    if settings.split_by is None or not len(edges):
        draw = np.random.default_rng(settings.seed)
        frames = (_typed(chunk, columns, bad_rows) for chunk in source.chunks(bad_rows))
        assigned = ((frame, np.searchsorted(edges, draw.random(len(frame)), side="right")) for frame in frames)
        _write_splits(folder, list(shares), _staged_schema(columns), assigned, progress)
    else:
        _stage_by_time(source, folder, columns, settings.split_by, list(shares), edges, bad_rows, progress)


def _stage_by_time(
    source: Source,
    folder: Path,
    columns: Sequence[Column],
    time: str,
    splits: Sequence[str],
    edges: np.ndarray,
    bad_rows: BadRows,
    progress: Progress,
) -> None:
    """Rows of the same time stay together."""
    schema = _staged_schema(columns).append(pa.field(TIME, pa.int64()))
    frames = (_typed(chunk, columns, bad_rows, time=time) for chunk in source.chunks(bad_rows))
    _write_splits(folder, ["all"], schema, ((frame, np.zeros(len(frame))) for frame in frames), progress)
    times = [_time_at(folder / "all", share) for share in edges]
    whole = (pl.DataFrame(batch) for batch in read_shards(folder / "all"))
    assigned = ((frame, np.searchsorted(times, frame[TIME].to_numpy(), side="right")) for frame in whole)
    _write_splits(folder, splits, _staged_schema(columns), assigned, progress)
    shutil.rmtree(folder / "all")


def _write_splits(
    folder: Path, splits: Sequence[str], schema: pa.Schema, assigned: Iterable[tuple[pl.DataFrame, np.ndarray]], progress: Progress
) -> None:
    num_rows = 0
    with ExitStack() as stack:
        writers = [stack.enter_context(ShardWriter(folder / split, schema)) for split in splits]
        for frame, split_of_row in assigned:
            for number, writer in enumerate(writers):
                writer.write(frame.filter(pl.Series(split_of_row == number)).to_arrow())
            num_rows += len(frame)
            progress(f"reading {', '.join(splits)}", num_rows)


def _typed(chunk: Chunk, columns: Sequence[Column], bad_rows: BadRows, *, time: str | None = None) -> pl.DataFrame:
    """The rows of a chunk without the bad ones, in staged types."""
    needed = [(column.name, column.name) for column in columns if column.is_staged] + ([(TIME, time)] if time is not None else [])
    _check_columns(chunk, [raw for _, raw in needed])
    by_name = {column.name: column for column in columns}
    read = {
        name: cells.time_cells(raw, chunk.rows.schema[raw]) if name == TIME else _cells(by_name[raw], chunk.rows.schema[raw]) for name, raw in needed
    }
    typed = chunk.rows.select(cell.value.alias(name) for name, cell in read.items())
    wrong = chunk.rows.select(cell.is_wrong.alias(name) for name, cell in read.items())
    is_bad = wrong.select(pl.any_horizontal(pl.all())).to_series()
    for row in is_bad.arg_true():
        name, raw = next((name, raw) for name, raw in needed if wrong[name][row])
        fault = f"{raw} {read[name].fault}"
        bad_rows.add(chunk.path, int(chunk.numbers[row]), fault, f"{fault}: {chunk.rows[raw][row]!r}", unit=chunk.unit)
    return typed.filter(~is_bad)


def _check_columns(chunk: Chunk, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in chunk.rows.columns]
    if missing:
        raise ValueError(f"{chunk.path}: no column {missing[0]!r}; its columns are {chunk.rows.columns}. All files need the columns of the first.")


def _cells(column: Column, dtype: pl.DataType) -> cells.Cells:
    if column.kind == "label":
        return cells.label_cells(column.name)
    if column.is_list:
        return cells.list_cells(column.name, column.separator, max_length=column.max_length, keep_last=column.kind == "sequence")
    if column.kind == "categorical":
        return cells.text_cells(column.name)
    number = cells.number_cells(column.name, dtype)
    return number._replace(value=cells.log_bucket(number.value)) if column.vocabulary is not None else number


def _staged_schema(columns: Sequence[Column]) -> pa.Schema:
    return pa.schema([(column.name, _staged_type(column)) for column in columns if column.is_staged])


def _staged_type(column: Column) -> pa.DataType:
    if column.kind == "label":
        return pa.int8()
    if column.is_list:
        return pa.list_(pa.string())
    return pa.float64() if column.vocabulary is None else pa.string()


def _time_at(folder: Path, share: float) -> int:
    """The earliest time that at least `share` of the rows lie before, found by histograms that zoom in: exact, in memory that no row adds to."""
    time = pl.scan_parquet(folder / "*.parquet").select(pl.col(TIME).alias("time"))
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
