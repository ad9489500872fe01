"""The contract of a compression method: a frozen config (`Method`) and a drop-in table (`Table`)."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from leanrec.methods.order import RowOrder, check_sorted
from leanrec.ops import fused
from leanrec.ops.sensitivity import Sensitivity
from leanrec.ops.spread import Spread

_CHUNK_VALUES = 2**20
_MAX_WEIGHT_POWER = 4  # of counts up to a billion, which float32 still holds


@dataclass(frozen=True)
class Method(ABC):
    """Hyperparameters of one method: literals only, with defaults that work on a 1000 x 16 table.

    Its text form is its repr, `PQ(num_subspaces=4, num_centroids=256)`: the same in code, on the command line, in result files
    and in saved models (`leanrec.methods.parse` reads it back). The first line of the class docstring names the paper.

    Raises:
        ValueError: A setting is not of the type of its default; whole numbers and floats of NumPy and torch become Python's own.
    """

    knob: ClassVar[str]
    """The integer field that trades size for quality: size never falls as it grows."""
    gaps: ClassVar[Mapping[str, str]] = {}
    """Ways of use, "fit" after training or "scratch" from its first step on, that the method does not have -> why."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            try:
                object.__setattr__(self, field.name, _plain(value, field.default))
            except (TypeError, ValueError, OverflowError):
                kind = type(field.default).__name__
                raise ValueError(f"{type(self).__name__} has {field.name}={value!r}. Give a plain {kind}, such as {field.default!r}.") from None
        power = getattr(self, "weight_power", 0.0)
        if not 0 <= power <= _MAX_WEIGHT_POWER:
            raise ValueError(f"{type(self).__name__} has weight_power={power}. Choose 0 to {_MAX_WEIGHT_POWER}.")

    @abstractmethod
    def knob_values(self, num_embeddings: int, embedding_dim: int) -> Sequence[int]:
        """Values of the knob that fit a table of this shape, rising."""

    @abstractmethod
    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        """Bytes of a table as stored, everything it needs to answer counted; known before anything is built.

        Raises:
            ValueError: These settings do not fit a table of this shape; the message gives the valid values.
        """

    @abstractmethod
    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> Table:
        """A table of this shape, not fitted: the start of training from scratch, of `fit` or of `load_state_dict`.

        Raises:
            ValueError: As `nbytes`.
        """

    def variants(self, num_embeddings: int, embedding_dim: int) -> list[Method]:
        """The settings among which a budget chooses for a table of this shape; here, one per value of the knob."""
        return [self.with_knob(value) for value in self.knob_values(num_embeddings, embedding_dim)]

    @property
    def uses_sensitivity(self) -> bool:
        """Whether a fit gains from knowing how much the loss depends on each row: see `Table.weigh`."""
        return False

    def check_counts(self, counts: Tensor | None) -> None:
        """Raise ValueError if these settings do not fit a table whose ids occur so often, (V,) int: rows should be sorted and are not."""
        if counts is not None and getattr(self, "sorted_rows", False):
            check_sorted(counts)

    def for_counts(self, counts: Tensor | None) -> Method:
        """The same settings, or, where they do not fit these counts, with the order of the rows stored."""
        try:
            self.check_counts(counts)
        except ValueError:
            settings: dict[str, Any] = {"sorted_rows": False}
            return replace(self, **settings)
        return self

    @property
    def streaming_gap(self) -> str | None:
        """Why a fit cannot go from a sample of the rows to one row after another, as `leanrec.compress_table` does; None where it can."""
        return "its fit needs all rows at once"

    def with_knob(self, value: int) -> Self:
        """The same settings with another value of the knob."""
        settings: dict[str, Any] = {self.knob: value}
        return replace(self, **settings)

    def short(self) -> str:
        """The text form with the defaults left out, for tables and names of files: `MEC(num_steps=0)`. `parse` reads it back."""
        given = [field for field in fields(self) if getattr(self, field.name) != field.default]
        return f"{type(self).__name__}({', '.join(f'{field.name}={getattr(self, field.name)!r}' for field in given)})"

    @abstractmethod
    def expected_error(self, spread: Spread) -> float:
        """Estimate, between 0 and 1, of the share of a table's variance that these settings lose, each row weighted by its count.

        A formula, not a measurement: it lets `fit_budget` weigh settings against one another before anything is built.

        Args:
            spread: Of the table's rows.
        """

    def curve(
        self, chunks: Iterable[Tensor], num_embeddings: int, embedding_dim: int, *, counts: Tensor | None, sensitivity: Sensitivity | None
    ) -> list[tuple[Method, float]]:
        """Settings among which a budget chooses for a table, each with the squared error of a looked-up row that it is expected to leave.

        Here, all `variants` by their `expected_error`. A method whose sizes depend on the rows themselves measures them instead; with
        sensitivities the error is then the expected rise of the loss.

        Args:
            chunks: Rows of the table, (N, D) float at a time, to be read once.
            num_embeddings: V.
            embedding_dim: D.
            counts: (V,) int64, or None.
            sensitivity: Of the table, where it is known.
        """
        spread = Spread.measure(chunks, num_embeddings, counts)
        return [(variant, spread.variance * variant.expected_error(spread)) for variant in self.variants(num_embeddings, embedding_dim)]


class Table(nn.Module, ABC):
    """A compressed V x D table, drop-in for `nn.Embedding`.

    Everything it needs to answer is a parameter or a registered buffer: saved, moved by `.to()` and counted by `nbytes`.
    """

    halves: ClassVar[Sequence[str]] = ()
    """Buffers of float16 that stay so, as they are stored, whatever precision the table is asked to have."""

    def __init__(self, method: Method, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        if torch.get_default_dtype() != torch.float32:
            raise ValueError(
                f"torch's default dtype is {torch.get_default_dtype()}, and tables are made in float32. Call torch.set_default_dtype(torch.float32), "
                "and give the model another precision by .to(dtype)."
            )
        super().__init__()
        self.method = method
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx: int | None = None
        self.sparse = False  # whether parameters with a row per id should get sparse gradients, as nn.Embedding(sparse=True) does
        self.fit_error: float | None = None  # share of the variance that the fit lost, as `leanrec.compress` measured it
        # Every random draw of this table comes from this seed, so fitting is repeatable and the global random state stays untouched.
        self.seed = 0 if generator is None else int(torch.randint(2**62, (), generator=generator))

    @abstractmethod
    def fit(self, weight: Tensor, counts: Tensor | None = None) -> Self:
        """Post-training compression of `weight`, in place; returns self.

        Args:
            weight: (V, D) float, read in chunks and left as it is.
            counts: (V,) int64 occurrences of each id in the training split, or None for equal weight.
        """

    def weigh(self, sensitivity: Sensitivity) -> None:
        """Called before `fit`, where it is known how much the loss depends on each row: what the fit is to make small; ignored by most."""

    @abstractmethod
    def lookup(self, ids: Tensor) -> Tensor:
        """Rows of the table: (N,) int64 in [0, V) -> (N, D)."""

    def coded(self) -> fused.Coded | None:
        """The table as the look-up kernel reads it, where it has a layout that the kernel knows and `lookup` answers the same; else None."""
        return None

    def axes(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Coordinates (V, R), basis (R, D) and mean (D,), where rows are coordinates @ basis + mean and R + 1 is below D; else None.

        What follows a table can then be multiplied with the basis instead of with rows: see `leanrec.merge`.
        """
        return None

    def held(self, name: str) -> Any:
        """A parameter or buffer of its own, for `coded`: to find one as an attribute takes `nn.Module` as long as reading a row.

        Replicas of `nn.DataParallel` and modules that `torch.nn.utils.prune` has changed have it as an attribute alone.
        """
        found: Tensor | None = self._parameters.get(name)
        if found is None:
            found = self._buffers.get(name)
        return getattr(self, name) if found is None else found

    def penalty(self) -> Tensor | float:
        """A term that training adds to its loss; 0 where the method has none."""
        return 0.0

    def observe(self, ids: Tensor, context: Tensor) -> None:
        """Called with rows of the training log before training from scratch, where a method learns from the log itself.

        Args:
            ids: (N,) int64, of this table.
            context: (N, C) int64, a hash for each id that other tables are asked for in the same row of the log.
        """

    def sort_rows(self, counts: Tensor) -> None:
        """Take the order of the rows by popularity from (V,) int counts, where the method goes by it; `fit` does so itself.

        Raises:
            ValueError: The method takes rows to be sorted, and they are not.
        """
        for module in self.modules():
            if isinstance(module, RowOrder):
                module.fit(counts)

    def begin(self) -> None:
        """Called before training from scratch: a table that learns in another form than the stored one takes that form."""

    def begin_tuning(self) -> None:
        """Called before a fitted table is trained on: if it then learns in another form than the stored one, it takes that form."""

    def maintain(self, step: int) -> Iterable[tuple[nn.Parameter, Tensor]]:
        """Called after every training step: re-clustering, pruning, promotion; nothing where the method needs none or `begin` was not called.

        Returns:
            Parameters with (N,) int64 rows of theirs that now stand for something else: the optimizer forgets what it knew of them.
        """
        return ()

    def finish(self) -> None:
        """Called after training of either kind: the table takes its stored form, of the bytes announced, if it had another, and answers as before."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows for ids of any shape: (...) int -> (..., D). Final: methods write `lookup`, and `coded` where the kernel can do the same.

        Raises:
            IndexError: An id outside [0, V) (checked on the CPU, outside compiled and exported code).
            ValueError: Ids are floats.
        """
        if input.is_floating_point():
            raise ValueError(f"ids are {input.dtype}, which cannot tell large ids apart. Give integers, such as ids.long().")
        coded = self.coded()
        if coded is not None and fused.takes(coded, input):
            return fused.rows(coded, input, num_rows=self.num_embeddings, padding=self.padding_idx)
        ids = input.reshape(-1).long()
        if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in torch.aminmax(ids))
            if low < 0 or high >= self.num_embeddings:
                raise IndexError(f"id {low if low < 0 else high} is outside the table's rows 0 to {self.num_embeddings - 1}.")
        rows = self.lookup(ids)
        if self.padding_idx is not None:
            rows = rows.masked_fill((ids == self.padding_idx).unsqueeze(-1), 0.0)
        return rows.reshape(*input.shape, self.embedding_dim)

    @torch.no_grad()
    def decode(self, *, chunk_rows: int = 65_536) -> Tensor:
        """All rows: (V, D)."""
        starts = range(0, self.num_embeddings, chunk_rows)
        device = next(iter(self.state_dict().values())).device
        return torch.cat([self(torch.arange(start, min(start + chunk_rows, self.num_embeddings), device=device)) for start in starts])

    @property
    def nbytes(self) -> int:
        """Bytes as stored: all parameters and buffers of the table's state dict."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_dict().values())

    @property
    def chunk_rows(self) -> int:
        """Rows of a piece in which a fit reads a weight: a multiple of 8 that makes about 4 MiB, which any machine has to spare."""
        return max(8, _CHUNK_VALUES // self.embedding_dim // 8 * 8)

    def row_chunks(self, weight: Tensor, *, chunk_rows: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """First row and float32 copy of each piece of a weight that may be larger than memory; pieces but the last are multiples of 8 rows.

        Args:
            weight: (V, D) float.
            chunk_rows: Rows of a piece, a multiple of 8; None: the table's `chunk_rows`.

        Raises:
            ValueError: `weight` has another shape than this table, or a value that is not finite.
        """
        self.check_weight(weight)
        chunk_rows = chunk_rows or self.chunk_rows
        for start in range(0, self.num_embeddings, chunk_rows):
            rows = weight[start : start + chunk_rows].detach()
            yield start, checked(rows, range(start, start + len(rows)))

    def check_weight(self, weight: Tensor) -> None:
        """Raises ValueError unless `weight` has this table's shape."""
        if weight.shape != (self.num_embeddings, self.embedding_dim):
            given = " x ".join(str(size) for size in weight.shape)
            raise ValueError(f"the weight to fit is {given}, but the table is {self.num_embeddings} x {self.embedding_dim}. Give one of that shape.")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to`, `.float` and the like call."""
        for name in self.halves:
            self._buffers[name] = self.get_buffer(name).view(torch.int16)  # whole numbers go to other devices, but to no other precision
        try:
            super()._apply(fn, recurse)
        finally:  # a device may not be there, or be full
            for name in self.halves:
                self._buffers[name] = self.get_buffer(name).view(torch.float16)
        return self

    def extra_repr(self) -> str:
        """Shape and settings, for `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.method!r}"


def _plain(value: Any, default: Any) -> Any:
    """A value as a Python literal of the type of a default; raises TypeError, ValueError or OverflowError."""
    kind = type(default)
    if kind is tuple and isinstance(value, list | tuple):
        return tuple(_plain(each, default[0]) for each in value)
    if kind is int and type(value) is not bool:
        return operator.index(value)
    if kind is float and type(value) is not bool and math.isfinite(value):
        return float(value)
    if kind in (bool, str) and type(value) is kind:
        return value
    raise TypeError


def size_grid(least: int, most: int, *, per_octave: int) -> list[int]:
    """Whole numbers from `least` to `most`, both among them, so many for each doubling: fine enough for a budget to be used up."""
    steps = range(math.ceil(math.log2(most / least) * per_octave))
    return sorted({*(round(least * 2 ** (step / per_octave)) for step in steps), most}) if most > least else [least]


def row_weights(counts: Tensor | None, num_embeddings: int, *, power: float) -> Tensor:
    """Weight of each row in a fit, (V,) float32 on the CPU: count ** power; ones without counts.

    A row that never occurred weighs as a tenth of an occurrence: it must not decide, but it is answered and should not be random.

    Raises:
        ValueError: `counts` is not one number per row.
    """
    check_counts(counts, num_embeddings)
    if counts is None:
        return torch.ones(num_embeddings)
    return counts.cpu().float().clamp(min=0.1) ** power


def check_counts(counts: Tensor | None, num_embeddings: int) -> None:
    """Raises ValueError unless `counts` is one number per row."""
    if counts is not None and counts.shape != (num_embeddings,):
        raise ValueError(f"counts has shape {tuple(counts.shape)}, but the table has {num_embeddings} rows. Give one count per row.")


def checked(rows: Tensor, ids: Sequence[int] | Tensor) -> Tensor:
    """Rows as float32.

    Args:
        rows: (N, D) float.
        ids: N, which rows of the weight these are.

    Raises:
        ValueError: A value is not finite.
    """
    rows = rows.float()
    # The sum is quick to take and not finite if any value is not; a finite weight of huge values may overflow it, so a second look decides.
    if rows.sum().isfinite():
        return rows
    finite = rows.isfinite().all(1)
    if not finite.all():
        row = int(ids[int(finite.long().argmin())])
        raise ValueError(f"row {row} of the weight holds NaN or infinite values. Fit a weight of finite values.")
    return rows
