"""Everything that decides what `prepare` makes of a log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from leanrec.data.source import OnBadRow

Format = Literal["csv", "tsv", "parquet", "libsvm", "criteo", "avazu"]
Numeric = Literal["standardize", "log-bucket"]
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class FieldSettings:
    """What the user says of one column, or of all that match a pattern; None where nothing was said."""

    kind: str | None = None
    min_count: int | None = None
    max_length: int | None = None
    numeric: Numeric | None = None


@dataclass(frozen=True)
class Settings:
    """All options of `prepare`, in the words of its command line.

    Attributes:
        format: None to tell by the names of the files.
        delimiter: One character between the columns of text; None for that of the format.
        header: Whether the first line of a text file names the columns; None for what the format does.
        columns: Names of the columns of text without a header.
        fields: Column or pattern (`C*`) -> what holds for it; for each option the first match decides.
        min_count: Values with fewer occurrences in the training split become unknown.
        max_length: Elements of a list that are kept.
        numeric: What is done with numbers.
        split: Shares of the splits that have no files of their own; empty for 0.8, 0.1, 0.1 or 0.9, 0.1.
        split_by: Column of the time by which rows are split, oldest into training; None to split at random.
        seed: Decides the random split.
        on_bad_row: Whether a row that cannot be read is an error or is left out and counted.
    """

    format: Format | None = None
    delimiter: str | None = None
    header: bool | None = None
    columns: tuple[str, ...] = ()
    fields: Mapping[str, FieldSettings] = field(default_factory=dict)
    min_count: int = 1
    max_length: int = 50
    numeric: Numeric = "standardize"
    split: tuple[float, ...] = ()
    split_by: str | None = None
    seed: int = 0
    on_bad_row: OnBadRow = "error"

    def __post_init__(self) -> None:
        _check_type("header", self.header, bool, "true or false")
        _check_type("delimiter", self.delimiter, str, "text")
        _check_type("split_by", self.split_by, str, "the name of a column")
        _check_choice("format", self.format, (None, *get_args(Format)))
        _check_choice("on_bad_row", self.on_bad_row, get_args(OnBadRow))
        _check_choice("numeric", self.numeric, get_args(Numeric))
        _check_whole("min_count", self.min_count, 1)
        _check_whole("max_length", self.max_length, 1)
        _check_whole("seed", self.seed, 0)
        for name, one in self.fields.items():
            _check_type(f"kind of {name!r}", one.kind, str, "text such as 'categorical'")
            _check_choice(f"numeric of {name!r}", one.numeric, (None, *get_args(Numeric)))
            _check_whole(f"min_count of {name!r}", one.min_count, 1)
            _check_whole(f"max_length of {name!r}", one.max_length, 1)
        if self.delimiter is not None and (len(self.delimiter.encode()) != 1 or self.delimiter in '\r\n"'):
            raise ValueError(f"delimiter={self.delimiter!r}: one ASCII character is needed, such as ',' or a tab.")
        if self.columns and self.header:
            raise ValueError("columns= names the columns of files without a header, but header=True. Give one of the two.")
        if self.split and not (min(self.split) > 0 and abs(sum(self.split) - 1) < 1e-6):  # not: a comparison with NaN is false
            raise ValueError(f"split={','.join(map(str, self.split))}: shares must be above 0 and sum to 1, e.g. 0.8,0.1,0.1.")

    def of(self, name: str) -> FieldSettings:
        """What was said of column `name`, each option by the first entry that matches and has it."""
        said = [one for pattern, one in self.fields.items() if _matches(name, pattern)]
        return FieldSettings(**{f.name: next((v for one in said if (v := getattr(one, f.name)) is not None), None) for f in fields(FieldSettings)})

    def check_columns(self, names: Sequence[str]) -> None:
        """Refuse an entry that names none of the columns.

        Raises:
            ValueError: There is such an entry.
        """
        patterns = [*self.fields, *([self.split_by] if self.split_by else [])]
        unknown = [pattern for pattern in patterns if not any(_matches(name, pattern) for name in names)]
        if unknown:
            raise ValueError(f"Column {unknown[0]!r} is not in the input. Its columns are {list(names)}.")


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def _check_choice(name: str, value: str | None, choices: Sequence[str | None]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown. Choose one of {[choice for choice in choices if choice is not None]}.")


def _check_type(name: str, value: Any, cls: type, needed: str) -> None:
    if not isinstance(value, cls | None):
        raise ValueError(f"{name}={value!r}: {needed} is needed.")


def _check_whole(name: str, value: int | None, least: int) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise ValueError(f"{name}={value!r}: a whole number from {least} is needed.")
