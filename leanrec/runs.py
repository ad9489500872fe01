"""Run folders: every command writes one folder that holds a `run.json`, appears at once and whole, and is never half there."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

RUN_FILE, SETTINGS_FILE = "run.json", "settings.json"


@dataclass
class Run:
    """A run in progress.

    Attributes:
        folder: Where to write; it becomes the folder that the user named when the run ends well.
        resumed: Whether `folder` holds what an interrupted run with the same settings left.
        results: What to keep in `run.json` beside settings, versions, seconds and peak memory. JSON values.
    """

    folder: Path
    resumed: bool
    results: dict[str, Any] = field(default_factory=dict)


def is_finished(out: Path, *, command: str, settings: Mapping[str, Any]) -> bool:
    """Whether `out` already holds this very run.

    Raises:
        ValueError: `out` holds something else, which nothing overwrites.
    """
    if not out.exists():
        return False
    if not (out / RUN_FILE).is_file():
        raise ValueError(f"{out}: exists and is not a run folder (no {RUN_FILE}). Choose another --out.")
    record = load(out)
    given = _plain(settings)
    if record["command"] == command and record["settings"] == given:
        return True
    if record["command"] != command:
        raise ValueError(f"{out}: holds the result of `leanrec {record['command']}`. Choose another --out or delete it.")
    raise ValueError(f"{out}: holds a run with other settings ({_differences(record['settings'], given)}). Choose another --out or delete it.")


@contextmanager
def create(out: Path, *, command: str, settings: Mapping[str, Any], resumable: bool = False) -> Iterator[Run]:
    """A run that writes into `OUT.partial` and becomes `OUT`, with its `run.json`, only when the block ends well.

    An exception or a kill leaves `OUT.partial`. A resumable run goes on from there; one that is not resumable starts afresh. A ValueError
    before anything was written leaves nothing: the user asked for what cannot be.

    Args:
        out: The folder that the user asked for; it must not exist (see `is_finished`).
        command: Name of the verb.
        settings: Everything that decides the result, literals and paths; written to `run.json`.
        resumable: Whether what an interrupted run left is kept for this one.

    Raises:
        ValueError: `OUT.partial` is not what a run left, or what a resumable run with other settings left.
    """
    partial = out.with_name(out.name + ".partial")
    saved = partial / SETTINGS_FILE
    text = json.dumps({"command": command, "settings": _plain(settings)}, indent=1, sort_keys=True)
    resumed = resumable and saved.is_file() and saved.read_text() == text
    if not resumed:
        if partial.exists():
            _check_disposable(partial, command, settings, resumable=resumable)
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        write_atomically(saved, text)
    run, start = Run(partial, resumed), time.perf_counter()
    commit()  # now: files may change while the run goes on
    try:
        yield run
    except ValueError:
        if list(partial.iterdir()) == [saved]:
            shutil.rmtree(partial)
        raise
    record = {
        "command": command,
        "settings": _plain(settings),
        **run.results,
        "seconds": round(time.perf_counter() - start, 3),
        "peak_memory": peak_memory(),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
    }
    write_atomically(partial / RUN_FILE, json.dumps(record, indent=1) + "\n")
    saved.unlink()
    os.rename(partial, out)


def load(folder: Path) -> dict[str, Any]:
    """The record of a finished run.

    Raises:
        ValueError: `folder` is not one.
    """
    try:
        record = json.loads((folder / RUN_FILE).read_text())
    except FileNotFoundError:
        unfinished = folder.with_name(folder.name + ".partial").exists()
        hint = "the run was interrupted; give the same command again" if unfinished else "give a folder that a leanrec command wrote"
        raise ValueError(f"{folder}: no finished run here ({RUN_FILE} not found); {hint}.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / RUN_FILE}: not JSON ({error}).") from None
    if not (isinstance(record, dict) and isinstance(record.get("command"), str) and isinstance(record.get("settings"), dict)):
        raise ValueError(
            f"{folder / RUN_FILE}: not the record of a run, which has a command and its settings. Give the command again with another --out."
        )
    return record


def identity(folder: Path) -> str:
    """The same text for the same finished run, and another one when it was made anew.

    Raises:
        ValueError: `folder` is not one.
    """
    return hashlib.sha256(json.dumps(load(folder), sort_keys=True).encode()).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees either the old content or all of the new."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    replace(temporary, path)


def replace(temporary: Path, path: Path) -> None:
    """Put a finished temporary file in the place of `path`, after its bytes are on the disk."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def fingerprint(paths: Sequence[Path]) -> str:
    """SHA-256 over names, sizes and contents of files: the same input gives the same text."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def reset_peak_memory() -> None:
    """Let `peak_memory` count from now on, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Largest resident memory of this process so far, or since `reset_peak_memory`, in bytes."""
    with suppress(OSError):
        # getrusage would start a child process at its parent's peak.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def machine() -> str:
    """Processor, cores and system in words."""
    return f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def versions() -> dict[str, str]:
    """Versions of Python and of what decides a result."""
    packages = {name: metadata.version(name) for name in ("leanrec", "torch", "numpy", "polars", "pyarrow", "safetensors")}
    return {"python": platform.python_version(), **packages}


@cache
def commit() -> str | None:
    """The git commit that leanrec runs from, as it was when the process first asked, with "-dirty" where files differ; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _check_disposable(partial: Path, command: str, settings: Mapping[str, Any], *, resumable: bool) -> None:
    """Raise ValueError unless a run that starts afresh may take the place of what is there."""
    names = {path.name for path in partial.iterdir()}
    if names <= {SETTINGS_FILE, SETTINGS_FILE + ".tmp"}:
        return
    try:
        left = json.loads((partial / (SETTINGS_FILE if SETTINGS_FILE in names else RUN_FILE)).read_text())
        left_command, left_settings = left["command"], dict(left["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{partial}: is in the way, and not what an interrupted run left. Move it, or choose another --out.") from None
    if left_command != command:
        raise ValueError(f"{partial}: holds an interrupted `leanrec {left_command}`. Delete it, or choose another --out.")
    if resumable and (differences := _differences(left_settings, _plain(settings))):
        raise ValueError(
            f"{partial}: holds an interrupted run with other settings ({differences}). Go on with those, delete it, or choose another --out."
        )


def _differences(there: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> str:
    parts = []
    for key in sorted(key for key in now.keys() | there.keys() if now.get(key) != there.get(key)):
        old, new = there.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            parts.append(_differences(old, new, f"{within}{key}."))
        else:
            parts.append(f"{within}{key}: {old!r} there, {new!r} now")
    return ", ".join(parts)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back, so that a fresh command compares equal to a stored one."""
    return json.loads(json.dumps(dict(settings), default=str))


def _processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
