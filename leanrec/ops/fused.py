"""Look-ups in coded tables at one go, as torch operators that `torch.compile` and `torch.export` see through.

On a CPU by the C++ kernel (`kernel.cpp`), on a GPU by the Triton one (`fused_gpu.py`), both for float32 tables. Where the kernel is not
there, or a table is of another precision, tables are read by torch, by their `lookup`.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from leanrec.ops.additive import sum_words
from leanrec.ops.packing import unpack_rows

_kernel: Any
try:
    _kernel = importlib.import_module("leanrec.ops._kernel")
except ImportError:
    _kernel = None

_FINE, _BAD_BORDERS, _BAD_OFFSETS = -1, -2, -3  # what the kernel answers beside the place of an id out of range
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_CPU = torch.device("cpu")
IDS = (torch.int64, torch.int32)  # of ids that the kernel reads
_ANY_ROW = 2**62  # more than a table has
_TILE = 16  # columns of words that the kernel adds up at once
_enabled = True


class Coded(NamedTuple):
    """A table in a layout that the kernel reads.

    Attributes:
        layout: "concat", "sum", "byte_sum", "levels" or "scaled".
        tensors: What is read, the one with the values, and a gradient where there is one, first.
        numbers: Sizes that the tensors do not tell.
        width: D, columns of a row.
    """

    layout: str
    tensors: list[Tensor]
    numbers: list[int]
    width: int


def concat(packed_codes: Tensor, codebooks: Tensor, num_bits: int, width: int) -> Coded:
    """Rows that are one word of each of M code books side by side: (bytes,) uint8 as `packing.pack` makes them, (M, K, D / M) float32."""
    return Coded("concat", [codebooks, packed_codes], [num_bits], width)


def sums(packed_codes: Tensor, codebooks: Tensor, num_bits: int, width: int) -> Coded:
    """Rows that are the sum of one word of each of L code books: (bytes,) uint8, (L, K, D) float32."""
    return Coded("sum", [codebooks, packed_codes], [num_bits], width)


def byte_sums(packed_codes: Tensor, words: Tensor, scales: Tensor, num_bits: int) -> Coded:
    """As `sums`, of whole numbers, times a scale for each column: (bytes,) uint8, (L, K, D) int8, (D,) float32."""
    return Coded("byte_sum", [scales, packed_codes, words], [num_bits], len(scales))


def levels(
    packed_codes: Tensor,
    num_bits: int,
    *,
    mean: Tensor,
    borders: Tensor,
    packed_words: Tensor,
    scales: Tensor,
    packed_ranks: Tensor | None,
    rank_bits: int,
    width: int,
) -> Coded | None:
    """Rows of falling length: a mean and a word of 4-bit values of each level that a row has; see `VRQTable` for the tensors.

    None where D is odd, so that words begin within bytes, and where scales are no float16.
    """
    if width % 2 or scales.dtype != torch.float16:
        return None
    ranks = [] if packed_ranks is None else [packed_ranks]
    return Coded("levels", [mean, packed_codes, borders, packed_words, scales, *ranks], [num_bits, rank_bits], width)


def scaled(packed_codes: Tensor, scales: Tensor, num_bits: int, *, group_size: int, width: int) -> Coded | None:
    """Rows rounded to 8, 4 or 2 bits: (bytes,) uint8, (V, groups) float16; None where a row or a group begins within a byte."""
    if (width * num_bits) % 8 or (group_size * num_bits) % 8:
        return None
    return Coded("scaled", [scales, packed_codes], [num_bits, group_size], width)


def is_built() -> bool:
    """Whether the kernel for CPUs is there."""
    return _kernel is not None


def takes(coded: Coded, ids: Tensor) -> bool:
    """Whether a kernel answers for these ids: it is there for their device, and the table has the precision that it knows."""
    values = coded.tensors[0]
    if not _enabled or values.dtype != (torch.float16 if coded.layout == "scaled" else torch.float32):
        return False
    if ids.is_cpu and values.is_cpu:
        if _kernel is None:
            _say_not_built()
        return _kernel is not None
    return ids.is_cuda and values.is_cuda and _HAS_TRITON


def rows(coded: Coded, ids: Tensor, *, num_rows: int, padding: int | None) -> Tensor:
    """Rows for ids of any shape: (...) int32 or int64 -> (..., D) float32, with a gradient for code books and mean.

    Args:
        coded: The table.
        ids: On the device of the table.
        num_rows: V.
        padding: The id for which zeros are answered.

    Raises:
        IndexError: An id outside [0, V).
    """
    skipped = -1 if padding is None else padding
    learns = coded.tensors[0].requires_grad and torch.is_grad_enabled()
    if learns or torch.compiler.is_compiling() or torch.jit.is_tracing() or type(ids) is not Tensor or not ids.is_cpu:
        flat = _rows(ids.reshape(-1), coded.tensors, coded.numbers, coded.layout, coded.width, num_rows, skipped)
        return flat.view(*ids.shape, coded.width)
    return _read(ids, coded, num_rows, skipped)


def bags(coded: Coded, ids: Tensor, offsets: Tensor, *, num_rows: int, padding: int | None, mean: bool, weights: Tensor | None = None) -> Tensor:
    """Sums or means of the rows of bags on a CPU, without a gradient: (N,) int, (B + 1,) int64 -> (B, D) float32.

    Args:
        coded: The table.
        ids: Of all bags, one after the other.
        offsets: Start of each bag, and N.
        num_rows: V.
        padding: The id that does not count in a bag.
        mean: Whether to divide by the number of ids that count.
        weights: (N,) float32, factor of each row.

    Raises:
        IndexError: An id outside [0, V).
        ValueError: Offsets that fall or do not lie within the ids.
    """
    return _read(ids, coded, num_rows, -1 if padding is None else padding, offsets, weights, mean=mean)


class Read(NamedTuple):
    """One of several tables that are read together.

    Attributes:
        coded: The table.
        num_rows: V.
        padding: The id for which zeros are answered.
        decoded: Its first rows as they are answered, (N, D) float32, contiguous: ids below N are copied from there.
    """

    coded: Coded
    num_rows: int
    padding: int | None
    decoded: Tensor | None = None


class Together(ABC):
    """Several tables on a CPU that are read with one call of the kernel, without a gradient; where they are to be moved, make it anew."""

    def __init__(self, tables: Mapping[int, Read]) -> None:
        """What is read.

        Args:
            tables: Place -> a table that the kernel `takes`; all of one width.
        """
        self.tables: dict[int, Any] = dict(tables)
        self._made: list[Any] = []
        self._held: list[Tensor] = []

    def takes(self, ids: Sequence[Tensor]) -> bool:
        """Whether the kernel answers for (N,) ids of each table: not where a program is traced or compiled."""
        if not self.tables or not _enabled or _kernel is None or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        return all(type(each) is Tensor and each.dtype in IDS and each.is_cpu and each.dim() == 1 for each in ids)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": [], "_held": []}  # addresses, which are not those of a copy

    def _run(self, run: Any, ids: Sequence[Tensor], out: Tensor) -> None:
        ids = [each.long().contiguous() for each in ids]
        if len(ids) != len(self.tables) or any(len(each) != len(out) for each in ids):
            raise ValueError(f"{len(self.tables)} tables need {len(out)} ids each, but are given {[len(each) for each in ids]}.")
        assert out.is_contiguous() and out.dtype == torch.float32
        self._made = self._made or [self._make(place, table) for place, table in self.tables.items()]
        bad = run(self._made, [each.data_ptr() for each in ids], len(out), out.data_ptr(), torch.get_num_threads())
        if bad != _FINE:
            number, row = divmod(bad, len(out)) if bad >= 0 else (0, bad)
            raise _refusal(row, ids[number], list(self.tables.values())[number].num_rows)

    @abstractmethod
    def _make(self, place: int, table: Any) -> Any:
        """A table as the kernel takes it; what has to last as long goes to `_held`."""


class SideBySide(Together):
    """Tables whose rows go to places next to one another."""

    def __init__(self, tables: Mapping[int, Read], num_places: int) -> None:
        super().__init__(tables)
        self.num_places = num_places
        self.width = next((table.coded.width for table in self.tables.values()), 0)

    def read(self, ids: Sequence[Tensor], out: Tensor) -> None:
        """Write the rows for (N,) ids of each table to its place in `out`, (N, F, D) float32; what is in other places stays.

        Raises:
            IndexError: An id outside of its table.
            ValueError: Not as many ids of one table as of another.
        """
        self._run(_kernel.run_side_by_side, ids, out)

    def _make(self, place: int, table: Read) -> Any:
        coded, num_rows, padding, decoded = table
        slot, stride, skipped = 4 * coded.width * place, coded.width * self.num_places, -1 if padding is None else padding
        call = _kernel.Call(0, True, 0, num_rows, skipped, 0, 0, 0, False, slot, coded.width, stride)  # `run` fills in the zeros that stand for ids
        if decoded is not None:
            call.copy_first(decoded.data_ptr(), len(decoded))
        return _READS[coded.layout](call, coded.tensors, coded.numbers, self._held)


class _Summed(NamedTuple):
    packed_codes: Tensor
    num_bits: int
    num_books: int
    num_words: int
    first_word: int
    num_rows: int
    padding: int | None


class Sums(Together):
    """Tables in the layout "sum" whose rows are added up.

    Attributes:
        tiles: (D / 16 rounded up, W + 1, 16) float32, the words of all tables and one of zeros, 16 columns at a time: the kernel adds up so many
            of all rows before the next, and so reads words that are in a core's own cache.
        width: D.
    """

    def __init__(self, tables: Mapping[int, Read], zeros: Tensor) -> None:
        """What is added up.

        Args:
            tables: Place -> a table in the layout "sum"; all of one width.
            zeros: (D,), the word of zeros.
        """
        super().__init__({})
        self.width = len(zeros)
        books = [table.coded.tensors[0] for table in tables.values()]
        firsts = accumulate((len(words) * words.shape[1] for words in books), initial=0)
        for (place, (coded, num_rows, padding, _)), first in zip(tables.items(), firsts, strict=False):
            num_books, num_words, _ = coded.tensors[0].shape
            self.tables[place] = _Summed(coded.tensors[1], coded.numbers[0], num_books, num_words, first, num_rows, padding)
        words = torch.cat([*[each.flatten(0, 1) for each in books], zeros.unsqueeze(0)])
        self.tiles = F.pad(words, (0, -self.width % _TILE)).unflatten(1, (-1, _TILE)).transpose(0, 1).contiguous()

    def map(self, fn: Callable[[Tensor], Tensor]) -> Sums:
        """The same of what `fn` makes of each tensor."""
        mapped = copy.copy(self)
        mapped.tiles = fn(self.tiles)
        mapped.tables = {place: table._replace(packed_codes=fn(table.packed_codes)) for place, table in self.tables.items()}
        return mapped

    def add(self, ids: Sequence[Tensor], out: Tensor) -> Tensor:
        """`out`, (N, D), with the rows that (N,) ids have in each table added to it in place; by torch where the kernel cannot.

        Raises:
            IndexError: An id outside of its table.
            ValueError: Not as many ids of one table as of another.
        """
        is_plain = out.is_cpu and out.dtype == self.tiles.dtype == torch.float32 and out.is_contiguous()  # it is not under autocast, for one
        if is_plain and self.takes(ids):
            self._run(self._add, ids, out)
            return out
        for table, each in zip(self.tables.values(), ids, strict=True):
            codes = unpack_rows(table.packed_codes, each.long(), table.num_books, table.num_bits)
            words = table.first_word + codes + table.num_words * torch.arange(table.num_books, device=codes.device)
            rows = self.tiles[:, words].sum(2).transpose(0, 1).flatten(1)[:, : self.width].to(out.dtype)
            out += rows if table.padding is None else rows.masked_fill((each == table.padding).unsqueeze(1), 0.0)
        return out

    def _add(self, made: list[Any], ids: list[int], num_ids: int, out: int, num_threads: int) -> int:
        return _kernel.add_sums(made, ids, num_ids, self.tiles.data_ptr(), self.tiles.shape[1], self.width, out, num_threads)

    def _make(self, place: int, table: _Summed) -> Any:
        packed_codes, *numbers, padding = table
        return _kernel.Lookup(packed_codes.data_ptr(), packed_codes.numel(), *numbers, -1 if padding is None else padding)


@contextmanager
def plain_torch() -> Iterator[None]:
    """Within it all tables are read by torch alone: for comparison, and for exported programs that must run without leanrec."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def _read(
    ids: Tensor, coded: Coded, num_rows: int, padding: int, offsets: Tensor | None = None, weights: Tensor | None = None, *, mean: bool = False
) -> Tensor:
    """Rows, or with `offsets` pooled ones. A batch may be one id: every call here counts."""
    if not ids.is_contiguous():
        ids = ids.contiguous()
    if ids.dtype not in IDS:
        ids = ids.long()
    width, num_ids = coded.width, ids.numel()
    num_bags, first_offset = (0, 0) if offsets is None else (len(offsets) - 1, offsets.data_ptr())
    # As `torch.empty`, in two thirds of its time.
    out = torch.empty_strided((num_ids if offsets is None else num_bags, width), (width, 1), dtype=torch.float32, device=_CPU)
    first_weight = 0 if weights is None else weights.data_ptr()
    long_ids = ids.dtype == torch.int64
    call = _kernel.Call(
        ids.data_ptr(), long_ids, num_ids, num_rows, padding, first_offset, first_weight, num_bags, mean, out.data_ptr(), width, width
    )
    held: list[Tensor] = []
    bad = _kernel.run(_READS[coded.layout](call, coded.tensors, coded.numbers, held), torch.get_num_threads())
    if bad == _FINE:
        return out if ids.dim() == 1 or offsets is not None else out.view(*ids.shape, width)
    if bad == _BAD_OFFSETS:
        raise ValueError(f"offsets of bags must begin at 0, never fall and end at {num_ids}, the number of ids, at most.")
    raise _refusal(bad, ids, num_rows)


def _refusal(bad: int, ids: Tensor, num_rows: int) -> Exception:
    """What is wrong, where the kernel answered something else than `_FINE`."""
    if bad == _BAD_BORDERS:
        return ValueError("the borders of the table's levels do not fit its codes: the file that it was loaded from is damaged.")
    return IndexError(f"id {int(ids.reshape(-1)[bad])} is outside the table's rows 0 to {num_rows - 1}.")


def _reads_books(name: str) -> Any:
    def read(call: Any, tensors: list[Tensor], numbers: list[int], held: list[Tensor]) -> Any:
        codebooks, packed_codes = tensors
        num_books, num_words, _ = codebooks.shape
        if not codebooks.is_contiguous():
            codebooks = codebooks.contiguous()
            held.append(codebooks)
        return getattr(_kernel, name)(call, packed_codes.data_ptr(), packed_codes.numel(), numbers[0], codebooks.data_ptr(), num_books, num_words)

    return read


def _read_byte_sums(call: Any, tensors: list[Tensor], numbers: list[int], held: list[Tensor]) -> Any:
    scales, packed_codes, words = tensors
    num_books, num_words, _ = words.shape
    place, nbytes = packed_codes.data_ptr(), packed_codes.numel()
    return _kernel.byte_sum(call, place, nbytes, numbers[0], words.data_ptr(), num_books, num_words, scales.data_ptr())


def _read_levels(call: Any, tensors: list[Tensor], numbers: list[int], held: list[Tensor]) -> Any:
    mean, packed_codes, borders, packed_words, scales, *ranks = tensors
    place, nbytes = (ranks[0].data_ptr(), ranks[0].numel()) if ranks else (0, 0)
    return _kernel.levels(
        call,
        packed_codes.data_ptr(),
        packed_codes.numel(),
        numbers[0],
        place,
        nbytes,
        numbers[1],
        mean.data_ptr(),
        borders.data_ptr(),
        len(borders),
        packed_words.data_ptr(),
        scales.data_ptr(),
        len(scales) // len(borders),
    )


def _read_scaled(call: Any, tensors: list[Tensor], numbers: list[int], held: list[Tensor]) -> Any:
    scales, packed_codes = tensors
    return _kernel.scaled(call, packed_codes.data_ptr(), numbers[0], scales.data_ptr(), numbers[1], scales.shape[1])


# Layout -> what the kernel is to run for a call and a table; `held` takes tensors that must last until then.
_READS = {"concat": _reads_books("concat"), "sum": _reads_books("sum"), "byte_sum": _read_byte_sums, "levels": _read_levels, "scaled": _read_scaled}


@torch.library.custom_op("leanrec::rows", mutates_args=())
def _rows(ids: Tensor, tensors: list[Tensor], numbers: list[int], layout: str, width: int, num_rows: int, padding: int) -> Tensor:
    if ids.is_cpu:
        return _read(ids, Coded(layout, tensors, numbers, width), num_rows, padding)
    from leanrec.ops import fused_gpu  # Triton takes a while to import

    return fused_gpu.rows(ids, tensors, numbers, layout, width, num_rows, padding)


@_rows.register_fake
def _(ids: Tensor, tensors: list[Tensor], numbers: list[int], layout: str, width: int, num_rows: int, padding: int) -> Tensor:
    return ids.new_empty((ids.shape[0], width), dtype=torch.float32)


@torch.library.custom_op("leanrec::rows_gradient", mutates_args=())
def _rows_gradient(grad: Tensor, ids: Tensor, tensors: list[Tensor], numbers: list[int], layout: str, padding: int) -> Tensor:
    values, packed_codes = tensors[:2]
    ids, grad = ids.long(), grad.contiguous()
    if layout == "levels":
        return grad.masked_fill((ids == padding).unsqueeze(1), 0.0).sum(0)
    if layout == "byte_sum":
        codes = unpack_rows(packed_codes, ids, len(tensors[2]), numbers[0])
        return (grad * sum_words(codes, tensors[2])).masked_fill((ids == padding).unsqueeze(1), 0.0).sum(0)
    out = torch.zeros_like(values, memory_format=torch.contiguous_format)
    num_books, num_words, width = values.shape
    if not ids.is_cpu:
        codes = unpack_rows(packed_codes, ids, num_books, numbers[0]) + torch.arange(0, num_books * num_words, num_words, device=ids.device)
        grad = grad.masked_fill((ids == padding).unsqueeze(1), 0.0)
        parts = grad.view(-1, width) if layout == "concat" else grad.repeat_interleave(num_books, dim=0)
        return out.view(-1, width).index_add_(0, codes.flatten(), parts).view_as(out)
    _kernel.gradients(
        ids.data_ptr(),
        len(ids),
        padding,
        grad.data_ptr(),
        grad.shape[1],
        packed_codes.data_ptr(),
        packed_codes.numel(),
        numbers[0],
        out.data_ptr(),
        num_books,
        num_words,
        width,
        layout == "concat",
        torch.get_num_threads(),
    )
    return out


@_rows_gradient.register_fake
def _(grad: Tensor, ids: Tensor, tensors: list[Tensor], numbers: list[int], layout: str, padding: int) -> Tensor:
    return torch.empty_like(tensors[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, tensors, ctx.numbers, ctx.layout, _, _, ctx.padding = inputs
    ctx.save_for_backward(ids, *tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    ids, *tensors = ctx.saved_tensors
    first = _rows_gradient(grad, ids, tensors, ctx.numbers, ctx.layout, ctx.padding) if tensors[0].requires_grad else None
    return None, [first, *[None] * (len(tensors) - 1)], None, None, None, None, None


_rows.register_autograd(_backward, setup_context=_save)


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, ids, tensors, ctx.numbers, ctx.layout, ctx.padding = inputs
    ctx.width = grad.shape[1]
    ctx.save_for_backward(ids, *tensors)


def _backward_of_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The gradient is linear in that of the rows: what goes back is the rows of a table whose values are `grad`."""
    ids, _, *tensors = ctx.saved_tensors
    if ctx.layout == "levels":
        rows = grad.expand(len(ids), -1).masked_fill((ids == ctx.padding).unsqueeze(1), 0.0)
    else:
        rows = _rows(ids, [grad.contiguous(), *tensors], ctx.numbers, ctx.layout, ctx.width, _ANY_ROW, ctx.padding)
    return rows, None, [None] * (1 + len(tensors)), None, None, None


_rows_gradient.register_autograd(_backward_of_gradient, setup_context=_save_gradient)


def _say_not_built() -> None:
    global _said
    if not _said and not torch.compiler.is_compiling():
        _said = True
        warnings.warn(
            "leanrec's look-up kernel was not built, so compressed tables are read by torch, several times slower. "
            "Install a C++ compiler and then leanrec again: pip install --force-reinstall --no-deps leanrec",
            stacklevel=2,
        )


_said = False
