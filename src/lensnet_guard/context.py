"""What is open in this thread or task: context, micro-step, sanctioned scope.

Every ``with`` block of a guard is one `Frame`; the open ones form a stack in a context variable,
so threads start with nothing open and asyncio tasks inherit what was open when they started. A
frame that is closed elsewhere (a generator finalised by another thread, a task that outlives the
block it was started in) counts for nothing from then on: a block's effect ends with the block.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from lensnet_guard.budget import MicroStep
from lensnet_guard.record import Context

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(slots=True, eq=False)
class Frame:
    """One open ``with`` block: a context, or a micro-step, or a scope, or the last two at once."""

    context: Context | None = None
    micro_step: MicroStep | None = None
    scope: str | None = None
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Position:
    """The sum of the open frames, outermost first."""

    context: Context | None = None
    micro_step: MicroStep | None = None
    scope: str | None = None
    frames: tuple[Frame, ...] = ()

    @property
    def inside_training_step(self) -> bool:
        """Whether a training micro-step is open, also one whose context has been closed."""
        steps = (frame.micro_step for frame in self.frames)
        return any(step is not None and step.context == "training" for step in steps)


_NOWHERE = Position()


class OpenBlocks:
    """The stack of open blocks of one guard, seen from the running thread or task."""

    def __init__(self) -> None:
        self._position = ContextVar("lensnet_guard_position", default=_NOWHERE)

    def position(self) -> Position:
        """Where the running thread or task stands now."""
        position = self._position.get()
        for frame in position.frames:
            if frame.closed:
                return self._move_to(position.frames)
        return position

    def push(self, frame: Frame) -> Position:
        """Open a block; the position is that inside it."""
        return self._move_to((*self._position.get().frames, frame))

    def remove(self, frame: Frame) -> None:
        """Close a block, in whatever order and from whatever thread."""
        frame.closed = True
        self._move_to(self._position.get().frames)

    def carry(self, fn: Callable[P, R]) -> Callable[P, R]:
        """Bind a function to the position here and now; see `resumed`."""
        position = self.position()

        @functools.wraps(fn)
        def carried(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.resumed(position):
                return fn(*args, **kwargs)

        return carried

    @contextmanager
    def resumed(self, position: Position) -> Iterator[None]:
        """Stand at ``position`` for the duration of the block.

        Its context holds even when the block that declared it has ended; its micro-step and its
        scope end with their blocks, because their budget has been settled then.
        """
        frames = tuple(Frame(context=f.context) if f.context else f for f in position.frames)
        token = self._position.set(_fold(frames))
        try:
            yield
        finally:
            self._position.reset(token)

    def _move_to(self, frames: tuple[Frame, ...]) -> Position:
        position = _fold(tuple(frame for frame in frames if not frame.closed))
        self._position.set(position)
        return position


def _fold(frames: tuple[Frame, ...]) -> Position:
    """Add up open frames; a micro-step and its scopes count in its own context only."""
    context: Context | None = None
    micro_step: MicroStep | None = None
    scope: str | None = None
    for frame in frames:
        if frame.context is not None:
            context = frame.context
        if frame.micro_step is not None:
            micro_step, scope = frame.micro_step, None
        if frame.scope is not None:
            scope = frame.scope
    if micro_step is None or micro_step.context != context:
        micro_step, scope = None, None
    return Position(context, micro_step, scope, frames)
