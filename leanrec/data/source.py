"""What every input format hands on: chunks of raw rows that know where they come from, and a record of the rows that were refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import polars as pl

SAMPLE_ROWS = 10_000
SHOWN_BAD_ROWS = 10
OnBadRow = Literal["error", "skip"]


class Chunk(NamedTuple):
    """Rows of one file, in its order, before their values are looked at.

    Attributes:
        rows: The columns as the file has them: text, or the types of Parquet.
        path: The file.
        numbers: (len(rows),) int64 line of each row in the decompressed text, the header counted; in Parquet its row. Both from 1.
        unit: What the numbers count.
    """

    rows: pl.DataFrame
    path: Path
    numbers: np.ndarray
    unit: Literal["line", "row"] = "line"


class BadRows:
    """The rows that were refused.

    Attributes:
        counts: Reason -> number of rows.
        first: The first few, in words.
    """

    def __init__(self, on_bad_row: OnBadRow) -> None:
        self.on_bad_row = on_bad_row
        self.counts: Counter[str] = Counter()
        self.first: list[str] = []

    def add(self, path: Path, number: int, reason: str, detail: str, *, unit: str = "line") -> None:
        """Refuse one row.

        Args:
            path: Its file.
            number: Its line or row.
            reason: The kind of fault, under which it is counted.
            detail: What was found and what was expected.
            unit: What `number` counts.

        Raises:
            ValueError: Bad rows are errors in this run.
        """
        place = f"{path}:{number}" if unit == "line" else f"{path}, row {number}"
        if self.on_bad_row == "error":
            raise ValueError(f"{place}: {detail}. Repair the row, or leave such rows out with --on-bad-row skip.")
        self.counts[reason] += 1
        if len(self.first) < SHOWN_BAD_ROWS:
            self.first.append(f"{place}: {detail}")


class Source(Protocol):
    """Files of one format."""

    def chunks(self, bad_rows: BadRows) -> Generator[Chunk, None, None]:
        """All rows in order, in pieces of bounded size. Rows that do not fit the columns go to `bad_rows`.

        Raises:
            ValueError: A file cannot be read, the files do not have the same columns, or a row is bad and bad rows are errors.
        """
        ...


def read_sample(source: Source) -> pl.DataFrame:
    """The first rows (at most `SAMPLE_ROWS`), from which kinds are inferred.

    Raises:
        ValueError: There are none, or the files cannot be read.
    """
    bad_rows = BadRows("skip")
    with closing(source.chunks(bad_rows)) as chunks:
        sample = next((chunk.rows for chunk in chunks if len(chunk.rows)), None)
    if sample is None:
        refused = f"; the first that was refused: {bad_rows.first[0]}" if bad_rows.first else ""
        raise ValueError(f"No rows in the input{refused}.")
    return sample.head(SAMPLE_ROWS)
