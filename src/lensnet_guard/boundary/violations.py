"""Violations: recorded, logged, told to the window that they happen in, and raised."""

import copy
import threading
from collections.abc import Sequence
from types import FrameType

from lensnet_guard.calls.context import OpenBlocks, Position
from lensnet_guard.calls.errors import LensNetViolation, build_violation
from lensnet_guard.calls.policy import CallPolicy, Mode
from lensnet_guard.calls.record import CallRecord, Kind, frame_up
from lensnet_guard.logs.history import History, Refusal


class Violations:
    """What becomes of the violations of one contract.

    Args:
        policy: The contract.
        mode: ``"enforce"`` raises them; with the others they are only recorded and logged.
        history: It takes the records, and knows who else is told.
        blocks: What is open in each thread and task.

    Attributes:
        unseen: Those that background threads have raised outside of every window.
    """

    def __init__(
        self, policy: CallPolicy, mode: Mode, history: History, blocks: OpenBlocks
    ) -> None:
        self._policy = policy
        self._mode = mode
        self._history = history
        self._blocks = blocks
        self.unseen: list[LensNetViolation] = []

    def refuse(self, refusal: Refusal, due_from: Sequence[str] = ()) -> CallRecord:
        """Record and log a violation, then raise it; in observe mode return its record.

        Args:
            refusal: What is refused.
            due_from: Who should have made calls that are missing.
        """
        here, scope = refusal.here, refusal.scope
        ledger = here.ledger
        with self._history.lock:
            record = self._history.add_violation(refusal)
            made = self._made(here)
            window = here.window(self._policy.in_full[scope].per) if scope is not None else None
            earlier = tuple(window.spent(scope)) if window and scope else ()
        violation = build_violation(
            record,
            self._policy,
            made=made,
            earlier=earlier,
            detail=refusal.detail,
            due_from=due_from,
            mistake=refusal.mistake,
        )
        if ledger is not None:
            ledger.violations.append(violation)
        elif threading.current_thread() is not threading.main_thread():
            self.unseen.append(copy.copy(violation))  # without frames, for it may be long
        for sink in self._history.sinks:
            sink.violation(violation)
        if self._mode == "observe":
            return record
        self._history.name_log(violation)
        try:
            raise violation
        finally:
            del violation  # or this frame, which its traceback holds, would hold it

    def raise_unseen(self) -> None:
        """Raise a violation that a background thread raised outside of every window.

        Nobody waits for what such a thread raises, so it could pass in silence.
        """
        unseen, self.unseen = self.unseen, []
        if unseen and self._mode == "enforce":
            raise unseen[0]

    def _made(self, here: Position) -> dict[str, int]:
        """Return the calls so far of each scope whose window is open."""
        made = {}
        for name, full in self._policy.in_full.items():
            if (window := here.window(full.per)) is not None:
                made[name] = len(window.spent(name))
        return made

    def require_context(self, what: str) -> Position:
        """Return what is open; refuse ``what`` where no context is declared."""
        here = self._blocks.position()
        if here.context is None:
            self.violate("NoContext", here, f": {what}")
        return here

    def violate(
        self,
        reason: str,
        here: Position,
        detail: str,
        *,
        kind: Kind = "context",
        due_from: Sequence[str] = (),
        frame: FrameType | None = None,
        mistake: str | None = None,
    ) -> None:
        """Refuse something that is not a call.

        Args:
            reason: The name of the violation's class.
            here: What is open.
            detail: What the headline of its message ends in.
            kind: Of its record.
            due_from: Who should have made calls that are missing.
            frame: The code that it is about; by default the caller's.
            mistake: What explains it, where its reason alone does not tell.

        Raises:
            LensNetViolation: Of that class, where violations are raised.
        """
        if self._mode != "off":
            frame = frame or frame_up(1)
            refusal = Refusal(kind, reason, here, frame, here.scope, detail=detail, mistake=mistake)
            self.refuse(refusal, due_from)
