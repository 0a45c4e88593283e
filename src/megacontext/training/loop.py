"""The loop of a run: its steps, its checkpoints, its validation; what a step is, trainers say.

A run has phases, one after another, and `TrainingLoop._make_steps` is what all of them go through.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.profiler import record_function

from megacontext.config import MCConfig
from megacontext.controller import MCController
from megacontext.data.source import Source
from megacontext.files import reading
from megacontext.micro_step import Cuts, LensResult
from megacontext.training.distributed import (
    DataParallel,
    World,
    gathered,
    load_optimizer,
    load_weights,
    local_part,
)
from megacontext.training.metric_sinks import MetricSink, MetricSinkError, write_all
from megacontext.training.optimization import new_optimizer, rate_at, train_alone, update
from megacontext.training.run_folder import ADVICE, RunFolder
from megacontext.training.running_means import RunningMeans
from megacontext.training.step_profile import step_profile
from megacontext.training.train_config import TrainConfig
from megacontext.training.train_result import Report, StepReport

LM_DATA, DATA = 0, 1  # what random numbers are for
VALIDATION_SEQUENCES = 32
COMPARED_SEQUENCES = 16  # of validation, with all their variants


@dataclass(frozen=True)
class Phase:
    """Steps of one kind.

    Attributes:
        name: As reports call it.
        trained: Whose gradients there are.
        done: Steps that were made before.
        steps: Steps of the whole phase.
        make_step: Makes the next one; returns how many there were then.
        log: Gives the metrics since the last logged step, which it keeps where that is due.
        sinks: Are told of them.
        prepare: Is called before the first of the steps that are left.
    """

    name: str
    trained: nn.Module
    done: int
    steps: int
    make_step: Callable[[], int]
    log: Callable[[], dict[str, float]]
    sinks: Sequence[MetricSink] = ()
    prepare: Callable[[], None] = lambda: None


class TrainingLoop(ABC):
    """The state of a run: model, optimizer, steps; its subclasses say what a step is.

    Args:
        model: Sizes.
        settings: How to train.
        source: Where sequences come from.
        folder: Takes checkpoints and metrics.
        device: Of this process.
        world: The processes of the run.
        stop: Asked before the first step and after each, whether to end.

    Attributes:
        counters: Names of the attributes that count steps; a checkpoint has them.
        mc: The controller that is trained.
        call: Calls methods of the controller so that all processes train the same weights.
        step: Steps of the last phase so far.
        stopped: Whether the run ended because it was asked to.
        cuts: Those of the last micro-step, to look at; None before the first one.
    """

    counters: tuple[str, ...] = ("step",)

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
        self.step = 0
        self.cuts: Cuts | None = None
        self.means = RunningMeans(device)  # of metrics, since the last logged step
        self._frozen_loss: float | None = None  # validation of what does not change
        self.loss_alone = torch.zeros((), device=device)  # of the last step of one network alone
        self.mc = MCController(model, bf16=settings.bf16).to(device)
        self.mc.language_model.recompute = settings.recompute
        if settings.compile:
            self.mc.compile_networks()
        self.call = DataParallel(self.mc, world, shard=settings.shard)
        self.optimizer = _optimizer_of(self.mc, settings)
        # A range in a trace, only on demand: it is not free where no trace is taken.
        self.phase: Callable[[str], AbstractContextManager[object]] = nullcontext

    @property
    def done(self) -> int:
        """Steps of the phase that the run is in."""
        counts = [getattr(self, name) for name in self.counters]
        return next((count for count in reversed(counts) if count), 0)

    def run(self, report: Report, sinks: Sequence[MetricSink], *, profile: bool = False) -> None:
        """Make all remaining steps.

        Args:
            report: Called after every logged step.
            sinks: Get the metrics of every logged step of all networks.
            profile: Take a trace of some of them, in the first process.

        Raises:
            FloatingPointError: A loss or weights that are no longer finite; nothing was saved then.
            MetricSinkError: A sink failed; the run was saved at that step, by several processes at
                its last checkpoint.
        """
        if not any(phase.done for phase in self.phases(report, sinks)):
            self.save()  # so that a run can be resumed from its first moment
        self._hear()
        *before, last = self.phases(report, sinks)
        for phase in before:
            if phase.done < phase.steps and not self.stopped:  # else it may be of what is frozen
                self._make_steps(phase, report)
        if self.stopped:
            return
        profile = profile and self.world.first
        steps = last.steps - last.done if profile else 0
        self.phase = record_function if profile else nullcontext
        with step_profile(self.folder.profile, steps, cuda=self.device.type == "cuda") as end_step:
            self._make_steps(last, report, end_step)

    @abstractmethod
    def phases(self, report: Report, sinks: Sequence[MetricSink]) -> list[Phase]:
        """Return the phases of the run, in their order, as they stand now.

        Args:
            report: Is told of what a phase prepares.
            sinks: Get the metrics of the last one.

        Returns:
            The phases.
        """

    @abstractmethod
    def validation_agreement(self) -> float:
        """Compare LensNet with the preferences of the same held-out sequences every time."""

    def _make_steps(
        self, phase: Phase, report: Report, end_step: Callable[[], object] = lambda: None
    ) -> None:
        """Make the steps of a phase that are left."""
        settings, step = self.settings, phase.done
        phase.prepare()
        with self.mc.context("training"):
            train_alone(self.mc.parameters(), phase.trained.parameters())
            self.call.train(phase.trained)
            while step < phase.steps and not self.stopped:
                step = phase.make_step()
                last = step == phase.steps
                checkpoint = self._hear() or last or step % settings.checkpoint_interval == 0
                logged = last or step % settings.log_interval == 0
                if checkpoint or logged:
                    self._check_finite(step)
                if logged:
                    row = phase.log()
                    report(StepReport(phase.name, step, phase.steps, row))
                if checkpoint:
                    self.save()
                if logged:
                    self._tell(phase.sinks, row)
                end_step()

    def _hear(self) -> bool:
        """Tell whether a process is to stop: all of them do then, if there is more to do."""
        more = self.step < self.settings.steps
        self.stopped = self.world.any(self.stop()) and more
        return self.stopped

    def _tell(self, sinks: Sequence[MetricSink], row: dict[str, float]) -> None:
        """Tell the sinks, between two steps: nothing of this step is open any more."""
        try:
            write_all(sinks, self.step, row, self.cuts or ())
        except MetricSinkError as error:
            saved = "at its last checkpoint"
            if self.world.size == 1:  # else the others would have to take part
                self.save()
                saved = "at that step"
            raise MetricSinkError(
                f"{error}; the run is saved {saved} in {self.folder.path}: continue it with "
                "--resume"
            ) from error.__cause__

    def log_alone(self) -> dict[str, float]:
        """Return the loss of the last step of one network alone; it is kept nowhere."""
        return {"lm_loss": float(self.world.sum(self.loss_alone)) / self.world.size}

    def make_micro_steps(
        self,
        step: int,
        steps: int,
        micro_step: Callable[[int, int, int], LensResult],
        share: float = 1.0,
    ) -> None:
        """Make this process's micro-steps of an optimizer step, and the step.

        Args:
            step: Its number within the phase.
            steps: Of the phase.
            micro_step: Gives the loss of one, and its metrics; is told its number within the phase,
                the step, and its number within that.
            share: Of the peak learning rates.
        """
        settings = self.settings
        own = settings.accumulation // self.world.size
        for micro in range(own):
            # Sequences and cuts go by the micro-step's number within the run, whoever does it.
            number = step * settings.accumulation + micro * self.world.size + self.world.rank
            with self.call.adding_up(last=micro == own - 1):
                with self.phase("process_batch"):
                    result = micro_step(number, step, micro)
                with self.phase("backward"):
                    torch.autograd.backward(result.loss / own)
            self.means.add({"loss": result.loss.detach(), **result.metrics})
        with self.phase("optimizer"):
            rate = share * rate_at(step, steps, settings.warmup_steps)
            update(self.optimizer, rate, settings.clip_norm)

    def log(self) -> dict[str, float]:
        """Return means since the last logged step and the validation, which the folder keeps."""
        row = self.means.take(self.world.sum) | {
            "validation_loss": self.validation_loss(),
            "validation_agreement": self.validation_agreement(),
        }
        self.folder.append_metrics({"step": self.step, **row})
        return row

    def _check_finite(self, step: int) -> None:
        """Stop all processes before a model that has diverged replaces a good checkpoint."""
        weights = map(local_part, self.mc.learned.parameters())
        healthy = [weight.detach().isfinite().all() for weight in weights]
        diverged = ~torch.stack([*healthy, self.means.finite()]).all()
        if bool(self.world.sum(diverged.float())):
            raise FloatingPointError(
                f"the loss or the weights are no longer finite at step {step}; the last checkpoint "
                f"in {self.folder.path} is kept: train anew with lower learning rates"
            )

    def validation_loss(self) -> float:
        """Compute the loss on the same held-out windows every time, nats per label."""
        if self._frozen_loss is not None:
            return self._frozen_loss
        config, rng = self.mc.config, np.random.default_rng(0)
        text = self.settings.data == "text"  # as much as a working context has; others need all
        length = config.train_wc_length if text else config.sequence_tokens
        batch = self.source.held_out_batch(rng, VALIDATION_SEQUENCES, length).to(self.device)
        with self.mc.context("inference"), torch.no_grad():
            loss = float(self.call(self.mc.full_detail_loss, batch.tokens, batch.labelled))
        self._frozen_loss = loss if config.freeze_language_model else None
        return loss

    def save(self) -> None:
        """Replace the checkpoint; all processes must call it together.

        Raises:
            OSError: It cannot be written; the old one is kept.
        """
        first = self.world.first
        state = {
            **{name: getattr(self, name) for name in self.counters},
            "means": self.means.state(self.world.sum),
            "model": gathered(self.mc.learned.state_dict(), keep=first),
            "optimizer": gathered(self.optimizer.state_dict(), keep=first),
        }
        self.folder.save_checkpoint(state)

    def restore(self) -> None:
        """Go on at the newest checkpoint, if there is one.

        Raises:
            DamagedFileError: It cannot be read, or is of another model.
        """
        # Of a sharded run a device may not hold the whole.
        on = torch.device("cpu") if self.settings.shard else self.device
        state = self.folder.load_checkpoint(on)
        if state is not None:
            with reading(self.folder.checkpoint, ADVICE):
                for name in self.counters:
                    setattr(self, name, state[name])
                if self.world.first:  # means are summed over the processes
                    self.means.load(state["means"])
                load_weights(self.mc.learned, state["model"])
                load_optimizer(self.optimizer, state["optimizer"])
        self.folder.drop_metrics_after(self.step)


def _optimizer_of(mc: MCController, settings: TrainConfig) -> torch.optim.AdamW:
    """Make the optimizer of all networks, LensNet in a group of its own."""
    lens = [*mc.lensnet.parameters()]
    if mc.config.language_model:  # GistNet is new, and learns as LensNet does
        lens += mc.gistnet.parameters()
    rest = [p for p in mc.learned.parameters() if p not in set(lens)]
    return new_optimizer([(rest, settings.learning_rate), (lens, settings.lens_learning_rate)])


def random_numbers(seed: int, purpose: int, number: int) -> np.random.Generator:
    """Make random numbers by what they are for alone, so that nothing of them need be saved.

    Args:
        seed: Of the run.
        purpose: What they are for.
        number: Of the step, or what else there are many of.

    Returns:
        The generator.
    """
    return np.random.default_rng([seed, purpose, number])
