"""From the log of an observed run to what is known of each module, in one pass, line by line.

What is kept does not grow with the run.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lensnet_guard import _schema
from lensnet_guard._text import count
from lensnet_guard.postmortem.events import modules_of, text, texts, whole
from lensnet_guard.postmortem.reader import OpenFile, open_logs, read_lines
from lensnet_guard.postmortem.tallies import (
    ADAPTERS,
    MICRO_STEP,
    Numbered,
    Observed,
    Spread,
    Tally,
    Where,
    Who,
    Windows,
)

_OBSERVE = "observe"
# Refused whatever a policy says; of calls without a context the tallies tell.
_NEVER_LEGAL = ("ReentrantCall", "BypassedGuard", "ContextSwitchRefused", "RankDivergence")


class NotObserved(ValueError):
    """Logs that tell nothing of how a module is called."""


def read_observed(
    targets: Iterable[str | os.PathLike[str]], progress: Callable[[int], object] = lambda _: None
) -> tuple[list[Observed], list[str]]:
    """Read run folders and log files.

    Args:
        targets: Run folders and log files.
        progress: Is told of the bytes that were read.

    Returns:
        What is known of each module, and what is wrong with the logs, in words.

    Raises:
        FileNotFoundError: A target does not exist, or a folder holds no log.
        NotObserved: No run in them was observed, or by a guard that took no notes.
    """
    reading = _Reading()
    for log, files in open_logs(targets):
        reading.take_log(log, files, progress)
    return reading.result()


class _Reading:
    """All logs, one after the other."""

    def __init__(self) -> None:
        self._modules: dict[str, Observed] = {}
        self._faults: list[str] = []
        self._others: list[str] = []  # why a run tells nothing
        self._run: _Run | None = None

    def take_log(
        self, log: str, files: Iterable[OpenFile], progress: Callable[[int], object]
    ) -> None:
        """Take all lines of a log."""
        unreadable = sum(self._take_file(log, file, progress) for file in files)
        self._end_run()
        if unreadable:
            self._faults.append(f"{log}: {count(unreadable, 'line')} cannot be read")

    def _take_file(self, log: str, file: OpenFile, progress: Callable[[int], object]) -> int:
        """Take a file, and return how many lines are no events; a broken one hides no other."""
        unreadable = 0
        try:
            if file.lines is None:
                raise file.error or OSError("it cannot be opened")
            for line in read_lines(file.lines, progress):
                if line.event is None:
                    unreadable += 1
                else:
                    self._take(log, line.event)
        except OSError as error:
            self._faults.append(f"{file.path}: {error.strerror or error}")
        return unreadable

    def _take(self, log: str, event: Mapping[str, Any]) -> None:
        name = event[_schema.EVENT]
        if name == _schema.RUN_BEGIN or self._run is None:
            self._end_run()
            self._run = _Run(log, event, self._modules)
        self._run.take(name, event)

    def _end_run(self) -> None:
        run, self._run = self._run, None
        if run is not None and run.tells_nothing:
            self._others.append(run.tells_nothing)
        elif run is not None:
            self._faults += run.finish()

    def result(self) -> tuple[list[Observed], list[str]]:
        """Return what was found: the last line has been taken."""
        if not self._modules:
            raise NotObserved(self._others[0] if self._others else "no line of the log is an event")
        return list(self._modules.values()), [*self._faults, *self._others]


class _Run:
    """One run of one process.

    Attributes:
        tells_nothing: Why not, where it was not observed; empty where it was.
    """

    def __init__(self, log: str, header: Mapping[str, Any], modules: dict[str, Observed]) -> None:
        self.tells_nothing = _why_not(log, header)
        self._log, self._header, self._modules = log, header, modules
        self._late = header[_schema.EVENT] != _schema.RUN_BEGIN
        self._streams: dict[str, Stream] = {}
        self._steps, self._ended, self._lost = 0, False, 0
        if not self.tells_nothing:
            for name in modules_of(header) or (text(header.get(_schema.MODULE)) or "?",):
                self._stream(name)

    def _stream(self, name: str) -> "Stream":
        """Return what takes the lines about a module; about a copy of it, too."""
        while name.endswith(" (copy)"):
            name = name.removesuffix(" (copy)")
        if name not in self._streams:
            observed = self._modules.setdefault(name, Observed(name))
            policies = self._header.get(_schema.POLICIES)
            own = policies.get(name) if isinstance(policies, dict) else None
            policy = own if own is not None else self._header.get(_schema.POLICY)
            observed.policy = policy if isinstance(policy, dict) else {}
            observed.ranks.add(text(self._header.get(_schema.RANK)) or "?")
            self._streams[name] = Stream(observed, self._late)
        return self._streams[name]

    def take(self, name: str, event: Mapping[str, Any]) -> None:
        """Take one event.

        Raises:
            NotObserved: It is a call, and nobody has taken notes of it.
        """
        if self.tells_nothing:
            return
        self._steps = max(self._steps, whole(event.get(_schema.OPTIMIZER_STEP)) or 0)
        if name == _schema.RUN_END:
            self._ended = True
            self._lost = whole(event.get(_schema.LOST_LINES)) or 0
        if name not in _OF_MODULES:
            return
        stream = self._stream(text(event.get(_schema.MODULE)) or "?")
        is_call = name == _schema.CALL_BEGIN and event.get(_schema.KIND) == "call"
        if is_call and not isinstance(event.get(_schema.CALLERS), list):
            raise NotObserved(
                f"{self._log} was written by a lensnet-guard that did not note who makes a call "
                "and in what state; observe the run once more, with this version"
            )
        _OF_MODULES[name](stream, event)

    def finish(self) -> list[str]:
        """Return what is wrong with the log of the run: its lines have been taken."""
        for stream in self._streams.values():
            stream.finish(self._steps, self._ended)
        faults = {
            "its first lines are gone": self._late,
            f"{count(self._lost, 'line')} could not be written": self._lost,
            "it stops before the end of the run": not self._ended,
        }
        return [f"{self._log}: {fault}" for fault, there in faults.items() if there]


def _why_not(log: str, header: Mapping[str, Any]) -> str:
    """Return why a run tells nothing of how its modules are called; nothing where it does."""
    mode = text(header.get(_schema.MODE))
    if header.get(_schema.FROM_MEMORY) is True:
        return f"{log} was written from memory, as a training ended; observe a run with a log"
    if mode == _OBSERVE:
        return ""
    return (
        f"{log} is of a run in mode {mode!r}, and only one that observes shows how its modules are "
        'called: run it once with mode="observe" or LENSNET_GUARD=observe, and a log'
    )


class Stream:
    """The lines of one run about one module, taken in order.

    Args:
        observed: Takes what is found.
        late: The log's beginning is gone: the first window of each kind is not whole.
    """

    def __init__(self, observed: Observed, late: bool) -> None:
        self._observed = observed
        self._late = late
        self._seen_kinds: set[str] = set()
        self._ordinals: Counter[str] = Counter()
        self._open: dict[tuple[Who, str, object], tuple[int, Where]] = {}
        self._numbered: dict[Who, Numbered] = {}
        self._now: dict[Who, tuple[int, int, Where]] = {}  # number of the step, calls, the last
        self._running: dict[object, tuple[list[Tally], Where]] = {}

    def begin(self, event: Mapping[str, Any]) -> None:
        """Take a call; recomputes are none."""
        observed, context = self._observed, text(event.get(_schema.CONTEXT))
        if event.get(_schema.KIND) != "call" or event.get(_schema.REASON) in _NEVER_LEGAL:
            return
        if (method := text(event.get(_schema.METHOD))) is not None:
            observed.methods[method] += 1
        if context == "inference":
            observed.inference_calls += 1
            return
        tallies = observed.training if context == "training" else observed.unset
        who, frame = observed.who(event)
        where = Where(event, frame)
        mine = [who]
        held = texts(event.get(_schema.HELD))
        if who.scope is None:
            mine += [Who(caller=who.caller, adapters=a) for a in ADAPTERS if a in held]
        kinds = self._kinds(event, who)
        for one in mine:
            if one not in tallies:
                tallies[one] = Tally(where)
            tallies[one].take(event, where, frozenset(kinds))
            for kind, key in kinds.items():
                before, _ = self._open.get((one, kind, key), (0, where))
                self._open[one, kind, key] = before + 1, where
            self._number(tallies[one], one, event, where)
        key = whole(event.get(_schema.GUARD)), whole(event.get(_schema.SEQ))
        self._running[key] = [tallies[one] for one in mine], where

    def end(self, event: Mapping[str, Any]) -> None:
        """Take the end of a call."""
        key = whole(event.get(_schema.GUARD)), whole(event.get(_schema.SEQ))
        tallies, where = self._running.pop(key, ((), None))
        if where is not None and event.get(_schema.OUTCOME) == "returned":
            for tally in tallies:
                tally.held_of_results.take(texts(event.get(_schema.HELD)), where)

    def violation(self, event: Mapping[str, Any]) -> None:
        """Take what was broken; most of it only the observed policy forbids."""
        reason = text(event.get(_schema.REASON)) or "?"
        no_call = reason == "NoContext" and event.get(_schema.KIND) != "call"
        if reason in _NEVER_LEGAL or no_call:
            message = (text(event.get(_schema.MESSAGE)) or reason).partition("\n")[0].rstrip(".")
            where = Where(event, whole(event.get(_schema.CALLER)) or 0)
            first, times = self._observed.refused.get(reason, (f"{message}, {where}", 0))
            self._observed.refused[reason] = first, times + 1

    def _kinds(self, event: Mapping[str, Any], who: Who) -> dict[str, object]:
        """Return the kinds of the windows in which a call is made, and which of each it is."""
        kinds: dict[str, object] = dict.fromkeys(texts(event.get(_schema.WINDOWS)), "")
        step, micro_step = (whole(event.get(f)) for f in (_schema.STEP, _schema.MICRO_STEP))
        alone = who.scope is not None and "per" not in self._observed.scope(who.scope)
        if step is not None or alone:
            kinds[MICRO_STEP] = step, micro_step
        return kinds

    # Windows -----------------------------------------------------------------------------------

    def micro_step(self, event: Mapping[str, Any]) -> None:
        """Take the end of a micro-step."""
        if event.get(_schema.CONTEXT) != "training":
            return
        step, micro_step = (whole(event.get(f)) for f in (_schema.STEP, _schema.MICRO_STEP))
        label = f"step {step}, micro-step {micro_step}"
        if step is not None:
            self._end(MICRO_STEP, (step, micro_step), label, event)
            return
        due = event.get(_schema.DUE)
        for scope in due if isinstance(due, dict) else ():  # a scope that stood alone
            who = Who(scope=text(scope))
            calls, last = self._open.pop((who, MICRO_STEP, (None, None)), (0, None))
            tally = self._observed.training.get(who)
            if tally is not None and event.get(_schema.RAISED) is None:
                spread = tally.windows.setdefault(MICRO_STEP, Spread())
                spread.alone += 1
                spread.add(calls, "a scope that stood alone", last)

    def window(self, event: Mapping[str, Any]) -> None:
        """Take the end of another window."""
        name = text(event.get(_schema.WINDOW))
        if name and event.get(_schema.CONTEXT) != "inference":
            self._ordinals[name] += 1
            self._end(name, "", f'"{name}" {self._ordinals[name]}', event)

    def _end(self, kind: str, key: object, label: str, event: Mapping[str, Any]) -> None:
        observed = self._observed
        whole_one = event.get(_schema.RAISED) is None
        whole_one &= not self._late or kind in self._seen_kinds
        self._seen_kinds.add(kind)
        windows = observed.windows.setdefault(kind, Windows())
        for who, tally in (*observed.training.items(), *observed.unset.items()):
            calls, last = self._open.pop((who, kind, key), (0, None))
            if kind not in tally.windows:
                without = [f"{earlier} (none)" for earlier in windows.labels]
                tally.windows[kind] = Spread(examples={0: without})
            if whole_one:
                tally.windows[kind].add(calls, label, last)
            else:
                tally.windows[kind].broken_off = max(tally.windows[kind].broken_off, calls)
        if whole_one:
            windows.add(label)

    def _number(self, tally: Tally, who: Who, event: Mapping[str, Any], where: Where) -> None:
        """Take the number of optimizer steps before a call."""
        step = whole(event.get(_schema.OPTIMIZER_STEP))
        if step is None:
            return
        if who not in self._numbered:
            self._numbered[who] = Numbered()
            tally.numbered.append(self._numbered[who])
        number, calls, _ = self._now.get(who, (step, 0, where))
        if step > number:
            self._close(who)
            number, calls = step, 0
        self._now[who] = number, calls + 1, where

    def _close(self, who: Who) -> None:
        found, (number, calls, last) = self._numbered[who], self._now[who]
        if number == 0:
            found.before = calls
        else:
            found.between.add(calls, f"optimizer step {number}", last)

    def finish(self, steps: int, ended: bool) -> None:
        """The last line of the run has been taken.

        Args:
            steps: How many optimizer steps torch has numbered.
            ended: Whether the log goes on to the end of the run.
        """
        self._observed.steps.append(steps)
        for who, found in self._numbered.items():
            number, calls, _ = self._now[who]
            found.steps, found.after = steps, 0 if ended else None
            if number < steps or steps == 0:
                self._close(who)
            elif ended:
                found.after = calls
            else:
                found.between.broken_off = max(found.between.broken_off, calls)
        for (who, kind, _), (calls, _) in self._open.items():
            for tallies in (self._observed.training, self._observed.unset):
                if who in tallies:
                    spread = tallies[who].windows.setdefault(kind, Spread())
                    spread.broken_off = max(spread.broken_off, calls)


_OF_MODULES: dict[str, Callable[[Stream, Mapping[str, Any]], None]] = {
    _schema.CALL_BEGIN: Stream.begin,
    _schema.CALL_END: Stream.end,
    _schema.VIOLATION: Stream.violation,
    _schema.MICRO_STEP_END: Stream.micro_step,
    _schema.WINDOW_END: Stream.window,
}
