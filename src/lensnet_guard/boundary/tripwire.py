"""The tripwire: notices runs of a guarded module that did not come through its proxy.

It swaps the class of the raw module, and of every submodule, for a subclass whose ``forward``
first looks whether this thread is inside an admitted run. That catches a reference taken before
guarding, ``__wrapped__``, ``forward``, ``_call_impl``, ``torch.func.functional_call``, deep copies,
a submodule called alone and a module compiled before it was guarded. Swapping ``__call__`` would
miss ``_call_impl``; a ``forward`` on the instance would make a copy run the original's weights.
"""

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from lensnet_guard._torch_checkpoints import recomputed_checkpoint
from lensnet_guard._torch_internals import eager_only
from lensnet_guard.boundary.armed_class import armed_class, arms_of, original_of
from lensnet_guard.boundary.armed_class import itself as _itself
from lensnet_guard.calls.record import frame_up

# What torch prints where a guarded module stands in the way of a full graph.
EAGER = (
    "a module guarded by lensnet_guard is called in Python, so that every call is counted. Compile "
    "the module itself before it is guarded (module.compile(); guard_module(module)) and leave "
    "fullgraph=True out around its callers: they run with one graph break"
)


class Inside(threading.local):
    """Whether the running thread is inside an admitted run of the module.

    A thread-local and no context variable: torch.compile can read it in a traced forward, and
    guards on its value, so that a compiled module is checked too, without a graph break.
    """

    def __init__(self) -> None:  # runs once in every thread
        # An attribute of the object, not of the class: for one of the class torch.compile would
        # not notice that it is hidden later by one of the object.
        self.here = False


Refuse = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Tripwire:
    """Arms a module and its submodules; `disarm` puts everything back as it was.

    Left alone are parts that run nothing (a ModuleList) or no Python (TorchScript),
    parametrizations (reading a weight runs them), and parts that a guard of their own has armed.

    Args:
        module: The raw module. The parts of a copy are armed although their classes, inherited
            from the original, are armed already.
        guard: Whose module it is, for `guard_behind`.
        inside: Says whether a run is admitted.
        refuse: Called with ``(part, forward, args, kwargs)`` instead of the forward otherwise;
            what it returns is the result.
        shared: Names of submodules that other models run too, and that are left alone.

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
        self.module: nn.Module | None = module
        self.guard: object | None = guard
        self._inside = inside
        self._refuse: Refuse | None = refuse
        self._armed: dict[int, nn.Module] = {}
        self._classes: dict[type, type] = {}
        try:
            for part in submodules.values():
                if id(part) not in spared and runs(part) and armed_by(part) is None:
                    self._arm(part)
        except BaseException:
            self.disarm()
            raise

    def _arm(self, part: nn.Module) -> None:
        self.change_class(part, type(part))
        _touch(part)
        self._armed[id(part)] = part
        if "forward" in part.__dict__:  # as accelerate's hooks leave behind
            run = part.__dict__["forward"]
            run = run.__wrapped__ if isinstance(run, _OwnForward) else run  # of a copy
            part.__dict__["forward"] = _OwnForward(self, part, run)

    def change_class(self, part: nn.Module, cls: type) -> None:
        """Make a part an instance of ``cls``, armed."""
        original = original_of(cls)
        if original not in self._classes:
            self._classes[original] = self._armed_class(original)
        _set_class(part, self._classes[original])

    def owns(self, part: nn.Module) -> bool:
        """Return whether this very part was armed here; a copy of it was not."""
        return id(part) in self._armed

    def disarm(self) -> None:
        """Restore every class and every forward, the same objects as before."""
        for part in self._armed.values():
            forward = part.__dict__.get("forward")
            if isinstance(forward, _OwnForward) and forward.tripwire is self:
                part.__dict__["forward"] = forward.__wrapped__
            _set_class(part, original_of(type(part)))
        self._armed.clear()
        # Copies, and torch.compile's caches, keep the armed classes: they shall keep no more.
        self.module = self.guard = self._refuse = None

    @eager_only(EAGER)
    def _behind(
        self, part: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Refuse a run that nobody admitted, unless it is a part's in a recompute."""
        own = armed_by(part)
        if own is not None and own is not self:  # a guarded copy, by a bound method of before
            return own.run_own(part, run, args, kwargs)
        if self._refuse is None:  # a copy that has outlived the guard
            return run(*args, **kwargs)
        if part is not self.module and recomputed_checkpoint(frame_up()) is not None:
            return self._run_inside(run, args, kwargs)
        return self._refuse(part, run, args, kwargs)

    def run_own(
        self, part: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Run a forward that is no function of the class, and ask first."""
        if self._inside.here:
            return run(*args, **kwargs)
        return self._behind(part, run, args, kwargs)

    def _run_inside(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        self._inside.here = True
        try:
            return run(*args, **kwargs)
        finally:
            self._inside.here = False

    @eager_only(EAGER)
    def _compiled(self, part: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a compiled part that is called from outside: a recompute must run compiled again."""
        if part is not self.module and recomputed_checkpoint(frame_up()) is not None:
            return self._run_inside(run, args, kwargs)
        return run(*args, **kwargs)

    def _armed_class(self, original: Any) -> type:
        """Return a subclass of the same name that asks first, and otherwise is the original."""
        inside, tripwire = self._inside, self
        static = isinstance(inspect.getattr_static(original, "forward"), staticmethod)

        def forward(part: nn.Module, *args: Any, **kwargs: Any) -> Any:
            run = original.forward
            if static or type(run) is not FunctionType:  # a mock, say, which takes no self
                behind: Any = super(armed, part)
                return tripwire.run_own(part, behind.forward, args, kwargs)
            if inside.here:
                return run(part, *args, **kwargs)
            # No method: torch.compile cannot trace MethodType(...), nor in torch 2.7 __get__.
            return tripwire._behind(part, functools.partial(run, part), args, kwargs)

        def __call__(part: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
            if inside.here or getattr(part, "_compiled_call_impl", None) is None:
                return original.__call__(part, *args, **kwargs)
            return tripwire._compiled(
                part, functools.partial(original.__call__, part), args, kwargs
            )

        # Code of its own, for torch.compile counts recompiles by code and gives up after eight.
        forward.__code__ = forward.__code__.replace()
        __call__.__code__ = __call__.__code__.replace()
        # Without the function's attributes, by which torch.compile would look behind it.
        forward = functools.wraps(original.forward, updated=())(forward)
        armed = armed_class(original, self, {"forward": forward, "__call__": __call__})
        return armed  # named, for `forward` asks what stands behind it


class _OwnForward:
    """Stands where somebody has put a forward on an instance, and asks first.

    It is no function: a function travels with a deep copy as it is, and the copy would run the
    original's weights. A pickle holds the forward alone.

    Attributes:
        __wrapped__: The forward, where `inspect.signature` looks for it.
    """

    def __init__(self, tripwire: Tripwire, part: nn.Module, run: Callable[..., Any]) -> None:
        self.tripwire = tripwire
        self.part = part
        self.__wrapped__ = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tripwire.run_own(self.part, self.__wrapped__, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_OwnForward":
        return _OwnForward(self.tripwire, *copy.deepcopy((self.part, self.__wrapped__), memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.__wrapped__,)


# Goes past a module's own __setattr__: Fabric's hands what it is given to the module inside.
_set_class: Callable[[nn.Module, type], None] = vars(object)["__class__"].__set__


def armed_by(part: nn.Module) -> Tripwire | None:
    """Return the tripwire that has armed this very part; None for a copy, which looks like it."""
    tripwire: Tripwire | None = arms_of(type(part))
    return tripwire if tripwire is not None and tripwire.owns(part) else None


def guard_behind(module: object) -> object | None:
    """Return the guard of a raw module; None without one, and for a part or a copy of one."""
    tripwire = armed_by(module) if isinstance(module, nn.Module) else None
    return tripwire.guard if tripwire is not None and tripwire.module is module else None


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
