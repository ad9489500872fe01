"""Paths, folders and patterns as the user writes them -> the files of each split."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from leanrec.data.settings import SPLITS, Format

FORMATS: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".libsvm": "libsvm",
    ".libfm": "libsvm",
    ".svm": "libsvm",
    ".fm": "libsvm",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def find_splits(inputs: Sequence[str | Path]) -> dict[str, list[Path]]:
    """Split -> its files, where `inputs` is one folder that holds `train` with `valid` or `test` (files of any format, or folders); else nothing."""
    if len(inputs) != 1 or not Path(inputs[0]).is_dir():
        return {}
    entries = sorted(Path(inputs[0]).iterdir())
    found = {split: [path for path in entries if path.name.split(".")[0] == split] for split in SPLITS}
    splits = {split: find_files(paths) for split, paths in found.items() if paths}
    return splits if "train" in splits and len(splits) > 1 else {}


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """The files that `inputs` stand for, those of folders and patterns in the order of their names.

    Raises:
        ValueError: A file is not there, a pattern matches nothing or a folder holds no data.
    """
    if not inputs:
        raise ValueError("No input: name at least one file, folder or pattern.")
    return [file for one in inputs for file in _find(str(one))]


def format_of(path: Path) -> Format:
    """The format that a file's name tells.

    Raises:
        ValueError: It tells none.
    """
    suffix = _data_suffix(path)
    if suffix not in FORMATS:
        raise ValueError(f"{path}: the name does not tell the format. Give --format, or end the name in one of {sorted(FORMATS)}.")
    return FORMATS[suffix]


def compression_of(path: Path) -> str | None:
    """The compression of a text file, by the end of its name."""
    return COMPRESSIONS.get(path.suffix.lower())


def _find(text: str) -> list[Path]:
    path = Path(text)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith((".", "_")) and _data_suffix(file) in FORMATS)
        if not files:
            raise ValueError(f"{path}: no file in this folder ends in one of {sorted(FORMATS)}. Name the files, or a pattern such as '{path}/*'.")
        return files
    if path.is_file():
        return [path]
    if glob.has_magic(text):
        files = sorted(Path(match) for match in glob.glob(text, recursive=True) if Path(match).is_file())
        if not files:
            raise ValueError(f"{text}: no file matches this pattern.")
        return files
    raise ValueError(f"{path}: no such file or folder.")


def _data_suffix(path: Path) -> str:
    """The suffix that tells the format: `.csv` of `clicks.csv.gz`."""
    name = Path(path.stem) if compression_of(path) else path
    return name.suffix.lower()
