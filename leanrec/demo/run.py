"""`leanrec demo`: the whole pipeline on a synthetic log."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from leanrec import runs
from leanrec.data.prepare import prepare
from leanrec.demo.clicks import draw_clicks
from leanrec.demo.picture import Point, draw, require_matplotlib
from leanrec.evaluate import Comparison, Evaluation, evaluate_run
from leanrec.methods import METHODS
from leanrec.ops.metrics import auc
from leanrec.train import TrainSettings, train_run
from leanrec.tune import compress_run

CLICKS_FILE, NUMBERS_FILE, PICTURE_FILE = "clicks.csv", "demo.json", "quality_over_bytes.png"
METHOD, RATIO = "VRQ()", 50
KNOBS = {"Scalar": (8, 4, 2), "PQ": (4, 2, 1), "RQ": (3, 2, 1), "MEC": (4, 2, 1), "VRQ": (4000, 1000)}
"""Method -> values of its knob in the picture."""

MODEL: Mapping[str, Any] = {"embedding_dim": 32, "hidden_units": [64, 32], "embedding_std": 0.01}
TRAINING = TrainSettings(epochs=2, batch_size=2048, table_learning_rate=5e-3, l2=3e-3, evaluations_per_epoch=4, patience=2)
TUNING = TrainSettings(epochs=1, batch_size=2048, learning_rate=1e-4, evaluations_per_epoch=4, patience=2)
SIZES = ("tables", "tables_full", "model", "model_full", "vocabulary")

Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoSettings:
    """Size of the demo's log, and the seed of everything."""

    num_rows: int = 1_000_000
    num_users: int = 200_000
    num_items: int = 150_000
    seed: int = 0


@dataclass(frozen=True)
class Demo:
    """What the demo found.

    Attributes:
        folder: Where everything lies.
        rows: Split -> rows of the log.
        num_ids: Distinct raw values of all columns.
        truth_auc: AUC of the probabilities that the clicks were drawn with: no model can do better.
        embedding_dim: D of the tables.
        size: Bytes of `tables` and `model`, each also before (`tables_full`, `model_full`), and of the `vocabulary` on disk.
        full: Quality of the full model on the test rows.
        compressed: Quality of the compressed and fine-tuned one.
        comparison: Compressed minus full on the same rows, with intervals.
        tuning_helped: Whether fine-tuning raised the validation AUC; otherwise the compressed model is as it was before.
        points: The compressed models of the picture.
        seconds: Run -> wall-clock seconds that it took.
    """

    folder: Path
    rows: dict[str, int]
    num_ids: int
    truth_auc: float
    embedding_dim: int
    size: dict[str, int]
    full: Evaluation
    compressed: Evaluation
    comparison: Comparison
    tuning_helped: bool
    points: tuple[Point, ...]
    seconds: dict[str, float]

    @property
    def ratio(self) -> float:
        """Bytes of all tables before / after."""
        return self.size["tables_full"] / self.size["tables"]

    def __str__(self) -> str:
        size, difference = self.size, self.comparison.auc
        head = ("", "full model", f"VRQ, {self.ratio:.1f}x smaller")
        lines = [
            ("embedding tables, bytes", f"{size['tables_full']:,}", f"{size['tables']:,}"),
            ("whole model, bytes", f"{size['model_full']:,}", f"{size['model']:,}"),
            ("id vocabulary on disk, bytes", f"{size['vocabulary']:,}", "the same"),
            ("embedding dimension", str(self.embedding_dim), str(self.embedding_dim)),
            ("test AUC", f"{self.full.auc:.4f}", f"{self.compressed.auc:.4f}"),
            ("test log loss", f"{self.full.logloss:.4f}", f"{self.compressed.logloss:.4f}"),
            ("AUC difference", "", f"{difference.difference:+.4f}"),
            ("95% interval", "", f"{difference.low:+.4f} to {difference.high:+.4f}"),
        ]
        widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
        table = "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in (head, *lines))
        about = (
            f"{sum(self.rows.values()):,} clicks and views, {self.num_ids:,} distinct ids; measured on {self.full.rows:,} test rows. "
            f"A model that knew the truth would have an AUC of {self.truth_auc:.4f}."
        )
        tuning = "" if self.tuning_helped else "\nFine-tuning did not raise the validation AUC: the model before it was kept.\n"
        return f"{about}\n\n{table}\n{tuning}\npicture: {self.folder / PICTURE_FILE}\nnumbers: {self.folder / NUMBERS_FILE}"


def demo(out: Path, *, seed: int = 0, progress: Say | None = None) -> Demo:
    """A synthetic click log prepared, a model trained on it, its tables compressed 50 times, and what that cost in quality.

    A killed demo goes on where it was, and what is finished is not repeated.

    Args:
        out: Folder to write: `clicks.csv`, the prepared log `data`, the runs in `runs`, `quality_over_bytes.png` and `demo.json`.
        seed: Source of everything that is drawn.
        progress: Called with a line of text when a stage begins.

    Raises:
        ValueError: `out` holds something else, or matplotlib is not installed.
    """
    return run_demo(out, DemoSettings(seed=seed), progress=progress)


def run_demo(out: Path, settings: DemoSettings, *, progress: Say | None = None) -> Demo:
    """The demo on a log of another size; for the rest see `demo`."""
    require_matplotlib()
    say, folder = progress or _silent, out.resolve()  # runs remember the paths of what they read
    _claim(folder, settings)
    log = _write_log(folder / CLICKS_FILE, settings, say)
    say("prepare: raw values become ids")
    prepared = prepare(folder / CLICKS_FILE, folder / "data", kinds={"click": "label"}, seed=settings.seed)
    base, small = folder / "runs" / "base", folder / "runs" / "small"
    say(f"train: DeepFM, embedding_dim={MODEL['embedding_dim']}")
    train_run(prepared.folder, base, model="deepfm", model_settings=MODEL, settings=replace(TRAINING, seed=settings.seed))
    say(f"compress: {METHOD} at {RATIO}x, then fine-tuning")
    compress_run(base, small, method=METHOD, ratio=RATIO, tuning=replace(TUNING, seed=settings.seed), seed=settings.seed)
    points = [*_untuned_points(folder / "runs", settings, say), _point("VRQ", small, tuned=True)]
    say("evaluate: both on the test rows")
    full, _ = evaluate_run(base)
    compressed, comparison = evaluate_run(small, against=base, seed=settings.seed)
    assert comparison is not None
    record = runs.load(small)
    size, valid = {name: record["report"][name] for name in SIZES}, record["valid"]
    helped = valid["auc"] > valid["auc_untuned"]
    result = Demo(out, prepared.rows, *log, MODEL["embedding_dim"], size, full, compressed, comparison, helped, tuple(points), _seconds(folder))
    draw(points, folder / PICTURE_FILE, full_auc=full.auc, full_tables=size["tables_full"])
    _write_numbers(folder / NUMBERS_FILE, settings, result)
    return result


def _claim(folder: Path, settings: DemoSettings) -> None:
    """Make the folder this demo's own, or find that it is.

    Raises:
        ValueError: It holds something else.
    """
    numbers = folder / NUMBERS_FILE
    if not numbers.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder}: exists and is not a folder of `leanrec demo` (no {NUMBERS_FILE}). Choose another --out.")
        folder.mkdir(parents=True, exist_ok=True)
        runs.write_atomically(numbers, json.dumps({"settings": asdict(settings)}, indent=1) + "\n")
    there = _settings_in(numbers)
    if there != asdict(settings):
        raise ValueError(f"{folder}: holds a demo with the settings {there}, not {asdict(settings)}. Choose another --out or delete it.")


def _settings_in(path: Path) -> Any:
    try:
        return json.loads(path.read_text())["settings"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: not a file that `leanrec demo` wrote. Choose another --out or delete it.") from None


def _write_log(path: Path, settings: DemoSettings, say: Say) -> tuple[int, float]:
    """Number of distinct ids in the log and AUC of its true probabilities; the log is drawn anew each time, and written once."""
    say(f"draw: a log of {settings.num_rows:,} rows")
    clicks = draw_clicks(settings.num_rows, num_users=settings.num_users, num_items=settings.num_items, seed=settings.seed)
    if not path.exists():
        temporary = path.with_name(path.name + ".tmp")
        clicks.rows.write_csv(temporary)
        runs.replace(temporary, path)
    num_ids = sum(clicks.rows[name].n_unique() for name in clicks.rows.columns if name != "click")
    return num_ids, auc(torch.tensor(clicks.rows["click"].to_numpy()), torch.tensor(clicks.probabilities))


def _untuned_points(folder: Path, settings: DemoSettings, say: Say) -> list[Point]:
    """The base model compressed by each method to each of its sizes, nothing trained afterwards."""
    points = []
    for name, values in KNOBS.items():
        say(f"picture: {name}, {len(values)} sizes, no fine-tuning")
        for value in values:
            method, run = METHODS[name]().with_knob(value), folder / f"untuned-{name.lower()}-{value}"
            compress_run(folder / "base", run, method=repr(method), tuning=None, seed=settings.seed)
            points.append(_point(name, run, tuned=False))
    return points


def _point(method: str, run: Path, *, tuned: bool) -> Point:
    evaluation, _ = evaluate_run(run)
    size = runs.load(run)["report"]
    return Point(method, size["tables"], size["ratio"], evaluation.auc, tuned)


def _seconds(folder: Path) -> dict[str, float]:
    """Wall-clock seconds of each run when it was done, by its path in the demo's folder."""
    records = sorted(folder.glob(f"**/{runs.RUN_FILE}"))
    return {str(path.parent.relative_to(folder)): json.loads(path.read_text())["seconds"] for path in records}


def _write_numbers(path: Path, settings: DemoSettings, result: Demo) -> None:
    numbers = {"settings": asdict(settings)} | {name: value for name, value in asdict(result).items() if name != "folder"}
    numbers |= {"ratio": result.ratio, "machine": runs.machine(), "versions": runs.versions(), "commit": runs.commit()}
    runs.write_atomically(path, json.dumps(numbers, indent=1) + "\n")


def _silent(line: str) -> None:
    """Progress that nobody asked for."""
