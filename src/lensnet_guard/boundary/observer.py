"""What a log in observe mode notes of calls besides: who makes them, in what windows and state.

``lensnet-guard suggest`` reads it. Nothing of it is taken in enforce mode, or without a log.
"""

from types import FrameType
from typing import Any

from lensnet_guard import _schema
from lensnet_guard.calls.call import Call
from lensnet_guard.calls.callers import names_on
from lensnet_guard.calls.context import Position
from lensnet_guard.calls.record import CallRecord


class Observer:
    """Looks at the calls of one module, and asks for nothing of them."""

    def begin(
        self, record: CallRecord, call: Call, frame: FrameType | None, here: Position
    ) -> None:
        """Note what there is to say of a call before it runs.

        Args:
            record: Of the call; it takes the notes to the log.
            call: As conditions see it.
            frame: The innermost frame of who calls.
            here: The blocks that are open.
        """
        notes: dict[str, Any] = {_schema.CALLERS: names_on(frame, record.depth)}
        if windows := [window.name for window in here.windows]:
            notes[_schema.WINDOWS] = windows
        record.notes = notes

    def end(self, record: CallRecord, call: Call, result: Any) -> None:
        """Note what there is to say of what a call has returned."""
