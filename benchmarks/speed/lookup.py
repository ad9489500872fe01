"""Look-ups in compressed tables against `torch.nn.functional.embedding` on the float32 table.

`python benchmarks/speed/lookup.py` measures all, with `large small limit words one_row deepfm` after it some. Needs 8 GB of memory.
Codes are random, which takes the kernel as long as any others; the levels of VRQ end as those of fitted tables do, fewer and fewer rows having more.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
from collections.abc import Callable
from typing import Any

import record
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanrec import merge
from leanrec.data.schema import Field, Schema
from leanrec.merge import MergedEmbedding, MergedLinear
from leanrec.methods import PQ, RQ, VRQ, Method, Scalar, Table
from leanrec.models import build
from leanrec.ops import fused

BATCH = 65_536
COLUMNS = 64
BATCHES = 16  # different ones, so that no cache learns them
_BOOKS = {"pq": PQ(num_subspaces=4), "rq": RQ(num_levels=5), "rq_bytes": RQ(num_levels=5, word_bits=8)}
_LARGE_ROWS, _LARGE = 20_000_000, {**_BOOKS, "vrq": VRQ(codes_per_1000_rows=6800, num_levels=16)}
_WORDS = "a word of a code book is read for each code of a row, from the second-level cache, where a float32 row is copied once"
_PYTHON = "Python takes this time, once for each table, not the kernel; `lookup_one_row_of_26` is what it comes to in a model"
_BESIDE = ("torch", "nn.Embedding", "dense part", "embedding after the other", "kernel after the other")  # shown where they were measured
_NOTES = {
    **{f"lookup_one_row_{name}": _PYTHON for name in ("pq", "rq", "rq_bytes", "vrq", "int8")},
    **{f"lookup_{size}_{name}": _WORDS for size in ("small", "large") for name in ("rq", "rq_bytes", "vrq")},
}


def main() -> None:
    """Run the parts that are named, or all."""
    parts = {"large": large, "small": small, "limit": limit, "words": words, "one_row": one_row, "deepfm": deepfm}
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("parts", nargs="*", default=list(parts), metavar=f"{{{','.join(parts)}}}")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--machine", help="end of the results' names, to keep those of another machine beside the usual ones")
    given = arguments.parse_args()
    record.suffix = f"_{given.machine}" if given.machine else ""
    torch.set_num_threads(given.threads)
    with torch.no_grad():
        for part in given.parts:
            parts[part]()


def large() -> None:
    """A table of 5 GB against about 50 times smaller ones."""
    _compare("lookup_large", _LARGE_ROWS, _LARGE, bar=4, repeats=15)


def small() -> None:
    """A table that fits the cache."""
    methods = {**_BOOKS, "vrq": VRQ(codes_per_1000_rows=4000, num_levels=16), "int8": Scalar()}
    _compare("lookup_small", 10_000, methods, bar=1, repeats=30)


def limit() -> None:
    """How near look-ups in the table of 5 GB come to what memory allows: their answer has to be written, and float32 rows to be read."""
    full = _full(_LARGE_ROWS)
    part, copied = full[: _LARGE_ROWS // 5], torch.zeros(_LARGE_ROWS // 5, COLUMNS)
    batches = [draw(_LARGE_ROWS, BATCH, seed=turn) for turn in range(BATCHES) for draw in (_uniform, _zipf)]
    tables = {name: _table(method, _LARGE_ROWS) for name, method in _LARGE.items()}
    readers = {"writing alone": lambda ids: torch.empty(len(ids), COLUMNS).fill_(1.0), "embedding": lambda ids: F.embedding(ids, full), **tables}
    seconds = record.median_seconds({name: _each(read, batches) for name, read in readers.items()}, repeats=15)
    memory = record.median_seconds({"read": part.sum, "copied": lambda: copied.copy_(part)}, repeats=9)
    medians = {f"{name} ms for two batches": value / BATCHES * 1e3 for name, value in seconds.items()}
    medians |= {"GB/s read in order": part.nbytes / memory["read"] / 1e9, "GB/s copied": part.nbytes / memory["copied"] / 1e9}
    record.write(
        "lookup_limit",
        ratio=seconds["writing alone"] / seconds["pq"],
        bar=None,
        against="writing the answer of PQ alone, without a look-up",
        medians=medians,
        setting={"rows": _LARGE_ROWS, "columns": COLUMNS, "batch": BATCH, "threads": torch.get_num_threads()},
        note="no look-up can take less than its writing does",
    )


def words() -> None:
    """Up to how many code books a table gains by a merged dense layer, which adds up words instead of multiplying rows."""
    rows, columns, hidden, batch, num_tables = 100_000, 32, 256, 4096, 26
    vectors, weight = torch.rand(batch, num_tables * columns), torch.rand(hidden, num_tables * columns)
    ids = [_zipf(rows, batch, seed=number) for number in range(num_tables)]
    jobs: dict[str, Callable[[], Any]] = {"F.linear": lambda: F.linear(vectors, weight)}
    for num_books in (1, 2, 3, 4, 6):
        codes = [torch.randint(256, (rows * num_books,), generator=_seeded(number)).to(torch.uint8) for number in range(num_tables)]
        made = [fused.sums(each, torch.rand(num_books, 256, hidden), 8, hidden) for each in codes]
        sums = fused.Sums({place: fused.Read(each, rows, None) for place, each in enumerate(made)}, torch.zeros(hidden))
        jobs[f"{num_books} books"] = lambda sums=sums: sums.add(ids, torch.zeros(batch, hidden))
    seconds = record.median_seconds(jobs, repeats=41, warm_ups=4)
    record.write(
        "merged_words",
        ratio=seconds["F.linear"] / seconds["2 books"],
        bar=None,
        against="`F.linear` with the vectors; ours with 2 code books, the most that `leanrec.merge` takes at D = 32",
        medians={f"{name} ms": value * 1e3 for name, value in seconds.items()},
        setting={"tables": num_tables, "rows": rows, "columns": columns, "outputs": hidden, "batch": batch, "threads": torch.get_num_threads()},
    )


def one_row() -> None:
    """The latency of a single id, as a module is called."""
    rows = 1_000_000
    full = _full(rows)
    tables = {
        name: _table(method, rows) for name, method in {"pq": PQ(), "rq": RQ(), "rq_bytes": RQ(word_bits=8), "vrq": VRQ(), "int8": Scalar()}.items()
    }
    ids = [torch.randint(rows, (1,), generator=_seeded(1)) for _ in range(1000)]
    jobs = {"embedding": _each(lambda each: F.embedding(each, full), ids), "nn.Embedding": _each(nn.Embedding.from_pretrained(full), ids)}
    medians = record.median_seconds(jobs | {name: _each(table, ids) for name, table in tables.items()}, repeats=41)
    for name in tables:
        _write(
            "lookup_one_row_" + name,
            medians,
            "embedding",
            name,
            bar=1,
            unit="us a look-up",
            scale=1e6 / len(ids),
            setting={"rows": rows, "columns": COLUMNS},
        )


def deepfm() -> None:
    """The whole forward pass of DeepFM with 26 tables, and one row of each of them."""
    rows, columns, batch = 1_000_000, 32, 4096
    schema = Schema(
        label="label",
        fields=tuple(Field(name=f"c{number}", kind="categorical", vocabulary=f"c{number}", num_embeddings=rows) for number in range(26)),
    )
    full = build("deepfm", schema, embedding_dim=columns).eval()
    methods = {
        "pq": PQ(num_subspaces=2),
        "rq": RQ(num_levels=2),
        "rq_bytes": RQ(num_levels=2, word_bits=8),
        "vrq": VRQ(codes_per_1000_rows=3200, num_levels=16),
        "int8": Scalar(),
    }
    models: dict[str, nn.Module] = {"full": full}
    for name, method in methods.items():
        models[name] = build("deepfm", schema, embedding_dim=columns).eval()
        models[name].embedding.tables = nn.ModuleDict({key: _table(method, rows, columns=columns, padding=0) for key in full.embedding.tables})
        models[f"{name}_merged"] = merge(copy.deepcopy(models[name]))
    models["dense part"] = build("deepfm", schema, embedding_dim=columns).eval()
    setting = {"tables": 26, "rows": rows, "columns": columns, "ids": "Zipf"}

    batches = [{f"c{number}": _zipf(rows, batch, seed=number + 100 * turn) for number in range(26)} for turn in range(BATCHES)]
    models["dense part"].embedding = _Ready(full.embedding(batches[0]))
    medians = record.median_seconds({name: _next(model, batches) for name, model in models.items()}, repeats=40, warm_ups=4)
    bound = f"with look-ups at no cost at all it would be {medians['full'] / medians['dense part']:.2f}: the rest are products of dense matrices"
    for name in [name for name in models if name not in ("full", "dense part")]:
        taken = sum(module.nbytes for module in models[name].modules() if isinstance(module, MergedEmbedding | MergedLinear))
        note = f"`leanrec.merge` takes {taken / 1e6:.1f} MB of memory" if taken else ""
        if not hasattr(models[name].deep, "first"):
            note = "; ".join(filter(None, [note, bound]))
        method = repr(methods[name.removesuffix("_merged")])
        _write(
            f"deepfm_forward_{name}",
            medians,
            "full",
            name,
            bar=1.5,
            unit="ms",
            scale=1e3,
            setting={**setting, "batch": batch, "method": method},
            note=note,
        )

    requests = [{f"c{number}": _zipf(rows, 1, seed=number + 100 * turn) for number in range(26)} for turn in range(200)]
    weights = [table.weight for table in full.embedding.tables.values()]
    jobs: dict[str, Callable[[Any], Any]] = {
        "embedding": lambda request: [F.embedding(*pair) for pair in zip(request.values(), weights, strict=True)]
    }
    jobs |= {"nn.Embedding": full.embedding} | {name: models[f"{name}_merged"].embedding for name in methods}
    medians = record.median_seconds({name: _each(read, requests) for name, read in jobs.items()}, repeats=41)
    for name, method in methods.items():
        _write(
            f"lookup_one_row_of_26_{name}",
            medians,
            "embedding",
            name,
            bar=1,
            unit="us for 26 rows",
            scale=1e6 / len(requests),
            setting={**setting, "batch": 1, "method": repr(method)},
            note="the field layer of a model after `leanrec.merge`; nn.Embedding: the same layer with float32 tables",
        )


class _Ready(nn.Module):
    """Stands for a field layer that takes no time."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = vectors

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.vectors


def _compare(title: str, rows: int, methods: dict[str, Method], *, bar: float, repeats: int) -> None:
    """Batches of uniform and of Zipf ids in turn, one median over both.

    Each side has its turn for all batches, as a process has that does nothing but serve. Beside it stands what they take where each reads one
    batch after the other side did, whose rows are in the cache then.
    """
    full = _full(rows)
    batches = [draw(rows, BATCH, seed=turn) for turn in range(BATCHES) for draw in (_uniform, _zipf)]
    for name, method in methods.items():
        table = _table(method, rows)
        readers: dict[str, Callable[[Tensor], Tensor]] = {"embedding": lambda ids: F.embedding(ids, full), "kernel": table}
        alone = record.median_seconds({side: _each(read, batches) for side, read in readers.items()}, repeats=repeats)
        turns = record.median_seconds({side: _next(read, batches) for side, read in readers.items()}, repeats=4 * repeats, warm_ups=8)
        medians = {side: seconds / BATCHES for side, seconds in alone.items()}
        medians |= {f"{side} after the other": 2 * seconds for side, seconds in turns.items()}
        medians |= record.median_seconds({"torch": _each(_by_torch(table), batches[:2])}, repeats=3)  # seconds a call for some
        setting = {"rows": rows, "columns": COLUMNS, "batch": BATCH, "method": repr(method), "ids": "uniform and Zipf in turn"}
        setting["times smaller"] = round(rows * COLUMNS * 4 / table.nbytes, 1)
        _write(f"{title}_{name}", medians, "embedding", "kernel", bar=bar, unit="ms for two batches", scale=1e3, setting=setting)


def _write(
    name: str, seconds: dict[str, float], other: str, ours: str, *, bar: float, unit: str, scale: float, setting: dict[str, Any], note: str = ""
) -> None:
    shown = {f"{key} {unit}": value * scale for key, value in seconds.items() if key in (other, ours, *_BESIDE)}
    against = "F.embedding on the float32 table" if other == "embedding" else "the same model with float32 tables"
    setting = {**setting, "threads": torch.get_num_threads(), "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "unset")}
    note = note or _NOTES.get(name, "")
    record.write(name, ratio=seconds[other] / seconds[ours], bar=bar, against=against, medians=shown, setting=setting, note=note)


def _full(rows: int) -> Tensor:
    """A float32 table of which every page is there."""
    return torch.zeros(rows, COLUMNS).add_(0.01)


def _table(method: Method, rows: int, *, columns: int = COLUMNS, padding: int | None = None) -> Table:
    table = method.build(rows, columns, generator=_seeded(0)).eval()
    table.padding_idx = padding
    if isinstance(method, VRQ):
        table.borders.copy_(torch.tensor(_falling_borders(rows, method.num_levels, int(table.borders.sum()))))
    assert fused.takes(table.coded(), torch.arange(1)), "the kernel is not built"
    return table


def _falling_borders(rows: int, num_levels: int, num_codes: int) -> list[int]:
    """Borders of a geometric fall that make use of all codes."""
    low, high = 0.0, 1.0
    for _ in range(60):
        fall = (low + high) / 2
        low, high = (fall, high) if sum(int(rows * fall**level) for level in range(num_levels)) <= num_codes else (low, fall)
    return [int(rows * low**level) for level in range(num_levels)]


def _by_torch(table: Table) -> Callable[[Tensor], Tensor]:
    def read(ids: Tensor) -> Tensor:
        with fused.plain_torch():
            return table(ids)

    return read


def _next(read: Callable[[Any], Any], batches: list[Any]) -> Callable[[], None]:
    turns = itertools.cycle(batches)
    return lambda: read(next(turns))


def _each(read: Callable[[Any], Any], batches: list[Any]) -> Callable[[], None]:
    def job() -> None:
        for ids in batches:
            read(ids)

    return job


def _uniform(rows: int, count: int, *, seed: int) -> Tensor:
    return torch.randint(rows, (count,), generator=_seeded(seed))


def _zipf(rows: int, count: int, *, seed: int) -> Tensor:
    """Ids that occur in proportion to 1 / (id + 1)."""
    shares = torch.rand(count, generator=_seeded(seed), dtype=torch.float64)
    return ((rows + 1.0) ** shares - 1).long().clamp(max=rows - 1)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


if __name__ == "__main__":
    main()
