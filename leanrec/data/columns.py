"""What each raw column is: as the user said, or inferred from its name and a sample of its values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import polars as pl

from leanrec.data.cells import form_of, time_of
from leanrec.data.schema import module_key
from leanrec.data.settings import Numeric, Settings

ColumnKind = Literal["categorical", "numeric", "multivalued", "sequence", "label", "timestamp", "ignore"]
LABEL_NAMES = ("label", "click", "clicked", "is_click", "target", "y")
TIME_NAME = re.compile(r"(^|_)(timestamp|datetime|date|time|ts)(_|$)", re.IGNORECASE)
EARLIEST_TIME = 10_000_000  # smaller integers count hours or ranks rather than tell a time
NUMERIC_DISTINCT = 20  # fewer distinct decimals are a scale of grades, and each is a category


@dataclass(frozen=True)
class Column:
    """How one raw column is read.

    Attributes:
        name: Its name.
        kind: What it is.
        why: What the kind was inferred from, or that it was given.
        separator: What separates the elements of a list in one cell; None where the cells are lists.
        vocabulary: Where its ids come from; None for columns without ids.
        min_count: Values with fewer occurrences in the training split are unknown.
        max_length: Elements of a list that are kept; 0 for columns that hold none.
        numeric: What is done with numbers.
    """

    name: str
    kind: ColumnKind
    why: str
    separator: str | None = None
    vocabulary: str | None = None
    min_count: int = 1
    max_length: int = 0
    numeric: Numeric = "standardize"

    @property
    def is_list(self) -> bool:
        """Whether a cell holds several values."""
        return self.kind in ("multivalued", "sequence")

    @property
    def is_field(self) -> bool:
        """Whether a model sees it."""
        return self.kind in ("categorical", "numeric", "multivalued", "sequence")


def describe_columns(sample: pl.DataFrame, settings: Settings) -> tuple[Column, ...]:
    """What each column of `sample` is, in its order.

    Raises:
        ValueError: A setting names a column that is not there, a kind is not one or does not fit, or there is not exactly one label.
    """
    settings.check_columns(sample.columns)
    given = {name: settings.of(name).kind for name in sample.columns}
    has_label = any(_parse(name, kind).kind == "label" for name, kind in given.items() if kind is not None)
    columns = []
    for series in sample.get_columns():
        kind = given[series.name]
        if kind is not None:
            column = _parse(series.name, kind)
        elif series.name == settings.split_by:  # as a field, its values in the test split would all be new
            column = Column(series.name, "timestamp", "split by")
        else:
            column = _infer(series, label_known=has_label)
        columns.append(_complete(column, series, settings))
    _check_label(columns)
    _check_vocabularies(columns)
    return tuple(columns)


def _parse(name: str, kind: str) -> Column:
    """A kind as the user writes it: KIND, KIND:SEPARATOR, KIND@VOCABULARY or KIND:SEPARATOR@VOCABULARY."""
    match = re.fullmatch(r"(\w+)(?::(.+?))?(?:@(.+))?", kind, re.DOTALL)
    kinds: dict[str, ColumnKind] = {kind: kind for kind in get_args(ColumnKind)}
    if match is None or match[1] not in kinds:
        raise ValueError(f"Column {name!r}: kind {kind!r} is unknown. Choose one of {list(kinds)}; lists as 'multivalued:|'.")
    column = Column(name, kinds[match[1]], "given", separator=match[2], vocabulary=match[3])
    if column.separator is not None and not column.is_list:
        raise ValueError(f"Column {name!r}: kind {kind!r} has a separator, which only 'multivalued' and 'sequence' take.")
    if column.vocabulary is not None and not (column.is_list or column.kind == "categorical"):
        raise ValueError(f"Column {name!r}: kind {kind!r} has a vocabulary, which only columns of ids have.")
    return column


def _infer(series: pl.Series, *, label_known: bool) -> Column:
    """Name and type first, then values."""
    name, dtype = series.name, series.dtype
    if name.lower() in LABEL_NAMES and not label_known:
        return Column(name, "label", "name")
    form = form_of(dtype)
    if form == "a list":
        return Column(name, "multivalued", "lists")
    if form == "nested values":
        return Column(name, "ignore", "nested")
    if dtype.is_temporal() or (TIME_NAME.search(name) and _tells_time(series)):
        return Column(name, "timestamp", "times" if dtype.is_temporal() else "name")
    if dtype.is_float() or dtype.is_decimal():
        return Column(name, "numeric", "decimals")
    if dtype == pl.String and _is_decimal_text(series):
        return Column(name, "numeric", "decimals")
    return Column(name, "categorical", "whole numbers" if dtype.is_integer() else "text" if dtype == pl.String else str(dtype).lower())


def _tells_time(series: pl.Series) -> bool:
    known = series.drop_nulls()
    times = known.to_frame().select(time_of(known.name, known.dtype)).to_series()
    return len(times) > 0 and times.null_count() == 0 and bool((times >= EARLIEST_TIME).all())


def _is_decimal_text(series: pl.Series) -> bool:
    known = series.filter(series.str.strip_chars() != "")
    numbers = known.cast(pl.Float64, strict=False)
    if not len(known) or numbers.null_count() or numbers.n_unique() <= NUMERIC_DISTINCT:
        return False
    return bool((numbers != numbers.floor()).any())


def _complete(column: Column, series: pl.Series, settings: Settings) -> Column:
    """The column with what the settings say of its ids, lists and numbers."""
    field = settings.of(column.name)
    form = form_of(series.dtype)
    if form == "nested values" and column.kind != "ignore":
        raise ValueError(f"Column {column.name!r}: a cell holds nested values ({series.dtype}), so it cannot be {column.kind!r}. Choose 'ignore'.")
    if column.is_list and column.separator is None and form == "one value":
        raise ValueError(f"Column {column.name!r}: a cell holds text, not a list. Say what separates its elements, e.g. '{column.kind}:|'.")
    if form == "a list" and not column.is_list and column.kind != "ignore":
        raise ValueError(f"Column {column.name!r}: a cell holds a list, so it cannot be {column.kind!r}. Choose 'multivalued' or 'sequence'.")
    numeric = field.numeric or settings.numeric
    has_ids = column.is_list or column.kind == "categorical" or (column.kind == "numeric" and numeric == "log-bucket")
    return replace(
        column,
        separator=None if form == "a list" else column.separator,
        vocabulary=(column.vocabulary or column.name) if has_ids else None,
        min_count=settings.min_count if field.min_count is None else field.min_count,
        max_length=(field.max_length or settings.max_length) if column.is_list else 0,
        numeric=numeric,
    )


def _check_label(columns: Sequence[Column]) -> None:
    labels = [column.name for column in columns if column.kind == "label"]
    if len(labels) > 1:
        raise ValueError(f"Columns {labels} could each be the label. Say which with --kind {labels[0]}=label.")
    if not labels:
        names = [column.name for column in columns]
        raise ValueError(f"No label (0 or 1) among the columns {names}. Name it with --kind COLUMN=label, or check separator and header.")
    if not any(column.is_field for column in columns):
        raise ValueError(f"Nothing but {[column.name for column in columns]} in the input: no column is a field of a model.")


def _check_vocabularies(columns: Sequence[Column]) -> None:
    names = [column.vocabulary for column in columns]
    for column in columns:
        if column.vocabulary not in (None, column.name) and names.count(column.vocabulary) == 1:
            raise ValueError(f"Column {column.name!r}: no other column has the vocabulary {column.vocabulary!r}. Name a categorical column.")
    _check_module_names([name for name in names if name is not None])
    _check_module_names([column.name for column in columns if column.is_field and column.vocabulary is None])


def _check_module_names(names: Sequence[str]) -> None:
    """Modules of a model are named after vocabularies and numeric fields."""
    first: dict[str, str] = {}
    for name in names:
        twin = first.setdefault(module_key(name), name)
        if twin != name:
            raise ValueError(f"Columns {twin!r} and {name!r} would have the same name in a model. Rename one, or leave it out: --kind {name}=ignore.")
