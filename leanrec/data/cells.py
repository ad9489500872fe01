"""Raw cells -> typed values, as expressions of the query engine, and which cells are wrong."""

from __future__ import annotations

import math
import re
from typing import Literal, NamedTuple

import polars as pl
import pyarrow as pa

MISSING_NUMBERS = ("", "na", "n/a", "nan", "null", "none", "\\n", "-")
TIME_FORMATS = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d")
Form = Literal["one value", "a list", "nested values"]


class Cells(NamedTuple):
    """One column of a chunk.

    Attributes:
        value: Typed values.
        is_wrong: Boolean: the cell holds something that is no such value; "null" where `value` has nulls for those alone, None where no cell can.
        fault: What is wrong then, in words.
    """

    value: pl.Expr
    is_wrong: pl.Expr | Literal["null"] | None
    fault: str


def form_of(dtype: pl.DataType) -> Form:
    """What a cell of this type holds."""
    if not dtype.is_nested():
        return "one value"
    return "a list" if isinstance(dtype, pl.List | pl.Array) and not dtype.inner.is_nested() else "nested values"


def raw_column(name: str) -> pl.Expr:
    """The column of this name, be it one that the query engine takes for a pattern (`*`, `^a$`)."""
    is_pattern = name == "*" or (name.startswith("^") and name.endswith("$"))
    return pl.col(f"^{re.escape(name)}$" if is_pattern else name)


def text_cells(name: str, dtype: pl.DataType) -> Cells:
    """Text of any scalar, without loss for whole numbers; missing is empty text."""
    raw = raw_column(name)
    if dtype == pl.String:
        return Cells(raw.fill_null(""), None, "")
    text = _text(raw, dtype)
    return Cells(text.fill_null(""), text.is_null() & raw.is_not_null(), "is no UTF-8 text")


def list_cells(name: str, dtype: pl.DataType, separator: str | None, *, max_length: int, keep_last: bool) -> Cells:
    """Lists of text without empty elements; a missing cell is an empty list. Longer ones keep their first or last `max_length` elements."""
    raw = raw_column(name)
    text = _texts(raw, dtype) if separator is None else _text(raw, dtype).str.split(separator)
    elements = text.list.eval(pl.element().filter(pl.element().is_not_null() & (pl.element() != "")))
    kept = elements.list.tail(max_length) if keep_last else elements.list.head(max_length)
    return Cells(kept.fill_null(pl.lit([], dtype=pl.List(pl.String))), text.is_null() & raw.is_not_null(), "is no UTF-8 text")


def label_cells(name: str, dtype: pl.DataType) -> Cells:
    """0 or 1 as int8."""
    raw = raw_column(name)
    number = (_text(raw, dtype) if dtype == pl.Binary else raw).cast(pl.Float64, strict=False)
    return Cells(pl.when(number.is_in([0.0, 1.0])).then(number).cast(pl.Int8), "null", "is neither 0 nor 1")


def number_cells(name: str, dtype: pl.DataType) -> Cells:
    """Finite float64, null where missing."""
    raw = raw_column(name)
    if dtype in (pl.String, pl.Binary):
        text = _text(raw, dtype)
        number = text.map_batches(_numbers, return_dtype=pl.Float64)
        is_no_text = text.is_null() & raw.is_not_null()
        return Cells(number, is_no_text | text.map_batches(_are_no_numbers, return_dtype=pl.Boolean), "is no number")
    number = raw.cast(pl.Float64, strict=False)
    is_number, is_missing = number.is_finite().fill_null(False), number.is_null() | number.is_nan()
    return Cells(pl.when(is_number).then(number), ~is_number & ~is_missing, "is no number")


def bucket_cells(name: str, dtype: pl.DataType) -> Cells:
    """Text of a number's bucket, the practice for the counts of the Criteo log: floor(ln(x)^2) above 2, floor(x) up to there; empty where missing.

    The buckets above 2 begin with "b": x = 3 (ln(3)^2 = 1.2) and x = 1 stay apart, as in the winning solution of the Criteo challenge.
    """
    cells = number_cells(name, dtype)
    if dtype in (pl.String, pl.Binary):
        raw = raw_column(name)
        text = pl.when(raw.is_null()).then(pl.lit("")).otherwise(_text(raw, dtype))
        return Cells(text.map_batches(_buckets_of_text, return_dtype=pl.String), "null", cells.fault)
    return cells._replace(value=cells.value.map_batches(_bucket_texts, return_dtype=pl.String))


def _text(raw: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """Text of scalars, null where it is no UTF-8."""
    return raw.map_batches(_decoded, return_dtype=pl.String) if dtype == pl.Binary else raw.cast(pl.String, strict=False)


def _texts(raw: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """Lists of text, null where an element is no UTF-8."""
    if not isinstance(dtype, pl.List | pl.Array) or dtype.inner != pl.Binary:
        return raw.cast(pl.List(pl.String), strict=False)
    lists = raw.cast(pl.List(pl.Binary))
    texts = lists.list.eval(pl.element().map_batches(_decoded, return_dtype=pl.String))
    return pl.when(texts.list.drop_nulls().list.len() == lists.list.drop_nulls().list.len()).then(texts)


def _decoded(raw: pl.Series) -> pl.Series:
    """Text of bytes, null where they are no UTF-8: found by halves, as a cast fails as a whole."""
    try:
        return raw.cast(pl.String)
    except pl.exceptions.ComputeError:
        half = len(raw) // 2
        return pl.concat([_decoded(raw[:half]), _decoded(raw[half:])]) if half else pl.Series(raw.name, [None], dtype=pl.String)


def _numbers(text: pl.Series) -> pl.Series:
    """Finite numbers of text, null where it holds none."""
    number = text.cast(pl.Float64, strict=False)
    # Most cells are bare digits or empty: only where others are does the text need a closer look.
    if (number.is_null() & (text != "")).any():
        number = text.str.strip_chars().cast(pl.Float64, strict=False)
    return number.to_frame().select(pl.when(pl.first().is_finite()).then(pl.first())).to_series()


def _are_no_numbers(text: pl.Series) -> pl.Series:
    """Which cells hold something that is neither a finite number nor missing."""
    number = text.cast(pl.Float64, strict=False)
    suspect = ~number.is_finite().fill_null(False) & (text != "").fill_null(False)
    if not suspect.any():
        return suspect
    return suspect & _numbers(text).is_null() & ~text.str.strip_chars().str.to_lowercase().is_in(MISSING_NUMBERS)


def _buckets_of_text(text: pl.Series) -> pl.Series:
    """Text of the bucket of each number that is text, null where it is no number. Counts repeat: each different text is read once."""
    encoded = text.to_arrow().dictionary_encode()
    distinct = pl.Series(pa.chunked_array([encoded.dictionary]), dtype=pl.String)
    buckets = _bucket_texts(_numbers(distinct)).set(_are_no_numbers(distinct), None)
    return buckets.gather(pl.Series(encoded.indices))


_FIRST_LARGE = 3  # place of the first bucket of numbers above 2, as what lies up to there has places up to 2


def _bucket_texts(numbers: pl.Series) -> pl.Series:
    """Text of the bucket of each number; "" where it is null."""
    number = pl.first()
    large = (number.log(math.e) ** 2).floor() + _FIRST_LARGE
    place = pl.when(number > 2).then(large).otherwise(number.floor()).cast(pl.Int64, strict=False)
    text = pl.when(pl.first() >= _FIRST_LARGE).then(pl.lit("b") + (pl.first() - _FIRST_LARGE).cast(pl.String)).otherwise(pl.first().cast(pl.String))
    return numbers.to_frame().select(place).select(text.fill_null("")).to_series()


def time_cells(name: str, dtype: pl.DataType) -> Cells:
    """Times as int64 that grow with time."""
    time = time_of(name, dtype)
    return Cells(time, "null", "is no time (a whole number, or text like 2024-05-31 23:59:59)")


def time_of(name: str, dtype: pl.DataType) -> pl.Expr:
    """Whole numbers as they are, dates and ISO text as microseconds; null where a cell is neither."""
    raw = raw_column(name)
    if dtype.is_temporal():
        return raw.cast(pl.Datetime("us")).to_physical()
    if dtype.is_numeric():
        return raw.cast(pl.Int64, strict=False)
    text = _text(raw, dtype).str.strip_chars()
    iso = text.str.replace("T", " ", literal=True).str.replace("Z", "", literal=True)
    parsed = [iso.str.to_datetime(pattern, time_unit="us", strict=False).to_physical() for pattern in TIME_FORMATS]
    return pl.coalesce(text.cast(pl.Int64, strict=False), *parsed)
