"""What a model weighs: bytes, ratio and error per table and in all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from leanrec.compress import group_counts
from leanrec.dense import factored_layers
from leanrec.embeddings import Group, address, group_nbytes, group_nbytes_full, listing, reconstruction_error, table_groups, title, unpooled
from leanrec.methods.base import Table


@dataclass(frozen=True)
class TableReport:
    """One table.

    Attributes:
        path: Where it stands in the model, the first of its places.
        num_embeddings: V.
        embedding_dim: D.
        method: Text form of its method without defaults, "-" where it is not compressed.
        nbytes: Bytes as stored, codes, codebooks and all.
        nbytes_full: Bytes as V x D float32.
        error: Share of the variance of the original rows that is lost, each row weighted by its count; None where it is not known.
    """

    path: str
    num_embeddings: int
    embedding_dim: int
    method: str
    nbytes: int
    nbytes_full: int
    error: float | None

    @property
    def ratio(self) -> float:
        """`nbytes_full` / `nbytes`."""
        return self.nbytes_full / self.nbytes if self.nbytes else 1.0


@dataclass(frozen=True)
class Report:
    """All tables of a model, in bytes as stored; a table that stands in several places counts once.

    Attributes:
        rows: Per table.
        tables: All tables.
        tables_full: All tables as float32.
        dense: Linear layers that `compress_dense` factored.
        dense_full: The layers that they replaced, as float32.
        model: Tables and all else in the model's state.
        model_full: The same with the tables as float32 and no layer factored.
        vocabulary: The map of raw values to ids, which is part of what is served; None where it was not given.
        error: Mean of the tables' errors weighted by `nbytes_full`, uncompressed ones counting 0; None where one is not known.
    """

    rows: tuple[TableReport, ...]
    tables: int
    tables_full: int
    dense: int
    dense_full: int
    model: int
    model_full: int
    vocabulary: int | None
    error: float | None

    @property
    def ratio(self) -> float:
        """`tables_full` / `tables`."""
        return self.tables_full / self.tables if self.tables else 1.0

    def to_dict(self) -> dict[str, Any]:
        """All values, ratios too, as JSON takes them."""
        rows = [asdict(row) | {"ratio": row.ratio} for row in self.rows]
        return asdict(self) | {"rows": rows, "ratio": self.ratio}

    def __str__(self) -> str:
        """A table of text: a line per table of the model, then the totals."""
        heads = ("table", "rows", "dim", "method", "bytes", "as float32", "ratio", "error")
        lines = [
            (row.path, f"{row.num_embeddings:,}", str(row.embedding_dim), row.method, *_sizes(row.nbytes, row.nbytes_full), _error(row.error))
            for row in self.rows
        ]
        lines.append(("all tables", "", "", "", *_sizes(self.tables, self.tables_full), _error(self.error)))
        if self.dense_full:
            lines.append(("factored layers", "", "", "", *_sizes(self.dense, self.dense_full), ""))
        lines.append(("whole model", "", "", "", *_sizes(self.model, self.model_full), ""))
        if self.vocabulary is not None:
            lines.append(("vocabulary", "", "", "", f"{self.vocabulary:,}", "", "", ""))
        return "\n".join(_aligned([heads, *lines], left={0, 3}))


def report(
    model: nn.Module,
    *,
    original: nn.Module | None = None,
    counts: Mapping[str, Tensor] | None = None,
    vocabulary_nbytes: int | None = None,
) -> Report:
    """Bytes, ratio and reconstruction error of a model's tables.

    Args:
        model: Any module, compressed or not.
        original: The model before `compress`, if still at hand: errors are then measured against its tables as they are now. Otherwise
            they are those that `compress` measured when it fitted the tables, which `save` and `load` keep.
        counts: As in `compress`; how rows weigh in errors against `original`.
        vocabulary_nbytes: Bytes of the map of raw values to ids.

    Raises:
        ValueError: `original` has not the same tables, or counts do not fit.
    """
    groups = table_groups(model)
    errors = {path: _fit_error(group) for path, group in groups.items()} if original is None else _measure(groups, original, counts)
    rows = tuple(_row(path, group, errors[path]) for path, group in groups.items())
    tables, tables_full = sum(row.nbytes for row in rows), sum(row.nbytes_full for row in rows)
    layers = factored_layers(model).values()
    dense, dense_full = sum(layer.nbytes for layer in layers), sum(layer.nbytes_full for layer in layers)
    state = {address(tensor): tensor.nbytes for tensor in model.state_dict(keep_vars=True).values() if isinstance(tensor, Tensor)}
    total = sum(state.values())
    total_full = total - tables + tables_full - dense + dense_full
    return Report(rows, tables, tables_full, dense, dense_full, total, total_full, vocabulary_nbytes, _mean_error(rows))


def _row(path: str, group: Group, error: float | None) -> TableReport:
    held = unpooled(group[path])
    method = held.method.short() if isinstance(held, Table) else "-"
    return TableReport(path, held.num_embeddings, held.embedding_dim, method, group_nbytes(group), group_nbytes_full(group), error)


def _fit_error(group: Group) -> float | None:
    held = unpooled(next(iter(group.values())))
    return held.fit_error if isinstance(held, Table) else None


def _measure(groups: Mapping[str, Group], original: nn.Module, counts: Mapping[str, Tensor] | None) -> dict[str, float | None]:
    """First path of each group -> error against the table at that path of the original."""
    row_counts = group_counts(groups, counts)
    before = {path: module for group in table_groups(original).values() for path, module in group.items()}
    for path, group in groups.items():
        if path not in before or title(path, before[path]) != title(path, group[path]):
            raise ValueError(f"{title(path, group[path])}: the original model has no such table. Its tables are {listing(before)}.")
    return {path: reconstruction_error(before[path], group[path], row_counts.get(path)) for path, group in groups.items()}


def _mean_error(rows: tuple[TableReport, ...]) -> float | None:
    errors = [0.0 if row.error is None and row.method == "-" else row.error for row in rows]
    known = [(error, row.nbytes_full) for error, row in zip(errors, rows, strict=True) if error is not None]
    if len(known) < len(rows) or not any(nbytes for _, nbytes in known):
        return None
    return sum(error * nbytes for error, nbytes in known) / sum(nbytes for _, nbytes in known)


def _sizes(nbytes: int, nbytes_full: int) -> tuple[str, str, str]:
    return f"{nbytes:,}", f"{nbytes_full:,}", f"{nbytes_full / nbytes:.1f}x" if nbytes else "-"


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.4f}"


def _aligned(lines: list[tuple[str, ...]], *, left: set[int]) -> list[str]:
    """Lines with their columns under one another, the given ones to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(text.ljust(widths[i]) if i in left else text.rjust(widths[i]) for i, text in enumerate(line)).rstrip() for line in lines]
