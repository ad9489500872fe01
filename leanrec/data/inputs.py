"""Paths, folders and patterns as the user writes them -> the files of each split."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path

from leanrec.data.settings import Format
from leanrec.runs import RUN_FILE, SETTINGS_FILE

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
SPLIT_NAMES = {"train": ("train",), "valid": ("valid", "val", "validation", "dev"), "test": ("test",)}


def find_splits(inputs: Sequence[str | Path]) -> dict[str, list[Path]]:
    """Split -> its files, where `inputs` is one folder that holds `train` with `valid` or `test` (files of any format, or folders); else nothing.

    The validation split may have any of its `SPLIT_NAMES`.

    Raises:
        ValueError: The folder holds the validation split under two names, or one file twice.
    """
    if len(inputs) != 1 or not Path(inputs[0]).is_dir():
        return {}
    entries = sorted(path for path in Path(inputs[0]).iterdir() if not _is_run(path))
    found = {split: [path for path in entries if _stem(path) in names] for split, names in SPLIT_NAMES.items()}
    if not found["train"] or not (found["valid"] or found["test"]):
        return {}
    names = sorted({_stem(path) for path in found["valid"]})
    if len(names) > 1:
        raise ValueError(f"{inputs[0]}: {' and '.join(map(repr, names))} each name the validation split. Keep one, or name the files with --valid.")
    splits = {split: find_files(paths) for split, paths in found.items() if paths}
    refuse_repeats([file for files in splits.values() for file in files])
    return splits


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """The files that `inputs` stand for, those of folders and patterns in the order of their names.

    A folder stands for no file of a run within it: what `prepare` wrote into the folder of a log is no part of the log.

    Raises:
        ValueError: A file is not there or named twice, a pattern matches nothing or a folder holds no data.
    """
    if not inputs:
        raise ValueError("No input: name at least one file, folder or pattern.")
    files = [file for one in inputs for file in _find(str(one))]
    refuse_repeats(files)
    return files


def refuse_repeats(files: Sequence[Path]) -> None:
    """Refuse a file that is named twice, whose rows would be read twice.

    Raises:
        ValueError: There is one.
    """
    first: dict[Path, Path] = {}
    for file in files:
        earlier = first.setdefault(file.resolve(), file)
        if earlier is not file:
            also = "" if earlier == file else f", also as {earlier}"
            raise ValueError(f"{file}: named twice{also}, so its rows would be read twice. Name each file once, in one split.")


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
        return _find_below(path)
    if path.is_file():
        return [path]
    if glob.has_magic(text):
        files = sorted(Path(match) for match in glob.glob(text, recursive=True) if Path(match).is_file())
        if not files:
            raise ValueError(f"{text}: no file matches this pattern.")
        return files
    raise ValueError(f"{path}: no such file or folder.")


def _find_below(root: Path) -> list[Path]:
    """The data files of a folder, without those of the runs within it."""
    files = [file for file in root.rglob("*") if file.is_file()]
    runs = {file.parent for file in files if file.name in (RUN_FILE, SETTINGS_FILE) and file.parent != root and _is_record(file)}
    data = [file for file in files if not file.name.startswith((".", "_")) and _data_suffix(file) in FORMATS and runs.isdisjoint(file.parents)]
    if not data:
        others = f", but in folders that leanrec wrote such as {min(runs)}," if runs else ""
        raise ValueError(f"{root}: no file in this folder{others} ends in one of {sorted(FORMATS)}. Name the files, or a pattern such as '{root}/*'.")
    return sorted(data)


def _is_run(folder: Path) -> bool:
    """Whether a command of leanrec wrote the folder, or began to."""
    return any(_is_record(folder / name) for name in (RUN_FILE, SETTINGS_FILE))


def _is_record(path: Path) -> bool:
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and {"command", "settings"} <= record.keys()


def _stem(path: Path) -> str:
    return path.name.split(".")[0]


def _data_suffix(path: Path) -> str:
    """The suffix that tells the format: `.csv` of `clicks.csv.gz`."""
    name = Path(path.stem) if compression_of(path) else path
    return name.suffix.lower()
