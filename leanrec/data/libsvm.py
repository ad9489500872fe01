"""libsvm and libfm text (`label index:1 index:1 ...`) as a source of raw rows."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import polars as pl

from leanrec.data.lines import Block, read_blocks
from leanrec.data.source import SAMPLE_ROWS, BadRows, Chunk

LABEL, FEATURES = "label", "features"


class LibsvmSource:
    """Rows of indices.

    Where the first lines have one number of indices, the index at place j is the categorical column `fj`; else they are one list, `features`.
    A label of -1 is how this format writes 0. Comments (`# ...`) and the `qid:` of ranking data are passed over.

    Attributes:
        width: Indices of every line; None where they are a list.
    """

    def __init__(self, paths: Sequence[Path], *, as_list: bool) -> None:
        self.paths = tuple(paths)
        self.width = None if as_list else _common_width(self.paths[0])

    def chunks(self, bad_rows: BadRows) -> Generator[Chunk, None, None]:
        """See `Source.chunks`."""
        for path in self.paths:
            for block in read_blocks(path, bad_rows):
                yield self._chunk(path, block, bad_rows)

    def _chunk(self, path: Path, block: Block, bad_rows: BadRows) -> Chunk:
        parsed = _parse(block).with_columns(_fault(self.width))
        for row, fault in parsed.with_row_index().filter(pl.col("fault").is_not_null()).select("index", "fault").iter_rows():
            bad_rows.add(path, int(block.numbers[row]), "no libsvm row", fault)
        is_sound = parsed["fault"].is_null() & (parsed["line"] != "")
        return Chunk(parsed.filter(is_sound).select(LABEL, *self._columns()), path, np.asarray(block.numbers)[is_sound.to_numpy()])

    def _columns(self) -> list[pl.Expr]:
        indices = pl.col("indices")
        return [indices.alias(FEATURES)] if self.width is None else [indices.list.get(place).alias(f"f{place}") for place in range(self.width)]


def _common_width(path: Path) -> int | None:
    """Indices of each of the first lines, if at least nine in ten agree: an odd line is a bad row rather than another format."""
    with closing(read_blocks(path, BadRows("skip"))) as blocks:
        widths = _parse(next(blocks)).filter(pl.col("line") != "").head(SAMPLE_ROWS)["indices"].list.len()
    usual = int(widths.mode(maintain_order=True)[0]) if len(widths) else 0
    return usual if usual and (widths == usual).sum() >= 0.9 * len(widths) else None


def _parse(block: Block) -> pl.DataFrame:
    """`line` (empty where it holds nothing but a comment), `label` (text), `indices` (lists of text) of each line."""
    line = pl.col("line")
    if b"#" in block.text:
        line = line.str.replace("#.*", "")
    if b"qid:" in block.text:
        line = line.str.replace(r"^(\s*\S+)\s+qid:\S+", "$1")
    label = line.str.extract(r"^(\S+)")
    return pl.DataFrame({"line": block.text.decode().split("\n")[:-1]}, schema={"line": pl.String}).select(
        line.str.strip_chars(),
        pl.when(label.cast(pl.Float64, strict=False) == -1).then(pl.lit("0")).otherwise(label).alias(LABEL),
        line.str.extract_all(r"\d+:").list.eval(pl.element().str.strip_chars_end(":")).alias("indices"),
    )


def _fault(width: int | None) -> pl.Expr:
    """What is wrong with a line, or null."""
    line, count = pl.col("line"), pl.col("indices").list.len()
    has_form = line.str.contains(r"^\S+(\s+\d+:\S+)*$")
    ones = line.str.count_matches(r"\d:1(\.0*)?(\s|$)")
    faults = [
        pl.when(~has_form).then(pl.lit("not of the form 'label index:value index:value ...'")),
        pl.when(ones != count).then(pl.lit("a value is not 1, and only indices are read")),
    ]
    if width is not None:
        words = f"{{}} indices, expected {width} as in the first lines; for lists of any length give --kind {FEATURES}=multivalued"
        faults.append(pl.when(count != width).then(pl.format(words, count)))
    return pl.when(line != "").then(pl.coalesce(faults)).alias("fault")
