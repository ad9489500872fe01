"""Results -> `README.md` and pictures. Nothing in them is typed by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from leanrec.bench.experiment import DENSE, FULL, PLAIN, RESTARTED, SMALLER, TUNED
from leanrec.bench.run import opponent, read_suites
from leanrec.methods import parse
from leanrec.ops.intervals import combine_seeds
from leanrec.tune import METHOD, TEACHER_SHARE

Result = Mapping[str, Any]

SHOWN_DROP = 0.03  # of AUC, in pictures
SAME_AUC = 5e-5  # to four digits
NORMAL_QUANTILE = 1.959964  # of 95% intervals over rows

MOST_AUC, MOST_AUC_LOW, MOST_LOG_LOSS = 0.0005, 0.001, 0.005  # that may be lost where nothing is said to be

HEADER = """# Benchmarks

Made by `leanrec bench --table` from the files under `results/`, one per run, which hold settings, seeds, versions and machine; a test
fails when this page is not what they say. To repeat a suite: `leanrec bench benchmarks/experiments/SUITE/*.toml`.

- **AUC difference**: to the uncompressed model of the same seed on the same test rows; mean over seeds, with the 95% interval over seeds
  and rows (DeLong within a seed, between-seed variance on top). ‡ where that model was trained anew, on another machine, and is not quite the
  one of the table.
- **tables**: bytes of all embedding tables as stored, codes, code books and scales counted; **ratio**: float32 bytes of the tables of the
  full model / that. **model**: the same with all other parameters. A ratio at the end of a method's name is the one asked for.
- **train, fit, tune**: seconds on one core of a shared machine, so compare them with one another only roughly. **hours**: of one core, for
  trainings (one that several results start from counts once), fits, tunings and predictions. **look-ups**: ids that the
  tables answer per second in batches of 4,096 rows, and relative to the full tables in the same process; † where torch read the codes, without
  the look-up kernel and several times slower ([docs/performance.md](../docs/performance.md)). Settings are chosen on validation
  data; the test split is read once per run. **teacher's share**: of what the full model predicts in the labels of the fine-tuning; clicks have
  the rest. **plain**: bytes of the smallest plain tables (full, of smaller dimension, in few bits, rare rows
  dropped) of the same log, backbone and seed, in any suite, whose AUC is as high: what the method has to beat. none: no plain model is as good.
"""


def write_readme(folder: Path) -> Path:
    """Write `folder/README.md` from the results below `folder/results`."""
    path = folder / "README.md"
    path.write_text(readme(folder))
    return path


def readme(folder: Path) -> str:
    """What `README.md` has to say."""
    parts, suites = [HEADER], read_suites(folder / "results")
    known = [result for results in suites.values() for result in results]
    parts += _summary(suites)
    for suite, results in suites.items():
        parts += [
            f"## {suite}\n\n{core_hours(results):.1f} hours of one core.\n",
            *(_experiment(group, folder, suite, known) for group in grouped(results, _experiment_key)),
        ]
    return "\n".join(parts)


def write_plots(folder: Path) -> list[Path]:
    """Write one picture per experiment and backbone that compares methods: AUC over bytes of the tables, one line per method.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    groups = [(suite, group) for suite, results in read_suites(folder / "results").items() for group in grouped(results, _experiment_key)]
    compared = [(suite, group) for suite, group in groups if len({result["run"]["family"] for result in group}) > 2]
    return [_plot(group, folder / _picture(suite, group)) for suite, group in compared]


def _summary(suites: Mapping[str, Sequence[Result]]) -> list[str]:
    """The default method at every size at which two others and more are compared with it."""
    rows = []
    for suite, results in suites.items():
        for group in grouped(results, _experiment_key):
            full = {result["run"]["seed"]: result for result in group if result["run"]["family"] == FULL}
            sized = [result for result in group if result["run"]["ratio"] and result["run"]["seed"] in full and not _scratch(result)]
            sized = [result for result in sized if result["run"]["family"] != RESTARTED]
            for cell in grouped(sized, lambda result: result["run"]["ratio"]):
                methods = {parse(members[0]["run"]["method"]).short(): members for members in grouped(cell, _method_key)}
                others = {name: members for name, members in methods.items() if members[0]["run"]["family"] != type(parse(METHOD)).__name__}
                if METHOD in methods and len({members[0]["run"]["family"] for members in others.values()}) > 1:
                    rows.append(_summary_row(suite, methods[METHOD], others, full, _tuned(group)))
    columns = ["suite", "log", "backbone", "dimension", "ratio", "seeds", "AUC difference [95%]", "log loss", "nothing lost"]
    columns += ["best other method", "better", "full, tuned"]
    about = f"""The default method, `{METHOD}`, at every size at which two and more others that compress the same models are compared with it.
**log loss**: relative to the full models. **nothing lost**: an AUC difference of {-MOST_AUC} or better, the end of its interval
above {-MOST_AUC_LOW}, and a log loss not higher by more than {MOST_LOG_LOSS:.1%}. **better**: other methods whose AUC is higher beyond the
interval of the difference. **full, tuned**: the AUC difference of the full model, after the same fine-tuning, to itself before it: what of a
gain is not the compression's.
"""
    return ["## At a glance\n", about, f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", *rows, ""] if rows else []


def _tuned(results: Sequence[Result]) -> list[Result]:
    """Full models that were fine-tuned like the compressed ones."""
    return [result for result in results if result["run"]["family"] == TUNED]


def _summary_row(
    suite: str, ours: Sequence[Result], others: Mapping[str, Sequence[Result]], full: Mapping[int, Result], tuned: Sequence[Result]
) -> str:
    run, (value, low, _) = ours[0]["run"], _interval(ours)
    log_loss = mean(ours, "quality", "logloss") / mean([full[result["run"]["seed"]] for result in ours], "quality", "logloss") - 1
    is_kept = value >= -MOST_AUC and low > -MOST_AUC_LOW and log_loss <= MOST_LOG_LOSS
    name, best = max(others.items(), key=lambda other: _interval(other[1])[0])
    better = [f"`{name}`" for name, members in others.items() if _is_better(members, ours)]
    cells = [
        suite,
        run["experiment"],
        run["backbone"],
        str(run["embedding_dim"]),
        f"{mean(ours, 'size', 'tables_full') / mean(ours, 'size', 'tables'):.1f}",
        str(len(ours)),
        difference(ours),
        f"{log_loss:+.1%}{_other(ours, list(full.values()))}",
        "yes" if is_kept else "no",
        f"`{name}` {difference(best)}",
        ", ".join(better) or "none",
        difference(tuned) if tuned else "",
    ]
    return "| " + " | ".join(cells) + " |"


def _experiment(results: Sequence[Result], folder: Path, suite: str, known: Sequence[Result]) -> str:
    """A heading and a table, the full model first, then by family and falling size; opponents are looked for among the `known`."""
    run, seeds = results[0]["run"], sorted({result["run"]["seed"] for result in results})
    full = [result for result in results if result["run"]["family"] == FULL]
    title = f"### {run['experiment']}: {run['backbone']} on {run['dataset']}\n"
    about = (
        f"Embedding dimension {full[0]['run']['embedding_dim']}; tables {full[0]['size']['tables_full']:,} bytes, vocabulary "
        f"{full[0]['size']['vocabulary']:,} bytes on disk; {len(seeds)} seed{'s' * (len(seeds) > 1)}; {_teacher(results)}"
        f"{' or '.join(sorted({result['machine'] for result in results}))}, {core_hours(results):.1f} hours of one core.\n"
    )
    columns = [
        "method",
        "AUC",
        "AUC difference [95%]",
        "log loss",
        "tables (bytes)",
        "ratio",
        "model (bytes)",
        "train (s)",
        "fit (s)",
        "tune (s)",
        "look-ups",
        "plain (bytes)",
    ]
    head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
    groups = sorted(grouped(results, _method_key), key=lambda group: (_order(group[0]), -mean(group, "size", "tables")))
    picture = _picture(suite, results)
    image = f"\n![AUC over bytes]({picture})\n" if (folder / picture).exists() else ""
    return "\n".join([title, about, head, *(_row(group, known, full, num_seeds=len(seeds)) for group in groups), image])


def _teacher(results: Sequence[Result]) -> str:
    """What the full model has to say in the fine-tunings; nothing where there are none, as in new models, which learn from clicks alone."""
    tunings = [result["settings"]["tuning"] for result in results if result.get("tuning") and result["run"]["family"] != RESTARTED]
    shares = sorted({TEACHER_SHARE if tuning is True else tuning.get("teacher_share", TEACHER_SHARE) for tuning in tunings})
    return f"teacher's share {' or '.join(f'{share:g}' for share in shares)}; " if shares else ""


def _row(results: Sequence[Result], known: Sequence[Result], full: Sequence[Result], *, num_seeds: int) -> str:
    """One method at one size, over its seeds; where runs are missing, it says how many there are."""
    run, size = results[0]["run"], mean(results, "size", "tables")
    name = (
        parse(run["method"]).short()
        if run["family"] != SMALLER
        else f"{parse(run['method']).short().replace('Full()', 'Full')} of dimension {run['embedding_dim']}"
    )
    name += (f" at {run['ratio']:g}x" if run["ratio"] is not None else "") + (" from scratch" if _scratch(results[0]) else "")
    name += f", linear layers at {run['dense_ratio']:g}x" if run.get("dense_ratio") else ""
    name += {TUNED: ", fine-tuned", RESTARTED: " in a new model"}.get(run["family"], "")
    aucs = [result["quality"]["auc"] for result in results]
    spread = f" ± {stdev(aucs):.4f}" if len(aucs) > 1 else ""
    cells = [
        f"`{name}`" + (f", {len(results)} of {num_seeds} seeds" if len(results) < num_seeds else ""),
        f"{fmean(aucs):.4f}{spread}",
        "" if run["family"] == FULL else difference(results) + _other(results, full),
        f"{mean(results, 'quality', 'logloss'):.4f}",
        f"{size:,.0f}",
        f"{mean(results, 'size', 'tables_full') / size:.1f}",
        f"{mean(results, 'size', 'model'):,.0f}",
        f"{mean(results, 'seconds', 'pretrain'):.1f}",
        f"{mean(results, 'seconds', 'fit'):.1f}",
        f"{mean(results, 'seconds', 'tune'):.1f}",
        _speed(results),
        _opponent(results, known),
    ]
    return "| " + " | ".join(cells) + " |"


def _other(results: Sequence[Result], full: Sequence[Result]) -> str:
    """A mark, where the full models that results are compared with are not those of their table but, trained elsewhere, end at other weights."""
    aucs = {result["run"]["seed"]: result["quality"]["auc"] for result in full}
    compared = {result["run"]["seed"]: result["quality"]["auc"] - result["quality"]["auc_diff"] for result in results}
    return "‡" if any(abs(auc - aucs.get(seed, auc)) > SAME_AUC for seed, auc in compared.items()) else ""


def _opponent(results: Sequence[Result], known: Sequence[Result]) -> str:
    """Mean bytes of the smallest plain tables that are as good; of a plain model itself, nothing."""
    if results[0]["run"]["family"] in (*PLAIN, TUNED) or results[0]["run"].get("dense_ratio"):
        return ""
    sizes = [opponent(result, known) for result in results]
    found = [size for size in sizes if size is not None]
    return f"{fmean(found):,.0f}" + (f" in {len(found)} of {len(sizes)}" if len(found) < len(sizes) else "") if found else "none"


def _speed(results: Sequence[Result]) -> str:
    """Look-ups per second of the compressed tables, and relative to the full ones in the same process."""
    if any("speed" not in result for result in results):
        return ""
    return f"{mean(results, 'speed', 'lookups_per_second') / 1e6:.1f} M/s, {relative_speed(results)}"


def relative_speed(results: Sequence[Result]) -> str:
    """Look-ups per second relative to the full tables in the same process, and whether the kernel was missing."""
    speed, full = (mean(results, "speed", key) for key in ("lookups_per_second", "lookups_per_second_full"))
    without = any(not result["speed"].get("kernel") for result in results)  # results older than the kernel do not say
    return f"{speed / full:.2f}x" + ("†" if without and parse(results[0]["run"]["method"]).build(64, 32).coded() is not None else "")


def difference(results: Sequence[Result]) -> str:
    """Mean AUC difference over seeds and its interval, as text."""
    return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*_interval(results))


def _interval(results: Sequence[Result]) -> tuple[float, float, float]:
    """Mean AUC difference over seeds and the ends of its interval; of a single seed, the interval over its rows."""
    return _combined([result["quality"]["auc_diff"] for result in results], [_error(result) for result in results])


def _is_better(results: Sequence[Result], ours: Sequence[Result]) -> bool:
    """Whether the AUC of a method is above that of another one, on the seeds of both, beyond the interval of the difference.

    Their differences to the full model are taken for independent. They have that model in common, so this usually errs on the wide side.
    """
    pairs = [(a, b) for a in results for b in ours if a["run"]["seed"] == b["run"]["seed"]]
    differences = [a["quality"]["auc_diff"] - b["quality"]["auc_diff"] for a, b in pairs]
    return bool(pairs) and _combined(differences, [math.hypot(_error(a), _error(b)) for a, b in pairs])[1] > 0


def _error(result: Result) -> float:
    """Standard error of the AUC difference, over rows."""
    return (result["quality"]["auc_diff_high"] - result["quality"]["auc_diff_low"]) / 2 / NORMAL_QUANTILE


def _combined(differences: Sequence[float], errors: Sequence[float]) -> tuple[float, float, float]:
    """Mean of one difference per seed and the ends of its interval; of a single seed, the interval over its rows."""
    if len(differences) == 1:
        return differences[0], differences[0] - NORMAL_QUANTILE * errors[0], differences[0] + NORMAL_QUANTILE * errors[0]
    interval = combine_seeds(differences, errors)
    return interval.value, interval.low, interval.high


def core_hours(results: Sequence[Result]) -> float:
    """Hours of one core that results tell of: trainings, each counted once, fits, tunings and predictions."""
    trained = {}
    seconds = 0.0
    for result in results:
        run, spent = result["run"], result["seconds"]
        own = (run["experiment"], run["method"], run["ratio"]) if _scratch(result) else None
        # A model that several start from was trained for the same seconds in all of them.
        trained[run["dataset"], run["backbone"], run["embedding_dim"], run["seed"], spent["pretrain"], own] = spent["pretrain"]
        seconds += spent["fit"] + spent["tune"] + spent["evaluate"]
    return (seconds + sum(trained.values())) / 3600


def _plot(results: Sequence[Result], path: Path) -> Path:
    """AUC over bytes of the tables (log scale): that of the full model plus the mean difference to it, with the interval of the difference.

    What loses more than `SHOWN_DROP`, and the wide intervals of two seeds, end at the picture's edge: they would press all else into a line.
    """
    from matplotlib.colors import TABLEAU_COLORS
    from matplotlib.figure import Figure
    from matplotlib.rcsetup import cycler

    whole = [result for result in results if result["run"]["family"] == FULL]
    full = mean(whole, "quality", "auc")
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(cycler(marker=["o", "s", "^"]) * cycler(color=list(TABLEAU_COLORS)))
    axes.axhline(full, color="black", linestyle="--", linewidth=1, label=f"full model, {mean(whole, 'size', 'tables'):,.0f} bytes")
    if tuned := _tuned(results):
        axes.axhline(full + _interval(tuned)[0], color="black", linestyle=":", linewidth=1, label="full model, fine-tuned")
    for (_, family, scratch), members in groupby(sorted(results, key=_order), key=_order):
        if family in (FULL, TUNED, DENSE):
            continue
        groups = sorted(grouped(list(members), _method_key), key=lambda group: mean(group, "size", "tables"))
        values, lows, highs = np.array([_interval(group) for group in groups]).T
        label = {SMALLER: "smaller dimension", RESTARTED: "in a new model"}.get(family, family) + (" from scratch" if scratch else "")
        axes.errorbar(
            [mean(group, "size", "tables") for group in groups],
            full + values,
            yerr=[values - lows, highs - values],
            linestyle="none" if family == SMALLER else "-",  # several dimensions, with and without fewer bits, are no line
            linewidth=1,
            elinewidth=0.7,
            markersize=4,
            capsize=2,
            label=label,
        )
    low, high = axes.get_ylim()
    best = max(full, *(full + _interval(group)[0] for group in grouped(results, _method_key)))
    axes.set_ylim(max(low, full - SHOWN_DROP), min(high, best + SHOWN_DROP / 3))
    run = results[0]["run"]
    axes.set(xscale="log", xlabel="bytes of all embedding tables, as stored", ylabel="test AUC")
    axes.set_title(f"{run['backbone']} on {run['dataset']}, 95% intervals of the difference to the full model", fontsize="medium")
    figure.legend(fontsize="small", loc="outside right upper")
    figure.set_figheight(max(5.0, 0.22 * len(axes.get_legend_handles_labels()[1])))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _picture(suite: str, results: Sequence[Result]) -> str:
    run = results[0]["run"]
    return f"pictures/{suite}-{run['experiment']}-{run['backbone']}.png"


def grouped(results: Iterable[Result], key: Any) -> list[list[Result]]:
    """Results that share a key, keys in order."""
    return [list(group) for _, group in groupby(sorted(results, key=key), key=key)]


def _experiment_key(result: Result) -> tuple[str, str]:
    return result["run"]["experiment"], result["run"]["backbone"]


def _method_key(result: Result) -> tuple[str, bool, bool, float, float, int]:
    return (
        parse(result["run"]["method"]).short(),  # two texts of one method, with and without an argument that came later, are one
        result["run"]["family"] in (TUNED, RESTARTED),
        _scratch(result),
        result["run"]["ratio"] or 0.0,
        result["run"].get("dense_ratio") or 0.0,
        result["run"]["embedding_dim"],
    )


def _scratch(result: Result) -> bool:
    """Whether the tables were compressed from the first step of training on."""
    return bool(result["run"].get("from_scratch", False))


def _order(result: Result) -> tuple[bool, str, bool]:
    """The full model first, as it is and fine-tuned, then families by name, those trained from scratch last."""
    return result["run"]["family"] not in (FULL, TUNED), result["run"]["family"], _scratch(result)


def mean(results: Sequence[Result], part: str, key: str) -> float:
    """Mean over results of one of their numbers."""
    return fmean(result[part][key] for result in results)
