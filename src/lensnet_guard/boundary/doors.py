"""The doors by which calls of a module come in, besides the call of its proxy.

They are methods that are fetched through the proxy, methods that the policy counts as calls, and
submodules that it does.
"""

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from lensnet_guard.boundary.armed_class import armed_by
from lensnet_guard.boundary.entrances import Entered
from lensnet_guard.boundary.peft_models import whole_methods
from lensnet_guard.boundary.tripwire import runs
from lensnet_guard.calls.policy import CallPolicy


class Doors:
    """The doors of one module.

    Args:
        module: The raw module.
        policy: It names methods and parts.

    Attributes:
        entered: Whether a method that was fetched through the proxy runs.
        methods: The names of the methods of which each run is a call.
    """

    def __init__(self, module: nn.Module, policy: CallPolicy) -> None:
        self.entered = Entered()
        self.methods = frozenset(policy.methods) | whole_methods(module)
        named = dict(module.named_modules()) if policy.parts else {}
        self._parts = {name: named[name] for name in policy.parts if name in named}
        self._module = module

    def admit(self, part: nn.Module) -> bool:
        """Return whether a run of the module or a part of it, from outside, is a call."""
        return self.name_of(part) is not None or (part is self._module and bool(self.entered))

    def name_of(self, part: nn.Module) -> str | None:
        """Return the name by which the policy counts runs of a part alone; None if it does not."""
        return next((name for name, one in self._parts.items() if one is part), None)

    def function(self, run: Callable[..., Any], method: str | None) -> Any:
        """Return the function by whose signature the arguments of a call have names.

        Args:
            run: What is run.
            method: The method or part that is called; None for the module.
        """
        if method in self.methods:
            return run
        module = self._parts[method] if method is not None else self._module
        return module.forward


def check_doors(module: nn.Module, policy: CallPolicy) -> None:
    """Make sure that a module has the methods and parts that its policy counts as calls.

    Raises:
        ValueError: It has not, or they cannot be counted.
    """
    for name in policy.methods:
        _check_method(module, name)
    submodules = dict(module.named_modules())
    for name in policy.parts:
        what = type(module).__name__
        if not name or name not in submodules:
            raise ValueError(f"parts: {what} has no submodule {name!r}")
        for shared in policy.shared_submodules:
            if shared in submodules and submodules[name] in submodules[shared].modules():
                raise ValueError(
                    f"parts: {name!r} is inside {shared!r} of shared_submodules, whose runs are no "
                    "calls"
                )
        if armed_by(submodules[name]) is not None:
            raise ValueError(f"parts: {name!r} has a guard of its own; leave it out")
        if not runs(submodules[name]):
            raise ValueError(f"parts: {name!r} has no forward, so there is no call of it to count")


def _check_method(module: nn.Module, name: str) -> None:
    what = type(module).__name__
    if name in ("forward", "__call__"):
        raise ValueError(f"methods: {name!r} of {what} is counted anyway; leave it out")
    static, found = inspect.getattr_static(module, name, None), getattr(module, name, None)
    bound = callable(static) and isinstance(found, MethodType)
    # What somebody has put on the class in the method's place: a mock of their tests.
    instead = callable(static) and found is static and not isinstance(static, type)
    own = callable(vars(module).get(name))
    if isinstance(static, classmethod) or not (bound or instead or own):
        raise ValueError(f"methods: {what} has no method {name!r}")
    if hasattr(nn.Module, name) or name.startswith("__"):
        raise ValueError(
            f"methods: {name!r} is a method of every module, and no way to call {what}; name one "
            "of its own"
        )
    function = inspect.unwrap(getattr(module, name))
    kinds = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
    if any(is_one(function) for is_one in kinds):
        raise ValueError(
            f"methods: {what}.{name} returns before its body has run, which no call could hold; "
            "name the method that runs it to its end"
        )
