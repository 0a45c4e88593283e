"""The verdict on a run folder in a line of numbers, for programs that train."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lensnet_guard._text import count
from lensnet_guard.postmortem.analysis import analyse
from lensnet_guard.postmortem.findings import Run, Sums
from lensnet_guard.postmortem.judge import current_runs
from lensnet_guard.postmortem.plain import plain


@dataclass(frozen=True)
class LogVerdict:
    """What a run folder's logs say.

    Attributes:
        module: The guarded module's name; of several, ``"reference, critic"``.
        micro_steps: Training micro-steps that ended; of several modules, those of the one that has
            the most.
        calls: Training calls that were allowed, in micro-steps that ended.
        inference_calls: Calls in inference context.
        violations: Violations of any kind.
        cut_off_calls: Training calls in micro-steps that never ended, because the process died.
        calls_per_micro_step: Calls of each training micro-step, in log order; none of several
            modules.
        unreadable_lines: Lines that are no JSON object, such as the last one of a killed process.
        lost_lines: Lines that a run reported as not written.
        clean: The post-mortem finds nothing wrong, and the logs go on to the end of the run.
        ended: Whether every log file ends with ``run.end``; a killed process leaves none, nor does
            one whose disk was full.
        modules: Of several modules, what each of them did, by its name.
    """

    module: str
    micro_steps: int
    calls: int
    inference_calls: int
    violations: int
    cut_off_calls: int
    calls_per_micro_step: tuple[int, ...]
    unreadable_lines: int
    lost_lines: int
    ended: bool
    clean: bool
    modules: Mapping[str, Sums] = field(default_factory=dict, metadata={"told": "if any"})

    def __str__(self) -> str:
        """Say it in a line for each module."""
        lines = [f"{module}: {sums}" for module, sums in self.modules.items()]
        if not lines:
            told = (
                count(self.micro_steps, "micro-step"),
                count(self.calls, f"{self.module} call"),
                count(self.violations, "violation"),
            )
            lines = [", ".join(told)]
        extras = {
            "inference call": self.inference_calls if not self.modules else 0,
            "cut-off call": self.cut_off_calls,
            "unreadable line": self.unreadable_lines,
            "lost line": self.lost_lines,
        }
        lines[-1] += "".join(f"; {count(n, what)}" for what, n in extras.items() if n)
        lines[-1] += "" if self.ended else "; the log stops before the end of the run"
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as a JSON-ready object, without the list of calls per micro-step."""
        fields: dict[str, Any] = plain(self)
        del fields["calls_per_micro_step"]
        return fields


def read_verdict(folder: str | os.PathLike[str]) -> LogVerdict:
    """Read every ``lensnet.rank*.jsonl`` of a run folder.

    Raises:
        FileNotFoundError: There is no log in the folder.
    """
    analysis = analyse([folder])
    runs = analysis.runs
    cut_off = sum(run.cut_off_calls for run in runs)
    ended = all(run.ended for run in current_runs(runs))
    return LogVerdict(
        module=runs[-1].module,
        micro_steps=sum(run.micro_steps for run in runs),
        modules=_added_up(runs),
        calls=sum(run.training_calls for run in runs) - cut_off,
        inference_calls=sum(run.inference_calls for run in runs),
        violations=sum(run.violation_count for run in runs),
        cut_off_calls=cut_off,
        calls_per_micro_step=tuple(n for run in runs for n in run.micro_step_calls),
        unreadable_lines=sum(run.unreadable.count for run in runs),
        lost_lines=sum(run.lost_lines for run in runs),
        ended=ended,
        clean=ended and analysis.exit_code == 0,
    )


def _added_up(runs: Iterable[Run]) -> dict[str, Sums]:
    """Return what each of several modules did in all runs."""
    added: dict[str, Sums] = {}
    for run in runs:
        for module, sums in run.modules.items():
            before = added.setdefault(module, Sums())
            for name, value in vars(sums).items():
                setattr(before, name, getattr(before, name) + value)
    return added
