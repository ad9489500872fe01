"""Rows composed of a quotient's and a remainder's. Shi et al., KDD 2020, arXiv 1909.02107."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from leanrec.methods.base import Method, Table, row_weights
from leanrec.ops.spread import Spread

_OPERATIONS = ("multiply", "add")
_FIT_ROUNDS = 5


@dataclass(frozen=True)
class QuotientRemainder(Method):
    """A row is the product, or the sum, of one row for id // m and one for id % m: every id has a row of its own, made of shared ones.

    The fewest bytes are at m = sqrt(V), where both tables have as many rows; from there on they grow with m. The first m ids, which are the
    popular ones where ids are sorted, differ in their remainder. The paper only trains from scratch; a fit takes least squares for one
    table and the other in turn. Its third operation, concatenation, is left out: half of a row would be shared by all ids of a quotient.

    Attributes:
        num_remainders: m, rows for remainders, 1 or more; a table of fewer rows has a remainder for each and one quotient.
        operation: "multiply" or "add", value by value.
        weight_power: A row counts as count ** weight_power in the fit.
    """

    knob: ClassVar[str] = "num_remainders"
    num_remainders: int = 256
    operation: str = "multiply"
    weight_power: float = 1.0

    def knob_values(self, num_embeddings: int, embedding_dim: int) -> Sequence[int]:
        least = math.ceil(num_embeddings**0.5)
        steps = range(2 * (num_embeddings // least).bit_length())
        return sorted({min(round(least * 2 ** (step / 2)), num_embeddings) for step in steps} | {num_embeddings})

    def nbytes(self, num_embeddings: int, embedding_dim: int) -> int:
        return sum(self.sizes(num_embeddings)) * embedding_dim * 4

    def sizes(self, num_embeddings: int) -> tuple[int, int]:
        """Rows of the quotients and of the remainders.

        Raises:
            ValueError: No remainder, or an unknown operation.
        """
        if self.num_remainders < 1:
            raise ValueError(f"QuotientRemainder has num_remainders={self.num_remainders}. Choose 1 or more; sqrt(V) takes the fewest bytes.")
        if self.operation not in _OPERATIONS:
            raise ValueError(f"QuotientRemainder has operation={self.operation!r}. Choose one of {list(_OPERATIONS)}.")
        num_remainders = min(self.num_remainders, num_embeddings)
        return -(-num_embeddings // num_remainders), num_remainders

    def build(self, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> QuotientRemainderTable:
        self.nbytes(num_embeddings, embedding_dim)
        return QuotientRemainderTable(self, num_embeddings, embedding_dim, generator=generator)

    def expected_error(self, spread: Spread) -> float:
        # What sums lose on independent rows, in the order of their shares. The mean of a remainder's rows follows each of them by its part
        # in their look-ups, and the mean of a quotient's rows does so with what that leaves. Products come close to it.
        sizes = self.sizes(spread.num_embeddings)
        own = F.pad(spread.shares.double(), (0, math.prod(sizes) - spread.num_embeddings)).reshape(sizes)
        left = 1 - own / own.sum(0, keepdim=True).clamp(min=1e-300)
        return float((own * left * (1 - own / own.sum(1, keepdim=True).clamp(min=1e-300))).sum())


class QuotientRemainderTable(Table):
    """`quotients`: (ceil(V / m), D) and `remainders`: (m, D), float32, trainable."""

    method: QuotientRemainder

    def __init__(self, method: QuotientRemainder, num_embeddings: int, embedding_dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(method, num_embeddings, embedding_dim, generator=generator)
        draws = torch.Generator().manual_seed(self.seed)
        num_quotients, num_remainders = method.sizes(num_embeddings)
        # Products of values of spread 0.1, or sums of two of spread 0.007, have the spread 0.01 of an uncompressed table.
        scale = 0.1 if method.operation == "multiply" else 0.01 * 0.5**0.5
        self.quotients = nn.Parameter(torch.randn(num_quotients, embedding_dim, generator=draws) * scale)
        self.remainders = nn.Parameter(torch.randn(num_remainders, embedding_dim, generator=draws) * scale)

    @torch.no_grad()
    def fit(self, weight: Tensor, counts: Tensor | None = None) -> Self:
        weights = row_weights(counts, self.num_embeddings, power=self.method.weight_power)
        neutral = torch.ones_like if self.method.operation == "multiply" else torch.zeros_like
        parts = [neutral(part, dtype=torch.float32, device=weight.device) for part in (self.quotients, self.remainders)]
        for _ in range(_FIT_ROUNDS):
            for number in (1, 0):
                parts[number] = self._fit_part(weight, weights, parts, number)
        self.quotients.copy_(parts[0])
        self.remainders.copy_(parts[1])
        return self

    def lookup(self, ids: Tensor) -> Tensor:
        quotients, remainders = self._digits(ids)
        rows = F.embedding(quotients, self.quotients, sparse=self.sparse)
        others = F.embedding(remainders, self.remainders, sparse=self.sparse)
        return rows * others if self.method.operation == "multiply" else rows + others

    def _digits(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Quotient and remainder of each id: two (N,) int64."""
        num_remainders = len(self.remainders)
        return ids // num_remainders, ids % num_remainders

    def _fit_part(self, weight: Tensor, weights: Tensor, parts: list[Tensor], number: int) -> Tensor:
        """The rows of one of the two tables that fit best beside those of the other; a row that fits nothing stays."""
        products, squares = torch.zeros_like(parts[number]), torch.zeros_like(parts[number])
        for start, rows in self.row_chunks(weight):
            digits = self._digits(torch.arange(start, start + len(rows), device=rows.device))
            others = parts[1 - number][digits[1 - number]]
            # A sum is a product with 1 once the other's part is taken off.
            rows, factors = (rows, others) if self.method.operation == "multiply" else (rows - others, torch.ones_like(others))
            weighted = factors * weights[start : start + len(rows)].to(rows.device).unsqueeze(1)
            products.index_add_(0, digits[number], weighted * rows)
            squares.index_add_(0, digits[number], weighted * factors)
        return torch.where(squares > 0, products / squares.clamp(min=torch.finfo(torch.float32).tiny), parts[number])
