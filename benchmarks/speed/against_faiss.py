"""Fitting a table in memory, against training and encoding with faiss: `python benchmarks/speed/against_faiss.py [ROWS]`.

Both see a training sample of the same size, 256 rows for each centroid, and give every row its codes. One thread each. The seconds are the
processor's own, so that what else the machine does falls on neither; errors are mean squared distances over the same rows. faiss encodes
residuals slowly, so residual quantizers get the first rows of the table only, on both sides.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch
from record import write

from leanrec import PQ, RQ

EMBEDDING_DIM, NUM_CODES, NUM_CENTROIDS = 64, 8, 256
SAMPLE_ROWS, RESIDUAL_ROWS, ERROR_ROWS = 256 * NUM_CENTROIDS, 200_000, 200_000
RESIDUAL_LEVELS = 4
CHUNK_ROWS = 2**18


def make_rows(num_rows: int) -> np.ndarray:
    """Rows around 4096 centres, as those of trained tables lie in groups."""
    draws = np.random.default_rng(0)
    centres = draws.standard_normal((4096, EMBEDDING_DIM), dtype=np.float32)
    rows = np.empty((num_rows, EMBEDDING_DIM), np.float32)
    for start in range(0, num_rows, CHUNK_ROWS):
        part = rows[start : start + CHUNK_ROWS]
        draws.standard_normal(out=part, dtype=np.float32)
        part += centres[draws.integers(len(centres), size=len(part))]
    return rows


def timed(job: Callable[[], Any]) -> tuple[Any, float]:
    """What a job gives, and the processor seconds that it takes."""
    start = time.process_time()
    result = job()
    return result, time.process_time() - start


def compare(name: str, rows: np.ndarray, quantizer: Any, method: PQ | RQ) -> None:
    """Time both on the same rows and keep the result."""
    sample = rows[:: max(1, len(rows) // SAMPLE_ROWS)][:SAMPLE_ROWS].copy()
    _, train = timed(lambda: quantizer.train(sample))
    codes, encode = timed(lambda: quantizer.compute_codes(rows))
    weight = torch.from_numpy(rows)
    table, ours = timed(lambda: method.build(len(rows), EMBEDDING_DIM).fit(weight))
    some = np.linspace(0, len(rows) - 1, ERROR_ROWS).astype(np.int64)
    their_error = float(np.square(quantizer.decode(codes[some]) - rows[some]).sum(1).mean())
    with torch.no_grad():
        our_error = float((table(torch.from_numpy(some)) - weight[some]).square().sum(1).mean())
    write(
        name,
        ratio=(train + encode) / ours,
        bar=1,
        against=f"faiss {faiss.__version__} {type(quantizer).__name__}, train and encode",
        medians={
            "leanrec CPU s": ours,
            "faiss CPU s": train + encode,
            "faiss train CPU s": train,
            "leanrec squared error": our_error,
            "faiss squared error": their_error,
        },
        setting={"rows": len(rows), "dim": EMBEDDING_DIM, "method": repr(method), "sample rows": SAMPLE_ROWS, "threads": 1, "repeats": 1},
        note=f"{len(rows):,} rows; the error is {our_error / their_error:.3f} of that of faiss",
    )


def main(num_rows: int) -> None:
    """Measure, and keep two results."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    rows = make_rows(num_rows)
    compare("against_faiss_pq", rows, faiss.ProductQuantizer(EMBEDDING_DIM, NUM_CODES, 8), PQ(num_subspaces=NUM_CODES))
    compare("against_faiss_rq", rows[:RESIDUAL_ROWS], faiss.ResidualQuantizer(EMBEDDING_DIM, RESIDUAL_LEVELS, 8), RQ(num_levels=RESIDUAL_LEVELS))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000_000)
