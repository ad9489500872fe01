"""Pooling over any table: what `nn.EmbeddingBag` is to `nn.Embedding`."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanrec.methods.base import Table
from leanrec.ops import fused

MODES = ("sum", "mean", "max")


class TableBag(nn.Module):
    """Pooled rows of a compressed table, drop-in for `nn.EmbeddingBag`.

    The rows that a batch needs are looked up in the table and pooled by torch's own kernel, so bags, offsets and errors are torch's. Without a
    gradient, the look-up kernel pools while it reads, where it knows the table.

    Attributes:
        table: The table, which other modules may share.
        padding_idx: The id that does not count in a bag. None: every id counts.
    """

    def __init__(self, table: Table, *, mode: str = "mean", padding_idx: int | None = None, include_last_offset: bool = False) -> None:
        """Pooling over `table`; the settings are those of `nn.EmbeddingBag`.

        Raises:
            ValueError: An unknown mode, or a padding_idx outside the table.
        """
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is unknown. Choose one of {list(MODES)}.")
        if padding_idx is not None and not 0 <= padding_idx < table.num_embeddings:
            raise ValueError(f"padding_idx={padding_idx} is outside the table's rows 0 to {table.num_embeddings - 1}.")
        self.table = table
        self.mode = mode
        self.padding_idx = padding_idx
        self.include_last_offset = include_last_offset

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """One pooled row per bag: (B, D).

        Args:
            input: Ids, (B, L) int: B bags of L; or (N,) int: bags one after the other.
            offsets: (B,) int start of each bag in a 1-D `input`; with `include_last_offset` (B + 1,), the last one its end.
            per_sample_weights: Factor of each row, the shape of `input`; mode "sum" only.

        Raises:
            IndexError: An id outside the table.
            ValueError: Shapes that do not go together, as in torch.
        """
        pooled = self._pool_at_once(input, offsets, per_sample_weights)
        if pooled is not None:
            return pooled
        rows = self.table(input.reshape(-1))
        positions = torch.arange(input.numel(), dtype=input.dtype, device=input.device).reshape(input.shape)
        pool = partial(F.embedding_bag, positions, offsets=offsets, include_last_offset=self.include_last_offset, mode=self.mode)
        if self.padding_idx is None:
            return pool(rows, per_sample_weights=per_sample_weights)

        # Not by the kernel's own padding_idx: with it torch.export fixes the number of rows, which here is the number of ids in the batch.
        counts = (input != self.padding_idx).reshape(-1, 1)
        pooled = pool(rows.masked_fill(~counts, -torch.inf if self.mode == "max" else 0.0), per_sample_weights=per_sample_weights)
        if self.mode == "max":
            return pooled.masked_fill(pooled == -torch.inf, 0.0)
        if self.mode == "mean":
            share = pool(counts.float())  # of each bag's ids that count: (B, 1)
            return (pooled / share.masked_fill(share == 0, 1.0)).to(pooled.dtype)
        return pooled

    def _pool_at_once(self, input: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor | None:
        """As `forward` by the look-up kernel; None where it cannot, or the call is one that torch will refuse."""
        if not isinstance(self.table, Table) or self.table._forward_hooks:  # who listens to the table hears its rows
            return None
        coded = self.table.coded()
        if coded is None or not input.is_cpu or not fused.takes(coded, input) or torch.compiler.is_compiling():
            return None
        if self.mode == "max" or self.table.padding_idx not in (None, self.padding_idx):
            return None
        if torch.is_grad_enabled() and (coded.tensors[0].requires_grad or (weights is not None and weights.requires_grad)):
            return None
        if weights is not None and (self.mode != "sum" or weights.shape != input.shape or weights.dtype != torch.float32):
            return None
        if input.dtype not in fused.IDS or (input.dim() == 2) != (offsets is None) or input.dim() not in (1, 2):
            return None
        if offsets is not None and (offsets.dtype not in fused.IDS or offsets.dim() != 1 or not len(offsets)):
            return None
        if offsets is None:
            offsets = torch.arange(len(input) + 1) * input.shape[1]
        elif not self.include_last_offset:
            offsets = torch.cat([offsets, offsets.new_tensor([len(input)])])
        return fused.bags(
            coded,
            input,
            offsets.long().contiguous(),
            num_rows=self.num_embeddings,
            padding=self.padding_idx,
            mean=self.mode == "mean",
            weights=None if weights is None else weights.contiguous(),
        )

    @property
    def num_embeddings(self) -> int:
        """V of the table."""
        return self.table.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """D of the table."""
        return self.table.embedding_dim

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"mode={self.mode!r}, padding_idx={self.padding_idx}, include_last_offset={self.include_last_offset}"
