"""Functions that somebody has put on an instance of a guarded module, in its forward's place.

What stands there runs inside an admitted call, and only there; what was read from there before, and
is called by it, is a part of that call. None of the objects here is a function: a function travels
with a deep copy as it is, and the copy would run the original's weights.
"""

import contextlib
import copy
import functools
import inspect
import operator
from collections.abc import Callable
from types import CellType, FrameType, FunctionType, MethodType
from typing import Any, Protocol

import torch
from torch import nn

from lensnet_guard._torch_checkpoints import recomputed_checkpoint
from lensnet_guard._torch_internals import eager_only
from lensnet_guard.boundary.armed_class import ArmedMeta, itself, original_of
from lensnet_guard.boundary.entrances import behind_entrance
from lensnet_guard.boundary.inside import EAGER, Inside
from lensnet_guard.calls.record import frame_up

_MISSING = object()


class Wire(Protocol):
    """What checks a function on an instance."""

    def run_own(
        self,
        part: nn.Module,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        method: str | None = None,
    ) -> Any:
        """Run a function that is none of the class, and ask first."""


class OwnMethod:
    """Stands where somebody has put a forward, or another method, on an instance, and asks first.

    A pickle holds what was put there alone.

    Attributes:
        tripwire: What it asks.
        part: On whose instance it stands.
        method: Its name where the policy counts it; None for the forward.
        __wrapped__: What was put there, where `inspect.signature` looks for it.
    """

    def __init__(
        self, tripwire: Wire, part: nn.Module, run: Callable[..., Any], method: str | None = None
    ) -> None:
        self.tripwire = tripwire
        self.part = part
        self.method = method
        self.__wrapped__ = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run what was put there, if the contract allows it."""
        return self.tripwire.run_own(self.part, self.__wrapped__, args, kwargs, self.method)

    def __getattr__(self, name: str) -> Any:
        return _of_what_it_runs(self, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OwnMethod":
        run = _behind_the_door(self.__wrapped__, self.part)
        part, run = copy.deepcopy((self.part, run), memo)
        return OwnMethod(self.tripwire, part, run, self.method)

    def __reduce__(self) -> tuple[Any, ...]:
        return itself, (self.__wrapped__,)


class Admits(Protocol):
    """Who admits the runs of a forward that was fetched through the proxy."""

    @property
    def inside(self) -> Inside:
        """What says whether a thread is inside a call."""

    @property
    def replaced(self) -> bool:
        """Whether a call has run another forward than the class's."""

    def run(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: FrameType | None,
    ) -> Any:
        """Admit and run one call."""


class FetchedForward:
    """The forward of a guarded module as its proxy gives it out: each run of it is a call.

    But one that was replaced meanwhile, and is called by what has replaced it, is a part of the
    call that runs already. It is told from a re-entry by what the running call began with, or what
    stands there now: another forward.

    Args:
        module: The raw module.
        inside: Says whether the running thread is inside one of its calls.
        find: Returns who admits its calls; None when it is not guarded any more.

    Attributes:
        module: The same; of a copy of the module, the copy.
        own: What stood on the instance when it was fetched; None for the class's forward.
        behind: The raw module's own forward of then, which is no door.
    """

    __slots__ = ("_find", "_inside", "behind", "module", "own")

    def __init__(
        self, module: Any, inside: Inside, find: Callable[[nn.Module], Admits | None]
    ) -> None:
        self.module = module
        self.own = own_forward(module)
        self.behind = module.forward
        self._inside = inside
        self._find = find

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module without its hooks, if the contract allows it."""
        inside = self._inside
        # A forward that was compiled as it was fetched comes this way, and no other.
        if torch.compiler.is_compiling() and inside.here and inside.running is not self.own:
            return self.behind(*args, **kwargs)
        return self._enter(args, kwargs)

    @eager_only(EAGER)
    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        who, frame = self._find(self.module), frame_up(2)
        if who is None:
            return self.behind(*args, **kwargs)
        self._inside = inside = who.inside  # of a copy's own guard
        if inside.here:
            now = own_forward(self.module)
            is_part = inside.running is not self.own or now is not self.own
        else:
            is_part = who.replaced and recomputed_checkpoint(frame) is not None
        if is_part:
            return self.behind(*args, **kwargs)
        return who.run(self.behind, args, kwargs, frame)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        run: Callable[..., Any] = self.own
        return run if run is not None else class_method(self.module, "forward")

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__wrapped__)

    def __getattr__(self, name: str) -> Any:
        return _of_what_it_runs(self, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FetchedForward":
        copied: FetchedForward = object.__new__(FetchedForward)
        copied._inside, copied._find = self._inside, self._find
        copied.module = copy.deepcopy(self.module, memo)
        copied.own, copied.behind = copy.deepcopy((self.own, self.behind), memo)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return itself, (self.__wrapped__,)


def _of_what_it_runs(shown: "OwnMethod | FetchedForward", name: str) -> Any:
    """Return an attribute of a function that another passes for: its name, whose method it is."""
    # But for its dict, by which wrappers copy, and what torch.compile would look behind it by.
    if name in ("__dict__", "__wrapped__") or name.startswith("_torchdynamo"):
        raise AttributeError(name)
    return getattr(shown.__wrapped__, name)


def _behind_the_door(run: Any, part: nn.Module, around: tuple[object, ...] = ()) -> Any:
    """Return a function that a copy takes over as it is, without what lets it call the original.

    It runs the original, as it does without a guard; but that shall be seen for what it is.
    """
    if not isinstance(run, FunctionType) or run.__closure__ is None or run in around:
        return run
    cells = []
    for cell in run.__closure__:
        with contextlib.suppress(ValueError):  # a cell that is empty
            held: Any = cell.cell_contents
            fetched = type(held) is FetchedForward and held.module is part
            raw = held.behind if fetched else _behind_the_door(held, part, (*around, run))
            cell = cell if raw is held else CellType(raw)
        cells.append(cell)
    if all(map(operator.is_, cells, run.__closure__)):
        return run
    code, closure = run.__code__, tuple(cells)
    copied = FunctionType(code, run.__globals__, run.__name__, run.__defaults__, closure)
    copied.__kwdefaults__ = run.__kwdefaults__
    return functools.update_wrapper(copied, run)


def own_forward(module: nn.Module) -> Any:
    """Return what somebody has put in the place of a module's forward; None for nothing."""
    own = module.__dict__.get("forward")
    return own.__wrapped__ if type(own) is OwnMethod else own


def class_method(part: nn.Module, name: str) -> Any:
    """Return a method as the original class has it, bound, whatever stands on the instance."""
    original: Any = original_of(type(part))
    method = inspect.getattr_static(original, name)
    bind = getattr(type(method), "__get__", None)
    return bind(method, part, original) if bind is not None else method


# What was put there -------------------------------------------------------------------------------


def as_given(value: Any, part: nn.Module, name: str) -> Any:
    """Return what somebody puts on an instance, without what the guard has put around it.

    Args:
        value: What is put there. It may be what was read there before.
        part: The instance.
        name: The attribute.

    Returns:
        The function, bound to the instance where it was bound to its proxy; None where it is the
        class's own, which stands there by itself.
    """
    if type(value) is FetchedForward and value.module is part:
        return value.own
    value = behind_entrance(value) or value
    if type(value) is OwnMethod and value.part is part:
        return value.__wrapped__
    bound = isinstance(value, MethodType) and value.__self__ is part
    if bound and value.__func__ is vars(type(part)).get(name, _MISSING):
        return None
    return _of_raw(value, part)


def without_guard(value: Any) -> Any:
    """Return what was read under a guard, and kept, as it would have been read without one."""
    value = behind_entrance(value) or value
    if type(value) in (FetchedForward, OwnMethod):
        return without_guard(value.__wrapped__)
    if isinstance(value, MethodType) and isinstance(type(value.__self__), ArmedMeta):
        part: Any = value.__self__
        name = getattr(value, "__name__", "")
        if value.__func__ is vars(type(part)).get(name, _MISSING):
            return class_method(part, name)
    return value


def _of_raw(value: Any, part: nn.Module) -> Any:
    """Return a function with the raw module in the place of its proxy, which no copy could keep."""

    def raw(argument: Any) -> Any:
        return part if getattr(argument, "__wrapped__", None) is part else argument

    if isinstance(value, MethodType) and raw(value.__self__) is not value.__self__:
        return MethodType(value.__func__, part)
    if type(value) is functools.partial:
        keywords = {name: raw(argument) for name, argument in value.keywords.items()}
        bound = functools.partial(value.func, *map(raw, value.args), **keywords)
        bound.__dict__.update(value.__dict__)
        same = all(map(operator.is_, bound.args, value.args)) and all(
            keywords[name] is value.keywords[name] for name in keywords
        )
        return value if same else bound
    return value
