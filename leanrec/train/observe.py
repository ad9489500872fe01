"""What compressed tables may learn from the log itself, before the first step of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leanrec.data.loader import Loader
from leanrec.methods.base import Table
from leanrec.ops.hashing import hash_buckets

MOST_ROWS = 1_000_000  # of the log; signatures of the ids that matter are settled long before


@torch.no_grad()
def observe(model: nn.Module, tables: Sequence[Table], loader: Loader) -> None:
    """Show every table that asks for it (`Table.observe`) which ids stand together in the rows of a log.

    The model is run on the log, and whatever its embedding tables are asked for counts as standing in the row: so it works on any model
    whose batches have their rows first.

    Args:
        model: All its embedding tables, compressed or not, make up the context.
        tables: Those that are to observe.
        loader: The log; at most its first million rows are read.
    """
    curious = [table for table in tables if type(table).observe is not Table.observe]
    if not curious:
        return
    seen: list[tuple[nn.Module, Tensor]] = []
    modules = [module for module in model.modules() if isinstance(module, nn.Embedding | Table)]
    seeds: dict[nn.Module, Tensor] = {module: torch.tensor([number]) for number, module in enumerate(modules)}

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.append((module, inputs[0]))

    hooks = [module.register_forward_hook(keep) for module in modules]
    training = model.training
    model.eval()
    try:
        for number, batch in enumerate(loader.batches(epoch=0)):
            if number * loader.batch_size >= MOST_ROWS:
                break
            seen.clear()
            model(batch.features)
            for table in curious:
                _show(table, seen, seeds, num_rows=len(batch.labels))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


def _show(table: Table, seen: Sequence[tuple[nn.Module, Tensor]], seeds: dict[nn.Module, Tensor], *, num_rows: int) -> None:
    """Give a table its ids of a batch, and beside each the hashed ids that other tables were asked for in its row."""
    others = [hash_buckets(ids.reshape(-1).cpu().long(), seeds[module], 2**62).reshape(num_rows, -1) for module, ids in seen if module is not table]
    if not others:
        return
    context = torch.cat(others, dim=1)  # (B, C)
    for module, ids in seen:
        if module is table:
            own = ids.reshape(num_rows, -1).cpu().long()
            table.observe(own.flatten(), context.repeat_interleave(own.shape[1], dim=0))
