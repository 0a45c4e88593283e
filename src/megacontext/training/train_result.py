"""What a run tells while it lasts, and how it ends."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from lensnet_guard.postmortem import LogVerdict


@dataclass(frozen=True)
class StepReport:
    """What is told after a logged step.

    Attributes:
        phase: ``"language model"`` or ``"training"``.
        step: Steps of the phase so far.
        steps: Steps of the whole phase.
        metrics: Means since the last report, by name.
    """

    phase: str
    step: int
    steps: int
    metrics: dict[str, float]


Report: TypeAlias = Callable[[StepReport], None]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        verdict: From the guard's log file.
        metrics: Of the last logged step; none where its line is gone.
        validation_loss: Of the language model on held-out data at full detail, nats per label.
        unigram_entropy: Of the held-out data, nats per label.
        run_dir: The run folder.
        profile: The trace of some of the steps that were made now; None where it was not asked for,
            and where there were no steps left to make.
    """

    verdict: LogVerdict
    metrics: dict[str, float | None]
    validation_loss: float
    unigram_entropy: float
    run_dir: Path
    profile: Path | None


class TrainingStopped(Exception):
    """A run ended early, because it was asked to; the message says where it is saved."""
