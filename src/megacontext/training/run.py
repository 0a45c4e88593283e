"""A run from its begin to its verdict: the folder, the processes, the guard around the trainer.

`train` prepares a run folder, a `Trainer` makes the steps, and the run ends with a verdict that is
computed from the guard's log file.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, BinaryIO

import torch

from lensnet_guard import compare_ranks, lensnet_guard
from lensnet_guard.postmortem import read_verdict
from megacontext.config import MCConfig
from megacontext.data.source import Source
from megacontext.model.frozen import weights_sha256
from megacontext.model.hf_loading import check_language_model, kept_files
from megacontext.training.distributed import device_name, joined_world
from megacontext.training.loop import TrainingLoop
from megacontext.training.metric_sinks import MetricSink, TensorBoardSink
from megacontext.training.pretrained import (
    SavedRun,
    check_same_language_model,
    read_run,
    saved_model,
    usable_device,
)
from megacontext.training.run_folder import ReadOnlyFolder, RunFolder
from megacontext.training.sources import load_source
from megacontext.training.staged import StagedTrainer
from megacontext.training.train_config import TrainConfig, check_together
from megacontext.training.train_result import Report, StepReport, TrainingStopped, TrainResult
from megacontext.training.trainer import Trainer


def _tell_nobody(_: StepReport) -> None:
    pass


def _never() -> bool:
    return False


def train(
    run_dir: str | os.PathLike[str],
    model: MCConfig | None = None,
    settings: TrainConfig | None = None,
    *,
    resume: bool = False,
    profile: bool = False,
    report: Report = _tell_nobody,
    sinks: Sequence[MetricSink] = (),
    stop: Callable[[], bool] = _never,
) -> TrainResult:
    """Train in a new run folder, or continue the run that a folder holds.

    Args:
        run_dir: The run folder.
        model: Sizes of a new run; a resumed run takes its own from ``config.json``.
        settings: How a new run is trained; a resumed run takes its own too.
        resume: Continue the run that the folder holds.
        profile: Take a trace of a few of the steps, see `step_profile`, in which every LensNet call
            and every phase of a micro-step is a range.
        report: Called after every logged step.
        sinks: Get the metrics of every logged step, after a checkpoint that was due.
        stop: Asked before the first step and after each. When it says so on one of several
            processes, all of them end after that step, with a checkpoint of it.

    Returns:
        How the run ended.

    Raises:
        FileExistsError: A new run's folder holds something.
        FileNotFoundError: There is no run to resume, or no text.
        ValueError: Settings, text or checkpoint that do not fit; nothing was written then.
        OSError: A file cannot be written; named. The last checkpoint is kept.
        TrainingStopped: ``stop`` said so, and there were steps left.
        LensNetViolation: Something called LensNet that may not.
        ImportError: A library that the settings need is not installed; nothing was written then.
        MetricSinkError: A sink failed; the run was saved at that step, by several processes at its
            last checkpoint.
    """
    plan = _plan(run_dir, model, settings, resume)
    with joined_world(plan.device) as world:
        world.check(plan.settings)
        if not world.first:  # the first process writes and tells, the others take part
            plan = replace(plan, folder=ReadOnlyFolder(run_dir), boards=())
            report, sinks = _tell_nobody, ()
        kind = StagedTrainer if plan.settings.kept_sequences else Trainer
        trainer = kind(
            plan.model, plan.settings, plan.source, plan.folder, plan.device, world, stop
        )
        _make_run(plan, trainer, report, sinks, profile)
        return _result(plan, trainer, profile)


@dataclass(frozen=True)
class _Plan:
    """A run before anything of it is made.

    Attributes:
        folder: Its files.
        resumed: What a run that was begun before says of itself; None for a new one.
        model: Sizes.
        settings: How it is trained.
        source: Where its sequences come from.
        device: Of this process.
        boards: The sinks that the settings ask for.
    """

    folder: RunFolder
    resumed: SavedRun | None
    model: MCConfig
    settings: TrainConfig
    source: Source
    device: torch.device
    boards: tuple[TensorBoardSink, ...]


def _plan(
    run_dir: str | os.PathLike[str],
    model: MCConfig | None,
    settings: TrainConfig | None,
    resume: bool,
) -> _Plan:
    """Find out what a run is, and that it can be made; nothing is written."""
    folder = RunFolder(run_dir)
    saved = read_run(folder) if resume else None
    if resume and folder.weights.exists():
        raise ValueError(
            f"{folder.path} holds the weights of a run and not its state, so it cannot be "
            "continued; train a new one, which can take its gists by --gists-of"
        )
    if saved is not None:
        model, settings = saved_model(folder, saved.model), saved.settings
    model, settings = model or MCConfig(), settings or TrainConfig()
    device = usable_device(device_name(settings.device))
    check_together(model, settings)
    check_language_model(model)  # before much text becomes tokens
    source = load_source(settings, model)
    if saved is not None and saved.source.get("sha256") != source.description.get("sha256"):
        raise ValueError(
            f"the text has changed since {folder.path} was begun (its sha256 differs), "
            "so the run cannot be continued; start a new one"
        )
    boards = (TensorBoardSink(folder.tensorboard),) if settings.tensorboard else ()
    return _Plan(folder, saved, model, settings, source, device, boards)


def _make_run(
    plan: _Plan, trainer: TrainingLoop, report: Report, sinks: Sequence[MetricSink], profile: bool
) -> None:
    """Make the folder of a new run, and all steps that are left, under the guard."""
    folder, world = plan.folder, trainer.world
    if plan.resumed is None:
        _make_folder(plan, trainer)
    else:
        check_same_language_model(folder, plan.resumed, trainer.mc)
    with folder.locked():
        if plan.resumed is not None:
            trainer.restore()
        with (
            lensnet_guard(trainer.mc, log=folder.path) as guard,
            compare_ranks(guard) if world.size > 1 else nullcontext(),
            ExitStack() as stack,
        ):
            for board in plan.boards:
                stack.enter_context(closing(board))  # however the run ends
            trainer.run(report, [*plan.boards, *sinks], profile=profile)
        world.wait()  # for all logs to be complete
    if trainer.stopped:
        raise TrainingStopped(f"stopped after step {trainer.done}, and saved in {folder.path}")


def _make_folder(plan: _Plan, trainer: TrainingLoop) -> None:
    """Let the first process make the folder, once all have seen that it is free."""
    folder, world = plan.folder, trainer.world
    folder.require_new()  # so that all processes refuse
    world.wait()
    config: dict[str, Any] = {
        "model": asdict(plan.model),
        "train": asdict(plan.settings),
        "source": plan.source.description,
    }
    if plan.model.freeze_language_model:  # no checkpoint has its weights
        config["language_model_sha256"] = weights_sha256(trainer.mc.language_model)
    folder.create(config, kept_files(plan.model.language_model))
    world.wait()
    if not folder.config.exists():
        raise FileNotFoundError(
            f"process {world.rank} does not see {folder.config}, which the first one wrote: "
            "put the run folder where all processes can read and write"
        )


def _result(plan: _Plan, trainer: TrainingLoop, profile: bool) -> TrainResult:
    """Read what came of it from its files, and draw the picture."""
    folder, cuts = plan.folder, trainer.cuts
    verdict, rows = read_verdict(folder.path), folder.read_metrics()
    entropy = plan.source.unigram_entropy()
    result = TrainResult(
        verdict=verdict,
        metrics=rows[-1] if rows else {},
        validation_loss=trainer.validation_loss(),
        unigram_entropy=entropy,
        run_dir=folder.path,
        profile=folder.profile if profile and cuts is not None else None,
    )

    def draw(file: BinaryIO) -> None:
        from megacontext.evaluation.overview import draw_overview  # matplotlib is slow to import

        draw_overview(file, rows, verdict, cuts, entropy)

    folder.save_overview(draw)
    trainer.world.wait()
    return result
