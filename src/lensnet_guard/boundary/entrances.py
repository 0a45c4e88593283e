"""Methods of a guarded module that are fetched through its proxy: they came by the front door.

``guard.module.generate(...)`` runs on the raw module, and calls it as often as it needs. These
calls are admitted like any other, for as long as the method runs: in its thread or task, not in
what others run there between two of its steps.
"""

import contextlib
import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import (
    AsyncGeneratorType,
    CodeType,
    CoroutineType,
    FrameType,
    FunctionType,
    GeneratorType,
    MethodType,
)
from typing import Any, Protocol

from torch import nn

from lensnet_guard._torch_internals import eager_only
from lensnet_guard.boundary.inside import EAGER
from lensnet_guard.calls.record import frame_up


@dataclass(slots=True, eq=False)
class _Entry:
    """One run of a method.

    Attributes:
        over: Whether it has ended; tasks that it has started may live on.
    """

    over: bool = False


class Entered:
    """Whether a method of the module that was fetched through its proxy runs here and now."""

    def __init__(self) -> None:
        self._entry: ContextVar[_Entry | None] = ContextVar("lensnet_guard_entered", default=None)

    def __bool__(self) -> bool:
        entry = self._entry.get()
        return entry is not None and not entry.over

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Say that one runs, for the duration of the block."""
        entry = _Entry()
        token = self._entry.set(entry)
        try:
            yield
        finally:
            entry.over = True
            with contextlib.suppress(ValueError):  # a coroutine may be closed by another task
                self._entry.reset(token)


class Admits(Protocol):
    """What a method that was fetched through the proxy asks of the guard."""

    @property
    def entered(self) -> Entered:
        """What says that such a method runs."""

    @property
    def methods(self) -> frozenset[str]:
        """The methods of which each run is a call."""

    def run(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: FrameType | None,
        method: str | None = None,
    ) -> Any:
        """Admit and run one call."""


Find = Callable[[nn.Module], Admits | None]


def is_entrance(found: MethodType) -> bool:
    """Return whether a method may run its module: those of every module do not."""
    function = found.__func__
    return vars(nn.Module).get(getattr(function, "__name__", "")) is not function


def entrance(name: str, found: MethodType, find: Find) -> MethodType:
    """Return a method that looks like another, and lets what it runs of the module in.

    Args:
        name: By which it was fetched.
        found: The method, bound to the raw module.
        find: Returns who admits the module's calls; None when it is not guarded any more. It is
            asked at each run: a copy of the module keeps the method, and has a guard of its own.
    """
    function = found.__func__
    make = next((make for is_one, make in _KINDS if is_one(function)), _plain)

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _enter(find(args[0]), name, function, args, kwargs)

    return MethodType(_looking_like(function, make(run)), found.__self__)


def counted(name: str, found: Callable[..., Any], module: nn.Module, find: Find) -> Any:
    """Return a function that stands on the instance for a method of which each run is a call.

    Args:
        name: By which it was fetched.
        found: The function.
        module: The raw module.
        find: As of `entrance`.
    """

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        who = find(module)
        return who.run(found, args, kwargs, frame_up(2), name) if who else found(*args, **kwargs)

    return _looking_like(found, _plain(run))


def _looking_like(function: Any, shim: Any) -> Any:
    functools.update_wrapper(shim, function, updated=())
    # Without that by which torch.compile would look behind it.
    attributes = getattr(function, "__dict__", {})
    shim.__dict__.update((k, v) for k, v in attributes.items() if not k.startswith("_torchdynamo"))
    shim.__wrapped__ = function
    return shim


def behind_entrance(value: Any) -> Any:
    """Return the method that such a one lets in; None for anything else."""
    function = getattr(value, "__func__", value)
    if not isinstance(function, FunctionType) or function.__code__ not in _SHIMS:
        return None
    behind: Any = function.__wrapped__  # type: ignore[attr-defined]
    return MethodType(behind, value.__self__) if isinstance(value, MethodType) else behind


@eager_only(EAGER)
def _enter(
    who: Admits | None,
    name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a method as a call of the books, or with its module's front door open."""
    if who is None:
        return function(*args, **kwargs)
    if name in who.methods:
        return who.run(MethodType(function, args[0]), args[1:], kwargs, frame_up(3), name)
    with who.entered.open():
        result = function(*args, **kwargs)
    # What goes on after the method has returned.
    go_on = _RESUMED.get(type(result))
    return go_on(result, who.entered) if go_on is not None else result


async def _awaited(coroutine: Coroutine[Any, Any, Any], entered: Entered) -> Any:
    with entered.open():
        return await coroutine


def _resumed(generator: Generator[Any, Any, Any], entered: Entered) -> Generator[Any, Any, Any]:
    """Yield what a generator yields; its consumer is not entered."""
    resume, value = generator.send, None
    while True:
        try:
            with entered.open():
                item = resume(value)
        except StopIteration as stop:
            return stop.value
        try:
            value, resume = (yield item), generator.send
        except GeneratorExit:
            with entered.open():
                generator.close()
            raise
        except BaseException as error:
            value, resume = error, generator.throw


async def _resumed_async(
    generator: AsyncGenerator[Any, Any], entered: Entered
) -> AsyncGenerator[Any, Any]:
    """Do as `_resumed`."""
    resume, value = generator.asend, None
    while True:
        try:
            with entered.open():
                item = await resume(value)
        except StopAsyncIteration:
            return
        try:
            value, resume = (yield item), generator.asend
        except GeneratorExit:
            with entered.open():
                await generator.aclose()
            raise
        except BaseException as error:
            value, resume = error, generator.athrow


_RESUMED: dict[type, Callable[[Any, Entered], Any]] = {
    CoroutineType: _awaited,
    GeneratorType: _resumed,
    AsyncGeneratorType: _resumed_async,
}

# Functions of the same kind, for those who ask before they call -----------------------------------

_Run = Callable[[tuple[Any, ...], dict[str, Any]], Any]


def _plain(run: _Run) -> Any:
    def shim(*args: Any, **kwargs: Any) -> Any:
        return run(args, kwargs)

    return shim


def _coroutine(run: _Run) -> Any:
    async def shim(*args: Any, **kwargs: Any) -> Any:
        return await run(args, kwargs)

    return shim


def _generator(run: _Run) -> Any:
    def shim(*args: Any, **kwargs: Any) -> Any:
        return (yield from run(args, kwargs))

    return shim


_KINDS: tuple[tuple[Callable[[Any], bool], Callable[[_Run], Any]], ...] = (
    (inspect.iscoroutinefunction, _coroutine),
    (inspect.isgeneratorfunction, _generator),
)
_SHIMS = frozenset(
    constant
    for make in (_plain, _coroutine, _generator)
    for constant in make.__code__.co_consts
    if isinstance(constant, CodeType)
)
