"""The wrapt boundary: a module that looks, registers and saves like the raw one, and asks first.

What is not a call passes straight through to the raw module (parameters, ``state_dict`` keys,
hooks, ``named_modules``). What would hand out the raw module, and so drop the guard silently, is
overridden here: fluent methods, copies and pickles. Runs of the raw module are `tripwire`'s.
"""

import copy
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from types import FrameType, MethodType
from typing import Any, Protocol, cast

import wrapt
from torch import nn

from lensnet_guard._torch_internals import eager_only
from lensnet_guard.boundary.armed_class import prepare_scriptable
from lensnet_guard.boundary.entrances import (
    Entered,
    counted,
    entrance,
    is_entrance,
)
from lensnet_guard.boundary.forwards import FetchedForward, OwnMethod
from lensnet_guard.boundary.inside import EAGER, Inside
from lensnet_guard.boundary.tripwire import guard_behind
from lensnet_guard.calls.record import frame_up

# The methods of nn.Module that return self; a test compares this with torch's own annotations.
FLUENT_METHODS = (
    *("apply", "bfloat16", "cpu", "cuda", "double", "eval", "float", "half", "ipu", "mtia"),
    *("requires_grad_", "share_memory", "to", "to_empty", "train", "type", "xpu"),
)


class Keeper(Protocol):
    """What a proxy asks of its guard."""

    @property
    def guard(self) -> object:
        """The guard itself."""

    @property
    def name(self) -> str:
        """The module's name in messages."""

    @property
    def inside(self) -> Inside:
        """What says whether a thread is inside a call."""

    @property
    def entered(self) -> Entered:
        """What says whether a method that was fetched through the proxy runs."""

    @property
    def methods(self) -> frozenset[str]:
        """The methods of which each run is a call."""

    @property
    def replaced(self) -> bool:
        """Whether a call has run another forward than the class's."""

    def run(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: FrameType | None,
        method: str | None = None,
    ) -> Any:
        """Admit and run one call.

        Args:
            run: What to run: the raw module, its forward, or a method.
            args: The call's arguments by position.
            kwargs: The call's arguments by name.
            frame: The frame of the proxy's caller, if it has one.
            method: The method or part that is called, where the policy names it.

        Returns:
            What the module returns.

        Raises:
            LensNetViolation: The call is refused.
        """

    def copy(self, module: nn.Module, *, shallow: bool) -> Any:
        """Guard a copy of the module: same contract, its own identity, counts and context.

        Args:
            module: The copy.
            shallow: Whether it runs the submodules of its original.

        Returns:
            The copy, guarded.
        """

    def reduce(self, module: nn.Module) -> tuple[Any, ...]:
        """Return what pickle keeps of the guarded module: the raw one, and its contract."""


class _TypeOfProxies(type(wrapt.ObjectProxy)):  # type: ignore[misc]
    """What asks for the class of a guarded module by ``type`` shall find that of the raw one.

    Its attributes, what it makes, what is an instance of it; not what it is derived from.
    """

    find_kind: Callable[[], type[nn.Module] | None] = staticmethod(lambda: None)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make another module of the raw one's kind, which nobody guards."""
        kind = cls.find_kind()
        return super().__call__(*args, **kwargs) if kind is None else kind(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.find_kind(), name)

    def __instancecheck__(cls, instance: object) -> bool:
        kind = cls.find_kind()
        return super().__instancecheck__(instance) or isinstance(instance, kind or ())


class GuardedModule(wrapt.ObjectProxy[nn.Module], metaclass=_TypeOfProxies):
    """Proxy around an ``nn.Module`` whose calls its guard admits, records or refuses.

    Made by `lensnet_guard.guard_module`, through `proxy_for`, not directly.
    """

    def __init__(self, module: nn.Module, keeper: Keeper) -> None:
        super().__init__(module)
        self._self_keeper = keeper  # by its prefix wrapt knows an attribute of the proxy's own
        self._self_entrances: dict[str, Any] = {}  # kept, so that each is equal to itself

    @eager_only(EAGER)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, if the contract allows it."""
        return self._self_keeper.run(self.__wrapped__, args, kwargs, frame_up().f_back)

    @eager_only(EAGER)
    def __getattr__(self, name: str) -> Any:
        found = _fetch(self, name)
        kind = type(found)  # whatever else it passes for; and it must be cheap to read a weight
        if kind is MethodType and _OF_EVERY_MODULE.get(name) is not found.__func__:
            return self._self_entrance(name, found)
        if kind is OwnMethod and found.method == name:
            return self._self_counted(name, found.__wrapped__)
        return found

    def _self_entrance(self, name: str, found: MethodType) -> MethodType:
        """Return a method of the module so that what it runs of the module is let in."""
        module, kept = self.__wrapped__, self._self_entrances.get(name)
        if kept is not None and kept.__func__.__wrapped__ is found.__func__:
            guarded = name not in self._self_keeper.methods or guard_behind(module) is not None
            if guarded and kept.__self__ is found.__self__:
                return kept  # type: ignore[no-any-return]
        if found.__self__ is not module or not is_entrance(found):
            return found
        kept = self._self_entrances[name] = entrance(name, found, self._self_find())
        return kept

    def _self_counted(self, name: str, found: Any) -> Any:
        """Return what somebody has put in the place of a method of which each run is a call."""
        if isinstance(found, MethodType):
            return self._self_entrance(name, found)
        return counted(name, found, self.__wrapped__, self._self_find())

    def _self_find(self) -> Callable[[nn.Module], Keeper | None]:
        """Return what finds who admits calls; this very keeper where the tripwire is gone."""
        if guard_behind(self.__wrapped__) is not None:
            return _keeper_behind
        return lambda _: self._self_keeper

    @property
    @eager_only(EAGER)
    def forward(self) -> Any:
        """The module without its hooks, as ``nn.Module.forward`` is; guarded all the same.

        Another may be set in its place, and deleted: what calls run from then on. One that was read
        here before is part of the call when the other calls it.
        """
        return FetchedForward(self.__wrapped__, self._self_keeper.inside, self._self_find())

    @forward.setter
    def forward(self, forward: Any) -> None:
        self.__wrapped__.forward = forward

    @forward.deleter
    def forward(self) -> None:
        del self.__wrapped__.forward

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """``nn.Module.named_modules``, whose first one is the module that was asked: this one.

        fully_shard finds the root among its modules so. Asked by a module around it, who gives
        what it has seen, it is the raw module, as ever.
        """
        raw, is_root = self.__wrapped__, not args and kwargs.get("memo") is None
        for name, module in raw.named_modules(*args, **kwargs):
            yield name, self if is_root and module is raw else module

    def __copy__(self) -> "GuardedModule":
        copied = self._self_keeper.copy(copy.copy(self.__wrapped__), shallow=True)
        return cast("GuardedModule", copied)

    def __deepcopy__(self, memo: dict[int, Any]) -> "GuardedModule":
        module = copy.deepcopy(self.__wrapped__, memo)
        return cast("GuardedModule", self._self_keeper.copy(module, shallow=False))

    def __reduce__(self) -> tuple[Any, ...]:
        return self._self_keeper.reduce(self.__wrapped__)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()

    def __prepare_scriptable__(self) -> Any:
        return prepare_scriptable(self.__wrapped__)

    def __repr__(self) -> str:
        return f"guarded {self.__wrapped__!r}"


def proxy_for(module: nn.Module, keeper: Keeper) -> GuardedModule:
    """Return the proxy of a module, of a type for all of its class.

    ``type(model)(model.config)`` makes another module of the raw one's class, as callbacks that
    average weights do, and ``type(model).from_pretrained`` is that class's.

    Args:
        module: The raw module.
        keeper: What the proxy asks.
    """
    proxy: GuardedModule = GuardedModule.__new__(_type_for(module.__class__))
    proxy.__init__(module, keeper)  # type: ignore[misc]
    return proxy


def _type_for(kind: type[nn.Module]) -> type[GuardedModule]:
    found: Any = _types.get(kind)
    if found is None:
        of = {"find_kind": weakref.ref(kind), "__module__": __name__}
        found = _types[kind] = _TypeOfProxies(kind.__name__, (GuardedModule,), of)
    return found  # type: ignore[no-any-return]


_types: MutableMapping[type[nn.Module], Any] = weakref.WeakKeyDictionary()


def _fluent(name: str) -> Any:
    def method(self: GuardedModule, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self.__wrapped__, name)(*args, **kwargs)
        return self if result is self.__wrapped__ else result

    method.__name__ = name
    method.__qualname__ = f"GuardedModule.{name}"
    method.__doc__ = f"``nn.Module.{name}``, returning the guarded module."
    return method


for _name in FLUENT_METHODS:
    if hasattr(nn.Module, _name):
        setattr(GuardedModule, _name, _fluent(_name))


def is_proxy(module: object) -> bool:
    """Return whether this is a guarded module itself, and not the raw one behind it."""
    # type(), because isinstance() would believe the class that the proxy pretends to have
    return issubclass(type(module), GuardedModule)


def keeper_of(module: object) -> Keeper | None:
    """Return what a guarded module asks; None for anything else, raw modules included."""
    # By wrapt's rules an attribute of the proxy's own begins so.
    return module._self_keeper if is_proxy(module) else None  # type: ignore[attr-defined]  # noqa: SLF001


def _keeper_behind(module: nn.Module) -> Keeper | None:
    """Return what the proxy asks of which a module stands behind."""
    guard: Any = guard_behind(module)
    return keeper_of(guard.module) if guard is not None else None


# Reads of the raw module what the proxy does not have itself.
_fetch: Callable[[GuardedModule, str], Any] = wrapt.ObjectProxy.__getattr__
_OF_EVERY_MODULE = vars(nn.Module)
