"""Bits per value chosen for each group of equally popular rows. MPE, 2024, arXiv 2409.20305."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from leanrec.methods.base import Method, Table, row_weights
from leanrec.methods.order import RowOrder, order_nbytes
from leanrec.ops.packing import pack, unpack_at
from leanrec.ops.rounding import GAUSSIAN_ERRORS, GAUSSIAN_SCALES, fake_quantize, least_squares_scales, quantize
from leanrec.ops.spread import Spread, moments

_MOST_BITS = 8
_CHUNK_VALUES = 2**20
_CHOICE_STEPS = 100  # training steps from one choice of widths to the next
_MEMORY = 0.9  # share of the energies that each choice leaves for the next


@dataclass(frozen=True)
class MixedPrecision(Method):
    """Rows in groups of equal popularity; a group keeps its rows' distances from a shared row at 0 to 8 bits per value, with one scale.

    Each next bit goes to the group that gains most by it. In a fit that is squared distance, weighted by counts. In training from scratch
    it is what dropping the group would cost the loss, summed over its look-ups as squared gradient x squared value (the Fisher information,
    as in Theis et al., 2018, arXiv 1801.05787). The paper learns a probability of each width by gradient and adds the expected number of
    bits to the loss, which leaves the size to chance; descending on widths under a fixed size was tried, and noise moved the widths of well
    served groups as far as need moved the others. Nor does a second training at fixed widths follow, as in the paper: rows are rounded at
    the present widths from the first step on.

    Attributes:
        bits_per_64_values: Mean bits per value in 64ths, 1 to 512 (8 bits); a table keeps one bit of one group at the least.
        group_size: Rows of a group, made a multiple of 8.
        weight_power: A row counts as count ** weight_power when bits are given out.
        sorted_rows: Whether row numbers are ranks of popularity; if not, ranks are stored.
    """

    knob: ClassVar[str] = "bits_per_64_values"
    bits_per_64_values: int = 128
    group_size: int = 128
    weight_power: float = 1.0
    sorted_rows: bool = True

    def knob_values(self, num_embeddings: int, embedding_dim: int) -> Sequence[int]:
        values = {round(2 ** (step / 4)) for step in range(37)} | {64 * bits for bits in range(1, _MOST_BITS + 1)}
        smallest = {self.with_knob(value).planes(num_embeddings): value for value in sorted(values, reverse=True)}
        return sorted(smallest.values())

    def groups(self, num_embeddings: int) -> tuple[int, int]:
        """Number of groups, and rows of each, of which the last may have fewer."""
        num_groups = -(-num_embeddings // _up_to_8(self.group_size))
        return num_groups, _up_to_8(-(-num_embeddings // num_groups))

    def planes(self, num_embeddings: int) -> int:
        """Bits per value, summed over the groups."""
        return max(1, self.groups(num_embeddings)[0] * self.bits_per_64_values // 64)

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        if not 1 <= self.bits_per_64_values <= 64 * _MOST_BITS:
            raise ValueError(
                f"MixedPrecision has bits_per_64_values={self.bits_per_64_values}. Choose 1 to {64 * _MOST_BITS}, which is 8 bits per value."
            )
        if self.group_size < 1:
            raise ValueError(f"MixedPrecision has group_size={self.group_size}. Choose at least 1 row, such as 128.")
        num_groups, group_rows = self.groups(num_embeddings)
        codes = self.planes(num_embeddings) * group_rows * embedding_dim // 8
        return codes + (num_groups + 1) * 4 + num_groups * 4 + embedding_dim * 4 + order_nbytes(num_embeddings, sorted_rows=self.sorted_rows)

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> MixedPrecisionTable:
        self.nbytes(num_embeddings, embedding_dim)
        return MixedPrecisionTable(self, num_embeddings, embedding_dim, generator=generator)

    def expected_error(self, spread: Spread) -> float:
        num_groups, group_rows = self.groups(spread.num_embeddings)
        weights = _group_sums(spread.shares**self.weight_power, num_groups, group_rows)
        widths = _best_widths(_gains(weights), self.planes(spread.num_embeddings))
        lost = _group_sums(spread.shares, num_groups, group_rows) * torch.tensor(GAUSSIAN_ERRORS, dtype=torch.float64)[widths]
        return min(1.0, float(lost.sum()))


class MixedPrecisionTable(Table):
    """`packed_codes`: (bytes,) uint8, the groups one after the other. `starts`: (groups + 1,) int32, the sum of the widths of all groups before.

    `scales`: (groups, 1), standard deviations, and `zero`: (D,), the shared row, float32, are trainable. Built without a fit, codes are random,
    and widths suit look-ups that fall as 1 / rank. From `begin` to `finish` there are also `weight`: (V, D), trainable, and `energies`:
    (groups,), what dropping a group would cost the loss.
    """

    method: MixedPrecision
    packed_codes: Tensor
    starts: Tensor
    weight: nn.Parameter | None
    energies: Tensor | None

    def __init__(self, method: MixedPrecision, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        draws = torch.Generator().manual_seed(self.seed)
        self.num_groups, self.group_rows = method.groups(num_embeddings)
        self.num_planes = method.planes(num_embeddings)
        num_bytes = self.num_planes * self.group_rows * embedding_dim // 8
        self.order = RowOrder(num_embeddings, sorted_rows=method.sorted_rows)
        self.register_buffer("packed_codes", torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=draws))
        self.register_buffer("starts", torch.zeros(self.num_groups + 1, dtype=torch.int32))
        self.scales = nn.Parameter(torch.full((self.num_groups, 1), 0.01))
        self.zero = nn.Parameter(torch.zeros(embedding_dim))
        self.register_parameter("weight", None)
        self.register_buffer("energies", None)
        self._choose_widths(_gains(_group_sums(1 / torch.arange(1, num_embeddings + 1), self.num_groups, self.group_rows)))

    @torch.no_grad()
    def fit(self, weight: Tensor, counts: Tensor | None = None) -> Self:
        self.order.fit(counts)
        weights = row_weights(counts, self.num_embeddings, power=self.method.weight_power)
        mean = moments((rows for _, rows in self.row_chunks(weight)), weights)[0].float()
        energies = torch.zeros(self.num_groups, dtype=torch.float64)
        for start, rows in self.row_chunks(weight):
            groups = self.order(torch.arange(start, start + len(rows), device=self.starts.device)).cpu() // self.group_rows
            energies.index_add_(0, groups, (weights[start : start + len(rows)] * (rows - mean).square().sum(1).cpu()).double())
        self.zero.copy_(mean)
        self._choose_widths(_gains(energies))
        self._store(weight, self.zero, choose_scales=True)
        return self

    def lookup(self, ids: Tensor) -> Tensor:
        ranks = self.order(ids)
        groups = ranks // self.group_rows
        starts = self.starts[groups].long()
        num_bits = (self.starts[groups + 1] - starts).unsqueeze(1)  # (N, 1)
        scales = F.embedding(groups, self.scales, sparse=self.sparse)
        if self.weight is not None:
            return self._rounded(F.embedding(ids, self.weight, sparse=self.sparse), groups, scales.abs(), num_bits) + self.zero
        columns = ranks.remainder(self.group_rows).unsqueeze(1) * self.embedding_dim + torch.arange(self.embedding_dim, device=ids.device)
        first_bits = starts.unsqueeze(1) * (self.group_rows * self.embedding_dim) + columns * num_bits
        last = (1 << num_bits) - 1
        levels = (2 * unpack_at(self.packed_codes, first_bits, num_bits) - last).to(scales.dtype) / last.clamp(min=1)
        return levels * (scales * scales.new_tensor(GAUSSIAN_SCALES)[num_bits]) + self.zero

    def begin(self) -> None:
        draws = torch.randn(self.num_embeddings, self.embedding_dim, generator=torch.Generator().manual_seed(self.seed))
        self.weight = nn.Parameter((draws * 0.01).to(self.scales))
        self.energies = torch.zeros(self.num_groups, device=self.scales.device)

    @torch.no_grad()
    def maintain(self, step: int) -> Iterable[tuple[nn.Parameter, Tensor]]:
        if self.energies is not None and (step + 1) % _CHOICE_STEPS == 0:
            self._choose_widths(_gains(self.energies))
            self.energies *= _MEMORY
        return ()

    @torch.no_grad()
    def finish(self) -> None:
        if self.weight is not None:
            weight, self.weight, self.energies = self.weight, None, None
            self.scales.abs_()
            self._store(weight, torch.zeros_like(self.zero), choose_scales=False)

    def _rounded(self, rows: Tensor, groups: Tensor, scales: Tensor, num_bits: Tensor) -> Tensor:
        """Rows of the weight at the widths of their groups, which note what they would cost the loss if they were dropped: (N, D)."""
        rounded = fake_quantize(rows, scales * scales.new_tensor(GAUSSIAN_SCALES)[num_bits], num_bits)
        if self.training and rounded.requires_grad:
            kept = rows.detach()
            rounded.register_hook(lambda gradient: self._note(groups, (gradient * kept).square().sum(1)))
        return rounded

    def _note(self, groups: Tensor, costs: Tensor) -> None:
        assert self.energies is not None
        self.energies.index_add_(0, groups, costs.to(self.energies))

    def _widths(self) -> Tensor:
        """Bits per value of each group: (groups,) int32."""
        return self.starts.diff()

    def _choose_widths(self, gains: Tensor) -> None:
        self.starts[1:] = _best_widths(gains, self.num_planes).cumsum(0)

    def _store(self, weight: Tensor, center: Tensor, *, choose_scales: bool) -> None:
        """Write the codes of all rows less the center, at the widths and, unless they are to be chosen for these rows, the scales of the table."""
        row_ids = self.order.row_ids().to(weight.device)
        chunk_groups = max(1, _CHUNK_VALUES // (self.group_rows * self.embedding_dim))
        for first in range(0, self.num_groups, chunk_groups):
            ids = row_ids[first * self.group_rows : (first + chunk_groups) * self.group_rows]
            rows = weight[ids].to(center) - center
            rows = F.pad(rows, (0, 0, 0, -len(rows) % self.group_rows)).view(-1, self.group_rows * self.embedding_dim)
            self._store_groups(rows, first, choose_scales=choose_scales)

    def _store_groups(self, rows: Tensor, first: int, *, choose_scales: bool) -> None:
        """As `_store`, of the groups from `first` on: (groups, values of a group)."""
        planes = self.packed_codes.view(self.num_planes, -1)  # a group of b bits takes b of these rows
        widths = self._widths()[first : first + len(rows)]
        for num_bits in range(1, _MOST_BITS + 1):
            picked = (widths == num_bits).nonzero().squeeze(1)
            if not len(picked):
                continue
            groups, ratio = first + picked, GAUSSIAN_SCALES[num_bits]
            if choose_scales:
                self.scales[groups] = (least_squares_scales(rows[picked], num_bits).float() / ratio).to(self.scales)
            packed = pack(quantize(rows[picked], self.scales[groups] * ratio, num_bits), num_bits)
            planes[self.starts[groups].long().unsqueeze(1) + torch.arange(num_bits, device=groups.device)] = packed.view(len(groups), num_bits, -1)


def _up_to_8(number: int) -> int:
    """The next multiple of 8."""
    return -(-number // 8) * 8


def _group_sums(values: Tensor, num_groups: int, group_rows: int) -> Tensor:
    """Sums over the rows of each group: (V,) -> (groups,) float64."""
    return F.pad(values, (0, num_groups * group_rows - len(values))).view(num_groups, group_rows).sum(1, dtype=torch.float64)


def _gains(energies: Tensor) -> Tensor:
    """Squared error that each next bit saves groups of these squared norms, falling from bit to bit: (groups,) -> (groups, 8)."""
    return energies.unsqueeze(1) * -torch.tensor(GAUSSIAN_ERRORS, dtype=energies.dtype).diff()


def _best_widths(gains: Tensor, num_planes: int) -> Tensor:
    """Bits of each group when the next bit always goes where it gains most: (groups, 8), each row falling -> (groups,) int64."""
    chosen = gains.flatten().topk(num_planes).indices
    return torch.zeros_like(gains.flatten(), dtype=torch.int64).index_fill_(0, chosen, 1).view_as(gains).sum(1)
