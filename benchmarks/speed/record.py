"""What all speed benchmarks share: fair timing, and one committed JSON per measurement.

`python benchmarks/speed/record.py` writes the table of all of them into docs/performance.md.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from leanrec import runs

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def median_seconds(jobs: Mapping[str, Callable[[], Any]], *, repeats: int, warm_ups: int = 1) -> dict[str, float]:
    """Median seconds of each job. They take turns, so that a busy moment of the machine falls on all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(warm_ups + repeats):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if turn >= warm_ups:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


suffix = ""  # of the names of all results


def write(
    name: str, *, ratio: float, bar: float | None, against: str, medians: Mapping[str, float], setting: Mapping[str, Any], note: str = ""
) -> None:
    """Keep one measurement as benchmarks/speed/results/NAME.json.

    Args:
        name: Of the file, what was measured.
        ratio: Ours against the other, larger being better for us.
        bar: What the ratio should be at least; None where nothing was promised.
        against: What we are compared with, in words.
        medians: The raw medians behind the ratio, each with its unit in its name.
        setting: All that it takes to repeat the measurement: sizes, seeds, threads.
        note: Why a bar is missed, or what limits the figure.
    """
    name += suffix
    result = {
        "name": name,
        "ratio": ratio,
        "bar": bar,
        "against": against,
        "medians": dict(medians),
        "setting": dict(setting),
        "note": note,
        "machine": runs.machine(),
        "load": os.getloadavg()[0],
        "versions": runs.versions(),
        "commit": runs.commit(),
    }
    RESULTS.mkdir(exist_ok=True)
    runs.write_atomically(RESULTS / f"{name}.json", json.dumps(result, indent=1) + "\n")
    print(f"{name}: {ratio:.2f}x, bar {bar}, {result['medians']}", flush=True)


def page(text: str) -> str:
    """The text of docs/performance.md with the table of all results between its marks."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    rows = ["| measured | against | ratio | bar | medians | note |", "|---|---|---|---|---|---|"]
    for result in results:
        medians = ", ".join(f"{name} {value:.4g}" for name, value in result["medians"].items())
        bar = "" if result["bar"] is None else f"{result['bar']:g}"
        met = "" if result["bar"] is None or result["ratio"] >= result["bar"] else " (missed)"
        rows.append(f"| `{result['name']}` | {result['against']} | {result['ratio']:.2f} | {bar}{met} | {medians} | {result['note']} |")
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + "\n".join(rows) + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
