"""A log in the form of the Criteo challenge, as large as asked for.

`python benchmarks/speed/criteo_like.py --rows 22000000 --out work/criteo_like.tsv` writes tab-separated text without a header: a label, 13 whole
numbers and 26 categorical values of 8 hexadecimal digits, any of which may be missing. The values of a column follow a power law over as many
different ones as the column of the challenge has. The same seed gives the same rows, and a longer log begins with the shorter one. Memory is
that of one chunk of rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import BinaryIO

import numpy as np
import polars as pl
import pyarrow as pa

CHUNK_ROWS = 250_000
# Distinct values of C1-C26 in the training set of the Display Advertising Challenge (45.8 million rows).
DISTINCT = (1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15)
DISTINCT = (*DISTINCT, 286181, 105, 142572)
EXPONENT = 1.05  # of the power law that draws a value by its rank
SMALL, SMALL_EXPONENT = 1_000_000, 0.8  # columns with more values than that have longer tails, as in the challenge
MISSING_NUMBER, MISSING_TEXT = 0.2, 0.03
NUMBERS = 13
HEX = np.array([f"{value:04x}".encode() for value in range(1 << 16)]).view(np.uint32)


def write_log(path: Path, *, rows: int, seed: int = 0) -> None:
    """Write a log of `rows` rows."""
    with path.open("wb") as file:
        for number, start in enumerate(range(0, rows, CHUNK_ROWS)):
            _write_chunk(file, np.random.default_rng([seed, number]), min(CHUNK_ROWS, rows - start))


def _write_chunk(file: BinaryIO, draw: np.random.Generator, rows: int) -> None:
    # Whole chunks are drawn whatever is kept of them: a shorter log is the beginning of a longer one.
    numbers = {f"I{place + 1}": _numbers(draw, place) for place in range(NUMBERS)}
    values = [_values(draw, place, distinct) for place, distinct in enumerate(DISTINCT)]
    # What is clicked hangs on six columns: there is something to learn.
    effects = sum((values[place] >> 8).astype(np.uint8) / 255 - 0.5 for place in (0, 2, 5, 11, 15, 20))
    labels = (draw.random(CHUNK_ROWS) < 1 / (1 + np.exp(1.2 - 1.5 * effects))).astype(np.int8)
    texts = {f"C{place + 1}": _hexadecimal(value, draw.random(CHUNK_ROWS) < MISSING_TEXT) for place, value in enumerate(values)}
    pl.DataFrame({"label": labels, **numbers, **texts}).head(rows).write_csv(file, separator="\t", include_header=False, quote_style="never")


def _numbers(draw: np.random.Generator, place: int) -> pl.Series:
    """Counts with a long tail, some missing."""
    numbers = np.floor(np.exp(draw.normal(0.6 * (place % 6), 1.5, CHUNK_ROWS))).astype(np.int64) - (place == 1)
    return pl.Series(pa.array(numbers, mask=draw.random(CHUNK_ROWS) < MISSING_NUMBER))


def _values(draw: np.random.Generator, place: int, distinct: int) -> np.ndarray:
    """(CHUNK_ROWS,) uint32 of at most `distinct` different values: ranks by the inverse of a power law's distribution, then mixed one to one."""
    power = 1 - (SMALL_EXPONENT if distinct > SMALL else EXPONENT)
    ranks = ((((distinct + 1.0) ** power - 1) * draw.random(CHUNK_ROWS) + 1) ** (1 / power)).astype(np.uint32)
    mixed = ranks + np.uint32(0x9E3779B9 * (place + 1) & 0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the end of MurmurHash3, a bijection
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    return mixed ^ (mixed >> np.uint32(16))


def _hexadecimal(values: np.ndarray, is_missing: np.ndarray) -> pl.Series:
    digits = np.stack([HEX[values >> 16], HEX[values & 0xFFFF]], axis=1)
    offsets = np.arange(len(values) + 1, dtype=np.int32) * 8
    known = np.packbits(~is_missing, bitorder="little")
    return pl.Series(pa.StringArray.from_buffers(len(values), pa.py_buffer(offsets), pa.py_buffer(digits), pa.py_buffer(known)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=22_000_000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_log(options.out, rows=options.rows, seed=options.seed)
