"""One measured run of a command with all processes that it starts."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# One thread for every library, whoever brings it. Ray would run its workers at the lowest priority, which a busy machine makes them pay for.
ONE_THREAD = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS", "NUMEXPR_NUM_THREADS"), "1"),
    "RAY_worker_niceness": "0",
}
TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Measured:
    """What a command took.

    Attributes:
        seconds: Of the clock.
        cpu_seconds: Of the processor, of all its processes, as far as they lived to be seen (two looks per second).
        peak_memory: Bytes: the largest resident memory (VmHWM) of a process, summed over the processes that ran at the same time.
        output: What it printed.
    """

    seconds: float
    cpu_seconds: float
    peak_memory: int
    output: str


def measure(command: Sequence[str], *, environment: Mapping[str, str] | None = None, timeout: float = 900.0) -> Measured:
    """Run a command to its end.

    Raises:
        RuntimeError: It failed; the message is the end of what it printed.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=errors, env={**os.environ, **ONE_THREAD, **(environment or {})})
        watch = _Watch(process.pid)
        code = process.wait(timeout)
        seconds = time.perf_counter() - start
        watch.end()
        output.seek(0)
        errors.seek(0)
        if code:
            raise RuntimeError(f"{' '.join(command)[:200]}: exit code {code}: {errors.read()[-2000:]}")
        return Measured(seconds, watch.cpu_seconds, watch.peak_memory, output.read())


def processor_seconds(root: int) -> float:
    """Seconds of the processor that a process and all that it started have had, those that ended left out."""
    return sum(_processor_seconds(process) for process in _with_descendants(root))


class _Watch:
    """Looks at a process and its descendants until told to end."""

    def __init__(self, root: int) -> None:
        self.root, self.peak_memory = root, 0
        self._cpu: dict[int, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self._thread.start()

    @property
    def cpu_seconds(self) -> float:
        return sum(self._cpu.values())

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def _look_on(self) -> None:
        while not self._over.wait(0.5):
            memory = 0
            for process in _with_descendants(self.root):
                with suppress(OSError, StopIteration, IndexError):
                    number = int(process.name)
                    self._cpu[number] = max(self._cpu.get(number, 0.0), _processor_seconds(process))
                    status = (process / "status").read_text().splitlines()
                    memory += next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
            self.peak_memory = max(self.peak_memory, memory)


def _processor_seconds(process: Path) -> float:
    with suppress(OSError, IndexError):
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK
    return 0.0


def _with_descendants(root: int) -> list[Path]:
    """The folders under /proc of a process and of all that it started."""
    parents = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    members = {root}
    while new := {child for child, parent in parents.items() if parent in members} - members:
        members |= new
    return [Path("/proc") / str(member) for member in members]
