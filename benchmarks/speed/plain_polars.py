"""What one would write by hand with polars: `python benchmarks/speed/plain_polars.py LOG OUT` makes ids of a log in Criteo's format.

The same result as `leanrec prepare --format criteo`, but for the checks: text to Parquet, one group-by per column, streaming joins.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import polars as pl

NUMBERS = [f"I{place}" for place in range(1, 14)]
TEXTS = [f"C{place}" for place in range(1, 27)]


def main(log: Path, out: Path) -> None:
    """Write ids and vocabularies of a log into an empty folder."""
    names = ["label", *NUMBERS, *TEXTS]
    rows = pl.scan_csv(log, separator="\t", has_header=False, new_columns=names, infer_schema=False, quote_char=None)
    numbers = [_bucket(pl.col(name)).alias(name) for name in NUMBERS]
    typed = rows.with_row_index("row").select("row", pl.col("label").cast(pl.Int8), *numbers, *(pl.col(name).fill_null("") for name in TEXTS))
    staged = out / "staged.parquet"
    typed.sink_parquet(staged)
    count = pl.scan_parquet(staged).select(pl.len()).collect().item()
    split = pl.Series("split", np.searchsorted([0.8, 0.9], np.random.default_rng(0).random(count), side="right").astype(np.int8))
    train = pl.scan_parquet(staged).filter(split == 0)
    encoded = pl.scan_parquet(staged)
    for name in [*NUMBERS, *TEXTS]:
        counts = train.group_by(name).agg(pl.len().alias("count")).collect(engine="streaming").sort("count", name, descending=[True, False])
        vocabulary = counts.with_columns(pl.int_range(2, pl.len() + 2, dtype=pl.Int32).alias(f"id of {name}"))
        vocabulary.write_parquet(out / f"{name}.parquet")
        encoded = encoded.join(vocabulary.lazy().drop("count"), on=name, how="left", maintain_order="left")
    ids = [pl.col(f"id of {name}").fill_null(1).alias(name) for name in [*NUMBERS, *TEXTS]]
    for number, part in enumerate(("train", "valid", "test")):
        encoded.filter(split == number).select("label", *ids).sink_parquet(out / f"{part}.parquet")
    staged.unlink()


def _bucket(text: pl.Expr) -> pl.Expr:
    number = text.cast(pl.Float64, strict=False)
    large = pl.lit("b") + (number.log(math.e) ** 2).floor().cast(pl.Int64, strict=False).cast(pl.String)
    return pl.when(number > 2).then(large).otherwise(number.floor().cast(pl.Int64, strict=False).cast(pl.String)).fill_null("")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
