"""The commands: each parses, calls one public function and prints."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leanrec.cli.display import display, print_table, show_training
from leanrec.cli.values import is_table, methods_from, settings_from, shape_from

if TYPE_CHECKING:
    from leanrec.methods.base import Method
    from leanrec.search import Trial

# torch, polars and everything that needs them are imported inside the commands: help and mistakes are answered at once.

app = typer.Typer(rich_markup_mode=None, add_completion=False, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})

Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Folder to write. It appears, whole, when the work is done.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `leanrec train` or `leanrec compress` wrote.")]
Seed = Annotated[
    int, typer.Option(metavar="NUMBER", min=0, max=2**63 - 1, help="Source of all that is drawn at random: the same seed gives the same result.")
]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="Threads to compute with.  [default: all cores]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _examples(*commands: str) -> str:
    """The end of a help page."""
    return "\n".join(["\b", "Examples:", *(f"  {command}" for command in commands)])


@app.callback(
    invoke_without_command=True,
    epilog=_examples(
        "leanrec demo",
        "leanrec prepare clicks.csv --out data/clicks",
        "leanrec train data/clicks --model deepfm --out runs/base",
        "leanrec compress runs/base --ratio 50 --out runs/small",
        "leanrec evaluate runs/small --against runs/base",
    ),
)
def leanrec(context: typer.Context, show_version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    """Make the embedding tables of a recommender many times smaller, and see what it costs.

    Every command reads folders and writes one folder with a run.json. A finished run is not repeated, and an interrupted one goes on when
    the same command is given again. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted with Ctrl-C.
    """
    if show_version:
        typer.echo(f"leanrec {version('leanrec')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(
    epilog=_examples(
        "leanrec prepare day_0.gz --format criteo --out data/criteo",
        "leanrec prepare 'clicks/*.csv' --kind clicked=label --kind 'tags=multivalued:|' --out data/clicks",
        "leanrec prepare logs.parquet --split 0.8,0.1,0.1 --split-by timestamp --min-count 5 --out data/logs",
        "leanrec prepare train.csv --valid valid.csv --test test.csv --config clicks.toml --out data/clicks",
    )
)
def prepare(
    inputs: Annotated[list[str], typer.Argument(metavar="FILES", help="Files, folders or patterns; or one folder with train, valid and test.")],
    out: Out,
    valid: Annotated[list[str] | None, typer.Option(metavar="FILES", help="Files of the validation split. May be given several times.")] = None,
    test: Annotated[list[str] | None, typer.Option(metavar="FILES", help="Files of the test split. May be given several times.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="TOML file of options; those on the command line win over it.")] = None,
    format: Annotated[
        str | None, typer.Option(metavar="NAME", help="csv, tsv, parquet, libsvm, criteo or avazu.  [default: as the names of the files tell]")
    ] = None,
    delimiter: Annotated[str | None, typer.Option(metavar="CHARACTER", help="What separates the columns of text.")] = None,
    header: Annotated[
        bool | None, typer.Option("--header/--no-header", help="Whether the first line of text names the columns.  [default: as the format has it]")
    ] = None,
    columns: Annotated[str | None, typer.Option(metavar="A,B,C", help="Names of the columns of text without a header.")] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN=KIND",
            help="What a column (or C*, a pattern) is: categorical, numeric, multivalued, sequence, label, timestamp or ignore; multivalued:| for "
            "elements separated by |; sequence:,@item for values of the column item. May be given several times.  [default: inferred]",
        ),
    ] = None,
    min_count: Annotated[
        list[str] | None,
        typer.Option(metavar="NUMBER", help="Rarer values become unknown: a number, or COLUMN=NUMBER. May be given several times.  [default: 1]"),
    ] = None,
    max_length: Annotated[int | None, typer.Option(metavar="NUMBER", help="Elements of a list that are kept.  [default: 50]")] = None,
    numeric: Annotated[
        str | None, typer.Option(metavar="NAME", help="standardize or log-bucket.  [default: standardize; log-bucket for criteo]")
    ] = None,
    split: Annotated[str | None, typer.Option(metavar="SHARES", help="Shares of training, validation and test.  [default: 0.8,0.1,0.1]")] = None,
    split_by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Split by this time, the newest rows into the test.  [default: at random]")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="NUMBER", min=0, max=2**63 - 1, help="Decides the random split.  [default: 0]")] = None,
    on_bad_row: Annotated[str | None, typer.Option(metavar="NAME", help="error, or skip to leave out and count.  [default: error]")] = None,
) -> None:
    """Turn a raw click log into ids, counts and Parquet."""
    from leanrec.data.prepare import prepare

    with display() as shown:
        prepared = prepare(
            inputs,
            out,
            valid=valid,
            test=test,
            config=config,
            format=format,
            delimiter=delimiter,
            header=header,
            columns=columns,
            kinds=kind,
            min_count=min_count,
            max_length=max_length,
            numeric=numeric,
            split=split,
            split_by=split_by,
            seed=seed,
            on_bad_row=on_bad_row,
            progress=shown.work,
        )
    header_names = ("column", "kind", "why", "vocabulary", "num_embeddings")
    print_table(header_names, [tuple(column[name] for name in header_names) for column in prepared.columns])
    typer.echo(f"\nrows: {', '.join(f'{split} {rows:,}' for split, rows in prepared.rows.items())}")
    typer.echo(f"vocabularies: {prepared.vocabulary_nbytes:,} bytes on disk")
    for reason, rows in prepared.skipped.items():
        typer.echo(f"skipped: {rows:,} rows, {reason}")
    for example in prepared.skipped_first:
        typer.echo(f"  {example}")
    typer.echo(f"written: {prepared.folder}")


@app.command(
    epilog=_examples(
        "leanrec train data/criteo --model deepfm --out runs/base",
        "leanrec train data/criteo --model dcnv2 --set embedding_dim=16 --set 'hidden_units=[400,400,400]' --out runs/dcnv2",
        "leanrec train data/criteo --model my_package.my_module:build --out runs/mine",
        "leanrec train data/criteo --model dcnv2 --tables runs/fm --out runs/dcnv2-from-fm",
        "leanrec train data/criteo --method 'Hash()' --ratio 50 --out runs/hashed",
    )
)
def train(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder that `leanrec prepare` wrote.")],
    out: Out,
    model: Annotated[
        str, typer.Option(metavar="NAME", help="lr, fm, deepfm, dcnv2, ipnn, gdcnp, fibinet, din; or package.module:function for your own.")
    ] = "deepfm",
    set: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of the model. May be given several times.")] = None,
    tables: Annotated[Path | None, typer.Option(metavar="RUN", help="Run whose embedding tables the model starts from.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD", help="Compression of the tables from the first step on; METHOD and GLOB=METHOD as in `leanrec compress`."),
    ] = None,
    ratio: Annotated[float | None, typer.Option(metavar="NUMBER", help="With --method: how many times smaller all tables together are.")] = None,
    nbytes: Annotated[int | None, typer.Option(metavar="NUMBER", help="With --method: bytes of all tables together, at most.")] = None,
    epochs: Annotated[int, typer.Option(metavar="NUMBER", help="Most passes over the training rows.")] = 20,
    batch_size: Annotated[int, typer.Option(metavar="NUMBER", help="Rows in a batch.")] = 4096,
    learning_rate: Annotated[float, typer.Option(metavar="NUMBER", help="Of all that is not an embedding table.")] = 1e-3,
    table_learning_rate: Annotated[float | None, typer.Option(metavar="NUMBER", help="Of the embedding tables.  [default: that of the rest]")] = None,
    table_optimizer: Annotated[
        str, typer.Option(metavar="NAME", help="Of the embedding tables: adam, or adagrad, which keeps one number per row.")
    ] = "adam",
    l2: Annotated[float, typer.Option(metavar="NUMBER", help="Weight of the squared norm of the embeddings in a batch.")] = 0.0,
    evaluations_per_epoch: Annotated[int, typer.Option(metavar="NUMBER", help="Times per epoch that the validation AUC is taken.")] = 1,
    patience: Annotated[int, typer.Option(metavar="NUMBER", help="Evaluations without a better AUC after which training stops.")] = 2,
    learning_rate_decay: Annotated[
        float, typer.Option(metavar="NUMBER", help="Factor on the learning rates at each evaluation without a better AUC.")
    ] = 1.0,
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Train a model on a prepared log, to its best validation AUC."""
    from leanrec.train import TrainSettings, train_run

    _use_threads(threads)
    settings = TrainSettings(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        table_learning_rate=table_learning_rate,
        table_optimizer=table_optimizer,
        l2=l2,
        evaluations_per_epoch=evaluations_per_epoch,
        patience=patience,
        learning_rate_decay=learning_rate_decay,
        seed=seed,
    )
    with display() as shown:
        on_step = show_training(shown, lambda: data, batch_size=batch_size, epochs=epochs)
        record = train_run(
            data,
            out,
            model=model,
            model_settings=settings_from(set or []),
            settings=settings,
            tables=tables,
            method=methods_from(method) if method else None,
            ratio=ratio,
            nbytes=nbytes,
            on_step=on_step,
        )
    best = max(record["history"], key=lambda evaluation: evaluation["auc"])
    steps = f"{best['step']:,} of {record['steps']:,} steps"
    typer.echo(f"validation AUC {record['valid']['auc']:.5f}, log loss {record['valid']['logloss']:.5f}: the best, after {steps}")
    typer.echo(f"written: {out}")


@app.command(
    epilog=_examples(
        "leanrec compress runs/base --ratio 50 --out runs/small",
        "leanrec compress runs/base --method 'MEC(num_subspaces=4)' --out runs/mec",
        "leanrec compress runs/base --method 'PQ()' --nbytes 2000000 --tune-epochs 0 --out runs/pq",
        "leanrec compress runs/base --method '*.item=PQ(num_subspaces=8)' --method '*.user=Scalar(num_bits=4)' --out runs/mixed",
        "leanrec compress runs/base --max-auc-drop 0.0005 --out runs/smallest",
        "leanrec compress runs/base --ratio 50 --dense-ratio 4 --out runs/smaller",
        "leanrec compress items.npy --method 'PQ(num_subspaces=8)' --counts counts.npy --out items-small",
        "leanrec compress model.safetensors --tensor item.weight --ratio 16 --out items-small",
    )
)
def compress(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="Folder that `leanrec train` or `leanrec compress` wrote; or a table in a file, which need not fit into memory: .npy, .safetensors, "
            ".parquet, or a folder of torch.distributed.checkpoint.",
        ),
    ],
    out: Out,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD",
            help="See `leanrec methods`. GLOB=METHOD, given several times, chooses by the tables' paths: the first match decides, and the "
            "method None, as no match, leaves a table alone.  [default: VRQ(); PQ() for a table in a file]",
        ),
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="Make all tables together so many times smaller, by the method's settings.")
    ] = None,
    nbytes: Annotated[int | None, typer.Option(metavar="BYTES", help="Or give the bytes that all tables together may have.")] = None,
    max_auc_drop: Annotated[
        float | None,
        typer.Option(metavar="NUMBER", help="Or make them as small as the validation AUC stays within so much, such as 0.0005: sizes are tried."),
    ] = None,
    dense_ratio: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="Make all linear layers together so many times smaller, by a low rank for each.")
    ] = None,
    tune_epochs: Annotated[
        int | None, typer.Option(metavar="NUMBER", min=0, help="Most passes of fine-tuning afterwards; 0 for none.  [default: 2]")
    ] = None,
    tune_learning_rate: Annotated[float | None, typer.Option(metavar="NUMBER", help="Of the fine-tuning.  [default: 0.0001]")] = None,
    tune_teacher_share: Annotated[
        float | None,
        typer.Option(metavar="NUMBER", help="Share that predictions of the model before compression have in its labels.  [default: 0.5]"),
    ] = None,
    tensor: Annotated[str | None, typer.Option(metavar="NAME", help="Of a table in a file: the tensor or column, where there are several.")] = None,
    counts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of a table in a file: how often each row is looked up, integers in a file of the same kinds.")
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Compress the embedding tables of a run, and its linear layers if so asked; or a table in a file.

    What is left of a run's model is then fine-tuned with the click loss; the tuned model is kept only where the validation split prefers it by
    more than chance. A table in a file is read in stretches and its compressed form written as it goes, in little memory.
    """
    if is_table(run):
        if any(option is not None for option in (max_auc_drop, dense_ratio, tune_epochs, tune_learning_rate, tune_teacher_share)):
            raise typer.BadParameter(f"{run} is a table, not a run: it has no model for --max-auc-drop, --dense-ratio or --tune-*.")
        _use_threads(threads)
        _compress_table(run, out, method or ["PQ()"], tensor, counts, ratio, nbytes, seed)
        return
    if tensor is not None or counts is not None:
        raise typer.BadParameter(f"{run} is a run, which has its own counts: --tensor and --counts go with a table in a file.")
    from leanrec import runs
    from leanrec.recommender import open_run
    from leanrec.tune import METHOD, TUNING, compress_run, size_report

    if tune_epochs == 0 and tune_learning_rate is not None:
        raise typer.BadParameter("--tune-epochs 0 is no fine-tuning: leave --tune-learning-rate out.")
    _use_threads(threads)
    epochs = TUNING.epochs if tune_epochs is None else tune_epochs
    learning_rate = TUNING.learning_rate if tune_learning_rate is None else tune_learning_rate
    tuning = replace(TUNING, epochs=epochs, learning_rate=learning_rate) if epochs else None
    with display() as shown:
        record = compress_run(
            run,
            out,
            method=methods_from(method or [METHOD]),
            ratio=ratio,
            nbytes=nbytes,
            max_auc_drop=max_auc_drop,
            dense_ratio=dense_ratio,
            tuning=tuning,
            teacher_share=tune_teacher_share,
            seed=seed,
            on_trial=lambda trial: shown.line(_trial(trial, max_auc_drop)),
            on_work=shown.work,
            on_step=show_training(shown, lambda: Path(runs.load(run)["recommender"]["data"]), batch_size=TUNING.batch_size, epochs=epochs),
        )
    typer.echo(size_report(open_run(out)))
    if max_auc_drop is not None:
        typer.echo(f"\n{_one_step_further(record['kept'], record['beyond'])}")
    valid = record["valid"]
    if record["tuning"] and not record["tuning"]["kept"]:
        typer.echo("\nThe fine-tuning gained nothing, or no more than chance can: the model is kept as it was before.")
    typer.echo(f"\nvalidation AUC {valid['auc']:.5f} (before tuning {valid['auc_untuned']:.5f}), log loss {valid['logloss']:.5f}")
    typer.echo(f"written: {out}")


def _compress_table(
    source: Path, out: Path, method: list[str], name: str | None, counts: Path | None, ratio: float | None, nbytes: int | None, seed: int
) -> None:
    from leanrec.stream import compress_table

    text = methods_from(method)
    if not isinstance(text, str):
        raise typer.BadParameter(f"--method {method[0]!r}: a table in a file takes one method, without a pattern.")
    with display() as shown:
        record = compress_table(source, text, out, name=name, counts=counts, ratio=ratio, nbytes=nbytes, seed=seed, progress=shown.work)
    table = record["table"]
    typer.echo(f"{table['num_embeddings']:,} x {table['embedding_dim']} by {record['method_used']}")
    error = "" if table["error"] is None else f", error {table['error']:.4f}"
    typer.echo(f"{table['nbytes']:,} bytes of {table['nbytes_full']:,}, {table['ratio']:.1f}x{error}; {record['peak_memory']:,} bytes of memory")
    typer.echo(f"written: {out}")


def _trial(trial: Trial, max_auc_drop: float | None) -> str:
    place = "within" if trial.within else "beyond"
    return f"ratio {trial.ratio:.1f}: validation AUC {trial.auc:.5f}, a drop of {trial.auc_drop:.5f}: {place} {max_auc_drop}"


def _one_step_further(kept: Mapping[str, float], beyond: Mapping[str, float] | None) -> str:
    """What the search ended between."""
    end = (
        f"one step further, {beyond['ratio']:.1f} would have dropped {beyond['auc_drop']:.5f}"
        if beyond
        else "the method cannot make the tables smaller"
    )
    return f"ratio {kept['ratio']:.1f} drops {kept['auc_drop']:.5f} of the validation AUC; {end}"


@app.command(
    epilog=_examples(
        "leanrec evaluate runs/base",
        "leanrec evaluate runs/small --against runs/base",
        "leanrec evaluate runs/small --against runs/base --popularity item --json",
    )
)
def evaluate(
    run: Run,
    against: Annotated[Path | None, typer.Option(metavar="RUN", help="Run to compare with on the same rows, usually the uncompressed one.")] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="train, valid or test.")] = "test",
    popularity: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Field by whose popularity the rows are divided.  [default: the one with most ids]")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Folder to write the result into, as run.json.")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    threads: Threads = None,
) -> None:
    """Measure the quality of a run.

    With --against, also its difference to another run on the same rows, with a 95% interval.
    """
    from leanrec.evaluate import evaluate_run

    _use_threads(threads)
    evaluation, comparison = evaluate_run(run, out=out, against=against, split=split, popularity=popularity, seed=seed)
    if as_json:
        typer.echo(json.dumps({"evaluation": evaluation.to_dict(), "comparison": comparison and comparison.to_dict()}, indent=1))
        return
    typer.echo(evaluation)
    if comparison is not None:
        typer.echo(f"\n{comparison}")


@app.command(epilog=_examples("leanrec report runs/small", "leanrec report runs/small --json"))
def report(run: Run, as_json: AsJson = False) -> None:
    """Show the bytes of a run's model, table by table."""
    from leanrec.recommender import open_run
    from leanrec.tune import size_report

    sizes = size_report(open_run(run))
    typer.echo(json.dumps(sizes.to_dict(), indent=1) if as_json else sizes)


@app.command(epilog=_examples("leanrec methods", "leanrec methods --shape 1000000x32"))
def methods(
    shape: Annotated[str, typer.Option(metavar="VxD", help="Rows and dimension of the table whose bytes are told.")] = "1000000x32",
) -> None:
    """List the compression methods.

    Each with its paper, the knob that trades size for quality, and the bytes of a table by default and over the range of the knob.
    """
    from leanrec.methods import METHODS

    num_embeddings, embedding_dim = shape_from(shape)
    typer.echo(f"A table of {num_embeddings:,} x {embedding_dim} is {num_embeddings * embedding_dim * 4:,} bytes as float32.\n")
    for method in METHODS.values():
        typer.echo(_about_method(method(), num_embeddings, embedding_dim))


def _about_method(method: Method, num_embeddings: int, embedding_dim: int) -> str:
    """A method's text form, its source and its bytes."""
    source = " ".join((inspect.getdoc(inspect.getmodule(method)) or "").split())
    knobs = method.knob_values(num_embeddings, embedding_dim)
    sizes = [method.with_knob(value).nbytes(num_embeddings, embedding_dim) for value in knobs]
    span = f"{method.knob} {knobs[0]} to {knobs[-1]}: {min(sizes):,} to {max(sizes):,} bytes" if len(knobs) > 1 else f"{method.knob} {knobs[0]}"
    return f"{method}\n  {source}\n  {_default_size(method, num_embeddings, embedding_dim)}; {span}\n"


def _default_size(method: Method, num_embeddings: int, embedding_dim: int) -> str:
    try:
        nbytes = method.nbytes(num_embeddings, embedding_dim)
    except ValueError:
        return "does not fit as it stands"
    return f"{nbytes:,} bytes ({num_embeddings * embedding_dim * 4 / nbytes:.1f}x)"


@app.command(
    epilog=_examples(
        "leanrec bench benchmarks/experiments/first/*.toml --logs ../logs --jobs 2",
        "leanrec bench --table --plot",
    )
)
def bench(
    experiments: Annotated[list[Path] | None, typer.Argument(metavar="FILES", help="TOML files; the name of their folder is the suite's.")] = None,
    logs: Annotated[Path | None, typer.Option(metavar="FOLDER", envvar="LEANREC_DATA", help="Folder of the logs that the experiments name.")] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of results/, work/ (may be deleted), README.md and pictures/.")] = Path(
        "benchmarks"
    ),
    jobs: Annotated[int, typer.Option(metavar="NUMBER", min=1, help="Runs at a time, each with one thread.")] = 1,
    table: Annotated[bool, typer.Option("--table", help="Write README.md from all results.")] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Write pictures of quality over bytes from all results.")] = False,
) -> None:
    """Run experiments; make tables of the results."""
    from leanrec.bench import bench, write_methods_page, write_plots, write_readme

    if experiments:
        if logs is None:
            raise typer.BadParameter("the folder of the logs is missing: give --logs FOLDER or set LEANREC_DATA.")
        with display() as shown:
            bench(
                experiments,
                logs=logs,
                results=out / "results",
                work=out / "work",
                num_jobs=jobs,
                on_result=lambda name, done, total: shown.line(f"{done} of {total}: {name}"),
            )
    for path in (write_plots(out) if plot else []) + ([write_readme(out), write_methods_page(out)] if table else []):
        typer.echo(f"written: {path}")
    if not experiments and not table and not plot:
        raise typer.BadParameter("nothing to do: name TOML files of experiments, or give --table or --plot.")


@app.command(epilog=_examples("leanrec demo", "leanrec demo --out demo --seed 1"))
def demo(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to write.")] = Path("demo"),
    seed: Seed = 0,
    threads: Threads = None,
) -> None:
    """Run the whole pipeline on a synthetic log.

    Prepare, train, compress with several methods and evaluate, in about two minutes on two cores.
    """
    from leanrec.demo import demo

    _use_threads(threads)
    with display() as shown:
        result = demo(out, seed=seed, progress=shown.line)
    typer.echo(result)


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
