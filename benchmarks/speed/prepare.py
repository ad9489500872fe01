"""`leanrec prepare` against FuxiCTR's preprocessing and a plain polars script, and its memory on a log of 5 GB.

    python benchmarks/speed/prepare.py --work work/prepare --fuxictr-python fuxictr/bin/python

makes the log (`criteo_like.py`), prepares its first half and all of it, and lets all three prepare a part of it in turns, each in processes of its
own. Their ratio is that of rows per second of the processor, which other work on the machine hardly changes; the clock's are kept beside it. With
`--only large` or `--only compare`, half of that. FuxiCTR needs an environment of its own, see `with_fuxictr.py`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from itertools import islice
from pathlib import Path

import record
from criteo_like import DISTINCT, NUMBERS, write_log
from processes import Measured, measure

HERE = Path(__file__).parent
NUMBER_NAMES = [f"I{place + 1}" for place in range(NUMBERS)]
TEXT_NAMES = [f"C{place + 1}" for place in range(len(DISTINCT))]
MEMORY_LIMIT = 4e9
NOTES = {
    "fuxictr": "what is left of leanrec's time is parsing text, Parquet and group-bys, which both leave to compiled engines; FuxiCTR holds the log "
    "in memory, which bounds the rows that can be compared",
    "polars": "the script checks no rows",
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for logs and what is made of them: four times the log")
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--compare-rows", type=int, default=1_000_000, help="rows that all three prepare")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--fuxictr-python", type=Path, help="Python of an environment that holds FuxiCTR")
    parser.add_argument("--only", choices=("large", "compare"))
    parser.add_argument("--machine", help="end of the results' names, to keep those of another machine beside the usual ones")
    options = parser.parse_args()
    record.suffix = f"_{options.machine}" if options.machine else ""
    options.work.mkdir(parents=True, exist_ok=True)
    if options.only != "compare":
        large(options.work, options.rows)
    if options.only != "large":
        compare(options.work, options.compare_rows, options.turns, options.fuxictr_python)


def large(work: Path, rows: int) -> None:
    """Memory of half the log and of all of it."""
    runs = {}
    for size in (rows // 2, rows):
        log = _log(work, size)
        runs[size] = measured = _leanrec(log, work / "prepared")
        columns = json.loads((work / "prepared" / "run.json").read_text())["columns"]
        values = sum(column["num_embeddings"] or 0 for column in columns)
        setting = {"rows": size, "log_bytes": log.stat().st_size, "distinct_values": values, "min_count": 1, "polars_threads": 1}
        print(size, measured.seconds, measured.cpu_seconds, measured.peak_memory, values, flush=True)
        (work / f"large-{size}.json").write_text(json.dumps({**setting, "peak": measured.peak_memory, "seconds": measured.seconds}))
        if size != rows:
            log.unlink()
        shutil.rmtree(work / "prepared")
    half, full = runs[rows // 2], runs[rows]
    gigabytes = {"peak GB": full.peak_memory / 1e9, "rows per second": rows / full.seconds, "rows per processor second": rows / full.cpu_seconds}
    record.write("prepare_memory", ratio=MEMORY_LIMIT / full.peak_memory, bar=1.0, against="4 GB of memory", medians=gigabytes, setting=setting)
    halves = {"half GB": half.peak_memory / 1e9, "whole GB": full.peak_memory / 1e9}
    record.write(
        "prepare_doubling",
        ratio=half.peak_memory / full.peak_memory,
        bar=None,
        against="its own peak memory on half the rows",
        medians=halves,
        setting={**setting, "distinct_values_half": json.loads((work / f"large-{rows // 2}.json").read_text())["distinct_values"]},
        note="the vocabularies are what grows: twice the rows hold more distinct values",
    )


def compare(work: Path, rows: int, turns: int, fuxictr_python: Path | None) -> None:
    """Rows per second of leanrec, FuxiCTR and polars on the same rows, in turns."""
    log = _log(work, rows)
    jobs = {"leanrec": lambda: _leanrec(log, work / "prepared"), "polars": lambda: _polars(log, work / "polars")}
    if fuxictr_python is not None:
        _write_splits(log, work / "fuxictr", rows)
        jobs["fuxictr"] = lambda: _fuxictr(fuxictr_python, work / "fuxictr")
    runs: dict[str, list[Measured]] = {name: [] for name in jobs}
    for _ in range(turns):
        for name, job in jobs.items():
            runs[name].append(job())
            print(name, runs[name][-1].seconds, runs[name][-1].cpu_seconds, runs[name][-1].peak_memory, flush=True)
    for name in jobs.keys() - {"leanrec"}:
        medians = {}
        for who in ("leanrec", name):
            medians[f"{who} rows per processor second"] = rows / statistics.median(run.cpu_seconds for run in runs[who])
            medians[f"{who} rows per second"] = rows / statistics.median(run.seconds for run in runs[who])
            medians[f"{who} peak GB"] = statistics.median(run.peak_memory for run in runs[who]) / 1e9
        setting = {"rows": rows, "log_bytes": log.stat().st_size, "min_count": 1, "polars_threads": 1, "turns": turns}
        if name == "fuxictr":
            setting["fuxictr_versions"] = json.loads(runs[name][-1].output.strip().splitlines()[-1])["versions"]
        record.write(
            f"prepare_{name}",
            ratio=medians["leanrec rows per processor second"] / medians[f"{name} rows per processor second"],
            bar=10.0 if name == "fuxictr" else None,
            against={"fuxictr": "FuxiCTR's build_dataset", "polars": "a plain polars script"}[name],
            medians=medians,
            setting=setting,
            note=NOTES[name],
        )


def _log(work: Path, rows: int) -> Path:
    path = work / f"criteo-{rows}.tsv"
    if not path.exists():
        write_log(path, rows=rows)
    return path


def _leanrec(log: Path, out: Path) -> Measured:
    shutil.rmtree(out, ignore_errors=True)
    return measure([sys.executable, "-m", "leanrec", "prepare", str(log), "--format", "criteo", "--out", str(out)], timeout=3600)


def _polars(log: Path, out: Path) -> Measured:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    return measure([sys.executable, str(HERE / "plain_polars.py"), str(log), str(out)], timeout=3600)


def _fuxictr(python: Path, folder: Path) -> Measured:
    """Its files are there already, divided and with a header: it divides no log itself."""
    shutil.rmtree(folder / "prepared", ignore_errors=True)
    job = {"job": "prepare", "folder": str(folder), "numbers": NUMBER_NAMES, "texts": TEXT_NAMES, "block_rows": 0, "separator": "\t"}
    return measure([str(python), str(HERE / "with_fuxictr.py"), json.dumps(job)], environment={"PYTHONPATH": ""}, timeout=3600)


def _write_splits(log: Path, folder: Path, rows: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with log.open("rb") as lines:
        for split, share in (("train", 0.8), ("valid", 0.1), ("test", 0.1)):
            with (folder / f"{split}.csv").open("wb") as file:
                file.write("\t".join(["label", *NUMBER_NAMES, *TEXT_NAMES]).encode() + b"\n")
                file.writelines(islice(lines, round(rows * share)))


if __name__ == "__main__":
    main()
