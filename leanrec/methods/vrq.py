"""Variable-rate residual quantization with the loss of the model as its distortion; leanrec's own.

Residual codes: Chen, Guan and Wang, Sensors 2010, doi:10.3390/s101211259. Sensitivity as distortion: Hassibi and Stork, NeurIPS 1992.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from leanrec.methods.base import Method, row_weights
from leanrec.methods.order import RowOrder, disorder, order_nbytes
from leanrec.methods.pq import PQ, code_bits, parts_error, used_centroids
from leanrec.methods.streaming import Sample, Sampling, StreamingTable
from leanrec.ops import fused
from leanrec.ops.additive import beam_search
from leanrec.ops.kmeans import ClusterMeans, kmeans, nearest, sample_rows
from leanrec.ops.levels import Gains, even_borders
from leanrec.ops.packing import pack, pack_at_, packed_nbytes, unpack_rows
from leanrec.ops.rounding import dequantize, fake_quantize, least_squares_scales, quantize
from leanrec.ops.sampling import systematic_sample
from leanrec.ops.sensitivity import Sensitivity
from leanrec.ops.spread import Spread

WORD_BITS = 4  # of a value of a code word; what rounding loses the next level makes up for
MAX_LEVELS = 32
_CENTROIDS = (16, 64, 256)  # that a budget tries
_LEVELS = 16
_CURVE_ROWS, _FIT_ROWS = 32_768, 65_536  # of a sample that stands for the table
_LEVEL_ITERS = 8
_REFINE_ROUNDS = 4
# Words compared per row and level, which set the width of the beam.
_FIRST_SEARCH, _LAST_SEARCH = 512, 1024
_MAX_BEAM = 16
_NO_ERROR = 1e-5  # share of the error that is not worth another level
_PRICES = 40  # of a byte, at which a budget tries sizes for each number of centroids


@dataclass(frozen=True)
class VRQ(Method):
    """A row is the mean row plus one centroid per level; popular rows have more levels than rare ones, the rarest none.

    Three things make it smaller than `RQ` at the same quality. Each level ends at the row from which on its codes do not pay, and
    since rows stand by falling popularity, only these few borders are stored. Code words are rounded to 4 bits a value, each with a scale,
    one level after the other, so that a level makes up for the rounding of those before. And where the sensitivity of the table is known
    (`leanrec.measure_sensitivity`, which `leanrec compress` calls), the error that is made small is the expected rise of the loss, not the
    squared distance: rows weigh by their share in the Fisher information, and directions by its metric. Code words live in the table's own
    space, so the metric costs no byte. Without sensitivity, or with `by_loss=False`, a row weighs as a power of its count.
    `docs/vrq.md` has the derivation.

    Attributes:
        codes_per_1000_rows: Codes stored, of all levels together, for a thousand rows: 4000 are four per row on average.
        num_levels: L, the most codes of one row, 1 to 32.
        num_centroids: K of each level, 2 to 65536; a table of fewer rows has one centroid per row.
        by_loss: Whether to make the expected rise of the loss small, where the sensitivity is known; else, the distance.
        sorted_rows: Whether rows stand in falling order of popularity, as `leanrec prepare` numbers ids; if not, the order is stored.
        weight_power: Without sensitivity, a row counts as count ** weight_power in the fit.
    """

    gaps: ClassVar[Mapping[str, str]] = PQ.gaps
    knob: ClassVar[str] = "codes_per_1000_rows"
    codes_per_1000_rows: int = 4000
    num_levels: int = 8
    num_centroids: int = 64
    by_loss: bool = True
    sorted_rows: bool = True
    weight_power: float = 0.75

    @property
    def uses_sensitivity(self) -> bool:
        return self.by_loss

    @property
    def streaming_gap(self) -> str | None:
        return None if self.sorted_rows else "with sorted_rows=False its codes stand by the popularity of rows, not in their order"

    def knob_values(self, num_embeddings: int, embedding_dim: int) -> Sequence[int]:
        return sorted({round(1000 * self.num_levels * 2**-halvings) for halvings in range(6)})

    def variants(self, num_embeddings: int, embedding_dim: int) -> list[Method]:
        return [
            replace(self, codes_per_1000_rows=rate, num_levels=levels, num_centroids=size)
            for size in self._centroid_choices(num_embeddings)
            for levels in (1, 2, 4, 8, 16)
            for rate in (1, 125 * levels, 500 * levels, 1000 * levels)
        ]

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        if not 1 <= self.num_levels <= MAX_LEVELS:
            raise ValueError(f"VRQ has num_levels={self.num_levels}. Choose 1 to {MAX_LEVELS}.")
        if not 1 <= self.codes_per_1000_rows <= 1000 * self.num_levels:
            raise ValueError(
                f"VRQ has codes_per_1000_rows={self.codes_per_1000_rows}. Choose 1 to {1000 * self.num_levels}, which is num_levels for every row."
            )
        num_centroids = used_centroids(self, self.num_centroids, num_embeddings)
        codes = packed_nbytes(self.num_codes(num_embeddings), 1, code_bits(num_centroids))
        words = packed_nbytes(self.num_levels * num_centroids, embedding_dim, WORD_BITS) + self.num_levels * num_centroids * 2
        return codes + words + embedding_dim * 4 + self.num_levels * 8 + order_nbytes(num_embeddings, sorted_rows=self.sorted_rows)

    def num_codes(self, num_embeddings: int) -> int:
        """Codes stored, of all levels together."""
        return max(1, num_embeddings * self.codes_per_1000_rows // 1000)

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> VRQTable:
        self.nbytes(num_embeddings, embedding_dim)
        return VRQTable(self, num_embeddings, embedding_dim, generator=generator)

    def expected_error(self, spread: Spread) -> float:
        levels, num_centroids = self.codes_per_1000_rows / 1000, min(self.num_centroids, spread.num_embeddings)
        lost = parts_error(spread, spread.spectra(1), num_bits=levels * math.log2(num_centroids))
        return min(1.0, spread.share_beyond(num_centroids) ** levels * lost)

    def curve(
        self, chunks: Iterable[Tensor], num_embeddings: int, embedding_dim: int, *, counts: Tensor | None, sensitivity: Sensitivity | None
    ) -> list[tuple[Method, float]]:
        """Measured on a fit of a sample of the rows for each number of centroids; see `_sizes`."""
        known = sensitivity if self.by_loss else None
        lens = _Lens.choose(known, embedding_dim)
        weights = known.rows if _is_known(known) else row_weights(counts, num_embeddings, power=self.weight_power)
        order = RowOrder(num_embeddings, sorted_rows=self.sorted_rows)
        order.fit(counts)
        sample = _Sample.draw(chunks, order, lens, weights, num_rows=_CURVE_ROWS)
        found: dict[Method, float] = {}
        for size in self._centroid_choices(num_embeddings):
            setting = replace(self, num_levels=_LEVELS, num_centroids=size)
            chain = _Chain.grow(sample, lens, num_levels=_LEVELS, num_centroids=min(size, num_embeddings), seed=0)
            found |= {method: lens.scale * lost for method, lost in _sizes(setting, chain.gains(sample), num_embeddings, embedding_dim)}
        return list(found.items())

    def _centroid_choices(self, num_embeddings: int) -> list[int]:
        return [size for size in _CENTROIDS if size == _CENTROIDS[0] or size < 2 * num_embeddings]


class VRQTable(StreamingTable):
    """`mean`: (D,) float32, trainable. The rest is frozen: `packed_codes`: (ceil(C * bits / 8),) uint8, rank by rank, C codes in all;
    `borders`: (L,) int64, rows that have a code of each level; `packed_words`: (ceil(L * K * D / 2),) uint8 and `scales`: (L K, 1) float16.

    Between `begin_tuning` and `finish` words are trained, rounded in every look-up: `words`: (L K, D) and `word_scales`: (L K, 1), both float32.

    Built without a fit, codes and code words are random.
    """

    row_parts = ("packed_codes",)
    method: VRQ
    packed_codes: Tensor
    borders: Tensor
    packed_words: Tensor
    scales: Tensor
    halves = ("scales",)
    words: nn.Parameter | None
    word_scales: nn.Parameter | None

    def __init__(self, method: VRQ, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        self.num_centroids = used_centroids(method, method.num_centroids, num_embeddings)
        self.num_bits = code_bits(self.num_centroids)
        self.sensitivity: Sensitivity | None = None
        num_words, num_codes = method.num_levels * self.num_centroids, method.num_codes(num_embeddings)
        draws = torch.Generator().manual_seed(self.seed)
        self.order = RowOrder(num_embeddings, sorted_rows=method.sorted_rows)
        self.mean = nn.Parameter(torch.zeros(embedding_dim))
        self.register_buffer("packed_codes", pack(torch.randint(self.num_centroids, (num_codes, 1), generator=draws), self.num_bits))
        self.register_buffer("borders", torch.tensor(even_borders(num_embeddings, method.num_levels, num_codes)))
        self.register_buffer("packed_words", pack(torch.randint(2**WORD_BITS, (num_words, embedding_dim), generator=draws), WORD_BITS))
        self.register_buffer("scales", torch.full((num_words, 1), 0.01, dtype=torch.float16))
        self.register_parameter("words", None)
        self.register_parameter("word_scales", None)

    def weigh(self, sensitivity: Sensitivity) -> None:
        self.sensitivity = sensitivity if self.method.by_loss else None

    def fit(self, weight: Tensor, counts: Tensor | None = None) -> Self:
        self.order.fit(counts)
        super().fit(weight, counts)
        self.sensitivity = None
        return self

    @property
    def sampling(self) -> Sampling:
        return Sampling(_FIT_ROWS, even_share=0.5)

    def disorder(self, counts: Iterable[Tensor]) -> str | None:
        return disorder(counts, self.num_embeddings)

    def chunk_weights(self, start: int, counts: Tensor | None, num_rows: int) -> Tensor:
        if _is_known(self.sensitivity):
            return self.sensitivity.rows[start : start + num_rows]
        return super().chunk_weights(start, counts, num_rows)

    def fit_sample(self, sample: Sample) -> None:
        lens = _Lens.choose(self.sensitivity, self.embedding_dim)
        drawn = _Sample.of(sample.ids, sample.rows, sample.weights, self.order, lens)
        first = _Chain.grow(drawn, lens, num_levels=self.method.num_levels, num_centroids=self.num_centroids, seed=self.seed)
        borders = first.gains(drawn).spend(self.method.num_codes(self.num_embeddings), num_levels=self.method.num_levels)
        chain = _Chain.grow(drawn, lens, num_levels=len(borders), num_centroids=self.num_centroids, seed=self.seed, borders=borders)
        chain.refine(drawn, lens, borders)
        self.borders.copy_(torch.tensor(borders))
        self.packed_words.copy_(pack(torch.cat([book.levels for book in chain.books]), WORD_BITS))
        self.scales.copy_(torch.cat([book.scales for book in chain.books]))
        self.mean.copy_(chain.mean @ lens.color)
        self.gathered = {"left": torch.zeros(0, dtype=torch.int64)}  # codes that do not fill a byte yet

    def encode(self, start: int, rows: Tensor, weights: Tensor) -> Mapping[str, Tensor]:
        ranks = torch.arange(start, start + len(rows))
        codes = self._choose(rows, ranks)
        codes = torch.cat([self.gathered["left"], codes[ranks.unsqueeze(1) < self.borders.cpu()]])
        whole = len(codes) if start + len(rows) == self.num_embeddings else len(codes) // 8 * 8
        self.gathered["left"] = codes[whole:].clone()
        return {"packed_codes": pack(codes[:whole].unsqueeze(1), self.num_bits)}

    def keep(self, start: int, rows: Tensor, weights: Tensor) -> None:
        if self.method.sorted_rows:
            super().keep(start, rows, weights)
            return
        ranks = self.order(torch.arange(start, start + len(rows), device=self.borders.device))
        places, present = self._places(ranks)
        codes = self._choose(rows, ranks.cpu()).to(places.device)
        pack_at_(self.packed_codes, codes[present].unsqueeze(1), places[present], self.num_bits)

    def lookup(self, ids: Tensor) -> Tensor:
        places, present = self._places(self.order(ids))
        codes = unpack_rows(self.packed_codes, places.flatten(), 1, self.num_bits).view_as(places)
        first_words = torch.arange(0, len(self.scales), self.num_centroids, device=ids.device)
        if self.words is not None:
            return self.mean + F.embedding_bag(codes + first_words, self._rounded(), per_sample_weights=present.to(self.mean), mode="sum")
        words = self._words((codes + first_words).flatten()).view(*places.shape, self.embedding_dim)
        return self.mean + (words * present.unsqueeze(2)).sum(1)

    def begin_tuning(self) -> None:
        self.words = nn.Parameter(self._words(torch.arange(len(self.scales), device=self.scales.device)))
        self.word_scales = nn.Parameter(self.scales.to(self.mean.dtype))

    @torch.no_grad()
    def finish(self) -> None:
        if self.words is not None and self.word_scales is not None:
            self.scales.copy_(self.word_scales.abs())
            self.packed_words.copy_(pack(quantize(self.words, self.scales, WORD_BITS), WORD_BITS))
            self.words = self.word_scales = None

    def coded(self) -> fused.Coded | None:
        if self.words is not None:
            return None
        return fused.levels(
            self.held("packed_codes"),
            self.num_bits,
            mean=self.held("mean"),
            borders=self.held("borders"),
            packed_words=self.held("packed_words"),
            scales=self.held("scales"),
            packed_ranks=None if self.method.sorted_rows else self.order.packed_ranks,
            rank_bits=0 if self.method.sorted_rows else self.order.num_bits,
            width=self.embedding_dim,
        )

    def lengths(self) -> Tensor:
        """Codes of each row: (V,) int64."""
        return (self.order(torch.arange(self.num_embeddings)).unsqueeze(1) < self.borders).sum(1)

    def _places(self, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """Where the codes of rows of some ranks, (N,) int64, stand among all, (N, L) int64, 0 where there is none, and where there is one."""
        ranks = ranks.unsqueeze(1)
        present = ranks < self.borders
        # All rows before it have min(rank, border) codes of a level.
        starts = torch.minimum(ranks, self.borders).sum(1, keepdim=True)
        return (starts + torch.arange(len(self.borders), device=ranks.device)).masked_fill(~present, 0), present

    def _words(self, numbers: Tensor) -> Tensor:
        """Code words by their numbers among those of all levels: (N,) int64 -> (N, D)."""
        levels = unpack_rows(self.packed_words, numbers, self.embedding_dim, WORD_BITS)
        return dequantize(levels, self.scales[numbers].to(self.mean.dtype), WORD_BITS)

    def _rounded(self) -> Tensor:
        """The words that are trained as they will be stored, with gradients as if they were not rounded: (L K, D)."""
        assert self.words is not None and self.word_scales is not None
        scales = self.word_scales.abs()
        scales = scales + (scales.half().to(scales) - scales).detach()
        return fake_quantize(self.words, scales, torch.full((1, 1), WORD_BITS, device=scales.device))

    def _choose(self, rows: Tensor, ranks: Tensor) -> Tensor:
        """Codes of (N, D) rows of (N,) ranks: (N, L) int64 on the CPU, 0 where a row has none."""
        lens = _Lens.choose(self.sensitivity, self.embedding_dim)
        levels = unpack_rows(self.packed_words, torch.arange(len(self.scales), device=self.scales.device), self.embedding_dim, WORD_BITS).cpu()
        parts = zip(levels.split(self.num_centroids), self.scales.cpu().split(self.num_centroids), strict=True)
        chain = _Chain(self.mean.cpu() @ lens.whiten, [_Book.stored(levels, scales, lens) for levels, scales in parts], [])
        return chain.encode(rows.cpu() @ lens.whiten, ranks, self.borders.tolist(), search=_LAST_SEARCH)


def _is_known(sensitivity: Sensitivity | None) -> TypeGuard[Sensitivity]:
    return sensitivity is not None and bool(sensitivity.rows.any())


@dataclass(frozen=True)
class _Lens:
    """The space in which squared distance is what an error costs.

    Attributes:
        whiten: (D, D), from the table's space into it.
        color: (D, D), back.
        scale: What a squared distance of 1 costs, averaged over rows by their weight.
    """

    whiten: Tensor
    color: Tensor
    scale: float

    @classmethod
    def choose(cls, sensitivity: Sensitivity | None, embedding_dim: int) -> _Lens:
        if not _is_known(sensitivity):
            return cls(torch.eye(embedding_dim), torch.eye(embedding_dim), 1.0)
        whiten, color = sensitivity.whitener()
        return cls(whiten, color, float(sensitivity.rows.sum(dtype=torch.float64)) / 2)


@dataclass(frozen=True)
class _Sample:
    """Rows that stand for all of a table: points (S, D) in a lens, ranks (S,), rising, and weights (S,), 1 in sum."""

    points: Tensor
    ranks: Tensor
    weights: Tensor
    table_rows: int

    @classmethod
    def of(cls, ids: Tensor, rows: Tensor, weights: Tensor, order: RowOrder, lens: _Lens) -> _Sample:
        """From ids (S,), rows (S, D) and weights (S,) as they were drawn."""
        ranks, by_rank = order(ids.to(next(order.buffers(), ids).device)).cpu().sort()
        return cls((rows.float().cpu() @ lens.whiten)[by_rank], ranks, weights[by_rank] / weights.sum(), order.num_embeddings)

    @classmethod
    def draw(cls, chunks: Iterable[Tensor], order: RowOrder, lens: _Lens, weights: Tensor, *, num_rows: int) -> _Sample:
        """All rows, or as many as are enough: half of them by weight, which find the code words, half of them evenly, which find the borders."""
        ids, drawn = systematic_sample(lambda: [weights], num_rows, even_share=0.5)
        picked, first = [], 0
        for chunk in chunks:
            low, high = torch.searchsorted(ids, torch.tensor([first, first + len(chunk)])).tolist()
            picked.append(chunk[(ids[low:high] - first).to(chunk.device)].float().cpu())
            first += len(chunk)
        return cls.of(ids, torch.cat(picked), drawn, order, lens)


@dataclass(frozen=True)
class _Book:
    """Code words as they are stored, `levels` (K, D) int32 and `scales` (K, 1) float16, and what that is in a lens, `words` (K, D)."""

    levels: Tensor
    scales: Tensor
    words: Tensor

    @classmethod
    def round(cls, words: Tensor, lens: _Lens) -> _Book:
        """The nearest that can be stored to words in the lens."""
        plain = words @ lens.color
        scales = least_squares_scales(plain, WORD_BITS)
        return cls.stored(quantize(plain, scales, WORD_BITS), scales, lens)

    @classmethod
    def stored(cls, levels: Tensor, scales: Tensor, lens: _Lens) -> _Book:
        """What levels (K, D) and scales (K, 1) stand for."""
        return cls(levels, scales, dequantize(levels, scales.float(), WORD_BITS) @ lens.whiten)


@dataclass
class _Chain:
    """Code books level by level, and the codes of a sample.

    Attributes:
        mean: (D,), in the lens.
        books: One per level.
        codes: For each level (S,) int64, of the sampled rows that have a code of it.
    """

    mean: Tensor
    books: list[_Book]
    codes: list[Tensor]

    @classmethod
    def grow(cls, sample: _Sample, lens: _Lens, *, num_levels: int, num_centroids: int, seed: int, borders: Sequence[int] | None = None) -> _Chain:
        """Each level by k-means on what the levels before it leave of the rows that have a code of it.

        Without `borders` these are all rows, and there are no more levels than leave anything.
        """
        generator = torch.Generator().manual_seed(seed)
        mean = sample.weights @ sample.points / sample.weights.sum()
        chain, rest = cls(mean, [], []), sample.points - mean
        start = float(sample.weights @ rest.square().sum(1))
        for level in range(num_levels):
            limit = len(rest) if borders is None else int(torch.searchsorted(sample.ranks, borders[level]))
            words = torch.zeros(num_centroids, len(mean))
            if limit:
                rows, weights = sample_rows(sample.weights[:limit], num_centroids, generator=generator)
                words = kmeans(rest[rows], num_centroids, weights=weights, num_iters=_LEVEL_ITERS, generator=generator)
            chain.books.append(_Book.round(words, lens))
            chain.codes.append(nearest(rest[:limit], chain.books[-1].words))
            rest[:limit] -= chain.books[-1].words[chain.codes[-1]]
            if borders is None and float(sample.weights @ rest.square().sum(1)) < _NO_ERROR * start:
                break
        return chain

    def gains(self, sample: _Sample) -> Gains:
        """What each level saves on the sample, for a chain that grew without borders."""
        rest, errors = sample.points - self.mean, []
        for book, codes in zip(self.books, self.codes, strict=True):
            errors.append(rest.square().sum(1))
            rest = rest - book.words[codes]
        errors.append(rest.square().sum(1))
        return Gains.measure(sample.ranks, torch.stack(errors, 1), sample.weights, sample.table_rows)

    def refine(self, sample: _Sample, lens: _Lens, borders: Sequence[int]) -> None:
        """Codes, all levels together, and the words of each level in turn fitted to what the others leave."""
        for _ in range(_REFINE_ROUNDS):
            codes = self.encode(sample.points, sample.ranks, borders, search=_FIRST_SEARCH)
            rest = sample.points - self.mean
            for level, known in enumerate(self.codes):
                self.codes[level] = codes[: len(known), level]
                rest[: len(known)] -= self.books[level].words[self.codes[level]]
            for level, (book, known) in enumerate(zip(self.books, self.codes, strict=True)):
                own = rest[: len(known)] + book.words[known]
                means = ClusterMeans(book.words)
                means.add(own, known, sample.weights[: len(known)])
                self.books[level] = _Book.round(means.value(), lens)
                rest[: len(known)] = own - self.books[level].words[known]

    def encode(self, points: Tensor, ranks: Tensor, borders: Sequence[int], *, search: int) -> Tensor:
        """Codes of points (N, D) in the lens, of ranks (N,), by beam search: (N, L) int64, 0 where a row has no code."""
        lengths = (ranks.unsqueeze(1) < torch.tensor(borders)).sum(1)
        words = torch.stack([book.words for book in self.books])
        beam_size = max(1, min(_MAX_BEAM, search // words.shape[1]))
        codes = torch.zeros(len(points), len(borders), dtype=torch.int64)
        for length in lengths.unique().tolist():
            if length:
                [rows] = torch.where(lengths == length)
                codes[rows, :length] = beam_search(points[rows] - self.mean, words[:length], beam_size=beam_size)
        return codes


def _sizes(method: VRQ, gains: Gains, num_embeddings: int, embedding_dim: int) -> list[tuple[Method, float]]:
    """Settings with the codes that pay at falling prices of a byte, up to each number of levels, each with the error that it leaves."""
    bits = code_bits(min(method.num_centroids, num_embeddings))
    least = replace(method, num_levels=1, codes_per_1000_rows=1)
    found: list[tuple[Method, float]] = [(least, gains.error)]
    highest = gains.error / max(1, least.nbytes(num_embeddings, embedding_dim))
    for step in range(_PRICES):
        price = highest * 2.0 ** (-step * 0.75 + 4)
        borders = [border for border in gains.borders(price * bits / 8) if border]
        for num_levels in range(1, len(borders) + 1):  # fewer than pay leave sizes between those of two prices
            rate = max(1, -(-sum(borders[:num_levels]) * 1000 // num_embeddings))
            setting = replace(method, num_levels=num_levels, codes_per_1000_rows=min(rate, 1000 * num_levels))
            found.append((setting, gains.left(borders[:num_levels])))
    return found
