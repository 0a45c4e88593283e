"""The tripwire: notices runs of a guarded module that did not come through its proxy.

It swaps the class of the raw module, and of every submodule, for a subclass whose ``forward``
first looks whether this thread is inside an admitted run. That catches a reference taken before
guarding, ``__wrapped__``, ``forward``, ``_call_impl``, ``torch.func.functional_call``, deep copies,
a submodule called alone and a module compiled before it was guarded. Swapping ``__call__`` alone
would miss ``_call_impl``; a ``forward`` on the instance would make a copy run the original's
weights.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from lensnet_guard._torch_internals import eager_only
from lensnet_guard.boundary.armed_class import (
    armed_by,
    armed_class,
    arms_of,
    original_of,
    set_class,
)
from lensnet_guard.boundary.forwards import OwnMethod, as_given, without_guard
from lensnet_guard.boundary.inside import EAGER, Inside
from lensnet_guard.boundary.peft_models import prompts_of, unloading_methods

# Called with (part, run, args, kwargs, method) where nobody has admitted a run.
Refuse = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any], str | None], Any]
Tell = Callable[[str], None]


class Tripwire:
    """Arms a module and its submodules; `disarm` puts everything back as it was.

    Left alone are parts that run nothing (a ModuleList inside) or no Python (TorchScript),
    parametrizations (reading a weight runs them), PEFT's prompts (saving them runs them), and parts
    that a guard of their own has armed.

    Args:
        module: The raw module. The parts of a copy are armed although their classes, inherited
            from the original, are armed already.
        guard: Whose module it is, for `guard_behind`.
        inside: Says whether a run is admitted.
        refuse: Called with ``(part, run, args, kwargs, method)`` instead of the run otherwise; what
            it returns is the result.
        shared: Names of submodules that other models run too, and that are left alone.
        methods: Names of methods of the module that are checked as its forward is.
        tell: Where the guard observes, it tells of what would be refused, and of what is left
            alone because it cannot be armed.

    Raises:
        ValueError: ``shared`` names no submodule.

    Whatever arming raises, the module is as it was.
    """

    def __init__(
        self,
        module: nn.Module,
        guard: object,
        inside: Inside,
        refuse: Refuse,
        shared: Iterable[str] = (),
        methods: Collection[str] = (),
        tell: Tell | None = None,
    ) -> None:
        submodules = dict(module.named_modules())
        for name in shared:
            if not name or name not in submodules:
                raise ValueError(
                    f"shared_submodules: {type(module).__name__} has no submodule {name!r}"
                )
        spared = {id(part) for name in shared for part in submodules[name].modules()}
        for part in submodules.values():
            if isinstance(part, parametrize.ParametrizationList):
                spared.update(map(id, part.modules()))
        spared.update(map(id, prompts_of(module)))
        self.module: nn.Module | None = module
        self.guard: object | None = guard
        self.tell = tell
        self._inside = inside
        self._refuse: Refuse | None = refuse
        self._methods = frozenset(methods)
        self._armed: dict[int, nn.Module] = {}
        self._classes: dict[tuple[type, frozenset[str]], type] = {}
        try:
            for part in submodules.values():
                run = part is module or runs(part)  # the module may have counted methods alone
                if id(part) not in spared and run and armed_by(part) is None:
                    self._arm(part)
        except BaseException:
            self.disarm()
            raise

    def _arm(self, part: nn.Module) -> None:
        self.change_class(part, type(part))
        _touch(part)
        self._armed[id(part)] = part
        for name in self._checked(part) & part.__dict__.keys():  # as accelerate's hooks leave it
            self._stand_before(part, name, without_guard(part.__dict__[name]))

    def change_class(self, part: nn.Module, cls: type) -> None:
        """Make a part an instance of ``cls``, armed."""
        original = original_of(cls)
        methods = self._checked(part) - {"forward"}
        methods = frozenset(name for name in methods if hasattr(original, name))
        try:
            if (original, methods) not in self._classes:
                self._classes[original, methods] = self._armed_class(original, methods)
            armed = self._classes[original, methods]
        except Exception as error:
            if self.tell is None:
                raise
            name = original.__name__
            self.tell(
                f"runs of a {name} alone go unseen, for nothing can be derived of it: {error}"
            )
            armed = original
        set_class(part, armed)

    def _checked(self, part: nn.Module) -> frozenset[str]:
        """Return the names under which a part is run."""
        return self._methods | {"forward"} if part is self.module else frozenset({"forward"})

    def owns(self, part: nn.Module) -> bool:
        """Return whether this very part was armed here; a copy of it was not."""
        return id(part) in self._armed

    def step_aside(self, parts: Iterable[nn.Module]) -> None:
        """Leave parts unarmed from now on: same classes and forwards as before, the same objects.

        What somebody has put on an instance is given back to it.
        """
        for part in [part for part in parts if self.owns(part)]:
            for name, value in part.__dict__.items():
                if (plain := without_guard(value)) is not value:
                    part.__dict__[name] = plain
            set_class(part, original_of(type(part)))
            del self._armed[id(part)]

    def _let_go(self, unloaded: object) -> None:
        """Leave a base model unarmed that PEFT has given back, with copies of parts that are in it.

        It is a model of its own from now on: what it was a part of has lost its adapters.
        """
        parts = list(unloaded.modules()) if isinstance(unloaded, nn.Module) else []
        self.step_aside(parts)
        for part in parts:
            if arms_of(type(part)) is self:
                set_class(part, original_of(type(part)))

    def disarm(self) -> None:
        """Restore every class and every forward."""
        self.step_aside(self._armed.values())
        # Copies, and torch.compile's caches, keep the armed classes: they shall keep no more.
        self.module = self.guard = self._refuse = None

    # What runs -------------------------------------------------------------------------------

    @eager_only(EAGER)
    def _behind(
        self,
        part: nn.Module,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        method: str | None = None,
    ) -> Any:
        """Ask about a run that nobody has admitted yet."""
        own = armed_by(part)
        if own is not None and own is not self:  # a guarded copy, by a bound method of before
            return own.run_own(part, run, args, kwargs, method)
        if self._refuse is None or arms_of(type(part)) is None:
            return run(*args, **kwargs)  # a copy that has outlived the guard, or never had one
        return self._refuse(part, run, args, kwargs, method)

    def run_own(
        self,
        part: nn.Module,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        method: str | None = None,
    ) -> Any:
        """Run a function that is none of the class, and ask first."""
        if self._inside.here:
            return run(*args, **kwargs)
        return self._behind(part, run, args, kwargs, method)

    def _armed_class(self, original: Any, methods: frozenset[str]) -> type:
        """Return a subclass of the same name that asks first, and otherwise is the original."""
        inside, tripwire = self._inside, self
        static = isinstance(inspect.getattr_static(original, "forward"), staticmethod)

        def make_forward(original: Any = original) -> Any:
            def forward(part: nn.Module, *args: Any, **kwargs: Any) -> Any:
                run = original.forward
                if static or type(run) is not FunctionType:  # a mock, say, which takes no self
                    behind: Any = super(armed, part)
                    return tripwire.run_own(part, behind.forward, args, kwargs)
                if inside.here:
                    return run(part, *args, **kwargs)
                # No method: torch.compile cannot trace MethodType(...), nor in torch 2.7 __get__.
                return tripwire._behind(part, functools.partial(run, part), args, kwargs)

            return _checked(forward, original.forward)

        def make_call(original: Any = original) -> Any:
            def __call__(part: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
                if inside.here:
                    return original.__call__(part, *args, **kwargs)
                run = functools.partial(original.__call__, part)
                return tripwire._behind(part, run, args, kwargs)

            __call__.__code__ = __call__.__code__.replace()
            return __call__

        def make_method(name: str, original: Any = original) -> Any:
            def method(part: nn.Module, *args: Any, **kwargs: Any) -> Any:
                run = getattr(original, name)
                if inside.here:
                    return run(part, *args, **kwargs)
                return tripwire._behind(part, functools.partial(run, part), args, kwargs, name)

            return _checked(method, getattr(original, name))

        def make_unloading(name: str, original: Any = original) -> Any:
            def method(part: nn.Module, *args: Any, **kwargs: Any) -> Any:
                unloaded = getattr(original, name)(part, *args, **kwargs)
                tripwire._let_go(unloaded)
                return unloaded

            return _checked(method, getattr(original, name))

        def set_attribute(part: nn.Module, name: str, value: Any) -> None:
            original.__setattr__(part, name, value)
            if name in watched:
                tripwire._replaced(part, name)

        watched = {"forward", *methods}
        makers = {"forward": make_forward, "__call__": make_call}
        makers.update((name, functools.partial(make_method, name)) for name in methods)
        for name in unloading_methods(original):
            makers[name] = functools.partial(make_unloading, name)
        armed = armed_class(original, self, makers, set_attribute)
        return armed  # named, for `forward` asks what stands behind it

    # What stands on instances ----------------------------------------------------------------

    def _replaced(self, part: nn.Module, name: str) -> None:
        """Check what somebody has put on an instance, or let the class's own stand there again."""
        if self.owns(part) and name in part.__dict__:
            given = as_given(part.__dict__[name], part, name)
            if given is None:
                del part.__dict__[name]
            else:
                self._stand_before(part, name, given)

    def _stand_before(self, part: nn.Module, name: str, run: Any) -> None:
        method = name if name != "forward" else None
        part.__dict__[name] = OwnMethod(self, part, run, method)


def _checked(function: Any, original: Any) -> Any:
    """Return a function that passes for the original, as far as it tells."""
    # Code of its own, for torch.compile counts recompiles by code and gives up after eight.
    function.__code__ = function.__code__.replace()
    # Without the function's attributes, by which torch.compile would look behind it.
    return functools.wraps(original, updated=())(function)


def guard_behind(module: object) -> object | None:
    """Return the guard of a raw module; None without one, and for a part or a copy of one."""
    tripwire = armed_by(module) if isinstance(module, nn.Module) else None
    if tripwire is None or tripwire.module is not module:
        return None
    guard: object = tripwire.guard
    return guard


def describe_part(module: nn.Module, part: nn.Module) -> str:
    """Return what ran, for the headline of a violation; nothing when it was the module itself."""
    names = {id(inner): name for name, inner in module.named_modules()}
    name = names.get(id(part), f"{type(part).__name__}, a copy or a former part,")
    return f": {name} was run alone" if name else ""


def _touch(module: nn.Module) -> None:
    """Change the dict of a module, and change it back.

    Code that torch 2.9 compiled before does not look at a class again whose instance has not
    changed (``use_recursive_dict_tags_for_guards``), and would run on without a tripwire.
    """
    module.__dict__["_lensnet_touched"] = None
    del module.__dict__["_lensnet_touched"]


def runs(module: nn.Module) -> bool:
    """Return whether a module has a forward, in Python."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return type(module).forward is not nn.Module.forward or "forward" in module.__dict__
