"""What is open in this thread or task: context, windows (a micro-step is one), sanctioned scope.

Every ``with`` block of a guard is one `Block`; the open ones form a stack in a context variable,
so threads start with nothing open and asyncio tasks inherit what was open when they started. A
block that is closed elsewhere (a generator finalised by another thread, a task that outlives the
block it was started in) counts for nothing from then on: a block's effect ends with the block.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

from lensnet_guard.calls.budget import MicroStep, Window
from lensnet_guard.calls.record import Context
from lensnet_guard.calls.scope import MICRO_STEP

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(slots=True, eq=False)
class Block:
    """One open ``with`` block: a context, or a window, or a scope, or a micro-step and a scope.

    Attributes:
        context: The context that it declares, if it does.
        window: The window that it opens, if it does.
        scope: The scope that it opens, if it does.
        within: The context that the scope was opened in, and the only one in which it counts.
        ledger: The micro-step that the scope was opened in, likewise; None outside of one.
        closed: Whether it has ended; then it counts for nothing.
    """

    context: Context | None = None
    window: Window | None = None
    scope: str | None = None
    within: Context | None = None
    ledger: Window | None = None
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Position:
    """The sum of the open blocks.

    Attributes:
        context: The context that the innermost block declares.
        micro_step: The innermost micro-step, where it was opened in that context.
        scope: The innermost scope, where it was opened in that context.
        blocks: The open blocks, outermost first.
    """

    context: Context | None = None
    micro_step: MicroStep | None = None
    scope: str | None = None
    blocks: tuple[Block, ...] = ()

    @property
    def inside_training_step(self) -> bool:
        """Whether a training micro-step is open, also one whose context has been closed."""
        steps = (block.window for block in self.blocks if isinstance(block.window, MicroStep))
        return any(step.context == "training" for step in steps)

    @property
    def ledger(self) -> Window | None:
        """The window that takes note of what goes wrong here: the micro-step, or the innermost."""
        return self.micro_step or next(self.windows, None)

    def window(self, name: str) -> Window | None:
        """Return the innermost open window of a name; None when there is none."""
        if name == MICRO_STEP:
            return self.micro_step
        return next((window for window in self.windows if window.name == name), None)

    @property
    def windows(self) -> Iterator[Window]:
        """The open windows that are no micro-steps, innermost first."""
        for block in reversed(self.blocks):
            if block.window is not None and block.window.name != MICRO_STEP:
                yield block.window


_NOWHERE = Position()


class OpenBlocks:
    """The stack of open blocks of one guard, seen from the running thread or task."""

    def __init__(self) -> None:
        self._position = ContextVar("lensnet_guard_position", default=_NOWHERE)

    def position(self) -> Position:
        """Return where the running thread or task stands now."""
        position = self._position.get()
        for block in position.blocks:
            if block.closed:
                return self._move_to(position.blocks)
        return position

    def push(self, block: Block) -> Position:
        """Open a block; the position is that inside it."""
        return self._move_to((*self._position.get().blocks, block))

    def remove(self, block: Block) -> None:
        """Close a block, in whatever order and from whatever thread."""
        block.closed = True
        self._move_to(self._position.get().blocks)

    def carry(self, fn: Callable[P, R]) -> Callable[P, R]:
        """Bind a function to the position here and now; see `resumed`.

        Raises:
            TypeError: A generator function, whose body runs only after the call has returned.
        """
        if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
            raise TypeError(
                f"carry binds a call, and the body of the generator {fn.__qualname__} runs after "
                "it: carry the function that consumes the generator"
            )
        position = self.position()
        if inspect.iscoroutinefunction(fn):

            @functools.wraps(fn)
            async def awaited(*args: P.args, **kwargs: P.kwargs) -> Any:
                with self.resumed(position):
                    return await fn(*args, **kwargs)

            return cast("Callable[P, R]", awaited)

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
        blocks = tuple(Block(context=f.context) if f.context else f for f in position.blocks)
        token = self._position.set(_fold(blocks))
        try:
            yield
        finally:
            self._position.reset(token)

    def _move_to(self, blocks: tuple[Block, ...]) -> Position:
        position = _fold(tuple(block for block in blocks if not block.closed))
        self._position.set(position)
        return position


def _fold(blocks: tuple[Block, ...]) -> Position:
    """Add up open blocks; a micro-step and a scope count in their own context only."""
    context: Context | None = None
    micro_step: MicroStep | None = None
    scope: Block | None = None
    for block in blocks:
        if block.context is not None:
            context = block.context
        if isinstance(block.window, MicroStep):
            micro_step, scope = block.window, None
        if block.scope is not None:
            scope = block
    if micro_step is not None and micro_step.context != context:
        micro_step = None
    if scope is not None and (scope.within != context or scope.ledger is not micro_step):
        scope = None
    return Position(context, micro_step, scope.scope if scope is not None else None, blocks)
