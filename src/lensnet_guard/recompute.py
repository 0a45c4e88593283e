"""Recomputes: second runs of a recorded call by activation checkpointing. They are no new calls.

A checkpointed call runs again inside backward, when its scope has long closed, and on CUDA in a
thread that has no context. It is recognised by torch's own checkpoint object: the same one is on
the stack when the call runs first and when it is recomputed. A call that was not made under a
checkpoint before is no recompute, whatever the stack looks like.
"""

from types import FrameType
from weakref import WeakKeyDictionary

from lensnet_guard._torch_internals import (
    backward_pass,
    open_checkpoints,
    recomputed_checkpoint,
)
from lensnet_guard.record import CallRecord


class Recomputes:
    """Remembers, for as long as torch does, which calls were made under which checkpoint."""

    def __init__(self) -> None:
        self._calls: WeakKeyDictionary[object, list[CallRecord]] = WeakKeyDictionary()
        # Of each checkpoint the backward pass seen last, and the recomputes that it has made.
        self._passes: WeakKeyDictionary[object, tuple[int | None, int]] = WeakKeyDictionary()

    def remember(self, record: CallRecord, frame: FrameType | None) -> None:
        """Note a call that is made from ``frame``, for all checkpoints that are open there."""
        for checkpoint in open_checkpoints(frame):
            self._calls.setdefault(checkpoint, []).append(record)

    def original(self, frame: FrameType | None) -> CallRecord | None:
        """The call that is being recomputed from ``frame``; None when this is no recompute.

        Several calls under one checkpoint are recomputed in their order, in every backward pass.
        """
        backward = backward_pass()
        checkpoint = recomputed_checkpoint(frame)
        calls = self._calls.get(checkpoint) if checkpoint is not None else None
        if not calls:
            return None
        last_pass, made = self._passes.get(checkpoint, (backward, 0))
        made = made if last_pass == backward else 0
        self._passes[checkpoint] = backward, made + 1
        if made >= len(calls):
            return None
        self.remember(calls[made], frame)  # a checkpoint within this one starts anew
        return calls[made]
