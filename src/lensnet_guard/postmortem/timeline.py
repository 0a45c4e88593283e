"""When things happened: the calls and micro-steps of a run as a bounded number of marks.

A log of a million calls gives as small a picture as one of ten: marks that fall into the same
stretch of time are drawn as one, and say how many they stand for. None is dropped.
"""

import html
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lensnet_guard import _schema
from lensnet_guard.postmortem.events import (
    call_key,
    modules_of,
    read_call,
    read_site,
    text,
    whole,
)
from lensnet_guard.postmortem.events import number as read_number
from lensnet_guard.postmortem.findings import Call, CallSite
from lensnet_guard.postmortem.reader import OpenFile, open_logs, read_lines

MARKS = 2_000  # that a timeline holds, and that a page shows
_STRETCHES = 512  # that the time of a run is cut into, at most
_KEPT_STACKS = 1_000
_LAST_MOMENT = 1e11  # seconds since the epoch; a later time, or one before it, is damage

MICRO_STEPS, WINDOWS = "micro-steps", "windows"
_CONTEXTS = ("training", "inference", "unset")
ROWS = (MICRO_STEPS, WINDOWS, *_CONTEXTS, "other contexts")
OUTCOMES = {  # name -> CSS class; the last is drawn on top
    "micro-step": "micro",
    "window": "micro",
    "returned": "returned",
    "recompute": "recompute",
    "raised": "raised",
    "in flight": "flight",
    "micro-step with violations": "violation",
    "window with violations": "violation",
    "violation": "violation",
}


def numbered_events(
    files: Iterable[OpenFile], progress: Callable[[int], object] = lambda _: None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the events of one log, each with its run's number from 0, as `analyse` counts runs."""
    number, events = 0, 0
    for file in files:
        for line in read_lines(file.lines, progress) if file.lines is not None else ():
            if line.event is None:
                continue
            if line.event[_schema.EVENT] == _schema.RUN_BEGIN and events:
                number, events = number + 1, 0
            events += 1
            yield number, line.event


def moment(event: Mapping[str, Any], before: float) -> float:
    """Return when an event happened, in seconds since the epoch; ``before`` if it does not tell."""
    at = read_number(event.get(_schema.TIMESTAMP))
    return at if at is not None and 0 <= at <= _LAST_MOMENT else before


class MicroStepBegins:
    """Where micro-steps began. No line tells, so the first call in each stands for it."""

    def __init__(self) -> None:
        # By thread and module.
        self._open: dict[tuple[str, str], tuple[tuple[object, ...], float]] = {}

    def call(self, call: Call, at: float) -> None:
        """Take a call or a refused call that happened at ``at``."""
        if call.kind not in ("call", "bypass") or (call.step is None and call.scope is None):
            return  # a call outside every micro-step
        where = call.thread, call.module
        key = (call.context, call.step, call.micro_step)
        if where not in self._open or self._open[where][0] != key:
            self._open[where] = key, at

    def end(self, event: Mapping[str, Any]) -> tuple[str, float] | None:
        """Take ``micro_step.end``: thread and time of its first call, None when it had none."""
        key = (event.get(_schema.CONTEXT), event.get(_schema.STEP), event.get(_schema.MICRO_STEP))
        module = text(event.get(_schema.MODULE)) or "?"
        found = [
            (at, *where)
            for where, (opened, at) in self._open.items()
            if opened == key and where[1] == module
        ]
        for _, *where in found:
            del self._open[where[0], where[1]]
        at, thread, _ = min(found, default=(0.0, "", ""))
        return (thread, at) if found else None


@dataclass(frozen=True)
class Mark:
    """One call or micro-step, or several in the same stretch of time.

    Attributes:
        row: Where it is drawn, of `ROWS`.
        outcome: How it is drawn, of `OUTCOMES`.
        start: Seconds from the beginning of the timeline.
        length: Seconds that it lasted.
        count: How many it stands for.
        label: What the first of them was.
    """

    row: str
    outcome: str
    start: float
    length: float
    count: int
    label: str


class Timeline:
    """The timeline of one run, taken event by event.

    Attributes:
        stacks: Of each call site, the stack of its first call, innermost frame first.
        began: The time of the first event, in seconds since the epoch; 0 when none was taken.
        last: The time of the last one, likewise.
    """

    def __init__(self) -> None:
        self.stacks: dict[CallSite, tuple[str, ...]] = {}
        self.began = self.last = 0.0
        self._width = 1e-6  # seconds of a stretch; doubled when the run outgrows them
        self._marks: dict[tuple[str, str, int, int], tuple[int, str]] = {}
        self._open: dict[tuple[object, ...], tuple[Call, float]] = {}
        self._begins = MicroStepBegins()
        self._several = False  # modules, so that each mark says which

    def take(self, event: Mapping[str, Any]) -> None:
        """Take one event; none of them raises."""
        at = moment(event, self.last)
        self.began = self.began or at
        self.last = max(self.last, at)
        name = event[_schema.EVENT]
        if name in (_schema.RUN_BEGIN, _schema.SEGMENT_BEGIN):
            self._several = bool(modules_of(event))
        elif name in (_schema.CALL_BEGIN, _schema.VIOLATION):
            self._call(event, at, refused=name == _schema.VIOLATION)
        elif name == _schema.CALL_END:
            call, began = self._open.pop(call_key(event), (None, at))
            if call is not None:
                self._add_call(call, _outcome(call, event.get(_schema.OUTCOME)), began, at)
        elif name == _schema.MICRO_STEP_END:
            _, began = self._begins.end(event) or ("", at)
            outcome = (
                "micro-step with violations" if event.get(_schema.VIOLATIONS) else "micro-step"
            )
            step, micro_step = whole(event.get(_schema.STEP)), whole(event.get(_schema.MICRO_STEP))
            label = f"{self._of(event)}step {step}, micro-step {micro_step}"
            self._add(MICRO_STEPS, outcome, began, at, label)
        elif name == _schema.WINDOW_END:
            outcome = "window with violations" if event.get(_schema.VIOLATIONS) else "window"
            label = f"{self._of(event)}the end of {text(event.get(_schema.WINDOW))}"
            self._add(WINDOWS, outcome, at, at, label)

    def _of(self, event: Mapping[str, Any]) -> str:
        return f"{text(event.get(_schema.MODULE))}, " if self._several else ""

    def finish(self) -> None:
        """The last event has been taken: calls that are open now never ended."""
        for call, began in self._open.values():
            self._add_call(call, "in flight", began, self.last)
        self._open.clear()

    def marks(self, limit: int = MARKS) -> list[Mark]:
        """Return at most ``limit`` marks, unless every row and outcome needs one of its own."""
        while len(self._marks) > limit and self._coarsen():
            pass
        marks = [
            Mark(row, outcome, first * width, (last - first + 1) * width, times, label)
            for width in (self._width,)
            for (row, outcome, first, last), (times, label) in self._marks.items()
        ]
        drawn = list(OUTCOMES)
        return sorted(marks, key=lambda m: (ROWS.index(m.row), drawn.index(m.outcome), m.start))

    def _call(self, event: Mapping[str, Any], at: float, *, refused: bool) -> None:
        call = read_call(event)
        self._begins.call(call, at)
        told = refused or call.reason is None  # an observed call has a violation's line of its own
        if told and len(self.stacks) < _KEPT_STACKS:
            self.stacks.setdefault(read_site(event), call.stack)
        if refused:
            self._add_call(call, "violation", at, at)
        else:
            self._open[call_key(event)] = call, at

    def _add_call(self, call: Call, outcome: str, began: float, ended: float) -> None:
        if call.reason is not None and outcome not in ("violation", "in flight"):
            return
        row = call.context or "unset"
        label = f"{call.reason or call.kind} {call.seq} at {call.caller}"
        label = f"{call.called}, {label}" if self._several or call.method else label
        self._add(row if row in _CONTEXTS else ROWS[-1], outcome, began, ended, label)

    def _add(self, row: str, outcome: str, began: float, ended: float, label: str) -> None:
        first, last = max(0.0, began - self.began), max(0.0, ended - self.began)  # clocks go back
        while last >= self._width * _STRETCHES:
            self._coarsen()
        key = (row, outcome, int(first / self._width), int(max(first, last) / self._width))
        times, label = self._marks.get(key, (0, label))
        self._marks[key] = times + 1, label
        while len(self._marks) > MARKS and self._coarsen():
            pass

    def _coarsen(self) -> bool:
        """Make stretches twice as long; False when all of the run lies in the first one."""
        fine, self._marks = self._marks, {}
        self._width *= 2
        for (row, outcome, first, last), (times, label) in fine.items():
            key = (row, outcome, first // 2, last // 2)
            before, label = self._marks.get(key, (0, label))
            self._marks[key] = before + times, label
        return any(last for _, _, _, last in self._marks)


def read_timelines(
    targets: Iterable[str | os.PathLike[str]], progress: Callable[[int], object] = lambda _: None
) -> dict[str, list[Timeline]]:
    """Return the timelines of every log's runs, in the order of `analyse`.

    Args:
        targets: Run folders and log files.
        progress: Is told of the bytes that were read.

    Returns:
        The timelines, by the log's path without its suffix.

    Raises:
        FileNotFoundError: A target does not exist, or a folder holds no log.
    """
    timelines: dict[str, list[Timeline]] = {}
    for log, files in open_logs(targets):
        runs = timelines[log] = [Timeline()]
        for number, event in numbered_events(files, progress):
            if number == len(runs):
                runs.append(Timeline())
            runs[number].take(event)
        for timeline in runs:
            timeline.finish()
    return timelines


def draw(timeline: Timeline, limit: int = MARKS) -> Iterator[str]:
    """Yield the timeline as HTML: legend, a stretchable SVG for each row, and seconds below."""
    marks = timeline.marks(limit)
    if not marks:
        return
    yield "<h3>Timeline</h3>"
    for outcome, css in OUTCOMES.items():
        if times := sum(mark.count for mark in marks if mark.outcome == outcome):
            yield legend(css, f"{outcome} ({times})")
    span = max(timeline.last - timeline.began, 1e-6)
    for row in ROWS:
        inside = [mark for mark in marks if mark.row == row]
        if inside:
            times = sum(mark.count for mark in inside)
            yield f'<p class="row">{row} ({times})</p><svg class="lane" viewBox="0 0 1000 24" '
            yield f'preserveAspectRatio="none" role="img" aria-label="{row}: {times}">'
            yield from (_draw_mark(mark, span) for mark in inside)
            yield "</svg>"
    ticks = "".join(f"<span>{span * part / 4:.4g} s</span>" for part in range(5))
    yield f'<p class="ticks">{ticks}</p>'
    yield '<p class="soft">A micro-step is drawn from its first call to its end.</p>'


def legend(css: str, text: str) -> str:
    """Return a coloured square and what it means."""
    box = f'<svg viewBox="0 0 1 1" aria-hidden="true"><rect class="{css}" width="1" height="1"/>'
    return f'<span class="key soft">{box}</svg>{html.escape(text)}</span>'


def _draw_mark(mark: Mark, span: float) -> str:
    start = min(1000 * mark.start / span, 997)
    width = min(max(1000 * mark.length / span, 3), 1000 - start)
    box = 'y="0" height="24"' if mark.outcome in ("violation", "in flight") else 'y="5" height="14"'
    title = mark.label if mark.count == 1 else f"{mark.count}, the first: {mark.label}"
    title = html.escape(f"{mark.outcome}: {title}")
    where = f'x="{start:.1f}" width="{width:.1f}" {box}'
    return f'<rect class="{OUTCOMES[mark.outcome]}" {where}><title>{title}</title></rect>'


def _outcome(call: Call, outcome: object) -> str:
    if isinstance(outcome, str) and outcome.startswith("raised"):
        return "raised"
    return "recompute" if call.kind == "recompute" else "returned"
