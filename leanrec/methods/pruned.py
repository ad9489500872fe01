"""Single values pruned under learned thresholds, the rest stored sparsely. PEP: Liu et al., ICLR 2021, arXiv 2101.07577."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from leanrec.methods.base import Method, Table, row_weights
from leanrec.ops.packing import pack, packed_nbytes, unpack_rows
from leanrec.ops.spread import Spread, moments

_CHUNK_VALUES = 2**20
_CHOICE_STEPS = 100  # training steps from one choice of the values kept to the next
_FIRST_LOGIT = -7.0  # of the thresholds: 0.001, a tenth of the spread of new rows
_MOST_CELLS = 2**31  # of a block, whose positions are packed as int32


@dataclass(frozen=True)
class Pruned(Method):
    """Of each row's distance from a shared row only some values are kept, for popular rows more.

    A fit keeps the values of the largest square, weighted by their row's count. In training from scratch every row learns a threshold, and
    values are shrunk by it, as in the paper. There thresholds alone decide how many values are left, pruned values never come back, and a
    second training starts from those that are left. Here the number is given: every 100 steps the values that pass their thresholds by most
    are kept and the others set to 0, yet these keep their gradients (straight through) and may pass the next time. Without that zero, noise
    alone carries pruned values past useful ones. The paper prunes to zero and not to a shared row.

    A kept value has a packed position within its block of rows, found by binary search. Blocks are as large as makes positions and starts of
    blocks smallest; a bitmap would be smaller only where more than an eighth or so of all values are kept, and by little.

    Attributes:
        kept_per_mille: Values kept, in thousandths of all, 1 to 1000; at least one value.
        weight_power: A row counts as count ** weight_power in the fit.
    """

    knob: ClassVar[str] = "kept_per_mille"
    kept_per_mille: int = 100
    weight_power: float = 1.0

    def knob_values(self, num_embeddings: int, embedding_dim: int) -> Sequence[int]:
        shares = sorted({round(10 ** (step / 8)) for step in range(25)})
        numbers = {max(1, num_embeddings * embedding_dim * share // 1000): share for share in reversed(shares)}
        return sorted(numbers.values())

    def num_kept(self, num_embeddings: int, embedding_dim: int) -> int:
        """Values kept."""
        if not 1 <= self.kept_per_mille <= 1000:
            raise ValueError(f"Pruned has kept_per_mille={self.kept_per_mille}. Choose 1 to 1000.")
        return max(1, num_embeddings * embedding_dim * self.kept_per_mille // 1000)

    def block_rows(self, num_embeddings: int, embedding_dim: int) -> int:
        """Rows of a block: the power of two with the fewest bytes."""
        sizes = [2**power for power in range(num_embeddings.bit_length() + 1) if 2**power * embedding_dim < _MOST_CELLS]
        return min(sizes, key=lambda size: sum(self._index_nbytes(num_embeddings, embedding_dim, size)))

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        index = self._index_nbytes(num_embeddings, embedding_dim, self.block_rows(num_embeddings, embedding_dim))
        return sum(index) + self.num_kept(num_embeddings, embedding_dim) * 4 + embedding_dim * 4

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> PrunedTable:
        self.nbytes(num_embeddings, embedding_dim)
        return PrunedTable(self, num_embeddings, embedding_dim, generator=generator)

    def expected_error(self, spread: Spread) -> float:
        if spread.variance == 0:
            return 0.0
        shares, sizes = _popularity_classes(spread.shares)
        variances = spread.covariance.diagonal().clamp(min=0)
        low, high = -100.0, 100.0  # log of the threshold on count x squared value that as many Gaussian values pass as are kept
        for _ in range(40):
            middle = (low + high) / 2
            passed, _ = _gaussian_tails(shares**self.weight_power, variances, middle)
            low, high = (middle, high) if float(sizes @ passed) > self.num_kept(spread.num_embeddings, spread.embedding_dim) else (low, middle)
        _, lost = _gaussian_tails(shares**self.weight_power, variances, low)
        return min(1.0, float((sizes * shares) @ lost) / spread.variance)

    def _index_nbytes(self, num_embeddings: int, embedding_dim: int, block_rows: int) -> tuple[int, int]:
        """Bytes of the positions, and of the starts of blocks."""
        num_kept = self.num_kept(num_embeddings, embedding_dim)
        num_blocks = -(-num_embeddings // block_rows)
        positions = packed_nbytes(num_kept, 1, _bits(block_rows * embedding_dim))
        return positions, packed_nbytes(num_blocks + 1, 1, _bits(num_kept + 1))


class PrunedTable(Table):
    """`values`: (kept, 1) and `mean`: (D,), the shared row, float32, trainable; `packed_positions` and `packed_starts`: uint8, frozen.

    Built without a fit, values are random and evenly spread. From `begin` to `finish` there are also `weight`: (V, D) and `threshold_logits`:
    (V, 1), trainable, and `kept`: (V, D) bool.
    """

    method: Pruned
    packed_positions: Tensor
    packed_starts: Tensor
    weight: nn.Parameter | None
    threshold_logits: nn.Parameter | None
    kept: Tensor | None

    def __init__(self, method: Pruned, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        self.num_kept = method.num_kept(num_embeddings, embedding_dim)
        self.block_cells = method.block_rows(num_embeddings, embedding_dim) * embedding_dim
        self.values = nn.Parameter(torch.randn(self.num_kept, 1, generator=torch.Generator().manual_seed(self.seed)) * 0.01)
        self.mean = nn.Parameter(torch.zeros(embedding_dim))
        for name in ("packed_positions", "packed_starts", "kept"):
            self.register_buffer(name, None)
        for name in ("weight", "threshold_logits"):
            self.register_parameter(name, None)
        self._set_positions(torch.arange(self.num_kept) * num_embeddings * embedding_dim // self.num_kept)

    @torch.no_grad()
    def fit(self, weight: Tensor, counts: Tensor | None = None) -> Self:
        weights = row_weights(counts, self.num_embeddings, power=self.method.weight_power)
        mean = moments((rows for _, rows in self.row_chunks(weight)), weights)[0].float()
        scores, values, positions = (torch.empty(0, dtype=dtype, device=weight.device) for dtype in (torch.float32, torch.float32, torch.int64))
        chunk_rows = max(8, max(_CHUNK_VALUES, self.num_kept) // self.embedding_dim // 8 * 8)
        for start, rows in self.row_chunks(weight, chunk_rows=chunk_rows):
            distances = (rows - mean).flatten()
            row_scores = weights[start : start + len(rows)].to(rows.device).repeat_interleave(self.embedding_dim) * distances.square()
            scores, best = torch.cat([scores, row_scores]).topk(min(self.num_kept, len(scores) + len(row_scores)), sorted=False)
            first = start * self.embedding_dim
            values = torch.cat([values, distances])[best]
            positions = torch.cat([positions, torch.arange(first, first + len(distances), device=rows.device)])[best]
        positions, order = positions.sort()
        self.mean.copy_(mean)
        self.values.copy_(values[order].unsqueeze(1))
        self._set_positions(positions)
        return self

    def lookup(self, ids: Tensor) -> Tensor:
        if self.weight is not None:
            return self._thresholded(ids) + self.mean
        first, end, target = self._find(ids)
        places = first.unsqueeze(1) + torch.arange(min(self.embedding_dim, self.num_kept), device=ids.device)
        columns = self._positions(places) - target.unsqueeze(1)
        own = (places < end.unsqueeze(1)) & (columns < self.embedding_dim)
        # What belongs to other rows goes to a column that is cut off.
        values = F.embedding(torch.where(own, places, first.unsqueeze(1)).clamp(max=self.num_kept - 1), self.values, sparse=self.sparse).squeeze(2)
        rows = values.new_zeros(ids.shape[0], self.embedding_dim + 1).scatter(1, torch.where(own, columns, self.embedding_dim), values)
        return rows[:, :-1] + self.mean

    def begin(self) -> None:
        draws = torch.randn(self.num_embeddings, self.embedding_dim, generator=torch.Generator().manual_seed(self.seed))
        self.weight = nn.Parameter((draws * 0.01).to(self.values))
        self.threshold_logits = nn.Parameter(torch.full((self.num_embeddings, 1), _FIRST_LOGIT).to(self.values))
        self.kept = torch.empty(self.num_embeddings, self.embedding_dim, dtype=torch.bool, device=self.values.device)
        self._choose(self.weight, self.threshold_logits, self.kept)

    def maintain(self, step: int) -> Iterable[tuple[nn.Parameter, Tensor]]:
        if self.weight is not None and self.threshold_logits is not None and self.kept is not None and (step + 1) % _CHOICE_STEPS == 0:
            self._choose(self.weight, self.threshold_logits, self.kept)
        return ()

    @torch.no_grad()
    def finish(self) -> None:
        if self.kept is not None:
            positions = self.kept.flatten().nonzero().squeeze(1)
            ids = torch.arange(self.num_embeddings, device=self.kept.device)
            values = torch.cat([self._thresholded(chunk)[self.kept[chunk]] for chunk in ids.split(max(1, _CHUNK_VALUES // self.embedding_dim))])
            self.values.copy_(values.unsqueeze(1))
            self._set_positions(positions)
            self.weight, self.threshold_logits, self.kept = None, None, None

    def _thresholded(self, ids: Tensor) -> Tensor:
        """Rows of the weight, shrunk by the thresholds, where they are kept, and 0 elsewhere; all values get their gradients: (N, D)."""
        assert self.weight is not None and self.threshold_logits is not None and self.kept is not None
        rows = F.embedding(ids, self.weight, sparse=self.sparse)
        thresholds = F.embedding(ids, self.threshold_logits, sparse=self.sparse).sigmoid()
        values = rows.detach()
        return values.sign() * F.relu(values.abs() - thresholds) * self.kept[ids] + (rows - values)

    @torch.no_grad()
    def _choose(self, weight: Tensor, threshold_logits: Tensor, kept: Tensor) -> None:
        """Keep the values that pass their thresholds by most; the others start again from 0."""
        best = (weight.abs() - threshold_logits.sigmoid()).flatten().topk(self.num_kept, sorted=False).indices
        kept.zero_().view(-1)[best] = True
        weight *= kept

    def _set_positions(self, positions: Tensor) -> None:
        """Store rising positions in the flattened table: (kept,) int64."""
        num_blocks = -(-self.num_embeddings * self.embedding_dim // self.block_cells)
        edges = torch.arange(num_blocks + 1, device=positions.device) * self.block_cells
        starts = torch.searchsorted(positions, edges)
        self.packed_positions = pack((positions % self.block_cells).unsqueeze(1), _bits(self.block_cells)).to(self.values.device)
        self.packed_starts = pack(starts.unsqueeze(1), _bits(self.num_kept + 1)).to(self.values.device)

    def _find(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Place of the first kept value that does not stand before a row, end of the row's block, and position of the row in it: (N,) each."""
        cells = ids * self.embedding_dim
        target, blocks = cells % self.block_cells, cells // self.block_cells
        starts, ends = (unpack_rows(self.packed_starts, block, 1, _bits(self.num_kept + 1)).squeeze(1) for block in (blocks, blocks + 1))
        low, high = starts, ends
        for _ in range(min(self.block_cells, self.num_kept).bit_length()):
            middle = (low + high) // 2
            before = (self._positions(middle) < target) & (low < high)
            low, high = torch.where(before, middle + 1, low), torch.where(before, high, middle)
        return low, ends, target

    def _positions(self, places: Tensor) -> Tensor:
        """Positions, each within its block, of kept values, a place past the last standing for the last: (...) int64 -> (...) int64."""
        clamped = places.clamp(max=self.num_kept - 1).flatten()
        return unpack_rows(self.packed_positions, clamped, 1, _bits(self.block_cells)).view(places.shape)


def _bits(num_codes: int) -> int:
    return max(1, (num_codes - 1).bit_length())


def _popularity_classes(shares: Tensor) -> tuple[Tensor, Tensor]:
    """Mean share, and number of rows, of up to 100 classes of rows of similar ranks: (V,) falling -> (C,) and (C,) float64."""
    edges = (len(shares) ** torch.linspace(0, 1, 100, dtype=torch.float64)).round().long().unique()
    totals = shares.cumsum(0, dtype=torch.float64)[edges - 1]
    sizes = F.pad(edges, (1, 0)).diff().double()
    return F.pad(totals, (1, 0)).diff() / sizes, sizes


def _gaussian_tails(weights: Tensor, variances: Tensor, log_threshold: float) -> tuple[Tensor, Tensor]:
    """For rows of Gaussian values: how many pass a threshold on weight x square, and the variance of those that do not: (C,), (D,) -> (C,), (C,)."""
    scores = (log_threshold - (weights.unsqueeze(1) * variances).log()).div(2).exp().clamp(max=30.0)  # thresholds in standard deviations
    passed = torch.erfc(scores / 2**0.5)
    lost = variances * (1 - passed - scores * (2 / torch.pi) ** 0.5 * (-scores.square() / 2).exp()).clamp(min=0)
    return passed.sum(1), lost.sum(1)
