"""``megacontext eval``."""

import dataclasses
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megacontext.cli.endings import EXIT_CODES, plain_endings, usage_errors
from megacontext.cli.eval_table import comparison_table, interval_text, plain_words
from megacontext.cli.options import DATA_HELP, with_options
from megacontext.cli.streams import PipeConsole
from megacontext.controller import MCController
from megacontext.data.source import Source
from megacontext.evaluation.compare import evaluate
from megacontext.evaluation.losses import no_session
from megacontext.evaluation.memo import Memo
from megacontext.evaluation.minilm import MISSING, load_minilm
from megacontext.evaluation.overview import draw_evaluation
from megacontext.evaluation.rows import as_good_as_lensnet, comparison_rows
from megacontext.evaluation.ways import LENSNET, Comparing
from megacontext.files import write_atomically
from megacontext.model.gguf import SMOLLM2
from megacontext.training import ablation
from megacontext.training.exported import model_folder
from megacontext.training.pretrained import load_model, read_run, usable_device
from megacontext.training.run_folder import RunFolder
from megacontext.training.sources import load_source
from megacontext.training.train_config import DATA, TrainConfig
from megacontext.training.train_result import StepReport

_HELP = """Compare ways to pick a working context, LensNet among them, at equal length.

Prints a table with 95 % bootstrap intervals, paired by sequence, and writes eval.json and
eval.png (with --ablate, ablations.json).

\b
Examples:
  megacontext eval --run-dir runs/recall
  megacontext eval --run-dir runs/recall --sequences 512 --seed 7 --json
  megacontext eval --run-dir runs/mine --data reuse --no-greedy
  megacontext eval --run-dir runs/recall --ablate
  megacontext eval --language-model smollm2 --out found --data reuse --sequences 24 --main-ways
"""
_OTHER_PARTS = (
    "The run was trained on {}, which holds other files out than {} does: it may have read some of "
    "these. Train and evaluate it with --data files for files that it never saw."
)
_OTHER_PATHS = (
    "The run was trained on another --text, and which files are held out depends on that: it may "
    "have read some of these. Leave --text out for files that it never saw."
)
_OF_FILES = ("text", "files", "reuse")  # data that read the same texts
_OPTIONS = (
    click.option(
        "--run-dir",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        help="Folder of a trained run.",
    ),
    click.option(
        "--language-model",
        help=f"Instead: {SMOLLM2}, with the LensNet and the GistNet that this package ships.",
    ),
    click.option(
        "--out",
        type=click.Path(path_type=Path, file_okay=False),
        show_default="the run's",
        help="Folder for eval.json and eval.png (of other data than the run's, or without gists, "
        "with that in their names), and for losses.jsonl.",
    ),
    click.option(
        "--data",
        type=click.Choice(DATA),
        show_default="the run's",
        help=DATA_HELP,
    ),
    click.option(
        "--text",
        type=click.Path(exists=True, path_type=Path),
        multiple=True,
        show_default="the run's, if both are text, files or reuse; else as train has it",
        help="File or folder that sequences are taken from; may be repeated.",
    ),
    click.option(
        "--sequences", type=click.IntRange(min=1), default=256, help="Held-out sequences."
    ),
    click.option(
        "--seed",
        type=click.IntRange(min=0),
        default=1000,
        help="Of the sequences and of everything random.",
    ),
    click.option(
        "--all-ways/--main-ways",
        default=True,
        help="Compare all ways to pick, or the ten that matter most.",
    ),
    click.option(
        "--oracle-draws",
        type=click.IntRange(min=0),
        default=64,
        help="Random cuts of which the oracle takes the best; 0 leaves it out.",
    ),
    click.option(
        "--greedy/--no-greedy",
        default=True,
        help="Add blocks one by one, each the one that helps most: the slowest way by far.",
    ),
    click.option(
        "--attention/--no-attention",
        default=True,
        help="Pick by what the language model attends to, which it has to read everything for.",
    ),
    click.option(
        "--session/--no-session",
        default=True,
        help="Let histories come bit by bit, in a session that refocuses.",
    ),
    click.option(
        "--gists/--no-gists",
        default=True,
        help="Hold as gists what is not held in detail; or leave it out, for all ways alike.",
    ),
    click.option(
        "--losses",
        type=click.Path(path_type=Path, dir_okay=False),
        show_default="losses.jsonl in the run folder",
        help="File of losses that were computed before, for an evaluation that was stopped to go "
        "on; models that differ in LensNet alone may share one.",
    ),
    click.option("--device", default="cpu", help="Torch device, such as cpu or cuda."),
    click.option(
        "--ablate",
        is_flag=True,
        help="Train the run's setting anew with one thing changed at a time, in RUN_DIR/ablations, "
        "and compare; takes about as long as the run did, seven times.",
    ),
    click.option(
        "--steps",
        type=click.IntRange(min=1),
        show_default="the run's",
        help="Optimizer steps of each training of --ablate.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."),
)


@click.command("eval", help=_HELP, epilog=EXIT_CODES, context_settings={"show_default": True})
@with_options(_OPTIONS)
def command(
    run_dir: Path | None, language_model: str | None, as_json: bool, **options: Any
) -> None:
    """Evaluate; `_HELP` is what a user reads."""
    _check_ablate(options, language_model)
    console = PipeConsole(stderr=as_json, highlight=False)
    sequences, seed = options["sequences"], options["seed"]
    with plain_endings():
        with usage_errors():
            folder = RunFolder(model_folder(run_dir, language_model))
            if language_model is not None and options["out"] is None:
                raise ValueError("--language-model needs an --out, where what is found is to go")
            out = options["out"] or folder.path
            out.mkdir(parents=True, exist_ok=True)
            folder.require_run()
            where = usable_device(options["device"])
        if options["ablate"]:
            result = _ablate(console, folder, options["steps"], sequences, seed)
        else:
            mc = load_model(folder.path, where)
            others = options["data"] or options["text"]
            with usage_errors() if others else nullcontext():
                settings = _settings(folder, options["data"], options["text"])
                source = load_source(settings, mc.config)
            what = Comparing(
                oracle_draws=options["oracle_draws"],
                greedy=options["greedy"],
                all_ways=options["all_ways"],
                attention=options["attention"],
                in_session=options["session"],
                gists=options["gists"],
                embed=None if source.tokenizer is None else load_minilm(str(where)),
            )
            memo = Memo(options["losses"] or out / "losses.jsonl")
            result = _evaluate(
                console, folder, out, mc, settings, source, what, memo, sequences, seed
            )
        if as_json:
            click.echo(json.dumps(result))


def _check_ablate(options: dict[str, Any], language_model: str | None) -> None:
    """Refuse what is of the other kind of evaluation."""
    if options["ablate"] and language_model is not None:
        raise click.UsageError("--ablate trains a run's setting anew; give the --run-dir of one")
    if options["steps"] is not None and not options["ablate"]:
        raise click.UsageError("--steps is of the trainings of --ablate; leave it out, or add that")
    if options["ablate"] and (options["data"] or options["text"] or not options["gists"]):
        raise click.UsageError(
            "--ablate trains and evaluates on the run's own data, with gists; leave out --data, "
            "--text and --no-gists"
        )


def _settings(folder: RunFolder, data: str | None, text: Sequence[Path]) -> TrainConfig:
    """Return the run's settings, for other data where that was asked for."""
    settings = read_run(folder).settings
    data = data or settings.data
    given = tuple(str(path.absolute()) for path in text)
    if not given and (data == settings.data or {data, settings.data} <= {*_OF_FILES}):
        given = settings.text
    return dataclasses.replace(settings, data=data, text=given)


def _evaluate(
    console: Console,
    folder: RunFolder,
    out: Path,
    mc: MCController,
    settings: TrainConfig,
    source: Source,
    what: Comparing,
    memo: Memo,
    sequences: int,
    seed: int,
) -> dict[str, Any]:
    own = read_run(folder).settings
    if own.data in _OF_FILES and settings.data in _OF_FILES:
        if "text" in (own.data, settings.data) and own.data != settings.data:
            console.print(
                _OTHER_PARTS.format(own.data, settings.data), markup=False, soft_wrap=True
            )
        elif own.text != settings.text:
            console.print(_OTHER_PATHS, markup=False, soft_wrap=True)
    if what.in_session and what.gists and (why := no_session(mc)):
        console.print(f"A session is not among the ways: {why}", markup=False, soft_wrap=True)
    if what.embed is None and source.tokenizer is not None:
        console.print(MISSING, markup=False, soft_wrap=True)
    with _progress(console) as progress:
        task = progress.add_task("sequences", total=sequences)
        evaluation = evaluate(
            mc,
            source,
            sequences=sequences,
            seed=seed,
            what=what,
            memo=memo,
            progress=lambda done: progress.update(task, completed=done),
        )
    rows = comparison_rows(evaluation)
    title = f"{folder.path}: {sequences} held-out sequences of {settings.data}, seed {seed}"
    console.print(comparison_table(rows, title))
    for line in plain_words(rows):
        console.print(line, markup=False, soft_wrap=True)
    result = {
        "run_dir": str(folder.path),
        "data": settings.data,
        "sequences": sequences,
        "clusters": None if evaluation.clusters is None else len(set(evaluation.clusters)),
        "seed": seed,
        "oracle_draws": what.oracle_draws,
        "gists": what.gists,
        "as_good_as_lensnet": [row.way for row in as_good_as_lensnet(rows)],
        "ways": [row.to_json() for row in rows],
    }
    other = "" if settings == own else f"-{settings.data}"
    path = out / f"eval{other}{'' if what.gists else '-no-gists'}.json"
    write_atomically(path, json.dumps(result, indent=2).encode() + b"\n")
    draw_evaluation(path.with_suffix(".png"), rows, evaluation.examples, evaluation.tokens)
    return result


def _ablate(
    console: Console, folder: RunFolder, steps: int | None, sequences: int, seed: int
) -> dict[str, Any]:
    run = read_run(folder)
    settings = run.settings
    if steps is not None:
        settings = dataclasses.replace(settings, steps=steps)
    results: list[ablation.AblationResult] = []
    with _progress(console) as progress:
        task = progress.add_task("", total=None)

        def report(name: str, step: StepReport) -> None:
            text = f"{name}: {step.phase}"
            progress.update(task, description=text, completed=step.step, total=step.steps)
            if not console.is_terminal and step.step == step.steps:
                console.print(f"{text}, {step.steps} steps done", soft_wrap=True)

        results += ablation.ablate(
            run.model,
            settings,
            folder.path / "ablations",
            sequences=sequences,
            seed=seed,
            report=report,
        )
    table = Table(title=f"{folder.path}: one thing changed, {sequences} sequences, seed {seed}")
    ways = [way for way in ablation.WAYS if way in results[0].evaluation.nll]
    table.add_column("training")
    for way in ways:
        table.add_column(f"{way}, nats", justify="right")
    rows = [result.to_json() for result in results]
    for row in rows:
        lensnet = f"{row[LENSNET]:.3f} {interval_text(row['interval'])}"
        table.add_row(row["name"], lensnet, *(f"{row[way]:.3f}" for way in ways[1:]))
    console.print(table)
    outcome = {"run_dir": str(folder.path), "sequences": sequences, "seed": seed, "rows": rows}
    path = folder.path / "ablations.json"
    write_atomically(path, json.dumps(outcome, indent=2).encode() + b"\n")
    return outcome


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
