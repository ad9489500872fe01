"""Training a DeepFM: leanrec against FuxiCTR and torch-rechub, samples per second of a whole epoch, loader included.

    python benchmarks/speed/train.py --work work/train --fuxictr-python fuxictr/bin/python

Two logs: `globo` (found in LEANREC_DATA or ../shared/data) and the Criteo-like one. All three read the same ids, prepared by leanrec, from disk, have
the same model, batch size, embedding dimension and optimizer (Adam) and one thread, and take turns, each in processes of its own; the first epoch
warms up and the second counts. The ratio is that of samples per second of the processor, which other work on the machine hardly changes; the clock's
are kept beside it. FuxiCTR's DeepFM has a free weight per id as its linear term and torch-rechub's has a projection of the vectors and
batch norm: leanrec runs once in each form.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl
from criteo_like import write_log
from processes import Measured, measure
from record import write

from leanrec.data.prepare import prepare
from leanrec.data.schema import Schema
from leanrec.data.shards import ROW_GROUP_ROWS

HERE = Path(__file__).parent
CRITEO_ROWS = 1_000_000
EMBEDDING_DIM, HIDDEN_UNITS, BATCH_SIZE = 16, [256, 128], 4096
FORMS = {"fuxictr": {"linear": "table"}, "rechub": {"linear": "projection", "batch_norm": True}}
NAMES = {"fuxictr": "FuxiCTR", "rechub": "torch-rechub"}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=400_000, help="training rows of an epoch, of a log with all its ids")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--logs", nargs="*", default=["globo", "criteo"])
    parser.add_argument("--fuxictr-python", type=Path, help="Python of an environment that holds FuxiCTR")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        job = json.loads(options.run)
        print(json.dumps({"leanrec": train_leanrec, "rechub": train_rechub}[job.pop("tool")](**job)))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    for log in options.logs:
        compare(log, options.work, options.rows, options.turns, options.fuxictr_python)


def compare(log: str, work: Path, rows: int, turns: int, fuxictr_python: Path | None) -> None:
    """Measure and keep the results of one log."""
    folder = _prepared(log, work, rows)
    sizes = {field.name: field.num_embeddings for field in Schema.load(folder / "schema.json").fields}
    model = {"folder": str(folder), "embedding_dim": EMBEDDING_DIM, "hidden_units": HIDDEN_UNITS, "batch_size": BATCH_SIZE}

    def own(**job: Any) -> Measured:
        return measure([sys.executable, str(HERE / "train.py"), "--work", str(work), "--run", json.dumps({**job, **model})], timeout=3600)

    def fuxictr() -> Measured:
        job = json.dumps({"job": "train", **model, "folder": str(folder / "plain"), "sizes": sizes})
        return measure([str(fuxictr_python), str(HERE / "with_fuxictr.py"), job], environment={"PYTHONPATH": ""}, timeout=3600)

    jobs = {"rechub": lambda: own(tool="rechub", sizes=sizes)} | ({"fuxictr": fuxictr} if fuxictr_python is not None else {})
    runs: dict[str, list[tuple[Measured, dict[str, Any]]]] = {}
    for _ in range(turns):
        for rival, job in jobs.items():
            for name, each in ((rival, job), (f"leanrec as {rival}", lambda rival=rival: own(tool="leanrec", form=FORMS[rival]))):
                measured = each()
                result = json.loads(measured.output.strip().splitlines()[-1])
                runs.setdefault(name, []).append((measured, result))
                print(log, name, result, measured.peak_memory, flush=True)
    for rival in jobs:
        _write(log, rival, runs, {"rows": rows, "table_rows": sum(sizes.values()), "fields": len(sizes), "turns": turns})


def _write(log: str, rival: str, runs: dict[str, list[tuple[Measured, dict[str, Any]]]], size: dict[str, int]) -> None:
    rates, peaks = {}, {}
    for name, key in (("leanrec", f"leanrec as {rival}"), (NAMES[rival], rival)):
        for unit in ("samples_per_processor_second", "samples_per_second"):
            rates[f"{name} {unit}"] = statistics.median(result[unit] for _, result in runs[key])
        peaks[f"{name} peak GB"] = statistics.median(measured.peak_memory for measured, _ in runs[key]) / 1e9
    setting = {**size, "batch_size": BATCH_SIZE, "embedding_dim": EMBEDDING_DIM, "hidden_units": HIDDEN_UNITS, "optimizer": "Adam", "threads": 1}
    ours, theirs = (rates[f"{name} samples_per_processor_second"] for name in ("leanrec", NAMES[rival]))
    write(
        f"train_{rival}_{log}",
        ratio=ours / theirs,
        bar=2.0,
        against=f"{NAMES[rival]}, a DeepFM on {log}",
        medians=rates | peaks,
        setting={**setting, "model": FORMS[rival], "versions_of_the_other": runs[rival][-1][1].get("versions")},
    )


def train_leanrec(folder: str, form: dict[str, Any], embedding_dim: int, hidden_units: list[int], batch_size: int) -> dict[str, Any]:
    """Samples per second of the second epoch of `leanrec.train`, validation left out."""
    import torch

    from leanrec.data.loader import Loader
    from leanrec.recommender import build
    from leanrec.train import Progress, TrainSettings, train

    class SecondEpochDone(Exception):
        """Nothing is left to measure."""

    torch.set_num_threads(1)
    recommender = build(Path(folder), "deepfm", {"embedding_dim": embedding_dim, "hidden_units": hidden_units, **form}, seed=0)
    loader = Loader(Path(folder), "train", recommender.schema, batch_size=batch_size, seed=0)
    validation = Loader(Path(folder), "valid", recommender.schema, batch_size=16_384)
    steps = loader.num_batches(epoch=1)
    times: dict[int, tuple[float, float]] = {}

    def look(progress: Progress) -> None:
        # After the last step of the first epoch, its validation done, and before that of the second is due.
        times[progress.step] = time.perf_counter(), time.process_time()
        if progress.step == loader.num_batches(epoch=0) + steps - 1:
            raise SecondEpochDone

    with suppress(SecondEpochDone):
        train(recommender.model, loader, validation, TrainSettings(epochs=2, batch_size=batch_size, learning_rate=1e-3), on_step=look)
    (start, start_used), (end, end_used) = (times[loader.num_batches(epoch=0) + step] for step in (0, steps - 1))
    rows = (steps - 1) * batch_size
    return {"samples_per_second": rows / (end - start), "samples_per_processor_second": rows / (end_used - start_used)}


def train_rechub(folder: str, sizes: dict[str, int], embedding_dim: int, hidden_units: list[int], batch_size: int) -> dict[str, Any]:
    """Samples per second of the second epoch of torch-rechub's own trainer on its own loader."""
    from importlib import metadata

    import torch
    from torch.utils.data import DataLoader
    from torch_rechub.basic.features import SparseFeature
    from torch_rechub.models.ranking import DeepFM
    from torch_rechub.trainers import CTRTrainer
    from torch_rechub.utils.data import TorchDataset
    from with_fuxictr import epochs

    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = pl.read_parquet(Path(folder) / "train" / "*.parquet")
    labels = rows["label"].to_numpy()
    features = [SparseFeature(name, vocab_size=size, embed_dim=embedding_dim) for name, size in sizes.items()]
    columns = {name: rows[name].to_numpy() for name in sizes}
    loader = DataLoader(TorchDataset(columns, labels), batch_size=batch_size, shuffle=True)  # as its DataGenerator makes it
    model = DeepFM(features, features, mlp_params={"dims": hidden_units, "dropout": 0.0, "activation": "relu"})
    trainer = CTRTrainer(model, optimizer_params={"lr": 1e-3})
    return {**epochs(lambda: trainer.train_one_epoch(loader), len(labels)), "versions": {"torch-rechub": metadata.version("torch-rechub")}}


def _prepared(log: str, work: Path, rows: int) -> Path:
    """A prepared log with all its ids but only its first `rows` training rows, and for FuxiCTR the same rows as one Parquet file in `plain`."""
    out, whole = work / f"{log}-{rows}", work / log
    if out.exists():
        return out
    if log == "criteo":
        write_log(work / "criteo.tsv", rows=CRITEO_ROWS)
        prepare(work / "criteo.tsv", whole, format="criteo")
    else:
        prepare([Path(os.environ.get("LEANREC_DATA", HERE.parents[2] / "shared" / "data")) / log], whole)
    for split, count in (("train", rows), ("valid", rows // 8)):
        (out / split).mkdir(parents=True)
        pl.scan_parquet(whole / split / "*.parquet").head(count).sink_parquet(out / split / "part-00000.parquet", row_group_size=ROW_GROUP_ROWS)
    (out / "plain").mkdir()
    shutil.copy(out / "train" / "part-00000.parquet", out / "plain" / "train.parquet")
    shutil.copy(whole / "schema.json", out)
    return out


if __name__ == "__main__":
    main()
