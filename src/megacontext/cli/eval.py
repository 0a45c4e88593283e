"""``megacontext eval``."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megacontext.cli.endings import EXIT_CODES, plain_endings, usage_errors
from megacontext.cli.options import with_options
from megacontext.cli.streams import PipeConsole
from megacontext.evaluation.compare import (
    LENSNET,
    Evaluation,
    bootstrap_interval,
    evaluate,
    gap_closed,
)
from megacontext.evaluation.overview import draw_evaluation
from megacontext.files import write_atomically
from megacontext.training import ablation
from megacontext.training.pretrained import load_model, read_run, usable_device
from megacontext.training.run_folder import RunFolder
from megacontext.training.sources import load_source
from megacontext.training.train_result import StepReport

_HELP = """Compare ways to pick a working context, LensNet among them, at equal length.

Prints a table with 95 % bootstrap intervals, paired by sequence, and writes eval.json and
eval.png (with --ablate, ablations.json).

\b
Examples:
  megacontext eval --run-dir runs/recall
  megacontext eval --run-dir runs/recall --sequences 512 --seed 7 --json
  megacontext eval --run-dir runs/recall --ablate
"""
_OPTIONS = (
    click.option(
        "--run-dir",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        required=True,
        help="Folder of a trained run; eval.json and eval.png go there.",
    ),
    click.option(
        "--sequences", type=click.IntRange(min=1), default=256, help="Held-out sequences."
    ),
    click.option("--seed", default=1000, help="Of the sequences and of everything random."),
    click.option(
        "--oracle-draws",
        type=click.IntRange(min=1),
        default=64,
        help="Random cuts of which the oracle takes the best.",
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
    run_dir: Path,
    sequences: int,
    seed: int,
    oracle_draws: int,
    device: str,
    ablate: bool,
    steps: int | None,
    as_json: bool,
) -> None:
    """Evaluate; `_HELP` is what a user reads."""
    if steps is not None and not ablate:
        raise click.UsageError("--steps is of the trainings of --ablate; leave it out, or add that")
    console = PipeConsole(stderr=as_json, highlight=False)
    with plain_endings():
        folder = RunFolder(run_dir)
        with usage_errors():
            folder.require_run()
            where = usable_device(device)
        if ablate:
            result = _ablate(console, folder, steps, sequences, seed)
        else:
            result = _evaluate(console, folder, sequences, seed, oracle_draws, where)
        if as_json:
            click.echo(json.dumps(result))


@dataclass(frozen=True)
class _Row:
    """What the table says of one way to pick.

    Attributes:
        way: Its name.
        entries: Of its working contexts.
        nll: Mean NLL per label, nats.
        interval: Of that.
        closed: Share of the gap from random collapse to the oracle that it closes.
        behind: By how much its NLL is above that of LensNet focus, nats.
        behind_interval: Of that.
    """

    way: str
    entries: int
    nll: float
    interval: tuple[float, float]
    closed: float
    behind: float
    behind_interval: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """Return what ``eval.json`` is to hold of it."""
        return {
            "way": self.way,
            "entries": self.entries,
            "nll": self.nll,
            "nll_interval": list(self.interval),
            "gap_closed": self.closed,
            "behind_lensnet": self.behind,
            "behind_lensnet_interval": list(self.behind_interval),
        }


def _rows(evaluation: Evaluation) -> list[_Row]:
    best = evaluation.nll[LENSNET]
    return [
        _Row(
            way,
            evaluation.entries[way],
            float(nll.mean()),
            bootstrap_interval(nll),
            gap_closed(evaluation, way),
            float((nll - best).mean()),
            bootstrap_interval(nll - best),
        )
        for way, nll in evaluation.nll.items()
    ]


def _interval(interval: Sequence[float], sign: str = "") -> str:
    low, high = (f"{bound:{sign}.3f}" for bound in interval)
    return f"[{low}, {high}]"


def _evaluate(
    console: Console, folder: RunFolder, sequences: int, seed: int, draws: int, device: torch.device
) -> dict[str, Any]:
    settings = read_run(folder).settings
    mc = load_model(folder.path, device)
    source = load_source(settings, mc.config)
    with _progress(console) as progress:
        task = progress.add_task("sequences", total=sequences)
        evaluation = evaluate(
            mc,
            source,
            sequences=sequences,
            seed=seed,
            oracle_draws=draws,
            progress=lambda done: progress.update(task, completed=done),
        )
    rows = _rows(evaluation)
    table = Table(title=f"{folder.path}: {sequences} held-out sequences, seed {seed}")
    for heading in ("way to pick", "entries", "NLL, nats", "gap closed", "NLL above LensNet focus"):
        table.add_column(heading, justify="left" if heading == "way to pick" else "right")
    for row in rows:
        behind = f"{row.behind:+.3f} {_interval(row.behind_interval, '+')}"
        table.add_row(
            row.way,
            str(row.entries),
            f"{row.nll:.3f} {_interval(row.interval)}",
            f"{row.closed:.2f}",
            "" if row.way == LENSNET else behind,
        )
    console.print(table)
    result = {
        "run_dir": str(folder.path),
        "data": settings.data,
        "sequences": sequences,
        "seed": seed,
        "oracle_draws": draws,
        "ways": [row.to_json() for row in rows],
    }
    write_atomically(folder.path / "eval.json", json.dumps(result, indent=2).encode() + b"\n")
    draw_evaluation(
        folder.path / "eval.png",
        {row.way: (row.nll, row.interval) for row in rows},
        evaluation.examples,
        evaluation.tokens,
    )
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
        lensnet = f"{row[LENSNET]:.3f} {_interval(row['interval'])}"
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
