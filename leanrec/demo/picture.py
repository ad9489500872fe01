"""The demo's picture: quality over bytes, a line per method."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STYLES = {"Scalar": ("#4c72b0", "s"), "PQ": ("#dd8452", "^"), "RQ": ("#55a868", "D"), "MEC": ("#8172b3", "v"), "VRQ": ("#c44e52", "o")}


@dataclass(frozen=True)
class Point:
    """A compressed model in the picture.

    Attributes:
        method: Name of the method.
        tables: Bytes of all tables.
        ratio: Bytes of all tables before / after.
        auc: On the test rows.
        tuned: Whether what was left of the model was trained on after the tables were compressed.
    """

    method: str
    tables: int
    ratio: float
    auc: float
    tuned: bool = False


def require_matplotlib() -> None:
    """Refuse to begin work that could not be drawn.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("The demo draws its picture with matplotlib, which is not installed. Give pip install 'leanrec[plot]' first.")


def draw(points: Sequence[Point], path: Path, *, full_auc: float, full_tables: int) -> None:
    """Write a PNG of test AUC over bytes of the tables, the full model as a dashed line, tuned models as stars."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(full_auc, color="black", linestyle="--", linewidth=1.2, label=f"full model, {in_bytes(full_tables)}")
    for method in dict.fromkeys(point.method for point in points):
        color, marker = STYLES[method]
        line = sorted((point.tables, point.auc) for point in points if point.method == method and not point.tuned)
        axes.plot(*zip(*line, strict=True), color=color, marker=marker, markersize=6, linewidth=1.6, label=method)
    for point in points:
        if point.tuned:
            star = f"{point.method} after fine-tuning, {point.ratio:.0f}x smaller"
            axes.plot(
                point.tables, point.auc, color=STYLES[point.method][0], marker="*", markersize=16, markeredgecolor="black", linestyle="", label=star
            )
    axes.set(xscale="log", xlabel="bytes of all embedding tables, as stored (log scale)", ylabel="test AUC")
    axes.set_title("Quality over size: lines without fine-tuning, the star after it", fontsize="medium")
    ticks = [full_tables / ratio for ratio in (4, 8, 16, 32, 64, 128)]
    axes.set_xticks(ticks, [f"{in_bytes(tick)}\n{full_tables / tick:.0f}x" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=130)


def in_bytes(nbytes: float) -> str:
    """Bytes for the eye: "512 kB", "27.1 MB"."""
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.0f} kB"
