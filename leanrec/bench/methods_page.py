"""Methods and results -> `METHODS.md`: what each one is, needs and reached. Nothing in it is typed by hand."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from leanrec.bench.run import read_suites
from leanrec.bench.table import Result, difference, grouped, mean, relative_speed
from leanrec.methods import METHODS, Method, Table, parse

SUITE = "field"
RATIO = 50

HEADER = f"""# Methods, what they need and what they reach

Made by `leanrec bench --table` from the methods' own files and from `results/{SUITE}`; how each method works stands in
[docs/methods.md](../docs/methods.md).

- **takes**: *counts*, the occurrences of each id in the training split; *log*, rows of the training log themselves, before the first step;
  *gradients*, steps of training in which it learns what it stores.
- **ways**: *fit* compresses a trained table, *scratch* trains small tables from the first step on. A way that is missing says why.
- **look-up**: ids per second, relative to the uncompressed tables in the same process, in batches of 4,096 rows of the log on one core;
  † where torch read the codes, without the look-up kernel and several times slower.
- **AUC difference**: to the tuned full model at {RATIO} times smaller tables, mean over seeds with the 95% interval; the better way, named.
"""


def write_methods_page(folder: Path) -> Path:
    """Write `folder/METHODS.md` from the results below `folder/results`."""
    path = folder / "METHODS.md"
    path.write_text(methods_page(folder))
    return path


def methods_page(folder: Path) -> str:
    """What `METHODS.md` has to say."""
    suites = read_suites(folder / "results")
    results = [result for result in suites.get(SUITE, []) if result["run"]["ratio"] == RATIO]
    # A method that was never measured has no place on a page of measurements.
    measured = {result["run"]["family"] for suite in suites.values() for result in suite}
    logs = sorted({result["run"]["dataset"] for result in results})
    columns = ["method", "source", "knob", "takes", "ways", "look-up", *(f"AUC difference on {log}" for log in logs)]
    lines = [HEADER, f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, kind in ((name, METHODS[name]) for name in METHODS if name in measured):
        own = [result for result in results if result["run"]["family"] == name and parse(result["run"]["method"]) == kind()]
        cells = [f"`{name}`", _source(kind), f"`{kind.knob}`", _takes(kind()), _ways(kind), _speed(own), *(_reached(own, log) for log in logs)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _source(kind: type[Method]) -> str:
    """The first line of the method's file, its arXiv numbers and DOIs as links."""
    text = " ".join((inspect.getdoc(inspect.getmodule(kind)) or "").split("\n\n")[0].split())
    text = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    return re.sub(r"doi:(\S+\w)", r"[doi:\1](https://doi.org/\1)", text)


def _takes(method: Method) -> str:
    """What a fit or a training is given beside the rows: tried, not declared."""
    table = method.build(64, 8)
    found = []
    if "fit" not in method.gaps:
        weight = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        alike, weighted = (method.build(64, 8).fit(weight, counts).state_dict() for counts in (None, torch.arange(64, 0, -1) ** 3))
        found += ["counts"] if any(not torch.equal(alike[name], weighted[name]) for name in alike) else []
    found += ["log"] if type(table).observe is not Table.observe else []
    found += ["gradients"] if type(table).begin is not Table.begin else []
    return ", ".join(found) or "-"


def _ways(kind: type[Method]) -> str:
    ways = [way for way in ("fit", "scratch") if way not in kind.gaps]
    return "; ".join([", ".join(ways), *(f"no {way}: {reason}" for way, reason in kind.gaps.items())])


def _speed(results: Sequence[Result]) -> str:
    return relative_speed(results) if results else ""


def _reached(results: Sequence[Result], log: str) -> str:
    ways = grouped([result for result in results if result["run"]["dataset"] == log], lambda result: result["run"]["from_scratch"])
    if not ways:
        return ""
    best = max(ways, key=lambda group: mean(group, "quality", "auc_diff"))
    return f"{difference(best)} {'scratch' if best[0]['run']['from_scratch'] else 'fit'}"
