"""What a post-mortem finds: runs, call sites, violations, calls in flight, and the verdict."""

from array import array
from collections import Counter
from dataclasses import dataclass, field

from lensnet_guard._text import count

KEPT_NOTES = 200
KEPT_LINES = 20  # that are named where lines are unreadable


@dataclass(frozen=True)
class Call:
    """A call, a refused call, or an unmet budget, as its line tells.

    Attributes:
        seq: The number of the record; -1 where the line does not tell.
        module: The guard's name for the module.
        kind: ``"call"``, ``"recompute"``, ``"bypass"``, ``"micro_step"`` or ``"context"``.
        reason: For a violation the name of its class, else None.
        context: ``"training"``, ``"inference"`` or None.
        scope: The scope or sanctioned caller that applied.
        step: The number of the optimizer step; None outside a micro-step.
        micro_step: The number of the micro-batch in it, likewise.
        thread: The name of the thread that called.
        grad_enabled: Whether autograd was recording.
        inputs: Shape, dtype and device of each argument, as text.
        stack: The frames that led to the call, innermost first, as ``file:line in function``.
        caller: The frame outside the guard and torch.
        timestamp: Seconds since the epoch.
        message: Of a violation its message; of a call that raised, what.
        compiled: What torch told of compilation and CUDA graphs, in words.
    """

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
    """A violation, and what set it apart from the call that was allowed before it.

    Attributes:
        call: What was refused.
        allowed: The call before it, if there was one.
        differences: What the two do not have in common, in words.
    """

    call: Call
    allowed: Call | None
    differences: tuple[str, ...]


@dataclass(frozen=True)
class Deviation:
    """A training micro-step that made other calls than were due.

    Attributes:
        step: The number of the optimizer step.
        micro_step: The number of the micro-batch in it.
        made: Calls that were made, by scope.
        due: Calls that had to be made, by scope.
    """

    step: int | None
    micro_step: int | None
    made: dict[str, int]
    due: dict[str, int]


@dataclass(frozen=True)
class CallSite:
    """Calls that one line of code made in one context and scope.

    Attributes:
        module: The guard's name for the module.
        context: ``"training"``, ``"inference"`` or None.
        scope: The scope or sanctioned caller that applied.
        kind: As of a `Call`.
        reason: For violations the name of their class, else None.
        caller: The line, as ``file:line in function``.
    """

    module: str
    context: str | None
    scope: str | None
    kind: str
    reason: str | None
    caller: str


@dataclass
class Notes:
    """Sentences of one kind.

    Attributes:
        count: How many there are.
        kept: The first of them.
    """

    count: int = 0
    kept: list[str] = field(default_factory=list)

    def add(self, note: str) -> None:
        """Count one more, and keep it if it is one of the first."""
        self.count += 1
        if len(self.kept) < KEPT_NOTES:
            self.kept.append(note)


@dataclass
class Run:
    """One run of one guard in one process.

    Attributes:
        log: The log's path without its suffix.
        rank: The process's rank, ``"?"`` where the log does not tell.
        pid: The process.
        host: The machine's name.
        module: The guard's name for the module.
        mode: The guard's mode.
        argv: The process's command line.
        versions: The versions of what the run needs, by name.
        started: The time of the first line, in seconds since the epoch.
        last: The time of the last line, likewise.
        ended: Whether ``run.end`` is there.
        running: Whether the process still holds the file.
        events: How many lines are events.
        training_calls: How many calls were allowed in training; recomputes are counted apart.
        inference_calls: How many calls were allowed in any other context.
        recomputes: How many calls ran again.
        cut_off_calls: How many training calls were made in micro-steps that never ended.
        micro_steps: How many training micro-steps have ended, but for those that were broken off.
        micro_step_calls: How many calls ran in each of them, in order; in observe mode the
            violations among them too.
        steps: Step and number of each of them, one after the other.
        sites: How many calls each call site has made.
        deviations: Micro-steps that made other calls than were due, the first of them.
        deviation_count: How many there are.
        violations: The first violations.
        violation_count: How many there are.
        in_flight: Calls that had begun and not ended when the log stopped.
        raised: The last call, if it raised and nothing came after.
        raised_count: How many calls raised.
        unreadable: Lines that are no event, as ``file:line``, the first of them.
        torn_at: The line in which a file ends, as ``file:line``.
        hazards: Outputs in use that a call was about to overwrite.
        overwritten: Outputs that torch says have been overwritten.
        compilations: Calls that made torch compile, or give up CUDA graphs for a function.
        phases: How many calls torch's CUDA graphs warmed up, recorded and replayed.
        damage: Files that cannot be read, and lines that ought to be there.
        lost_lines: How many lines could not be written.
        dropped_segments: Whether the first files of the log are gone, as in a long run.
        forked: Whether the process was forked from the one that had opened the log.
        parent: The pid of the process that a worker was forked or spawned by; None for the first.
        process: What tells the process from the others that wrote to the folder.
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
        """Whether the log stops before the end of the run, and nobody is writing it.

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
    """Ranks whose training calls differ.

    Attributes:
        step: The step of the first micro-step in which they do.
        calls: The calls that each rank made in it.
    """

    step: int
    calls: dict[str, int]


@dataclass(frozen=True)
class Analysis:
    """All runs of all logs, oldest first in each log.

    Attributes:
        runs: The runs.
        divergence: Where ranks went apart, if they did.
        verdict: One line: clean, violations, a crash and where, a damaged log, or still running.
        exit_code: 0 clean (or still running), 1 violations, crash or damage, 2 unreadable.
    """

    runs: tuple[Run, ...]
    divergence: Divergence | None
    verdict: str
    exit_code: int
