"""Captures: the calls of a stretch of time, of one guard or of all, and how they are listed."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import overload

from lensnet_guard.calls.errors import LensNetViolation
from lensnet_guard.calls.record import CallRecord, Context
from lensnet_guard.guard import Guard
from lensnet_guard.logs.sinks import Sink, add_to_all, remove_from_all

_GROUP_ABOVE = 10  # calls that are listed one by one


class CapturedCalls(Sequence[CallRecord], Sink):
    """The calls that somebody has made, oldest first; it grows while the capture is open.

    A refused call counts: somebody made it. A recompute does not: nobody did.

    Attributes:
        violations: Records of what was refused meanwhile, calls and blocks, whatever the context
            and scope.
        others: Calls that ``context`` and ``scope`` leave out.
    """

    def __init__(self, context: Context | None = None, scope: str | None = None) -> None:
        self.violations: list[CallRecord] = []
        self.others = 0
        self._context = context
        self._scope = scope
        self._records: list[CallRecord] = []

    @overload
    def __getitem__(self, index: int) -> CallRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[CallRecord]: ...
    def __getitem__(self, index: int | slice) -> CallRecord | Sequence[CallRecord]:
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"<{len(self)} captured calls>"

    def _add(self, record: CallRecord) -> None:
        if self._context in (None, record.context) and self._scope in (None, record.scope):
            self._records.append(record)
        else:
            self.others += 1

    # A sink ------------------------------------------------------------------------------------

    def begin(self, record: CallRecord) -> None:
        """Take an allowed call; one that is only observed came as a violation already."""
        if record.kind == "call" and record.verdict == "allow":
            self._add(record)

    def violation(self, error: LensNetViolation) -> None:
        """Take a refused call, and what was refused."""
        if error.record is not None:
            self.violations.append(error.record)
            if error.record.kind in ("call", "bypass"):
                self._add(error.record)


@contextmanager
def capture(
    guard: Guard | None = None, *, context: Context | None = None, scope: str | None = None
) -> Iterator[CapturedCalls]:
    """Capture the calls of one guard, or of every guard of the process, in every thread.

    Args:
        guard: Whose calls; None for all, also for guards that are made meanwhile.
        context: Take calls of this context only.
        scope: Take calls of this scope only.

    Yields:
        The calls, more and more of them.
    """
    captured = CapturedCalls(context, scope)
    if guard is None:
        add_to_all(captured)
    else:
        guard.add_sink(captured)
    try:
        yield captured
    finally:
        if guard is None:
            remove_from_all(captured)
        else:
            guard.remove_sink(captured)


def list_calls(calls: Sequence[CallRecord], *, full_stacks: bool = False) -> str:
    """Return a numbered listing: who called, in which context and scope, with which shapes.

    Above ten calls, equal ones (same module, context, scope, verdict, shapes and caller) are listed
    once, with their number.

    Args:
        calls: What to list.
        full_stacks: Show every frame that was kept, not the caller only.
    """
    if len(calls) <= _GROUP_ABOVE:
        rows = [(f"{number:>5}.", call) for number, call in enumerate(calls, 1)]
    else:
        first = {_key(call): call for call in reversed(calls)}
        times = Counter(map(_key, calls))
        rows = [(f"{count:>4} x", first[key]) for key, count in times.items()]
    return "\n".join(
        f"{number} {_headline(call)}\n{_whence(call, full_stacks)}" for number, call in rows
    )


def _key(call: CallRecord) -> tuple[object, ...]:
    return call.module, call.context, call.scope, call.reason, call.inputs, call.caller


def _headline(call: CallRecord) -> str:
    where = str(call.context or "no context")
    if call.scope is not None:
        where += f", scope {call.scope}"
    refused = f" refused as {call.reason}" if call.reason is not None else ""
    return f"{call.module}({', '.join(call.inputs)}) in {where}{refused}"


def _whence(call: CallRecord, full_stacks: bool) -> str:
    frames = call.stack() if full_stacks else [call.caller]
    return "\n".join(f"       {'at' if i == 0 else '  '} {f}" for i, f in enumerate(frames))
