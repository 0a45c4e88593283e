"""What a post-mortem finds: runs, call sites, violations, calls in flight, and the verdict."""

from array import array
from collections import Counter
from dataclasses import dataclass, field

from lensnet_guard._text import count


@dataclass(frozen=True)
class Call:
    """A call, a refused call, or an unmet budget, as its line tells."""

    seq: int
    module: str
    kind: str
    reason: str | None
    context: str | None
    scope: str | None
    step: int | None
    micro_step: int | None
    thread: str
    grad_enabled: bool
    inputs: tuple[str, ...]
    stack: tuple[str, ...]
    caller: str
    timestamp: float | None
    message: str | None = None


@dataclass(frozen=True)
class Violation:
    """A violation, and what set it apart from the call that was allowed before it."""

    call: Call
    allowed: Call | None
    differences: tuple[str, ...]


@dataclass(frozen=True)
class Deviation:
    """A training micro-step that made other calls than were due."""

    step: int | None
    micro_step: int | None
    made: dict[str, int]
    due: dict[str, int]


@dataclass(frozen=True)
class CallSite:
    """Calls that one line of code made in one context and scope."""

    module: str
    context: str | None
    scope: str | None
    kind: str
    reason: str | None
    caller: str


@dataclass
class Run:
    """One run of one guard in one process.

    Attributes:
        log: the log's path without its suffix.
        started, last: timestamps of the first and the last line, seconds since the epoch.
        ended: ``run.end`` is there. running: the process still holds the file.
        training_calls, inference_calls: allowed ones; recomputes are counted apart.
        cut_off_calls: training calls in micro-steps that never ended.
        steps: step and number of every training micro-step, one after the other.
        forked: a worker forked from the process that had opened the log.
        micro_step_calls: calls that ran in every training micro-step, in order; in observe mode
            the violations among them too.
        in_flight: calls that had begun and not ended when the log stopped.
        unreadable: numbers of lines that are no event, the first of them.
        torn_at: number of the line in which the file ends.
    """

    log: str
    rank: str = "?"
    pid: int | None = None
    host: str = "?"
    module: str = "LensNet"
    mode: str = "?"
    argv: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    started: float | None = None
    last: float | None = None
    ended: bool = False
    running: bool = False
    events: int = 0
    training_calls: int = 0
    inference_calls: int = 0
    recomputes: int = 0
    cut_off_calls: int = 0
    micro_steps: int = 0
    micro_step_calls: "array[int]" = field(default_factory=lambda: array("I"))
    steps: "array[int]" = field(default_factory=lambda: array("q"))
    sites: Counter[CallSite] = field(default_factory=Counter)
    deviations: list[Deviation] = field(default_factory=list)
    deviation_count: int = 0
    violations: list[Violation] = field(default_factory=list)
    violation_count: int = 0
    in_flight: list[Call] = field(default_factory=list)
    unreadable: list[int] = field(default_factory=list)
    unreadable_count: int = 0
    torn_at: int | None = None
    hazards: list[str] = field(default_factory=list)
    hazard_count: int = 0
    lost_lines: int = 0
    dropped_segments: bool = False
    forked: bool = False
    unreadable_files: list[str] = field(default_factory=list)

    @property
    def died(self) -> bool:
        """The log stops before the end of the run, and nobody is writing it.

        A forked worker ends without a word; it has died only when a call was in flight.
        """
        return not (self.ended or self.running or (self.forked and not self.in_flight))


@dataclass(frozen=True)
class Divergence:
    """Ranks whose training calls differ: the first micro-step in which they do."""

    step: int
    calls: dict[str, int]


@dataclass(frozen=True)
class Analysis:
    """All runs of all logs, oldest first in each log."""

    runs: tuple[Run, ...]
    divergence: Divergence | None

    @property
    def latest(self) -> tuple[Run, ...]:
        """The last run of every log that says anything: the ones that the verdict is about."""
        return tuple({run.log: run for run in self.runs if run.events}.values())

    @property
    def verdict(self) -> str:
        """One line: clean, violations, a crash and where, a damaged log, or still running."""
        runs = self.latest
        if not runs:
            return "unreadable: no line of the log is an event"
        for run in runs:
            if run.died and run.in_flight:
                call = run.in_flight[-1]
                where = f"call {call.seq} of {call.module}, called from {call.caller}"
                others = len(run.in_flight) - 1
                return f"crash in {where}" + (f", or in {others} more in flight" if others else "")
        for run in runs:
            if run.died:
                torn = f", log torn at line {run.torn_at}" if run.torn_at else ""
                return f"the process died outside any call of {run.module}{torn}"
        if violations := sum(run.violation_count for run in runs):
            told = count(violations, "violation")
            kept = [run.violations[0].call for run in runs if run.violations]
            if not kept:
                return f"{told}, in lines that are gone"
            return f"{told}, the first {kept[0].reason} at {kept[0].caller}"
        if self.divergence is not None:
            return f"ranks diverged at step {self.divergence.step}"
        if missed := sum(run.deviation_count for run in runs):
            return f"budget missed in {count(missed, 'micro-step')}"
        for run in self.runs:
            if run.unreadable_files:
                return f"log damaged: {run.unreadable_files[0]}"
        for run in runs:
            if run.torn_at or run.unreadable_count:
                line = run.torn_at or run.unreadable[0]
                return f"log damaged at line {line}"
            if run.lost_lines:
                return f"{run.lost_lines} lines of the log were lost"
        return "still running, clean so far" if any(run.running for run in runs) else "clean"

    @property
    def exit_code(self) -> int:
        """0 clean (or still running), 1 violations, crash or damage, 2 unreadable."""
        if self.verdict.startswith("unreadable"):
            return 2
        return 0 if self.verdict in ("clean", "still running, clean so far") else 1
