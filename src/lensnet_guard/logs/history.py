"""What a guard remembers: numbered records, counts, violations, and who is told of them."""

import itertools
import os
import threading
from collections import Counter, deque
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from lensnet_guard import _schema
from lensnet_guard._text import add_note, short_path
from lensnet_guard.calls.context import Position
from lensnet_guard.calls.record import CallRecord, Context, Kind, Stack, capture_stack
from lensnet_guard.logs.run_log import RunLog
from lensnet_guard.logs.sinks import Source

RING_RECORDS = 4_096  # the newest records that guard.calls and guard.violations hold
CALL_FRAMES = 16  # frames kept of an allowed call: enough to see the caller, cheap to take
VIOLATION_FRAMES = 64


_guards = itertools.count(1)

# context, scope, step, micro_step
_Where = tuple[Context | None, str | None, int | None, int | None]


@dataclass(frozen=True, slots=True)
class Refusal:
    """What is refused, before there is a record of it.

    Attributes:
        kind: As of a `CallRecord`.
        reason: The name of the violation's class.
        here: The blocks that are open.
        frame: The innermost frame of the code that is refused, if it has one.
        scope: The scope or sanctioned caller that applies.
        inputs: What `describe_inputs` says of a call's arguments.
        detail: What else the headline of the message says.
        method: The method or part that was called; None for the module.
        mistake: The entry of docs/mistakes.md that explains it, where its reason alone does not
            tell.
    """

    kind: Kind
    reason: str | None
    here: Position
    frame: FrameType | None
    scope: str | None
    inputs: tuple[object, ...] = ()
    detail: str = ""
    method: str | None = None
    mistake: str | None = None


def _where(here: Position, scope: str | None) -> _Where:
    ledger = here.micro_step
    if ledger is None:
        return here.context, scope, None, None
    return here.context, scope, ledger.step, ledger.micro_step


class History(Source):
    """The records of one guard, numbered in one sequence over all threads.

    Attributes:
        guard: Its number within the process.
        module: The guard's name for the module.
        lock: Held from reading a budget to spending it.
        calls: The newest records of calls, allowed and refused.
        violations: The newest records of violations.
        violation_count: Violations so far, also those that the ring no longer holds.
        log: The guard's own log, which is one of the sinks; None without one.
    """

    def __init__(self, module: str) -> None:
        super().__init__()
        self.guard = next(_guards)
        self.module = module
        self.calls: deque[CallRecord] = deque(maxlen=RING_RECORDS)
        self.violations: deque[CallRecord] = deque(maxlen=RING_RECORDS)
        self.violation_count = 0
        self.log: RunLog | None = None
        self._owns_log = False
        self._counts: Counter[tuple[Context | None, str | None]] = Counter()
        self._sequence = itertools.count(1)

    def count(self, context: Context | None, scope: str | None) -> int:
        """Count allowed calls, of one context or scope if given; recomputes are none."""
        with self.lock:
            counts = list(self._counts.items())
        return sum(n for (c, s), n in counts if context in (None, c) and scope in (None, s))

    def newest(self) -> list[CallRecord]:
        """Return the records that the rings hold, each once, in order."""
        with self.lock:
            records = {record.seq: record for record in (*self.calls, *self.violations)}
        return [records[seq] for seq in sorted(records)]

    def add_call(
        self,
        here: Position,
        scope: str | None,
        frame: FrameType | None,
        inputs: tuple[object, ...],
        method: str | None = None,
    ) -> CallRecord:
        """Record and count an allowed call that is made at ``here`` from ``frame``."""
        where = _where(here, scope)
        stack = capture_stack(frame, CALL_FRAMES)
        record = self._record("call", None, where, stack, inputs, method)
        self.calls.append(record)
        self._counts[where[:2]] += 1
        return record

    def add_recompute(
        self,
        original: CallRecord | None,
        here: Position,
        frame: FrameType | None,
        inputs: tuple[object, ...],
    ) -> CallRecord:
        """Record another run of ``original``, which belongs where that call was made.

        Where torch does not show which call is repeated, it belongs where it runs, ``here``.
        """
        if original is None:
            where = _where(here, here.scope)
        else:
            where = (original.context, original.scope, original.step, original.micro_step)
        stack = capture_stack(frame, CALL_FRAMES)
        method = original.method if original is not None else None
        record = self._record("recompute", None, where, stack, inputs, method)
        record.recompute_of = original.seq if original is not None else None
        self.calls.append(record)
        return record

    def add_violation(self, refusal: Refusal) -> CallRecord:
        """Record a violation, and among the calls too when it was one."""
        stack = capture_stack(refusal.frame, VIOLATION_FRAMES)
        where = _where(refusal.here, refusal.scope)
        record = self._record(
            refusal.kind, refusal.reason, where, stack, refusal.inputs, refusal.method
        )
        self.violation_count += 1
        self.violations.append(record)
        if refusal.kind in ("call", "bypass"):
            self.calls.append(record)
        return record

    def _record(
        self,
        kind: Kind,
        reason: str | None,
        where: _Where,
        stack: Stack,
        inputs: tuple[object, ...],
        method: str | None = None,
    ) -> CallRecord:
        return CallRecord(  # by position: names would cost a third more
            next(self._sequence),
            self.guard,
            self.module,
            kind,
            "allow" if reason is None else "refuse",
            reason,
            *where,
            threading.current_thread().name,
            torch.is_grad_enabled(),
            None,
            None if reason is None else "refused",
            None,
            None,
            method,
            stack,
            inputs,
        )

    # Where it all goes -------------------------------------------------------------------------

    def start_log(
        self,
        folder: str | os.PathLike[str],
        header: dict[str, Any],
        parent: int | None = None,
    ) -> None:
        """Log to a folder from now on, as a worker of ``parent`` if that is given.

        Raises:
            TypeError: ``folder`` is not a path.
            ValueError: There is a log already.
        """
        if self.log is not None and not self.log.closed:
            raise ValueError(f"{self.module} already logs to {self.log.folder}")
        self.write_to(RunLog(folder, {_schema.MODULE: self.module, **header}, parent))
        self._owns_log = True

    def write_to(self, log: RunLog) -> None:
        """Write to a log that somebody else owns, and ends."""
        self.end_log()
        self.log = log
        self._leave_log = log.add_writer(self)
        self.add_sink(log)

    def end_log(self) -> None:
        """End the log: write ``run.end`` and close it, or only leave it when another owns it."""
        log, self.log = self.log, None
        if log is not None:
            self.remove_sink(log)
            self._leave_log()
            if self._owns_log:
                log.close()
        self._owns_log = False

    def name_log(self, error: BaseException) -> None:
        """Say on an exception that is on its way out where its call is written down."""
        if self.log is not None and self.log.path is not None:
            path = short_path(str(self.log.path))
            add_note(error, f"lensnet_guard: the calls of {self.module} are in {path}")
