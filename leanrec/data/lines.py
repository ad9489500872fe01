"""Text files, compressed or not, as blocks of whole lines that know their numbers."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import pyarrow as pa

from leanrec.data.inputs import compression_of
from leanrec.data.source import BadRows

BLOCK_BYTES = 8 << 20
LONGEST_LINE_BYTES = 64 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Block(NamedTuple):
    """Lines of one file.

    Attributes:
        text: UTF-8 text of whole lines, none of them empty, each with its line break.
        numbers: (N,) int64 number of each line in the file, from 1.
    """

    text: bytes
    numbers: np.ndarray

    def without(self, rows: set[int]) -> Block:
        """The block but for the lines at these places."""
        kept = [(line, number) for row, (line, number) in enumerate(zip(self.lines(), self.numbers, strict=True)) if row not in rows]
        return Block(b"".join(line for line, _ in kept), np.array([number for _, number in kept], dtype=np.int64))

    def lines(self) -> list[bytes]:
        """The lines, each with its line break."""
        return [line + b"\n" for line in self.text.split(b"\n")[:-1]]


def read_blocks(path: Path, bad_rows: BadRows, *, header: bool = False) -> Generator[Block, None, None]:
    """The lines of a file, in blocks of about `BLOCK_BYTES`. Empty lines are passed over; lines that are no UTF-8 text go to `bad_rows`.

    Args:
        path: The file.
        bad_rows: Takes the lines that are no text.
        header: Whether the first line names columns, so that nothing can be read without it.

    Raises:
        ValueError: The file is empty, cannot be decompressed or is no text.
    """
    first = 1
    for text in _read_whole_lines(path):
        breaks = np.flatnonzero(np.frombuffer(text, dtype=np.uint8) == ord("\n"))
        block = Block(text, np.arange(first, first + len(breaks)))
        first_block, first = first == 1, first + len(block.numbers)
        empty = {row for row, line in enumerate(block.lines()) if not line.strip(b"\r\n")} if _may_have_empty_lines(text, breaks) else set()
        block = block.without(empty) if empty else block
        if header and first_block and _fault(block.text[: block.text.find(b"\n")]):
            raise ValueError(f"{path}: the first line is no UTF-8 text. Is this a text file, and does its name tell its compression?")
        yield _decodable(block, path, bad_rows)
    if first == 1:
        raise ValueError(f"{path}: the file is empty.")


def _read_whole_lines(path: Path) -> Iterator[bytes]:
    """The bytes of a file, cut after line breaks; the last line gets one if it has none."""
    rest, is_first = b"", True
    with _open(path) as file:
        while piece := _read(file, path):
            if is_first:
                piece, is_first = piece.removeprefix(BYTE_ORDER_MARK), False
            lines, line_break, tail = piece.rpartition(b"\n")
            if line_break:
                yield rest + lines + line_break
                rest = tail
            else:
                rest += tail
            if len(rest) > LONGEST_LINE_BYTES:
                raise ValueError(f"{path}: no line break within {LONGEST_LINE_BYTES >> 20} MiB. Is this a text file?")
    if rest:
        yield rest + b"\n"


def _open(path: Path) -> BinaryIO:
    compression = compression_of(path)
    if compression == "gzip":
        return cast(BinaryIO, gzip.open(path))
    if compression == "zstd":
        return cast(BinaryIO, pa.input_stream(path, compression="zstd"))
    return path.open("rb")


def _read(file: BinaryIO, path: Path) -> bytes:
    try:
        return file.read(BLOCK_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read to its end, truncated or damaged ({error}).") from None


def _may_have_empty_lines(text: bytes, breaks: np.ndarray) -> bool:
    if b"\r" in text and (text.startswith(b"\r") or b"\n\r" in text):
        return True
    return bool((np.diff(breaks, prepend=-1) == 1).any())


def _decodable(block: Block, path: Path, bad_rows: BadRows) -> Block:
    """The block without the lines that are no text."""
    if _fault(block.text) is None:
        return block
    faults = {row: fault for row, line in enumerate(block.lines()) if (fault := _fault(line)) is not None}
    for row, fault in faults.items():
        bad_rows.add(path, int(block.numbers[row]), "no UTF-8 text", fault)
    return block.without(set(faults))


def _fault(text: bytes) -> str | None:
    """Why bytes are no text; None if they are."""
    if (place := text.find(b"\0")) >= 0:
        return f"byte 0x00 at place {place + 1} of the line is no text"
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return f"byte 0x{text[error.start]:02x} at place {error.start + 1} of the line is no UTF-8 text"
    return None
