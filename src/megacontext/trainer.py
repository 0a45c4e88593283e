"""The trainer: trains language model, GistNet and LensNet on text, under the guard.

Reads from top to bottom: `train` prepares a run folder, `_Trainer.run` is the loop, and the run
ends with a verdict that is computed from the guard's log file.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from lensnet_guard import compare_ranks, lensnet_guard
from lensnet_guard.postmortem import read_verdict
from megacontext.config import MCConfig
from megacontext.controller import MCController
from megacontext.data import Source
from megacontext.distributed import (
    DataParallel,
    World,
    device_name,
    gathered,
    joined_world,
    load_optimizer,
    load_weights,
    local_part,
)
from megacontext.files import reading
from megacontext.hf_loading import check_language_model, kept_files
from megacontext.metric_sinks import MetricSink, MetricSinkError, TensorBoardSink, write_all
from megacontext.micro_step import Cuts, MCBatchResult
from megacontext.optimization import new_optimizer, own_gradients, rate_at, update
from megacontext.pretrained import read_run, saved_model, usable_device
from megacontext.run_folder import ADVICE, RunFolder
from megacontext.running_means import RunningMeans
from megacontext.sources import load_source
from megacontext.step_profile import step_profile
from megacontext.train_config import TrainConfig
from megacontext.train_result import StepReport, TrainingStopped, TrainResult

LM_DATA, DATA = 0, 1  # what random numbers are for
VALIDATION_SEQUENCES = 32
COMPARED_SEQUENCES = 16  # of validation, with all their variants


def train(
    run_dir: str | os.PathLike[str],
    model: MCConfig | None = None,
    settings: TrainConfig | None = None,
    *,
    resume: bool = False,
    profile: bool = False,
    report: Callable[[StepReport], None] = lambda _: None,
    sinks: Sequence[MetricSink] = (),
    stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train in a new run folder, or continue the run that a folder holds.

    Args:
        model, settings: of a new run; a resumed run takes its own from ``config.json``.
        profile: take a trace of a few of the steps, see `megacontext.step_profile`, in which every
            LensNet call and every phase of a micro-step is a range.
        report: called after every logged step.
        sinks: get the metrics of every logged step, after a checkpoint that was due.
        stop: asked before the first step and after each. When it says so on one of several
            processes, all of them end after that step, with a checkpoint of it.

    Raises:
        FileExistsError, FileNotFoundError: the folder does not fit ``resume``.
        ValueError: settings, text or checkpoint that do not fit; nothing was written then.
        OSError: a file cannot be written; named. The last checkpoint is kept.
        TrainingStopped: ``stop`` said so, and there were steps left.
        LensNetViolation: something called LensNet that may not.
        ImportError: a library that the settings need is not installed; nothing was written then.
        MetricSinkError: a sink failed; the run was saved at that step, by several
            processes at its last checkpoint.
    """
    folder = RunFolder(run_dir)
    saved = read_run(folder) if resume else None
    if saved is not None:
        model, settings = saved_model(folder, saved.model), saved.settings
    model, settings = model or MCConfig(), settings or TrainConfig()
    device = usable_device(device_name(settings.device))
    check_language_model(model)  # before much text becomes tokens
    source = load_source(settings, model)
    with joined_world(device) as world:
        world.check(settings)
        boards = [TensorBoardSink(folder.tensorboard)] if settings.tensorboard else []
        trainer = _Trainer(model, settings, source, folder, device, world, stop)
        if saved and saved.source.get("sha256") != source.description.get("sha256"):
            raise ValueError(
                f"the text has changed since {folder.path} was begun (its sha256 differs), "
                "so the run cannot be continued; start a new one"
            )
        if not resume:
            folder.require_new()  # so that all processes refuse
            world.wait()
        if world.first and not resume:
            folder.create(
                {
                    "model": dataclasses.asdict(model),
                    "train": dataclasses.asdict(settings),
                    "source": source.description,
                },
                kept_files(model.language_model),
            )
        world.wait()
        if not folder.config.exists():
            raise FileNotFoundError(
                f"process {world.rank} does not see {folder.config}, which the first one wrote: "
                "put the run folder where all processes can read and write"
            )
        with folder.locked() if world.first else nullcontext():
            if resume:
                trainer.restore()
            with (
                lensnet_guard(trainer.mc, log=folder.path) as guard,
                compare_ranks(guard) if world.size > 1 else nullcontext(),
                ExitStack() as stack,
            ):
                for board in boards:
                    stack.enter_context(closing(board))  # however the run ends
                told = [*boards, *sinks] if world.first else []
                cuts = trainer.run(report if world.first else lambda _: None, profile, told)
            world.wait()  # for all logs to be complete
        if trainer.stopped:
            raise TrainingStopped(
                f"stopped after step {trainer.step or trainer.lm_step}, and saved in {folder.path}"
            )
        verdict = read_verdict(folder.path)
        result = TrainResult(
            verdict=verdict,
            metrics=next(reversed(folder.read_metrics()), {}),
            validation_loss=trainer.validation_loss(),
            unigram_entropy=source.unigram_entropy(),
            run_dir=folder.path,
            profile=folder.profile if profile and cuts is not None else None,
        )
        if world.first:
            from megacontext.overview import draw_overview  # matplotlib is slow to import

            draw_overview(folder, verdict, cuts, source.unigram_entropy())
        world.wait()
    return result


class _Trainer:
    """The state of a run: model, optimizer, random generators, step."""

    def __init__(
        self,
        model: MCConfig,
        settings: TrainConfig,
        source: Source,
        folder: RunFolder,
        device: torch.device,
        world: World,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.settings = settings
        self.source = source
        self.folder = folder
        self.device = device
        self.world = world
        self.stop = stop
        self.stopped = False
        self.lm_step = 0
        self.step = 0
        self.means = RunningMeans(device)  # of metrics, since the last logged step
        self.mc = MCController(model, bf16=settings.bf16).to(device)
        self.mc.language_model.recompute = settings.recompute
        if settings.compile:
            self.mc.compile_networks()
        self.call = DataParallel(self.mc, world, shard=settings.shard)
        lens = [*self.mc.lensnet.parameters()]
        if model.language_model:  # GistNet is new, and learns as LensNet does
            lens += self.mc.gistnet.parameters()
        rest = [p for p in self.mc.parameters() if p not in set(lens)]
        self.optimizer = new_optimizer(
            [(rest, settings.learning_rate), (lens, settings.lens_learning_rate)]
        )
        # A range in a trace, only on demand: it is not free where no trace is taken.
        self.phase: Callable[[str], AbstractContextManager[object]] = nullcontext

    def run(
        self, report: Callable[[StepReport], None], profile: bool, sinks: Sequence[MetricSink]
    ) -> Cuts | None:
        """All remaining steps; returns the last micro-step's cuts, to look at."""
        settings, cuts = self.settings, None
        if self.step == 0 and self.lm_step == 0:
            self.save()  # so that a run can be resumed from its first moment
        with self.mc.context("training"):
            own_gradients(self.mc.language_model.parameters())
            self.call.train(self.mc.language_model)
            self._hear()
            while self.lm_step < settings.lm_steps and not self.stopped:
                loss = self._lm_step()
                self.lm_step += 1
                last = self.lm_step == settings.lm_steps
                if last or self.lm_step % settings.log_interval == 0:
                    row = {"lm_loss": float(self.world.sum(loss)) / self.world.size}
                    report(StepReport("language model", self.lm_step, settings.lm_steps, row))
                if self._hear() or last or self.lm_step % settings.checkpoint_interval == 0:
                    self._check_finite(self.lm_step)
                    self.save()
        if self.stopped:
            return None
        profile = profile and self.world.first
        steps = settings.steps - self.step if profile else 0
        self.phase = record_function if profile else nullcontext
        with (
            self.mc.context("training"),
            step_profile(self.folder.profile, steps, cuda=self.device.type == "cuda") as end_step,
        ):
            own_gradients(self.mc.parameters())
            self.call.train(self.mc)
            while self.step < settings.steps and not self.stopped:
                cuts = self._optimizer_step()
                self.step += 1
                last = self.step == settings.steps
                checkpoint = self._hear() or last or self.step % settings.checkpoint_interval == 0
                if checkpoint or self.step % settings.log_interval == 0:
                    self._check_finite(self.step)
                logged = last or self.step % settings.log_interval == 0
                if logged:
                    row = self.means.take(self.world.sum) | {
                        "validation_loss": self.validation_loss(),
                        "validation_agreement": self.validation_agreement(),
                    }
                    if self.world.first:
                        self.folder.append_metrics({"step": self.step, **row})
                    report(StepReport("training", self.step, settings.steps, row))
                if checkpoint:
                    self.save()
                if logged:
                    self._tell(sinks, row, cuts)
                end_step()
        return cuts

    def _hear(self) -> bool:
        """Whether one of the processes is to stop: all of them do then, if there is more to do."""
        more = self.step < self.settings.steps
        self.stopped = self.world.any(self.stop()) and more
        return self.stopped

    def _tell(self, sinks: Sequence[MetricSink], row: dict[str, float], cuts: Cuts) -> None:
        """Tell the sinks, between two steps: nothing of this step is open any more."""
        try:
            write_all(sinks, self.step, row, cuts)
        except MetricSinkError as error:
            saved = "at its last checkpoint"
            if self.world.size == 1:  # else the others would have to take part
                self.save()
                saved = "at that step"
            raise MetricSinkError(
                f"{error}; the run is saved {saved} in {self.folder.path}: continue it with "
                "--resume"
            ) from error.__cause__

    def _lm_step(self) -> Tensor:
        """One step of the language model alone; its loss, of this process's sequences."""
        settings = self.settings
        rng = self._random_numbers(LM_DATA, self.lm_step)
        sequence_tokens = self.mc.config.sequence_tokens
        batch = self.source.lm_batch(rng, settings.lm_batch_size, sequence_tokens)
        batch = batch.share(self.world.rank, self.world.size).to(self.device)
        loss: Tensor = self.call("full_detail_loss", batch.tokens, batch.labelled)
        torch.autograd.backward(loss)
        rate = min(1.0, (self.lm_step + 1) / max(settings.warmup_steps, 1))
        update(self.optimizer, rate, settings.clip_norm)
        return loss.detach()

    def _optimizer_step(self) -> Cuts:
        """This process's micro-steps of one step; the last one's cuts."""
        settings, config = self.settings, self.mc.config
        own = settings.accumulation // self.world.size
        for micro_step in range(own):
            # Sequences and cuts go by the micro-step's number within the run, whoever does it.
            number = self.step * settings.accumulation + micro_step * self.world.size
            number += self.world.rank
            rng = self._random_numbers(DATA, number)
            batch = self.source.batch(rng, settings.batch_size, config.sequence_tokens)
            batch = batch.to(self.device)
            self.mc.allocator.drawn = number * settings.batch_size * config.num_variants
            with self.call.adding_up(last=micro_step == own - 1):
                with self.phase("process_batch"):
                    result: MCBatchResult = self.call(
                        "process_batch",
                        batch.tokens,
                        step=self.step,
                        micro_step=micro_step,
                        labelled=batch.labelled,
                    )
                with self.phase("backward"):
                    torch.autograd.backward(result.loss / own)
            self.means.add({"loss": result.loss.detach(), **result.metrics})
        with self.phase("optimizer"):
            rate = rate_at(self.step, settings.steps, settings.warmup_steps)
            update(self.optimizer, rate, settings.clip_norm)
        return result.variants.cuts

    def _random_numbers(self, purpose: int, number: int) -> np.random.Generator:
        """By what they are for alone, so that nothing of them need be saved."""
        return np.random.default_rng([self.mc.config.seed, purpose, number])

    def _check_finite(self, step: int) -> None:
        """Stop before a checkpoint of a model that has diverged replaces a good one.

        All processes must call it together, and all stop when one must.
        """
        weights = map(local_part, self.mc.parameters())
        healthy = [weight.detach().isfinite().all() for weight in weights]
        diverged = ~torch.stack([*healthy, self.means.finite()]).all()
        if bool(self.world.sum(diverged.float())):
            raise FloatingPointError(
                f"the loss or the weights are no longer finite at step {step}; the last checkpoint "
                f"in {self.folder.path} is kept: train anew with lower learning rates"
            )

    def validation_loss(self) -> float:
        """Of the language model on the same held-out windows every time, nats per label."""
        batch = self.source.held_out_batch(
            np.random.default_rng(0), VALIDATION_SEQUENCES, self._validation_tokens()
        ).to(self.device)
        with torch.no_grad():
            return float(self.call("full_detail_loss", batch.tokens, batch.labelled))

    def validation_agreement(self) -> float:
        """Of LensNet with the preference pairs of the same held-out sequences every time."""
        batch = self.source.held_out_batch(
            np.random.default_rng(0), COMPARED_SEQUENCES, self.mc.config.sequence_tokens
        ).to(self.device)
        with torch.no_grad():  # also around the call, or DDP would wait for a backward
            return float(self.call("held_out_agreement", batch.tokens, batch.labelled))

    def _validation_tokens(self) -> int:
        """As many as a working context has of text; recall needs room for its facts."""
        config = self.mc.config
        text = self.settings.data == "text"
        return config.train_wc_length if text else config.sequence_tokens

    def save(self) -> None:
        first = self.world.first
        weights = gathered(self.mc.state_dict(), keep=first)
        optimizer = gathered(self.optimizer.state_dict(), keep=first)
        means = self.means.state(self.world.sum)
        if self.world.first:
            self.folder.save_checkpoint(
                {
                    "lm_step": self.lm_step,
                    "step": self.step,
                    "means": means,
                    "model": weights,
                    "optimizer": optimizer,
                }
            )

    def restore(self) -> None:
        # Of a sharded run a device may not hold the whole.
        on = torch.device("cpu") if self.settings.shard else self.device
        state = self.folder.load_checkpoint(on)
        if state is not None:
            with reading(self.folder.checkpoint, ADVICE):
                self.lm_step, self.step = state["lm_step"], state["step"]
                if self.world.first:
                    self.means.load(state["means"])
                load_weights(self.mc, state["model"])
                load_optimizer(self.optimizer, state["optimizer"])
        if self.world.first:
            self.folder.drop_metrics_after(self.step)
