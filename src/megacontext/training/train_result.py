"""What a run tells while it lasts, and how it ends."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from lensnet_guard.postmortem import LogVerdict


@dataclass(frozen=True)
class StepReport:
    """What the progress display gets: which phase, step, of how many, metrics."""

    phase: str
    step: int
    steps: int
    metrics: dict[str, float]


Report: TypeAlias = Callable[[StepReport], None]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        verdict: from the guard's log file.
        metrics: of the last logged step; none where its line is gone.
        validation_loss: of the language model on held-out data at full detail, nats per label.
        unigram_entropy: of the held-out data, nats per label.
        run_dir: the run folder.
        profile: the trace of some of the steps that were made now; None where it was not asked for,
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
