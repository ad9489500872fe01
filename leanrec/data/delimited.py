"""Delimited text (CSV, TSV, with or without a header) as a source of raw rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa
from pyarrow import csv

from leanrec.data.lines import Block, read_blocks
from leanrec.data.source import BadRows, Chunk

OTHER_DELIMITERS = {"\t": "a tab", ";": "';'", ",": "','", "|": "'|'", " ": "a space"}


class DelimitedSource:
    """Rows of text files that have the same columns.

    Cells may be quoted as in RFC 4180, but for tab-separated text, where a quote is a character like any other. A quoted cell ends on its line.
    """

    def __init__(self, paths: Sequence[Path], *, delimiter: str, header: bool, columns: Sequence[str]) -> None:
        self.paths, self.delimiter, self.header = tuple(paths), delimiter, header
        self._given = list(columns)

    def chunks(self, bad_rows: BadRows) -> Generator[Chunk, None, None]:
        """See `Source.chunks`."""
        first: list[str] | None = None
        for path in self.paths:
            for chunk in self._file_chunks(path, bad_rows):
                first = first or chunk.rows.columns
                if chunk.rows.columns != first:
                    raise ValueError(f"{path}: columns {chunk.rows.columns}, but {self.paths[0]} has {first}.")
                yield chunk

    def _file_chunks(self, path: Path, bad_rows: BadRows) -> Generator[Chunk, None, None]:
        names: list[str] | None = None
        for block in read_blocks(path, bad_rows, header=self.header):
            if not len(block.numbers):
                continue
            if names is None:
                names = self._names(path, block)
                block = _without_first_line(block) if self.header else block
            if len(block.numbers):
                yield self._chunk(path, block, names, bad_rows)

    def _names(self, path: Path, block: Block) -> list[str]:
        """Names of the columns of a file, from its first line or as given."""
        line = block.text[: block.text.index(b"\n") + 1]
        if b"\r" in line.rstrip(b"\r\n"):
            raise ValueError(f"{path}: lines end in a carriage return alone. Write them with line feeds.")
        first = self._parse(line, None)
        cells = [str(first[name][0].as_py()) for name in first.column_names]
        numbered = [f"column_{number}" for number in range(1, len(cells) + 1)]
        names = cells if self.header else self._given or numbered
        if len(names) == 1:
            others = [word for other, word in OTHER_DELIMITERS.items() if other != self.delimiter and other in cells[0]]
            hint = f"; {' or '.join(others)} would part it" if others else ""
            raise ValueError(f"{path}: one column, {cells[0][:80]!r}, with the separator {self.delimiter!r}{hint}. Give the right --delimiter.")
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise ValueError(f"{path}: two columns have the name {repeated[0]!r}. Columns need names of their own; is there a header at all?")
        return names

    def _chunk(self, path: Path, block: Block, names: Sequence[str], bad_rows: BadRows) -> Chunk:
        misfits: list[csv.InvalidRow] = []
        table = self._parse(block.text, names, misfits)
        if len(table) + len(misfits) != len(block.numbers):
            block = block.without(self._refuse_open_quotes(path, block, bad_rows))
            misfits.clear()
            table = self._parse(block.text, names, misfits)
        if len(table) + len(misfits) != len(block.numbers):
            raise ValueError(f"{path}: a cell in lines {block.numbers[0]} to {block.numbers[-1]} holds a line break or a carriage return.")
        for row in misfits:
            expected = f"{len(names)} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
            fault = f"{row.actual_columns} columns, expected {expected}"
            bad_rows.add(path, int(block.numbers[row.number - 1]), f"not {len(names)} columns", fault)
        block = block.without({row.number - 1 for row in misfits}) if misfits else block
        frame = pl.from_arrow(table)
        assert isinstance(frame, pl.DataFrame)
        return Chunk(frame, path, block.numbers)

    def _refuse_open_quotes(self, path: Path, block: Block, bad_rows: BadRows) -> set[int]:
        """Places of the lines on which a quoted cell begins and does not end, or the other way round."""
        odd = {row for row, line in enumerate(block.lines()) if line.count(b'"') % 2}
        for row in sorted(odd):
            bad_rows.add(path, int(block.numbers[row]), "open quote", "a quoted cell does not end on its line")
        return odd

    def _parse(self, text: bytes, names: Sequence[str] | None, misfits: list[csv.InvalidRow] | None = None) -> pa.Table:
        """The columns of a block as text; rows with other numbers of columns are left out and appended to `misfits`."""

        def leave_out(row: csv.InvalidRow) -> str:
            if misfits is not None:
                misfits.append(row)
            return "skip"

        types = {} if names is None else dict.fromkeys(names, pa.string())
        quote: str | bool = False if self.delimiter == "\t" else '"'
        return csv.read_csv(
            pa.BufferReader(text),
            # One thread: only then are rows numbered. One block: the text is bounded already.
            read_options=csv.ReadOptions(column_names=names, autogenerate_column_names=names is None, use_threads=False, block_size=len(text) + 1),
            parse_options=csv.ParseOptions(delimiter=self.delimiter, quote_char=quote, invalid_row_handler=leave_out),
            convert_options=csv.ConvertOptions(column_types=types, strings_can_be_null=False),
        )


def _without_first_line(block: Block) -> Block:
    return Block(block.text[block.text.index(b"\n") + 1 :], block.numbers[1:])
