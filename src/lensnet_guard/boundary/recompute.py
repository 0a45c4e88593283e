"""Recomputes: second runs of a recorded call by activation checkpointing. They are no new calls.

A checkpointed call runs again inside backward, when its scope has long closed, and on CUDA in a
thread that has no context. It is recognised by torch's own checkpoint object: the same one is
there when the call runs first and when it is recomputed. A call that was not made under a
checkpoint before is no recompute, whatever the stack looks like; only where torch does not show
its checkpoints is what they run in backward let through, as a recompute of nobody knows which call.
"""

from types import FrameType
from typing import NamedTuple
from weakref import WeakKeyDictionary

from lensnet_guard._torch_checkpoints import (
    backward_pass,
    losses,
    may_be_in_checkpoint,
    may_be_recomputing,
    open_checkpoints,
    recomputed_checkpoint,
)
from lensnet_guard.calls.record import CallRecord


class Recompute(NamedTuple):
    """A run that is no new call.

    Attributes:
        original: The call that it repeats; None where torch does not show which.
    """

    original: CallRecord | None


class Recomputes:
    """Remembers, for as long as torch does, which calls were made under which checkpoint."""

    def __init__(self) -> None:
        self._calls: WeakKeyDictionary[object, list[CallRecord]] = WeakKeyDictionary()
        # Of each checkpoint the backward pass seen last, and the recomputes that it has made.
        self._passes: WeakKeyDictionary[object, tuple[int | None, int]] = WeakKeyDictionary()

    def remember(self, record: CallRecord, frame: FrameType | None) -> None:
        """Note a call that is made from ``frame``, for all checkpoints that are open there."""
        if may_be_in_checkpoint():
            for checkpoint in open_checkpoints(frame):
                self._calls.setdefault(checkpoint, []).append(record)

    def knows(self, frame: FrameType | None) -> bool:
        """Return whether a call was made under the checkpoint that runs again from ``frame``."""
        return any(one in self._calls for one in recomputed_checkpoint(frame) or ())

    def find(self, frame: FrameType | None, *, hidden: bool = False) -> Recompute | None:
        """Return the recompute that runs from ``frame``; None when this is none.

        Several calls under one checkpoint are recomputed in their order, in every backward pass.

        Args:
            frame: The innermost frame of who runs the module.
            hidden: The checkpoint may have been opened where no call is noted.
        """
        held = recomputed_checkpoint(frame) if may_be_recomputing() else None
        if held is None:
            return None
        checkpoint = next((one for one in held if one in self._calls), None)
        if checkpoint is None:
            return Recompute(None) if hidden or losses() else None
        calls = self._calls[checkpoint]
        backward = backward_pass()
        last_pass, made = self._passes.get(checkpoint, (backward, 0))
        if last_pass != backward or (backward is None and made == len(calls)):
            made = 0  # no pass has a number where a saved tensor is read
        self._passes[checkpoint] = backward, made + 1
        if made >= len(calls):
            return None
        self.remember(calls[made], frame)  # a checkpoint within this one starts anew
        return Recompute(calls[made])
