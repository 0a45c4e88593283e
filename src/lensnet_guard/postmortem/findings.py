"""What a post-mortem finds: runs, call sites, violations, calls in flight, and the verdict."""

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType

from lensnet_guard._text import budget_text, count

KEPT_NOTES = 200
_EXPLAINED = "lensnet-guard explain overwritten-graph-outputs"
KEPT_LINES = 20  # that are named where lines are unreadable

Due = int | tuple[int, int | None]
"""A budget: exactly so many calls, or from the first number to the second; None: any number."""

# Of fields that `plain.plain` leaves out: always, and where they say nothing, as of logs of before.
_NEVER: Mapping[str, str] = MappingProxyType({"told": "never"})
_IF_ANY: Mapping[str, str] = MappingProxyType({"told": "if any"})


@dataclass(frozen=True)
class Call:
    """A call, a refused call, or an unmet budget, as its line tells.

    Attributes:
        seq: The number of the record; -1 where the line does not tell.
        module: The guard's name for the module.
        kind: ``"call"``, ``"recompute"``, ``"bypass"``, ``"result"``, ``"micro_step"``,
            ``"window"`` or ``"context"``.
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
        method: The method or part that was called; None for the module.
        mistake: Of a violation the entry of docs/mistakes.md that explains it, if one does.
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
    method: str | None = field(default=None, metadata=_IF_ANY)
    mistake: str | None = field(default=None, metadata=_IF_ANY)

    @property
    def called(self) -> str:
        """What was called: the module, or ``module.method``."""
        return _called(self.module, self.method)


def _called(module: str, method: str | None) -> str:
    return module if method is None else f"{module}.{method}"


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
    """A training micro-step, or another window, that made other calls than were due.

    Attributes:
        step: The number of the optimizer step; None of another window.
        micro_step: The number of the micro-batch in it, likewise.
        made: Calls that were made, by scope.
        due: Calls that had to be made, by scope.
        window: The window's name; None of a micro-step.
        number: The window's number among those of its name, from 1.
        module: The guard's name for the module, in a log of several.
    """

    step: int | None
    micro_step: int | None
    made: dict[str, int]
    due: dict[str, Due]
    window: str | None = field(default=None, metadata=_IF_ANY)
    number: int | None = field(default=None, metadata=_IF_ANY)
    module: str | None = field(default=None, metadata=_IF_ANY)

    def __str__(self) -> str:
        """Say where it was, and what was made of what was due."""
        where = f"step {self.step}, micro-step {self.micro_step}"
        if self.window is not None:
            where = f'window "{self.window}" {self.number}'
        scopes = {**dict.fromkeys(self.due, 0), **self.made}
        made = ", ".join(
            f"{scope} made {n} of {budget_text(self.due.get(scope, 0))}"
            for scope, n in scopes.items()
        )
        return f"{where}: {made}" if self.module is None else f"{self.module}, {where}: {made}"


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
        method: As of a `Call`.
    """

    module: str
    context: str | None
    scope: str | None
    kind: str
    reason: str | None
    caller: str
    method: str | None = field(default=None, metadata=_IF_ANY)

    @property
    def called(self) -> str:
        """What was called: the module, or ``module.method``."""
        return _called(self.module, self.method)


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
class Sums:
    """What one module of several did in a run.

    Attributes:
        training_calls: As of a `Run`.
        inference_calls: As of a `Run`.
        recomputes: As of a `Run`.
        cut_off_calls: As of a `Run`.
        micro_steps: As of a `Run`.
        micro_step_calls: As of a `Run`.
        steps: As of a `Run`.
        violation_count: As of a `Run`.
    """

    training_calls: int = 0
    inference_calls: int = 0
    recomputes: int = 0
    cut_off_calls: int = 0
    micro_steps: int = 0
    micro_step_calls: "array[int]" = field(default_factory=lambda: array("I"), metadata=_NEVER)
    steps: "array[int]" = field(default_factory=lambda: array("q"), metadata=_NEVER)
    violation_count: int = 0

    def __str__(self) -> str:
        """Say it in a line."""
        return ", ".join(
            (
                f"{count(self.training_calls, 'training call')} in "
                f"{count(self.micro_steps, 'micro-step')}",
                count(self.inference_calls, "inference call"),
                count(self.recomputes, "recompute"),
                count(self.violation_count, "violation"),
            )
        )


@dataclass
class Run:
    """One run of one guard, or of the guards of several modules, in one process.

    Attributes:
        log: The log's path without its suffix.
        rank: The process's rank, ``"?"`` where the log does not tell.
        pid: The process.
        host: The machine's name.
        module: The guard's name for the module; of several, ``"reference, critic"``.
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
        micro_steps: How many training micro-steps have ended, but for those that were broken off;
            of several modules, those of the one that has the most.
        micro_step_calls: How many calls ran in each of them, in order; in observe mode the
            violations among them too. Empty where there are several modules.
        steps: Step and number of each of them, one after the other, likewise.
        sites: How many calls each call site has made.
        deviations: Micro-steps and other windows that made other calls than were due, the first.
        deviation_count: How many of them are micro-steps.
        missed_windows: How many of them are other windows.
        modules: In a log of several modules, what each of them did, by its name.
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
    micro_step_calls: "array[int]" = field(default_factory=lambda: array("I"), metadata=_NEVER)
    steps: "array[int]" = field(default_factory=lambda: array("q"), metadata=_NEVER)
    sites: Counter[CallSite] = field(default_factory=Counter)
    deviations: list[Deviation] = field(default_factory=list)
    deviation_count: int = 0
    missed_windows: int = field(default=0, metadata=_IF_ANY)
    modules: dict[str, Sums] = field(default_factory=dict, metadata=_IF_ANY)
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
    def sums(self) -> Mapping[str, Sums]:
        """What each module did, by its name; by no name where there is only one."""
        if self.modules:
            return self.modules
        return {"": Sums(**{f.name: getattr(self, f.name) for f in fields(Sums)})}

    @property
    def who(self) -> str:
        """The process, and whose worker it is."""
        worker = f" (a worker of {self.parent})" if self.parent is not None else ""
        return f"process {self.pid}{worker} on {self.host}"

    @property
    def remarks(self) -> list[tuple[str, Notes]]:
        """What there is to say about compilation and CUDA graphs, with a title for each list."""
        lists = (
            (f"outputs overwritten ({_EXPLAINED})", self.overwritten),
            (f"CUDA graph hazards ({_EXPLAINED})", self.hazards),
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
            left = "only the sum of all calls counts" if self.modules else "sums count"
            faults.append(f"older segments were dropped: {left}, call sites are gone")
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
