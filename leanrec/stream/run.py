"""`leanrec compress` for a table in a file: read in stretches, compressed, and written as it goes, in memory that does not grow with the table."""

from __future__ import annotations

import json
import mmap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from leanrec import runs
from leanrec.methods import Method, parse
from leanrec.methods.base import checked, row_weights
from leanrec.methods.streaming import Sample, StreamingTable
from leanrec.ops.sampling import systematic_sample
from leanrec.ops.spread import Spread, mean_and_covariance
from leanrec.stream.formats import open_source
from leanrec.stream.output import TableFile
from leanrec.stream.source import Source

TABLE_FILE, PROGRESS_FILE = "table.safetensors", "progress.safetensors"
_SAVE_SECONDS = 10.0
_COUNT_ROWS = 2**17
_SPREAD_ROWS = 65_536  # of a sample whose spread tells settings apart
_TOP_ROWS = 2**17  # most popular rows whose shares are kept one by one
_ERROR_ROWS = 16_384  # of a sample on which the error is measured
_LOOKUP_ROWS = 256  # at a time of those: a look-up in a mapped file brings up to 64 KiB of it into memory


@torch.no_grad()
def compress_table(
    source: Path | str,
    method: Method | str,
    out: Path | str,
    *,
    name: str | None = None,
    counts: Path | str | None = None,
    counts_name: str | None = None,
    ratio: float | None = None,
    nbytes: int | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """The record of a table in a file, compressed into `OUT/table.safetensors` without ever being in memory whole.

    The method is fitted to a sample of the rows, drawn by count, and then all rows are encoded, a few MiB at a time: the result is that of
    `method.build(V, D).fit(weight, counts)`, value for value. A killed run goes on with the stretch of rows that it had not finished, and
    ends with the same bytes; a finished one is not repeated. `leanrec.load(nn.Embedding(V, D, device="meta"), OUT/table.safetensors)` gives
    the table.

    Args:
        source: `.npy`, `.safetensors` or `.parquet` file, or a folder of torch.distributed.checkpoint, with V rows of D floats.
        method: What to compress with, or its text form.
        out: Run folder to write.
        name: Of the tensor or column, where `source` has several.
        counts: File, as `source`, of the (V,) int occurrences of each row; None for equal weight.
        counts_name: As `name`.
        ratio: float32 bytes of the table / bytes after, at least, reached by choosing the method's settings; or
        nbytes: bytes after, at most. With neither, the method is taken as it stands.
        seed: Source of the random draws.
        progress: Called with what is done, rows done, rows in all.

    Raises:
        ValueError: A file cannot be read or holds no such thing, a row holds NaN, the method does not fit or needs all rows at once, the
            budget is out of reach, or `out` holds something else.
    """
    source, out, given = Path(source), Path(out), parse(method) if isinstance(method, str) else method
    rows = _vectors(source, name)
    row_counts = None if counts is None else _Counts(Path(counts), counts_name, rows)
    settings = {
        "source": source,
        "method": repr(given),
        "name": name,
        "counts": counts,
        "counts_name": counts_name,
        "ratio": ratio,
        "nbytes": nbytes,
        "seed": seed,
        "files": _state_of_files([*rows.files, *(row_counts.source.files if row_counts else [])]),
    }
    _check_streams(given)
    if runs.is_finished(out, command="compress", settings=settings):
        return runs.load(out)
    with runs.create(out, command="compress", settings=settings, resumable=True) as current:
        task = _Task(rows, row_counts, seed, current.folder, progress or (lambda *_: None))
        current.results.update(task.run(given, ratio, nbytes))
    return runs.load(out)


class _Counts:
    """Occurrences of each row."""

    def __init__(self, path: Path, name: str | None, rows: Source) -> None:
        self.source = open_source(path, name)
        if self.source.dtype.is_floating_point or self.source.row_shape:
            raise ValueError(
                f"{path}: holds {self.source.dtype} of shape {(self.source.num_rows, *self.source.row_shape)}. Counts are integers (V,)."
            )
        if self.source.num_rows != rows.num_rows:
            raise ValueError(f"{path}: has {self.source.num_rows} counts, but {rows.path} has {rows.num_rows} rows. Give one count per row.")

    def read(self, start: int, stop: int) -> Tensor:
        """Of the rows from one to before another: (N,) int64."""
        counts = self.source.read(start, stop).long()
        if len(counts) and int(counts.min()) < 0:
            raise ValueError(f"{self.source.path}: row {start + int(counts.argmin())} has the count {int(counts.min())}. Counts are at least 0.")
        return counts


class _Task:
    """One table on its way from the source to the folder."""

    def __init__(self, rows: Source, counts: _Counts | None, seed: int, folder: Path, progress: Callable[[str, int, int], None]) -> None:
        self.rows, self.counts, self.seed, self.folder, self.progress = rows, counts, seed, folder, progress
        self.shape = rows.num_rows, rows.row_shape[0]
        self.saved_at = time.monotonic()

    def run(self, method: Method, ratio: float | None, nbytes: int | None) -> dict[str, Any]:
        """What the run's record says of the table."""
        saved = self.folder / PROGRESS_FILE
        if saved.exists():
            table, file, start, seconds = self._resume(saved)
        else:
            began = time.perf_counter()
            if ratio is not None or nbytes is not None:
                method = self._choose(method, ratio, nbytes)
            table, start = self._fit(self._build(method)), 0
            file, seconds = TableFile(self.folder / TABLE_FILE, table), {"fit": time.perf_counter() - began, "encode": 0.0}
            self._save(table, file, start, seconds)
        self._encode(table, file, start, seconds)
        began = time.perf_counter()
        self._finish(table, file)
        seconds["finish"] = time.perf_counter() - began
        saved.unlink()
        size = table.nbytes
        full = self.shape[0] * self.shape[1] * 4
        return {
            "method_used": repr(table.method),
            "table": {
                "num_embeddings": self.shape[0],
                "embedding_dim": self.shape[1],
                "nbytes": size,
                "nbytes_full": full,
                "ratio": full / size,
                "error": table.fit_error,
            },
            "phases": {phase: round(taken, 3) for phase, taken in seconds.items()},
        }

    def _build(self, method: Method) -> StreamingTable:
        """The table with its small tensors in memory; what it holds of every row is on the meta device, and goes to the file."""
        with torch.device("meta"):
            table = method.build(*self.shape)
        assert isinstance(table, StreamingTable), "a method without a streaming_gap builds a StreamingTable"
        table.seed = self.seed
        for module in table.modules():
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, tensor in own:
                if module is not table or name not in table.row_parts:
                    empty = torch.empty_like(tensor, device="cpu")
                    setattr(module, name, nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty)
        return table

    def _fit(self, table: StreamingTable) -> StreamingTable:
        """The table after a look at a sample of the rows."""
        self.progress("sample", 0, self.shape[0])
        if self.counts is not None:
            starts = range(0, self.shape[0], _COUNT_ROWS)
            chunks = (self.counts.read(start, min(start + _COUNT_ROWS, self.shape[0])) for start in starts)
            if finding := table.disorder(chunks):
                raise ValueError(
                    f"{self.counts.source.path}: {finding} Sort the rows and their counts by falling count, or take RQ(), to which order is nothing."
                )
        ids, weights = table.draw(self._counts_of)
        table.fit_sample(Sample(ids, self._take(ids), weights))
        return table

    def _encode(self, table: StreamingTable, file: TableFile, start: int, seconds: dict[str, float]) -> None:
        for first, raw in self.rows.chunks(start, table.chunk_rows):
            began = time.perf_counter()
            stop = first + len(raw)
            chunk = self._checked(raw, range(first, stop))
            weights = table.chunk_weights(first, self._counts_of(first, stop), len(chunk))
            for name, piece in table.encode(first, chunk, weights).items():
                file.append(name, piece)
            seconds["encode"] += time.perf_counter() - began
            self.progress("rows", stop, self.shape[0])
            if time.monotonic() - self.saved_at >= _SAVE_SECONDS:
                self._save(table, file, stop, seconds)

    def _finish(self, table: StreamingTable, file: TableFile) -> None:
        """Settle the small tensors and close the file."""
        table.settle()
        for name, tensor in table.state_dict().items():
            if name not in table.row_parts:
                file.ends[name] = 0  # a run that was cut off here writes them again
                file.append(name, tensor)
        table.fit_error = self._measure(table, file)
        file.finish()

    def _measure(self, table: StreamingTable, file: TableFile) -> float | None:
        """Share of the variance that is lost, on rows drawn by count; the file answers as the table will."""
        ids, weights = self._draw_by_count(_ERROR_ROWS)
        rows = self._take(ids).double()
        maps: list[mmap.mmap] = []
        for name in table.row_parts:
            values, pages = file.mapped(name)
            setattr(table, name, nn.Parameter(values, requires_grad=False) if name in table._parameters else values)
            maps.append(pages)
        lost = torch.zeros((), dtype=torch.float64)
        for some, given, share in zip(ids.split(_LOOKUP_ROWS), rows.split(_LOOKUP_ROWS), weights.split(_LOOKUP_ROWS), strict=True):
            lost += share.double() @ (table(some).double() - given).square().sum(1)
            for pages in maps:
                pages.madvise(mmap.MADV_DONTNEED)
        _, covariance = mean_and_covariance([rows], weights)
        spread = float(covariance.trace() * weights.double().sum())
        return float(lost) / spread if spread > 0 else None

    def _choose(self, method: Method, ratio: float | None, nbytes: int | None) -> Method:
        """The settings with the least expected error within a budget."""
        full = self.shape[0] * self.shape[1] * 4
        if (ratio is None) == (nbytes is None) or (ratio is not None and not ratio > 0):
            raise ValueError(f"Give one of nbytes and ratio, above 0, not nbytes={nbytes} and ratio={ratio}.")
        budget = nbytes if nbytes is not None else int(full / ratio) if ratio else 0
        sizes = {variant: variant.nbytes(*self.shape) for variant in method.variants(*self.shape)}
        if min(sizes.values()) > budget:
            least = min(sizes.values())
            raise ValueError(
                f"The budget of {budget} bytes cannot be met: the smallest that {method} can do is {least} bytes, a ratio of {full / least:.1f}."
            )
        spread = self._spread()
        return min(
            (variant for variant, size in sizes.items() if size <= budget), key=lambda variant: (variant.expected_error(spread), sizes[variant])
        )

    def _spread(self) -> Spread:
        """Of the table, from rows drawn by count and from the counts of the most popular ones."""
        ids, weights = self._draw_by_count(_SPREAD_ROWS)
        _, covariance = mean_and_covariance([self._take(ids)], weights)
        if self.counts is None:
            return Spread(self.shape[0], covariance, torch.full((1,), 1 / self.shape[0]).expand(self.shape[0]))
        top, total = torch.empty(0, dtype=torch.int64), 0
        for start in range(0, self.shape[0], _COUNT_ROWS):
            counts = self.counts.read(start, min(start + _COUNT_ROWS, self.shape[0]))
            total += int(counts.sum())
            top = torch.cat([top, counts])
            top = top.topk(min(_TOP_ROWS, len(top))).values
        shares = top.double() / max(total, 1)
        return Spread(self.shape[0], covariance, torch.cat([shares, 1 - shares.sum(0, keepdim=True)]).float())

    def _draw_by_count(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Ids and weights of rows that stand for all look-ups, (S,) each."""

        def chunks() -> list[Tensor] | Any:
            for start in range(0, self.shape[0], _COUNT_ROWS):
                stop = min(start + _COUNT_ROWS, self.shape[0])
                yield row_weights(self._counts_of(start, stop), stop - start, power=1.0)

        return systematic_sample(chunks, num_rows)

    def _take(self, ids: Tensor) -> Tensor:
        return self._checked(self.rows.take(ids), ids)

    def _checked(self, rows: Tensor, ids: Sequence[int] | Tensor) -> Tensor:
        try:
            return checked(rows, ids)
        except ValueError as error:
            raise ValueError(f"{self.rows.path}: {error}") from None

    def _counts_of(self, start: int, stop: int) -> Tensor | None:
        return None if self.counts is None else self.counts.read(start, stop)

    def _save(self, table: StreamingTable, file: TableFile, start: int, seconds: dict[str, float]) -> None:
        """Keep all that it takes to go on with row `start`: first the rows on the disk, then the note that they are there."""
        file.sync()
        small = {f"table.{name}": tensor for name, tensor in table.state_dict().items() if name not in table.row_parts}
        tensors = small | {f"gathered.{name}": tensor for name, tensor in table.gathered.items()}
        note = {"method": repr(table.method), "start": start, "ends": file.ends, "seconds": seconds}
        temporary = self.folder / (PROGRESS_FILE + ".tmp")
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, {"note": json.dumps(note)})
        runs.replace(temporary, self.folder / PROGRESS_FILE)
        self.saved_at = time.monotonic()

    def _resume(self, saved: Path) -> tuple[StreamingTable, TableFile, int, dict[str, float]]:
        """What `_save` kept."""
        with safe_open(saved, framework="pt") as kept:
            note = json.loads(kept.metadata()["note"])
            tensors = {name: kept.get_tensor(name).clone() for name in kept.keys()}  # noqa: SIM118  # not a dict
        table = self._build(parse(note["method"]))
        state = table.state_dict()
        for name, tensor in tensors.items():
            kind, _, own = name.partition(".")
            if kind == "table":
                state[own].copy_(tensor)
            else:
                table.gathered[own] = tensor
        return table, TableFile(self.folder / TABLE_FILE, table, note["ends"]), note["start"], note["seconds"]


def _vectors(path: Path, name: str | None) -> Source:
    rows = open_source(path, name)
    shape = rows.num_rows, *rows.row_shape
    if not rows.dtype.is_floating_point or len(shape) != 2 or 0 in shape:
        sizes = " x ".join(map(str, shape))
        raise ValueError(f"{path}: holds {rows.dtype} of shape {sizes}. A table has rows of floats, V x D, at least one and of at least one value.")
    return rows


def _check_streams(method: Method) -> None:
    if method.streaming_gap is not None:
        raise ValueError(
            f"{type(method).__name__} cannot compress a table in a file: {method.streaming_gap}. "
            "Load the table into a model and use leanrec.compress, or take a method that streams, such as PQ()."
        )


def _state_of_files(files: Sequence[Path]) -> list[list[Any]]:
    """Name, size and time of change of each: enough to notice another input, without reading it twice."""
    states = [(path.name, path.stat()) for path in files]
    return [[name, state.st_size, state.st_mtime_ns] for name, state in states]
