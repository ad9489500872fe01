"""Delimited text (CSV, TSV, with or without a header) as a source of raw rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
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
        self._whole_line = _whole_line(delimiter, quoted=delimiter != "\t")

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
        if not self._whole_line.fullmatch(line):
            if b"\r" in line.rstrip(b"\r\n") and (self.header or len(block.numbers) == 1):
                raise ValueError(f"{path}: lines end in a carriage return alone. Write them with line feeds.")
            if self.header:
                raise ValueError(f"{path}: a quoted name in the first line does not end on it. Repair the line, whose cells name the columns.")
            line = next(filter(self._whole_line.fullmatch, block.lines()), line)
        cells = self._parse(line, None).column_names
        numbered = [f"column_{number}" for number in range(1, len(cells) + 1)]
        names = cells if self.header else self._given or numbered
        if len(names) == 1:
            others = [word for other, word in OTHER_DELIMITERS.items() if other != self.delimiter and other in cells[0]]
            hint = f"; {' or '.join(others)} would part it" if others else ""
            raise ValueError(f"{path}: one column, {cells[0][:80]!r}, with the separator {self.delimiter!r}{hint}. Give the right --delimiter.")
        if nameless := [number for number, name in enumerate(names, start=1) if not name.strip()]:
            is_index = nameless[0] == 1 and self.header  # as pandas writes it
            hint = "; is it the index of a pandas table? Write that with index=False, or name it and leave it out with --kind NAME=ignore" * is_index
            raise ValueError(f"{path}: column {nameless[0]} of {len(names)} has no name{hint or '. Name it'}.")
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise ValueError(f"{path}: two columns have the name {repeated[0]!r}. Columns need names of their own; is there a header at all?")
        return names

    def _chunk(self, path: Path, block: Block, names: Sequence[str], bad_rows: BadRows) -> Chunk:
        misfits: list[csv.InvalidRow] = []
        table = self._parse(block.text, names, misfits)
        if len(table) + len(misfits) != len(block.numbers) or self._may_hide_broken_lines(block.text):
            block = block.without(self._refuse_broken_lines(path, block, bad_rows))
            misfits.clear()
            table = self._parse(block.text, names, misfits) if block.text else table[:0]
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

    def _may_hide_broken_lines(self, text: bytes) -> bool:
        """Whether lines may be broken although there are as many rows as lines: one is parted and two are joined, or the last quote is open."""
        last = text[text.rfind(b"\n", 0, -1) + 1 :]
        return not self._whole_line.fullmatch(last) or (b"\r" in text and _has_return_before_the_end(text))

    def _refuse_broken_lines(self, path: Path, block: Block, bad_rows: BadRows) -> set[int]:
        """Places of the lines that are not one row each, whatever stands on the others."""
        broken = {row: line for row, line in enumerate(block.lines()) if not self._whole_line.fullmatch(line)}
        for row, line in broken.items():
            if self._whole_line.fullmatch(line.replace(b"\r", b"")):
                reason, fault = "carriage return", "a carriage return within the line"
            else:
                reason, fault = "open quote", "a quoted cell does not end on its line"
            bad_rows.add(path, int(block.numbers[row]), reason, fault)
        return set(broken)

    def _parse(self, text: bytes, names: Sequence[str] | None, misfits: list[csv.InvalidRow] | None = None) -> pa.Table:
        """The columns of a block as text; rows with other numbers of columns are left out and appended to `misfits`.

        Without `names` they are the cells of the first line.
        """

        def leave_out(row: csv.InvalidRow) -> str:
            if misfits is not None:
                misfits.append(row)
            return "skip"

        types = {} if names is None else dict.fromkeys(names, pa.string())
        quote: str | bool = False if self.delimiter == "\t" else '"'
        return csv.read_csv(
            pa.BufferReader(text),
            # One thread: only then are rows numbered. One block: the text is bounded already.
            read_options=csv.ReadOptions(column_names=names, use_threads=False, block_size=len(text) + 1),
            parse_options=csv.ParseOptions(delimiter=self.delimiter, quote_char=quote, invalid_row_handler=leave_out),
            # Blocks are text by now, and stay it where they are cut.
            convert_options=csv.ConvertOptions(column_types=types, strings_can_be_null=False, check_utf8=False),
        )


def _whole_line(delimiter: str, *, quoted: bool) -> re.Pattern[bytes]:
    """Matches a line on which every quoted cell ends, and with no carriage return outside quotes but at its end.

    A cell is quoted if it begins with a quote; a quote further on is a character, as for the parser.
    """
    stop = re.escape(delimiter.encode())
    begin = rb"""(?:"[^"]*(?:""[^"]*)*"(?!")|(?!"))""" if quoted else b""
    cell = begin + rb"[^%s\r\n]*" % stop
    return re.compile(rb"%s(?:%s%s)*\r*\n" % (cell, stop, cell))


def _has_return_before_the_end(text: bytes) -> bool:
    """Whether a carriage return is followed by anything but a line feed."""
    characters = np.frombuffer(text, dtype=np.uint8)
    return bool(((characters[:-1] == ord("\r")) & (characters[1:] != ord("\n"))).any())


def _without_first_line(block: Block) -> Block:
    return Block(block.text[block.text.index(b"\n") + 1 :], block.numbers[1:])
