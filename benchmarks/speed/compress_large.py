"""A table of 25.6 GB in a file, compressed in little memory: `python benchmarks/speed/compress_large.py FOLDER`.

FOLDER takes 27 GB while it runs. The speed is held against half of what bounds it: the slower of the disk, which is read plainly for it,
and of the processor, which must at least compute the scores of the same rows with the same centroids (one matrix product per part of a
row, in pieces that stay in the cache) and find the best of each (numpy's argmax), and nothing else. One thread. Work is counted in
processor seconds, which other work on the machine changes little, and the reading of the disk in seconds on the clock. The table and what
compressing it took stay in FOLDER, so that a second call only measures the bounds again.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from record import write

from leanrec import runs

NUM_EMBEDDINGS, EMBEDDING_DIM = 100_000_000, 64
NUM_SUBSPACES, NUM_CENTROIDS = 8, 256
MEMORY = 2_000_000_000
CHUNK_ROWS = 2**19
BARE_ROWS = 2**21


def make_table(path: Path) -> None:
    """Rows around 4096 centres, as those of trained tables lie in groups: written in chunks."""
    draws = np.random.default_rng(0)
    centres = draws.standard_normal((4096, EMBEDDING_DIM), dtype=np.float32)
    noise = draws.standard_normal((CHUNK_ROWS, EMBEDDING_DIM), dtype=np.float32)
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (NUM_EMBEDDINGS, EMBEDDING_DIM)}
        np.lib.format.write_array_header_2_0(file, header)
        for start in range(0, NUM_EMBEDDINGS, CHUNK_ROWS):
            rows = min(CHUNK_ROWS, NUM_EMBEDDINGS - start)
            # The same noise, turned by another shift and flipped by another sign in every chunk: drawing it anew would take longer than all else.
            turned = np.roll(noise, int(draws.integers(EMBEDDING_DIM)), axis=1)[:rows] * draws.choice(np.float32([-1, 1]), size=(rows, 1))
            file.write((centres[draws.integers(len(centres), size=rows)] + turned).tobytes())
        file.flush()
        os.fsync(file.fileno())


def drop_pages(path: Path) -> None:
    """Have a file read from the disk again, as far as the system does it."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read_seconds(path: Path) -> float:
    """What reading the file takes and nothing else."""
    drop_pages(path)
    buffer, start = bytearray(2**22), time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def bare_seconds() -> tuple[float, float]:
    """What the products of all rows with all centroids take, and the search for the best of each: those of two million rows, scaled."""
    torch.set_num_threads(1)
    width, chunk = EMBEDDING_DIM // NUM_SUBSPACES, 2**19 // NUM_CENTROIDS
    rows, words = torch.randn(BARE_ROWS, EMBEDDING_DIM), torch.randn(NUM_SUBSPACES, width, NUM_CENTROIDS)
    scores, products, searches = torch.empty(chunk, NUM_CENTROIDS), [], []
    for _ in range(5):
        product = search = 0.0
        for part in rows.split(chunk):
            for subspace in range(NUM_SUBSPACES):
                start = time.process_time()
                torch.mm(part[:, subspace * width : (subspace + 1) * width], words[subspace], out=scores)
                middle = time.process_time()
                scores.numpy().argmax(1)
                product, search = product + middle - start, search + time.process_time() - middle
        products.append(product * NUM_EMBEDDINGS / BARE_ROWS)
        searches.append(search * NUM_EMBEDDINGS / BARE_ROWS)
    return statistics.median(products), statistics.median(searches)


def compress(table: Path, out: Path) -> tuple[float, float]:
    """Seconds of `leanrec compress` in a process of its own: of the processor, and on the clock."""
    drop_pages(table)
    start = time.perf_counter()
    method = f"PQ(num_subspaces={NUM_SUBSPACES}, num_centroids={NUM_CENTROIDS})"
    command = [sys.executable, "-m", "leanrec", "compress", str(table), "--method", method, "--threads", "1", "--out", str(out)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime, time.perf_counter() - start


def main(folder: Path) -> None:
    """Measure, and keep two results."""
    table, out = folder / "large.npy", folder / "large-compressed"
    if not table.exists():
        make_table(table)
    disk, taken = plain_read_seconds(table), folder / "large-seconds.json"
    if not out.exists():
        taken.write_text(json.dumps(compress(table, out)))
    seconds, clock = json.loads(taken.read_text())
    products, searches = bare_seconds()
    record = runs.load(out)
    phases, processor = record["phases"], products + searches
    setting = {"rows": NUM_EMBEDDINGS, "dim": EMBEDDING_DIM, "method": record["method_used"], "threads": 1, "nbytes": record["table"]["nbytes"]}
    peak = record["peak_memory"]
    write(
        "compress_large_memory",
        ratio=MEMORY / peak,
        bar=1,
        against="2 GB of memory",
        medians={"peak MB": peak / 1e6, "table MB": table.stat().st_size / 1e6, "output MB": record["table"]["nbytes"] / 1e6},
        setting=setting,
    )
    bound = max(disk, processor)
    write(
        "compress_large_speed",
        ratio=2 * bound / seconds,
        bar=1,
        against="half the speed of what bounds it: reading the file, or bare products with all centroids and the search for the best",
        medians={"compress CPU s": seconds, "products CPU s": products, "search CPU s": searches, "read s": disk, "compress s": clock}
        | {f"{phase} s": taken for phase, taken in phases.items()},
        setting=setting,
        note=f"the disk delivers {table.stat().st_size / disk / 1e9:.2f} GB/s; against the processor alone {2 * processor / seconds:.2f}; "
        f"error {record['table']['error']:.3f}",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
