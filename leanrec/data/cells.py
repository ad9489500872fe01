"""Raw cells -> typed values, as expressions of the query engine, and which cells are wrong."""

from __future__ import annotations

import math
from typing import NamedTuple

import polars as pl

MISSING_NUMBERS = ("", "na", "n/a", "nan", "null", "none", "\\n", "-")
TIME_FORMATS = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d")


class Cells(NamedTuple):
    """One column of a chunk.

    Attributes:
        value: Typed values.
        is_wrong: Boolean: the cell holds something that is no such value.
        fault: What is wrong then, in words.
    """

    value: pl.Expr
    is_wrong: pl.Expr
    fault: str


def text_cells(name: str) -> Cells:
    """Text of any scalar, without loss for whole numbers; missing is empty text."""
    text = pl.col(name).cast(pl.String, strict=False)
    return Cells(text.fill_null(""), text.is_null() & pl.col(name).is_not_null(), "is no UTF-8 text")


def list_cells(name: str, separator: str | None, *, max_length: int, keep_last: bool) -> Cells:
    """Lists of text without empty elements; a missing cell is an empty list. Longer ones keep their first or last `max_length` elements."""
    raw = pl.col(name)
    text = raw.cast(pl.List(pl.String), strict=False) if separator is None else raw.cast(pl.String, strict=False).str.split(separator)
    elements = text.list.eval(pl.element().filter(pl.element().is_not_null() & (pl.element() != "")))
    kept = elements.list.tail(max_length) if keep_last else elements.list.head(max_length)
    return Cells(kept.fill_null(pl.lit([], dtype=pl.List(pl.String))), text.is_null() & raw.is_not_null(), "is no UTF-8 text")


def label_cells(name: str) -> Cells:
    """0 or 1 as int8."""
    number = pl.col(name).cast(pl.Float64, strict=False)
    return Cells(number.cast(pl.Int8, strict=False), ~number.is_in([0.0, 1.0]).fill_null(False), "is neither 0 nor 1")


def number_cells(name: str, dtype: pl.DataType) -> Cells:
    """Finite float64, null where missing."""
    raw = pl.col(name)
    if dtype in (pl.String, pl.Binary):
        text = raw.cast(pl.String, strict=False).str.strip_chars()
        number = text.cast(pl.Float64, strict=False)
        is_missing = raw.is_null() | text.str.to_lowercase().is_in(MISSING_NUMBERS).fill_null(False)
    else:
        number = raw.cast(pl.Float64, strict=False)
        is_missing = number.is_null() | number.is_nan()
    is_number = number.is_finite().fill_null(False)
    return Cells(pl.when(is_number).then(number), ~is_number & ~is_missing, "is no number")


def bucket_cells(name: str, dtype: pl.DataType) -> Cells:
    """Text of a number's bucket, the practice for the counts of the Criteo log: floor(ln(x)^2) above 2, floor(x) up to there; empty where missing.

    The buckets above 2 begin with "b": x = 3 (ln(3)^2 = 1.2) and x = 1 stay apart, as in the winning solution of the Criteo challenge.
    """
    cells = number_cells(name, dtype)
    large = pl.lit("b") + (cells.value.log(math.e) ** 2).floor().cast(pl.Int64, strict=False).cast(pl.String)
    small = cells.value.floor().cast(pl.Int64, strict=False).cast(pl.String)
    return cells._replace(value=pl.when(cells.value > 2).then(large).otherwise(small).fill_null(""))


def time_cells(name: str, dtype: pl.DataType) -> Cells:
    """Times as int64 that grow with time."""
    time = time_of(name, dtype)
    return Cells(time, time.is_null(), "is no time (a whole number, or text like 2024-05-31 23:59:59)")


def time_of(name: str, dtype: pl.DataType) -> pl.Expr:
    """Whole numbers as they are, dates and ISO text as microseconds; null where a cell is neither."""
    raw = pl.col(name)
    if dtype.is_temporal():
        return raw.cast(pl.Datetime("us")).to_physical()
    if dtype.is_numeric():
        return raw.cast(pl.Int64, strict=False)
    text = raw.cast(pl.String, strict=False).str.strip_chars()
    iso = text.str.replace("T", " ", literal=True).str.replace("Z", "", literal=True)
    parsed = [iso.str.to_datetime(pattern, time_unit="us", strict=False).to_physical() for pattern in TIME_FORMATS]
    return pl.coalesce(text.cast(pl.Int64, strict=False), *parsed)
