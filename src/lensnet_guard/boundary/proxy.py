"""The wrapt boundary: a module that looks, registers and saves like the raw one, and asks first.

What is not a call passes straight through to the raw module (parameters, ``state_dict`` keys,
hooks, ``named_modules``). What would hand out the raw module, and so drop the guard silently, is
overridden here: fluent methods, copies and pickles. Runs of the raw module are `tripwire`'s.
"""

import copy
import functools
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol, cast

import wrapt
from torch import nn

from lensnet_guard._torch_internals import eager_only
from lensnet_guard.boundary.armed_class import refuse_scripting
from lensnet_guard.boundary.tripwire import EAGER
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

    def run(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: FrameType | None,
    ) -> Any:
        """Admit and run one call.

        Args:
            run: What to run: the raw module, or its forward.
            args: The call's arguments by position.
            kwargs: The call's arguments by name.
            frame: The frame of the proxy's caller, if it has one.

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


class GuardedModule(wrapt.ObjectProxy[nn.Module]):
    """Proxy around an ``nn.Module`` whose calls its guard admits, records or refuses.

    Made by `lensnet_guard.guard_module`, not directly.
    """

    def __init__(self, module: nn.Module, keeper: Keeper) -> None:
        super().__init__(module)
        self._self_keeper = keeper  # by its prefix wrapt knows an attribute of the proxy's own

    @eager_only(EAGER)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, if the contract allows it."""
        return self._self_keeper.run(self.__wrapped__, args, kwargs, frame_up().f_back)

    @property
    def forward(self) -> Any:
        """The module without its hooks, as ``nn.Module.forward`` is; guarded all the same.

        Raises:
            AttributeError: When it is set: a call would not run what was set.
        """
        raw = self.__wrapped__.forward

        @functools.wraps(raw, updated=())
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._self_keeper.run(raw, args, kwargs, frame_up().f_back)

        return forward

    @forward.setter
    def forward(self, _: Any) -> None:
        raise AttributeError(
            f"the forward of {self._self_keeper.name} is guarded and cannot be replaced; wrap or "
            "compile the module's forward first, and guard it afterwards"
        )

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

    def __prepare_scriptable__(self) -> None:
        refuse_scripting(self.__wrapped__)

    def __repr__(self) -> str:
        return f"guarded {self.__wrapped__!r}"


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
