"""The wrapt boundary: a module that looks, registers and saves like the raw one, and asks first.

Everything but a call passes straight through to the raw module (parameters, ``state_dict`` keys,
hooks, ``named_modules``). What would hand out the raw module, and so drop the guard silently, is
overridden here: fluent methods, copies and pickles. Runs of the raw module are `tripwire`'s.
"""

import copy
import sys
from typing import TYPE_CHECKING, Any, cast

import wrapt
from torch import nn

from lensnet_guard._torch_internals import eager_only
from lensnet_guard.tripwire import guard_behind, refuse_scripting

if TYPE_CHECKING:
    from lensnet_guard.guard import Guard

# The methods of nn.Module that return self; a test compares this with torch's own annotations.
FLUENT_METHODS = (
    *("apply", "bfloat16", "cpu", "cuda", "double", "eval", "float", "half", "ipu", "mtia"),
    *("requires_grad_", "share_memory", "to", "to_empty", "train", "type", "xpu"),
)


# What torch prints where a guarded module stands in the way of a full graph.
EAGER = (
    "a module guarded by lensnet_guard is called in Python, so that every call is counted. Compile "
    "the module itself before it is guarded (module.compile(); guard_module(module)) and leave "
    "fullgraph=True out around its callers: they run with one graph break"
)


class GuardedModule(wrapt.ObjectProxy[nn.Module]):
    """Proxy around an ``nn.Module`` whose calls its guard admits, records or refuses.

    Made by `lensnet_guard.guard_module`, not directly.
    """

    def __init__(self, module: nn.Module, guard: "Guard") -> None:
        super().__init__(module)
        self._self_guard = guard

    @eager_only(EAGER)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._self_guard._run(self.__wrapped__, args, kwargs, sys._getframe().f_back)

    @eager_only(EAGER)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module without its hooks, as ``nn.Module.forward`` does; guarded all the same."""
        return self._self_guard._run(self.__wrapped__.forward, args, kwargs, sys._getframe().f_back)

    def __copy__(self) -> "GuardedModule":
        return self._self_guard._guard_copy(copy.copy(self.__wrapped__), shallow=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> "GuardedModule":
        module = copy.deepcopy(self.__wrapped__, memo)
        return self._self_guard._guard_copy(module, shallow=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._self_guard._reduce_module(self.__wrapped__)

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
    """Whether this is a guarded module itself, and not the raw one behind it."""
    # type(), because isinstance() would believe the class that the proxy pretends to have
    return issubclass(type(module), GuardedModule)


def guard_of(module: object) -> "Guard | None":
    """The guard of a guarded module, or of a raw module behind a proxy; None for anything else."""
    guard = module._self_guard if is_proxy(module) else guard_behind(module)  # type: ignore[attr-defined]
    return cast("Guard | None", guard)
