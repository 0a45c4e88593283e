"""The log as a trace for https://ui.perfetto.dev and chrome://tracing, which open it as a file.

The format is Chrome's Trace Event Format, JSON object form; times are in microseconds. Every run
is a process of the trace and every thread in it has two tracks, its calls and its micro-steps.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from lensnet_guard import _schema
from lensnet_guard._text import json_line
from lensnet_guard.postmortem.events import (
    budgets,
    call_key,
    counts,
    modules_of,
    read_call,
    text,
    whole,
)
from lensnet_guard.postmortem.events import number as read_number
from lensnet_guard.postmortem.findings import Call
from lensnet_guard.postmortem.reader import open_logs
from lensnet_guard.postmortem.timeline import MicroStepBegins, moment, numbered_events

MARK = b'"producer":"lensnet-guard trace"'  # in the head: by it an earlier trace is known
_LONGEST_MS = 1e12  # a longer call is a damaged line


def write_trace(
    targets: Iterable[str | os.PathLike[str]],
    file: BinaryIO,
    progress: Callable[[int], object] = lambda _: None,
) -> int:
    """Write run folders and log files as one trace, event by event.

    Args:
        targets: Run folders and log files.
        file: Takes the trace.
        progress: Is told of the bytes of log that were read.

    Returns:
        How many events were written.

    Raises:
        FileNotFoundError: A target does not exist, or a folder holds no log.
    """
    file.write(b'{"displayTimeUnit":"ms","otherData":{' + MARK + b'},"traceEvents":[')
    written = 0
    for event in trace_events(targets, progress):
        file.write(b",\n" if written else b"\n")
        file.write(json_line(event))
        written += 1
    file.write(b"\n]}\n")
    return written


def trace_events(
    targets: Iterable[str | os.PathLike[str]], progress: Callable[[int], object] = lambda _: None
) -> Iterator[dict[str, Any]]:
    """Yield the events of the trace, each as soon as the log's lines allow it."""
    taken: set[int] = set()
    for _, files in open_logs(targets):
        run, last = None, -1
        for number, event in numbered_events(files, progress):
            if run is None or number != last:
                if run is not None:
                    yield from run.finish()
                run, last = _Run(_free_pid(event, taken)), number
            yield from run.take(event)
        if run is not None:
            yield from run.finish()


def _free_pid(event: Mapping[str, Any], taken: set[int]) -> int:
    """Return the process's own number, or the next free one: ranks on other hosts may share it."""
    pid = event.get(_schema.PID)
    # Viewers keep it in 32 bits.
    pid = pid if isinstance(pid, int) and not isinstance(pid, bool) and 0 < pid < 2**31 else 1
    while pid in taken:
        pid += 1
    taken.add(pid)
    return pid


class _Run:
    """The events of one run; holds only the calls that have not ended yet."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._last = 0.0
        self._tracks: dict[str, int] = {}
        self._open: dict[tuple[object, ...], tuple[Call, float]] = {}
        self._begins = MicroStepBegins()
        self._several = False  # modules, which have tracks of their own

    def take(self, event: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Take one event of the log; none of them raises."""
        at = moment(event, self._last)
        self._last = max(self._last, at)
        name = event[_schema.EVENT]
        if name in (_schema.RUN_BEGIN, _schema.SEGMENT_BEGIN):
            self._several = bool(modules_of(event))
            yield self._process_name(event)
        elif name == _schema.CALL_BEGIN:
            call = read_call(event)
            self._begins.call(call, at)
            self._open[call_key(event)] = call, at
        elif name == _schema.CALL_END:
            if (opened := self._open.pop(call_key(event), None)) is not None:
                yield from self._call(event, *opened, at)
        elif name == _schema.VIOLATION:
            yield from self._violation(event, at)
        elif name == _schema.MICRO_STEP_END:
            yield from self._micro_step(event, at)
        elif name == _schema.WINDOW_END:
            yield from self._window(event, at)

    def finish(self) -> Iterator[dict[str, Any]]:
        """Yield the calls in flight, which begin and never end."""
        for call, at in self._open.values():
            args = _args(call) | {"outcome": "in flight when the log stopped"}
            yield from self._emit(call.thread, at, args, ph="B", name=_title(call), cat=call.kind)
        self._open.clear()

    def _call(
        self, event: Mapping[str, Any], call: Call, began: float, ended: float
    ) -> Iterator[dict[str, Any]]:
        # The begin's line counts into the duration; a slice must not reach into the next one.
        took = read_number(event.get(_schema.DURATION_MS))
        seconds = max(0.0, ended - began)
        if took is not None and 0 <= took <= _LONGEST_MS:
            seconds = min(took / 1e3, seconds or math.inf)
        args = _args(call) | {"outcome": text(event.get(_schema.OUTCOME)), "duration_ms": took}
        name, dur = _title(call), _micro(seconds)
        yield from self._emit(call.thread, began, args, ph="X", dur=dur, name=name, cat=call.kind)

    def _violation(self, event: Mapping[str, Any], at: float) -> Iterator[dict[str, Any]]:
        call = read_call(event)
        self._begins.call(call, at)
        args = _args(call) | {"reason": call.reason, "message": call.message}
        name = f"{call.reason} of {call.called}"
        yield from self._emit(call.thread, at, args, ph="i", s="t", name=name, cat="violation")

    def _micro_step(self, event: Mapping[str, Any], ended: float) -> Iterator[dict[str, Any]]:
        """Draw it from its first call, for its begin is not logged; as a moment without one."""
        thread, began = self._begins.end(event) or ("", ended)
        shape: dict[str, Any] = {"ph": "i", "s": "t"}
        if thread:
            shape = {"ph": "X", "dur": _micro(max(0.0, ended - began))}
        track = f"micro-steps of {thread}" if thread else "micro-steps without calls"
        if self._several:
            track += f", {text(event.get(_schema.MODULE))}"
        step, micro_step = whole(event.get(_schema.STEP)), whole(event.get(_schema.MICRO_STEP))
        name = f"step {step}, micro-step {micro_step}"
        args = {
            "context": text(event.get(_schema.CONTEXT)),
            "step": step,
            "micro_step": micro_step,
            **_sums(event),
        }
        yield from self._emit(track, began, args, **shape, name=name, cat="micro_step")

    def _window(self, event: Mapping[str, Any], ended: float) -> Iterator[dict[str, Any]]:
        """Draw another window as the moment it ended, for no line tells when it began."""
        module = f", {text(event.get(_schema.MODULE))}" if self._several else ""
        name = f"the end of {text(event.get(_schema.WINDOW))}"
        args = {"context": text(event.get(_schema.CONTEXT)), **_sums(event)}
        shape = {"ph": "i", "s": "t", "name": name, "cat": "window"}
        yield from self._emit(f"windows{module}", ended, args, **shape)

    def _process_name(self, event: Mapping[str, Any]) -> dict[str, Any]:
        name = (
            f"rank {event.get('rank')}, process {event.get('process.pid')} on "
            f"{event.get('host.name')}: {event.get('module')}"
        )
        return self._metadata("process_name", 0, name)

    def _metadata(self, what: str, tid: int, name: str) -> dict[str, Any]:
        place = {"pid": self._pid, "tid": tid, "ts": 0}
        return {"ph": "M", "name": what, **place, "args": {"name": name}}

    def _emit(
        self, track: str, at: float, args: dict[str, Any], **fields: Any
    ) -> Iterator[dict[str, Any]]:
        """Yield an event on a track; before its first, the track's name."""
        if track not in self._tracks:
            self._tracks[track] = len(self._tracks) + 1
            yield self._metadata("thread_name", self._tracks[track], track)
        place = {"ts": _micro(at), "pid": self._pid, "tid": self._tracks[track]}
        yield {**fields, **place, "args": args}


def _micro(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _title(call: Call) -> str:
    return f"{call.called} {call.kind} {call.seq}"


def _sums(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a window came to."""
    return {
        "calls": counts(event.get(_schema.CALLS)),
        "due": budgets(event.get(_schema.DUE)),
        "violations": whole(event.get(_schema.VIOLATIONS)),
    }


def _args(call: Call) -> dict[str, Any]:
    return {
        "seq": call.seq,
        "context": call.context,
        "scope": call.scope,
        "step": call.step,
        "micro_step": call.micro_step,
        "inputs": call.inputs,
        "caller": call.caller,
        "compiled": call.compiled,
    }
