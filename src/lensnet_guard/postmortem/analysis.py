"""From log files to findings, in one pass, line by line.

What is kept does not grow with the logs, but for twenty bytes per training micro-step.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from lensnet_guard import _schema
from lensnet_guard._text import count
from lensnet_guard.postmortem.events import (
    budgets,
    call_key,
    counts,
    is_met,
    modules_of,
    number,
    read_call,
    read_site,
    text,
    texts,
    whole,
)
from lensnet_guard.postmortem.findings import (
    Analysis,
    Call,
    Deviation,
    Divergence,
    Due,
    Run,
    Sums,
    Violation,
)
from lensnet_guard.postmortem.judge import current_runs, judge
from lensnet_guard.postmortem.reader import Line, OpenFile, open_logs, read_lines, segment_of

KEPT_VIOLATIONS = 200  # of each run, the first
KEPT_DEVIATIONS = 200


def analyse(
    targets: Iterable[str | os.PathLike[str]], progress: Callable[[int], object] = lambda _: None
) -> Analysis:
    """Read run folders and log files.

    Args:
        targets: Run folders and log files.
        progress: Is told of the bytes that were read.

    Returns:
        All runs, with the verdict on them.

    Raises:
        FileNotFoundError: A target does not exist, or a folder holds no log.
    """
    runs: list[Run] = []
    for log, files in open_logs(targets):
        reading = _Reading(log)
        for file in files:
            reading.take_file(file, progress)
        runs += reading.finish()
    divergence = _divergence(current_runs(runs))
    return Analysis(tuple(runs), divergence, *judge(runs, divergence))


class _Reading:
    """The lines of one log, taken in order."""

    def __init__(self, log: str) -> None:
        self.runs: list[Run] = []
        self._log = log
        self._file = ""
        self._held = False
        self._taken: float | None = None  # the number of the file before this one
        self._new_run()

    def _new_run(self) -> Run:
        self._open: dict[tuple[object, ...], Mapping[str, Any]] = {}
        self._allowed: dict[str, Mapping[str, Any]] = {}
        # By module, where there are several; and so are the numbers of windows.
        self._since_step: Counter[str] = Counter()
        self._ran_since_step: Counter[str] = Counter()
        self._windows: Counter[tuple[str, str]] = Counter()
        self._missed: tuple[object, set[str]] = None, set()
        self._micro_steps = 0  # of all modules, as the log's own sums count them
        self.run = Run(self._log)
        self.runs.append(self.run)
        return self.run

    def _module(self, event: Mapping[str, Any]) -> str:
        """Return the module that a line is about; nothing where there is only one."""
        return (text(event.get(_schema.MODULE)) or "?") if self.run.modules else ""

    def _sums(self, module: str) -> tuple[Run | Sums, ...]:
        """Return what counts that which a module does."""
        modules = self.run.modules
        return (self.run, modules.setdefault(module, Sums())) if modules else (self.run,)

    def take_file(self, file: OpenFile, progress: Callable[[int], object]) -> None:
        """Take all lines of a file; one that cannot be read hides no other."""
        self._held |= file.held  # between two files, a writer holds the one that is full
        self._file = file.path.name
        try:
            if file.lines is None:
                raise file.error or OSError("it cannot be opened")
            for line in read_lines(file.lines, progress):
                self.take(line)
        except OSError as error:
            self.run.damage.add(f"{file.path}: {error.strerror or error}")
        self._taken = segment_of(file.path)

    def take(self, line: Line) -> None:
        """Take one line; none of them raises."""
        run = self.run
        event = line.event
        if event is None:
            where = f"{line.number} of {self._file}"
            run.unreadable.add(where)
            if line.torn:
                run.torn_at = where
            return
        name = event[_schema.EVENT]
        if name == _schema.RUN_BEGIN:
            self._end_run()
            run = self._new_run() if run.events else run
        run.events += 1
        run.ended = name == _schema.RUN_END
        run.last = number(event.get(_schema.TIMESTAMP)) or run.last
        take = self._takers.get(name)
        if take is not None:
            take(self, event)

    def finish(self) -> list[Run]:
        """Return all runs: the last file has been taken."""
        self.run.running = self._held and not self.run.ended
        self._end_run()
        return self.runs

    def _end_run(self) -> None:
        self.run.cut_off_calls = sum(self._since_step.values())
        for module, sums in self.run.modules.items():
            sums.cut_off_calls = self._since_step[module]
        self.run.in_flight = list(map(read_call, self._open.values()))

    # One method per event ----------------------------------------------------------------------

    def _header(self, event: Mapping[str, Any]) -> None:
        run = self.run
        run.rank = text(event.get(_schema.RANK)) or "?"
        run.pid = whole(event.get(_schema.PID))
        run.parent = whole(event.get(_schema.PARENT_PID))
        run.process = text(event.get(_schema.PROCESS))
        run.forked = event.get(_schema.FORKED) is True
        run.host = text(event.get(_schema.HOST)) or "?"
        run.module = text(event.get(_schema.MODULE)) or run.module
        for module in modules_of(event):
            run.modules.setdefault(module, Sums())
        run.mode = text(event.get(_schema.MODE)) or "?"
        run.argv = texts(event.get(_schema.ARGUMENTS))
        versions = event.get(_schema.VERSIONS)
        if isinstance(versions, dict):
            run.versions = {str(k): str(v) for k, v in versions.items()}
        run.started = run.started or number(event.get(_schema.TIMESTAMP))
        if (schema := event.get(_schema.SCHEMA_VERSION)) != _schema.VERSION:
            run.damage.add(f"it has schema {schema!r}, and this is a reader of {_schema.VERSION}")

    def _segment(self, event: Mapping[str, Any]) -> None:
        run = self.run
        self._header(event)
        before = counts(event.get(_schema.BEFORE))
        calls = _schema.CALLS, _schema.INFERENCE_CALLS
        names = (*calls, _schema.MICRO_STEPS, _schema.VIOLATIONS)
        sums = tuple(before.get(name, 0) for name in names)
        found = run.training_calls, run.inference_calls, self._micro_steps, run.violation_count
        segment = whole(event.get(_schema.SEGMENT)) or 0
        if run.events == 1:  # older segments were dropped
            run.dropped_segments = True
        elif self._taken is not None and self._taken < segment:
            lost = range(int(self._taken) + 1, segment + 1)
            run.damage.add(f"{self._file} follows segment {segment}, and {_missing(lost)}")
        elif found != sums and not before.get(_schema.LOST_LINES):
            told, read = sums[0] + sums[1], found[0] + found[1]
            run.damage.add(
                f"{self._file} tells of {count(told, 'call')} before it, {read} are there"
            )
        run.training_calls, run.inference_calls, self._micro_steps, run.violation_count = sums
        if not run.modules:
            run.micro_steps = self._micro_steps

    def _begin(self, event: Mapping[str, Any]) -> None:
        # The event itself is kept, and becomes a Call when somebody asks: most never do.
        run, site = self.run, read_site(event)
        self._open[call_key(event)] = event
        run.raised = None
        ran_in_training = site.context == "training" and site.kind != "recompute"
        module = self._module(event)
        self._ran_since_step[module] += ran_in_training
        if site.reason is not None:  # observed: the violation's line has counted it
            return
        run.sites[site] += 1
        for sums in self._sums(module):
            if site.kind == "recompute":
                sums.recomputes += 1
            elif ran_in_training:
                sums.training_calls += 1
            else:
                sums.inference_calls += 1
        if ran_in_training:
            self._since_step[module] += 1
            self._allowed[site.module] = event
        elif site.kind != "recompute":
            self._allowed.setdefault(site.module, event)

    def _end(self, event: Mapping[str, Any]) -> None:
        begin = self._open.pop(call_key(event), None)
        outcome, compiled = text(event.get(_schema.OUTCOME)) or "", event.get(_schema.COMPILED)
        if begin is None:
            return
        if outcome.startswith("raised"):
            self.run.raised_count += 1
            self.run.raised = replace(read_call(begin), message=outcome)
        if isinstance(compiled, dict):
            self._compiled(begin, compiled)

    def _compiled(self, begin: Mapping[str, Any], end: Mapping[str, Any]) -> None:
        run, phase = self.run, text(end.get(_schema.PHASE))
        if phase is not None:
            run.phases[phase] += 1
        graphs, skipped = (
            whole(end.get(k)) for k in (_schema.GRAPHS_COMPILED, _schema.CUDA_GRAPHS_SKIPPED)
        )
        if graphs or skipped:
            call = read_call(begin)
            what = f"compiled {count(graphs, 'graph')}" if graphs else "gave up CUDA graphs"
            if graphs and skipped:
                what += f", {skipped} without CUDA graphs"
            inputs = ", ".join(call.inputs)
            run.compilations.add(f"call {call.seq} at {call.caller} {what}; inputs {inputs}")

    def _violation(self, event: Mapping[str, Any]) -> None:
        run = self.run
        for sums in self._sums(self._module(event)):
            sums.violation_count += 1
        run.sites[read_site(event)] += 1
        if len(run.violations) < KEPT_VIOLATIONS:
            call = read_call(event)
            before = self._allowed.get(call.module)
            allowed = read_call(before) if before is not None else None
            run.violations.append(Violation(call, allowed, _differences(call, allowed)))

    def _micro_step(self, event: Mapping[str, Any]) -> None:
        if event.get(_schema.CONTEXT) != "training":
            return
        module = self._module(event)
        self._since_step[module], ran = 0, self._ran_since_step[module]
        self._ran_since_step[module] = 0
        if event.get(_schema.RAISED) is not None:  # how many calls it made then means nothing
            return
        run, (*_, own) = self.run, self._sums(module)
        self._micro_steps += 1
        own.micro_steps += 1
        own.micro_step_calls.append(ran)
        run.micro_steps = max(run.micro_steps, own.micro_steps)
        step, micro_step = whole(event.get(_schema.STEP)), whole(event.get(_schema.MICRO_STEP))
        own.steps.extend(_fitting(number) for number in (step, micro_step))
        if (missed := _missed(event)) is None:
            return
        where, others = self._missed
        if where != (step, micro_step) or module in others:  # else another module's has counted it
            run.deviation_count += 1
            others = set()
        self._missed = (step, micro_step), others | {module}
        self._deviation(Deviation(step, micro_step, *missed, module=module or None))

    def _window(self, event: Mapping[str, Any]) -> None:
        name, module = text(event.get(_schema.WINDOW)) or "?", self._module(event)
        self._windows[module, name] += 1
        if event.get(_schema.CONTEXT) == "inference" or event.get(_schema.RAISED) is not None:
            return
        if (missed := _missed(event)) is not None:
            self.run.missed_windows += 1
            number = self._windows[module, name]
            self._deviation(Deviation(None, None, *missed, name, number, module or None))

    def _deviation(self, found: Deviation) -> None:
        if len(self.run.deviations) < KEPT_DEVIATIONS:
            self.run.deviations.append(found)

    def _hazard(self, event: Mapping[str, Any]) -> None:
        earlier, call = _pair(event)
        self.run.hazards.add(f"{call} wrote over an output of {earlier} that was in use")

    def _overwritten(self, event: Mapping[str, Any]) -> None:
        earlier, call = _pair(event)
        self.run.overwritten.add(f"the output of {earlier} was overwritten by {call}")

    def _run_end(self, event: Mapping[str, Any]) -> None:
        self.run.lost_lines = whole(event.get(_schema.LOST_LINES)) or 0
        # The run's own sum counts, where lines of its violations have gone.
        told = whole(event.get(_schema.VIOLATIONS)) or 0
        self.run.violation_count = max(self.run.violation_count, told)

    _takers: ClassVar = {
        _schema.RUN_BEGIN: _header,
        _schema.SEGMENT_BEGIN: _segment,
        _schema.CALL_BEGIN: _begin,
        _schema.CALL_END: _end,
        _schema.VIOLATION: _violation,
        _schema.HAZARD: _hazard,
        _schema.OVERWRITTEN: _overwritten,
        _schema.MICRO_STEP_END: _micro_step,
        _schema.WINDOW_END: _window,
        _schema.RUN_END: _run_end,
    }


def _missed(event: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, Due]] | None:
    """Return what was made and what was due in a window, when they are at odds."""
    made, due = counts(event.get(_schema.CALLS)), budgets(event.get(_schema.DUE))
    kept = made.keys() <= due.keys() and all(is_met(n, made.get(s, 0)) for s, n in due.items())
    return (made, due) if due and not kept else None


def _pair(event: Mapping[str, Any]) -> tuple[str, str]:
    """Return the earlier and the later call of a line that tells of two."""
    return (
        f"call {whole(event.get('earlier_seq'))} at {text(event.get('earlier_at'))}",
        f"call {whole(event.get('seq'))} at {text(event.get('at'))}",
    )


def _differences(refused: Call, allowed: Call | None) -> tuple[str, ...]:
    if allowed is None or refused.kind not in ("call", "bypass"):
        return ()
    pairs = {
        "caller": (refused.caller, allowed.caller),
        "method": (refused.method or "forward", allowed.method or "forward"),
        "context": (refused.context or "unset", allowed.context or "unset"),
        "scope": (refused.scope or "none", allowed.scope or "none"),
        "inputs": (", ".join(refused.inputs), ", ".join(allowed.inputs)),
        "grad": (_on(refused.grad_enabled), _on(allowed.grad_enabled)),
        "thread": (refused.thread, allowed.thread),
    }
    return tuple(f"{what}: {a} (allowed: {b})" for what, (a, b) in pairs.items() if a != b)


def _missing(segments: range) -> str:
    if len(segments) == 1:
        return f"segment {segments[0]} is missing"
    return f"segments {segments[0]} to {segments[-1]} are missing"


def _on(enabled: bool) -> str:
    return "enabled" if enabled else "disabled"


def _divergence(runs: Iterable[Run]) -> Divergence | None:
    """Return the first micro-step in which ranks made different numbers of training calls.

    Micro-steps are compared by step and number; what a rank has not ended yet tells nothing, nor
    does a scope that stands alone and has no number.
    """
    by_rank: dict[str, Counter[tuple[int, int, str]]] = {}
    for run in runs:
        made = by_rank.setdefault(run.rank, Counter())
        for module, sums in run.sums.items():
            steps = zip(sums.steps[::2], sums.steps[1::2], sums.micro_step_calls, strict=True)
            for step, micro_step, calls in steps:
                if step >= 0:
                    made[step, micro_step, module] += calls
    if len(by_rank) < 2:
        return None
    for key in sorted(set.intersection(*map(set, by_rank.values()))):
        calls_of = {rank: made[key] for rank, made in by_rank.items()}
        if len(set(calls_of.values())) > 1:
            return Divergence(key[0], calls_of)
    return None


def _fitting(number: int | None) -> int:
    """Return a number that an array takes; -1 for none."""
    return -1 if number is None else max(-1, min(number, 2**62))
