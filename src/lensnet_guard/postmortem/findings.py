"""What a post-mortem finds: runs, call sites, violations, calls in flight, and the verdict."""

from array import array
from collections import Counter
from dataclasses import dataclass, field

from lensnet_guard._text import count

KEPT_NOTES = 200
KEPT_LINES = 20  # that are named where lines are unreadable


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
    compiled: str | None = None


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
class Notes:
    """Sentences of one kind: how many there are, and the first of them."""

    count: int = 0
    kept: list[str] = field(default_factory=list)

    def add(self, note: str) -> None:
        """One more."""
        self.count += 1
        if len(self.kept) < KEPT_NOTES:
            self.kept.append(note)


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
        parent: the pid of the process that a worker was forked or spawned by; None for the first.
        micro_step_calls: calls that ran in every training micro-step, in order; in observe mode
            the violations among them too.
        in_flight: calls that had begun and not ended when the log stopped.
        raised: the last call, if it raised and nothing came after; raised_count: all that raised.
        unreadable: lines that are no event, as ``file:line``, the first of them.
        torn_at: the line in which a file ends, as ``file:line``.
        hazards: outputs in use that a call was about to overwrite.
        overwritten: outputs that torch says have been overwritten.
        compilations: calls that made torch compile, or give up CUDA graphs for a function.
        phases: calls by what torch's CUDA graphs did in them.
        damage: files that cannot be read, and lines that ought to be there.
        process: identifies the process among those that wrote to the folder.
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
    raised: Call | None = None
    raised_count: int = 0
    unreadable: Notes = field(default_factory=Notes)
    torn_at: str | None = None
    hazards: Notes = field(default_factory=Notes)
    overwritten: Notes = field(default_factory=Notes)
    compilations: Notes = field(default_factory=Notes)
    phases: Counter[str] = field(default_factory=Counter)
    damage: Notes = field(default_factory=Notes)
    lost_lines: int = 0
    dropped_segments: bool = False
    forked: bool = False
    parent: int | None = None
    process: str | None = None

    @property
    def died(self) -> bool:
        """The log stops before the end of the run, and nobody is writing it.

        A forked worker ends without a word; it has died only when a call was in flight.
        """
        return not (self.ended or self.running or (self.forked and not self.in_flight))

    @property
    def state(self) -> str:
        """How it stands with the run, in a word."""
        if self.ended or self.running:
            return "ended" if self.ended else "still running"
        return "died" if self.died else "left without a word"

    @property
    def who(self) -> str:
        """The process, and whose worker it is."""
        worker = f" (a worker of {self.parent})" if self.parent is not None else ""
        return f"process {self.pid}{worker} on {self.host}"

    @property
    def remarks(self) -> list[tuple[str, Notes]]:
        """What there is to say about compilation and CUDA graphs, with a title for each list."""
        lists = (
            ("outputs overwritten", self.overwritten),
            ("CUDA graph hazards", self.hazards),
            ("calls that compiled", self.compilations),
        )
        return [(title, notes) for title, notes in lists if notes.count]

    @property
    def log_faults(self) -> list[str]:
        """What is wrong with the log itself."""
        faults = list(self.damage.kept)
        if self.torn_at is not None:
            faults.append(f"a file ends inside line {self.torn_at}")
        if self.unreadable.count:
            where = ", ".join(self.unreadable.kept[:KEPT_LINES])
            faults.append(f"{count(self.unreadable.count, 'line')} unreadable: {where}")
        if self.lost_lines:
            faults.append(f"{count(self.lost_lines, 'line')} could not be written")
        if self.dropped_segments:
            faults.append("older segments were dropped: sums count, call sites are gone")
        return faults


@dataclass(frozen=True)
class Divergence:
    """Ranks whose training calls differ: the first micro-step in which they do."""

    step: int
    calls: dict[str, int]


@dataclass(frozen=True)
class Analysis:
    """All runs of all logs, oldest first in each log.

    Attributes:
        verdict: one line: clean, violations, a crash and where, a damaged log, or still running.
        exit_code: 0 clean (or still running), 1 violations, crash or damage, 2 unreadable.
    """

    runs: tuple[Run, ...]
    divergence: Divergence | None
    verdict: str
    exit_code: int
