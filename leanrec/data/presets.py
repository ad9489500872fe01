"""Logs whose columns are known: their options, and columns that are computed from others."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import polars as pl

from leanrec.data.settings import FieldSettings
from leanrec.data.source import BadRows, Chunk, Source

CRITEO_COLUMNS = ("label", *(f"I{number}" for number in range(1, 14)), *(f"C{number}" for number in range(1, 27)))

# Format -> (options for the whole log, options of columns).
PRESETS: dict[str | None, tuple[dict[str, Any], dict[str, FieldSettings]]] = {
    "criteo": (
        {"delimiter": "\t", "header": False, "columns": CRITEO_COLUMNS, "numeric": "log-bucket"},
        {name: FieldSettings(kind={"l": "label", "I": "numeric", "C": "categorical"}[name[0]]) for name in CRITEO_COLUMNS},
    ),
    "avazu": (
        {"delimiter": ","},
        {
            "id": FieldSettings(kind="ignore"),
            "click": FieldSettings(kind="label"),
            "hour": FieldSettings(kind="timestamp"),
            "*": FieldSettings(kind="categorical"),
        },
    ),
}

# Avazu's `hour` is YYMMDDHH: as it stands, every hour of the test is unknown. What comes back each day and week is its hour and its weekday.
DERIVED: dict[str, tuple[pl.Expr, ...]] = {
    "avazu": (
        pl.col("hour").str.slice(6, 2).alias("hour_of_day"),
        pl.concat_str("hour", pl.lit("00")).str.to_datetime("%y%m%d%H%M", strict=False).dt.weekday().alias("weekday"),
    )
}


class DerivedSource:
    """The rows of another source with columns computed from theirs."""

    def __init__(self, source: Source, derived: Sequence[pl.Expr]) -> None:
        self.source, self.derived = source, derived

    def chunks(self, bad_rows: BadRows) -> Generator[Chunk, None, None]:
        """See `Source.chunks`."""
        for chunk in self.source.chunks(bad_rows):
            yield chunk._replace(rows=self._derive(chunk.rows))

    def _derive(self, rows: pl.DataFrame) -> pl.DataFrame:
        missing = [name for one in self.derived for name in one.meta.root_names() if name not in rows.columns]
        if missing:
            raise ValueError(f"Column {missing[0]!r} of this format is not in the input. Its columns are {rows.columns}.")
        return rows.with_columns(self.derived)
