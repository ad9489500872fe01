"""What compressed tables may learn from the log itself, before the first step of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from leanrec.bag import TableBag
from leanrec.data.loader import Loader
from leanrec.embeddings import table_groups
from leanrec.methods.base import Table
from leanrec.ops.hashing import hash_buckets

MOST_ROWS = 1_000_000  # of the log; signatures of the ids that matter are settled long before
_MOST_IDS = 2**40  # in one table


class _Lookup(NamedTuple):
    """What one table was asked for: its number, and the ids of each row of a batch, (B, L) int64, as they are and hashed."""

    table: int
    ids: Tensor
    tokens: Tensor


@torch.no_grad()
def observe(model: nn.Module, tables: Sequence[Table], loader: Loader) -> None:
    """Show every table that asks for it (`Table.observe`) which ids stand together in the rows of a log.

    The model is run on the log, and whatever its embedding tables are asked for counts as standing in the row. So it works on any model
    that looks up ids whose first dimension are the rows of the batch; other look-ups, such as bags given by offsets, are left out.

    Args:
        model: All its embedding tables, compressed or not, make up the context.
        tables: Those that are to observe.
        loader: The log; at most its first million rows are read.
    """
    numbers: dict[nn.Module, int] = {module: number for number, group in enumerate(table_groups(model).values()) for module in group.values()}
    held = {(module.table if isinstance(module, TableBag) else module): number for module, number in numbers.items()}
    curious = [(table, held[table]) for table in tables if type(table).observe is not Table.observe]
    if not curious:
        return
    seen: list[tuple[nn.Module, Tensor]] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.append((module, inputs[0]))

    hooks = [module.register_forward_hook(keep) for module in numbers]
    training = model.training
    model.eval()
    try:
        for number, batch in enumerate(loader.batches(epoch=0)):
            if number * loader.batch_size >= MOST_ROWS:
                break
            seen.clear()
            model(batch.features)
            lookups = [_lookup(numbers[module], ids) for module, ids in seen if _is_by_row(module, ids, len(batch.labels))]
            for table, own in curious:
                _show(table, own, lookups)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


def _is_by_row(module: nn.Module, ids: Tensor, num_rows: int) -> bool:
    """Whether ids are those of the rows of a batch, one row after the other."""
    is_flat_bag = isinstance(module, nn.EmbeddingBag | TableBag) and ids.dim() == 1
    return ids.dim() > 0 and len(ids) == num_rows and not is_flat_bag


def _lookup(table: int, ids: Tensor) -> _Lookup:
    ids = ids.reshape(len(ids), -1).cpu().long()
    # Tables lie apart by more than they have ids, so that no id of one is taken for one of another.
    return _Lookup(table, ids, hash_buckets(ids, torch.tensor([table * _MOST_IDS]), 2**62).squeeze(-1))


def _show(table: Table, number: int, lookups: Sequence[_Lookup]) -> None:
    """Give a table its ids of a batch, and beside each the hashed ids that other tables were asked for in its row."""
    own = [lookup.ids for lookup in lookups if lookup.table == number]
    # A table that is asked for the very same ids, as one of first-order weights is, says nothing about them but what they are.
    others = [lookup.tokens for lookup in lookups if lookup.table != number and not any(torch.equal(lookup.ids, ids) for ids in own)]
    if not others:
        return
    context = torch.cat(others, dim=1)  # (B, C)
    for ids in own:
        table.observe(ids.flatten(), context.repeat_interleave(ids.shape[1], dim=0))
