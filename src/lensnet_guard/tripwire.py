"""The tripwire: notices runs of a guarded module that did not come through its proxy.

It swaps the class of the raw module, and of every submodule, for a subclass whose ``forward``
first looks whether this thread is inside an admitted run. That catches a reference taken before
guarding, ``__wrapped__``, ``forward``, ``_call_impl``, ``torch.func.functional_call``, deep copies,
a submodule called alone and a module compiled before it was guarded. Swapping ``__call__`` would
miss ``_call_impl``; a ``forward`` on the instance would make a copy run the original's weights.
"""

import copyreg
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lensnet_guard._torch_checkpoints import recomputed_checkpoint
from lensnet_guard._torch_internals import eager_only

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


# A forward that somebody put on an instance, and what stands there instead.
_OwnForward = tuple[Callable[..., Any], Callable[..., Any]]
Refuse = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Tripwire:
    """Arms a module and its submodules; `disarm` puts everything back as it was.

    Left alone are parts that run nothing (a ModuleList) or no Python (TorchScript),
    parametrizations (reading a weight runs them), and parts that a guard of their own has armed.

    Args:
        module: the raw module. The parts of a copy are armed although their classes, inherited
            from the original, are armed already.
        guard: whose module it is, for `guard_behind`.
        inside: says whether a run is admitted.
        refuse: called with ``(part, forward, args, kwargs)`` instead of the forward otherwise;
            what it returns is the result.
        shared: names of submodules that other models run too, and that are left alone.

    Raises:
        ValueError: ``shared`` names no submodule.
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
            if isinstance(part, ParametrizationList):
                spared.update(map(id, part.modules()))
        self.module: nn.Module | None = module
        self.guard: object | None = guard
        self._inside = inside
        self._refuse: Refuse | None = refuse
        self._armed: dict[int, tuple[nn.Module, type, _OwnForward | None]] = {}
        classes: dict[type, type] = {}
        for part in submodules.values():
            if id(part) in spared or not _runs(part) or armed_by(part) is not None:
                continue
            armed: type = type(part)
            original = armed._lensnet_original if isinstance(armed, _ArmedMeta) else armed
            own_forward = None
            if "forward" in part.__dict__:  # as accelerate's hooks leave behind
                before = part.__dict__["forward"]
                own_forward = before, self._checked(before, part)
                part.__dict__["forward"] = own_forward[1]
            if original not in classes:
                classes[original] = self._armed_class(original)
            part.__class__ = classes[original]
            _touch(part)
            self._armed[id(part)] = part, original, own_forward

    def owns(self, part: nn.Module) -> bool:
        """Whether this very part was armed here; a copy of it was not."""
        return id(part) in self._armed

    def disarm(self) -> None:
        """Restore every class and every forward, the same objects as before."""
        for part, original, own_forward in self._armed.values():
            if own_forward is not None and part.__dict__.get("forward") is own_forward[1]:
                part.__dict__["forward"] = own_forward[0]
            armed: type = type(part)
            if isinstance(armed, _ArmedMeta):
                part.__class__ = armed._lensnet_original
            else:
                warnings.warn(
                    f"lensnet_guard: the class of a guarded {original.__name__} was changed to "
                    f"{armed.__name__} meanwhile; it is left as it is",
                    RuntimeWarning,
                    stacklevel=3,
                )
        self._armed.clear()
        # Copies, and torch.compile's caches, keep the armed classes: they shall keep no more.
        self.module = self.guard = self._refuse = None

    @eager_only(EAGER)
    def _behind(
        self, part: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """A run that nobody admitted: refused, unless it is a part's in a recompute."""
        if self._refuse is None:  # a copy that has outlived the guard
            return run(*args, **kwargs)
        if part is not self.module and recomputed_checkpoint(sys._getframe()) is not None:
            return self._run_inside(run, args, kwargs)
        return self._refuse(part, run, args, kwargs)

    def _run_inside(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        self._inside.here = True
        try:
            return run(*args, **kwargs)
        finally:
            self._inside.here = False

    @eager_only(EAGER)
    def _compiled(self, part: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A compiled part called from outside: in a recompute it must run compiled again."""
        if part is not self.module and recomputed_checkpoint(sys._getframe()) is not None:
            return self._run_inside(run, args, kwargs)
        return run(*args, **kwargs)

    def _armed_class(self, original: Any) -> type:
        """A subclass of the same name that asks first, and otherwise is the original."""
        inside, tripwire = self._inside, self

        def forward(part: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if inside.here:
                return original.forward(part, *args, **kwargs)
            # No method: torch.compile cannot trace MethodType(...), nor in torch 2.7 __get__.
            return tripwire._behind(part, functools.partial(original.forward, part), args, kwargs)

        def __call__(part: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
            if inside.here or getattr(part, "_compiled_call_impl", None) is None:
                return original.__call__(part, *args, **kwargs)
            return tripwire._compiled(
                part, functools.partial(original.__call__, part), args, kwargs
            )

        # Code of its own, for torch.compile counts recompiles by code and gives up after eight.
        forward.__code__ = forward.__code__.replace()
        __call__.__code__ = __call__.__code__.replace()
        namespace = {
            "__slots__": (),
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "__init_subclass__": _refuse_subclass,
            "__prepare_scriptable__": refuse_scripting,
            "_lensnet_tripwire": self,
            "_lensnet_original": original,
            # Without the function's attributes, by which torch.compile would look behind it.
            "forward": functools.wraps(original.forward, updated=())(forward),
            "__call__": __call__,
        }
        if "_wrapped_call" in vars(original):  # torch.fx looks for it in type(self) alone
            namespace["_wrapped_call"] = original._wrapped_call
        becomes = getattr(original, "cls_to_become", None)  # of a lazy layer, when it first runs
        if becomes is not None:
            namespace["cls_to_become"] = self._armed_class(becomes)
        # Neither __init_subclass__ nor a metaclass that keeps a registry shall learn of this class:
        # hence type.__new__, and a first base that is there while the class is made, and then gone.
        meta = _meta_for(type(original))
        armed = type.__new__(meta, original.__name__, (_Silent, original), namespace)
        type.__setattr__(armed, "__bases__", (original,))
        return armed

    def _checked(self, run: Callable[..., Any], part: nn.Module) -> Callable[..., Any]:
        """A forward on the instance that asks first."""
        inside, tripwire = self._inside, self

        def forward(*args: Any, **kwargs: Any) -> Any:
            if inside.here:
                return run(*args, **kwargs)
            return tripwire._behind(part, run, args, kwargs)

        forward.__code__ = forward.__code__.replace()
        return forward


def armed_by(part: nn.Module) -> Tripwire | None:
    """The tripwire that has armed this very part; None for a copy, which only looks like it."""
    armed: type = type(part)
    if not isinstance(armed, _ArmedMeta):
        return None
    tripwire = armed._lensnet_tripwire
    return tripwire if tripwire.owns(part) else None


def guard_behind(module: object) -> object | None:
    """The guard of a raw module; None when it has none, or is only a part or a copy of one."""
    tripwire = armed_by(module) if isinstance(module, nn.Module) else None
    return tripwire.guard if tripwire is not None and tripwire.module is module else None


def describe_part(module: nn.Module, part: nn.Module) -> str:
    """What ran, for the headline of a violation: nothing more to say when it was the module."""
    names = {id(inner): name for name, inner in module.named_modules()}
    name = names.get(id(part), f"{type(part).__name__}, a copy or a former part,")
    return f": {name} was run alone" if name else ""


class _ArmedMeta(type):
    """Makes an armed class pass for its original: equal to it, and what is set is set there."""

    _lensnet_tripwire: Tripwire
    _lensnet_original: type

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:  # type(part)(...) is a new, free module
        return cls._lensnet_original(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls._lensnet_original)

    def __subclasscheck__(cls, subclass: type) -> bool:
        # By inheritance alone: an abstract original (DDP is one) asks each of its subclasses, and
        # thus this one, so asking it in turn would never end.
        return type.__subclasscheck__(cls._lensnet_original, subclass)

    def __eq__(cls, other: object) -> bool:  # type(part) == nn.Linear, as torch's own docs write
        return other is cls or other is cls._lensnet_original

    # Its own hash all the same: torch keeps dicts from classes to the subclasses it has made of
    # them, and one made of the original would take the tripwire off.
    __hash__ = type.__hash__

    def __setattr__(cls, name: str, value: Any) -> None:  # torch.fx sets forward on type(self)
        setattr(cls._lensnet_original, name, value)

    def __delattr__(cls, name: str) -> None:  # remove_parametrizations
        raise _changes_class(cls)


class _Silent:
    """Keeps ``__init_subclass__`` of what follows it in a class's bases from running.

    It has no ``__slots__``, or else an object could not change to a class with this base.
    """

    def __init_subclass__(cls) -> None:
        pass


@classmethod  # type: ignore[misc]  # of the armed classes
def _refuse_subclass(cls: type, /, **_: Any) -> None:
    raise _changes_class(next(base for base in cls.__mro__[1:] if isinstance(base, _ArmedMeta)))


def _changes_class(armed: type) -> RuntimeError:
    return RuntimeError(
        f"{armed.__name__} is guarded, and something wants to change its class (fully_shard and "
        "parametrizations do). Do that first and guard afterwards: fully_shard(module); "
        "guard_module(module)"
    )


def refuse_scripting(module: nn.Module) -> None:
    """What ``torch.jit.script`` asks a module first, and every submodule of it.

    Raises:
        RuntimeError: always: the script would be a copy without a guard.
    """
    raise RuntimeError(
        f"{type(module).__name__} is guarded by lensnet_guard and cannot be scripted: TorchScript "
        "would run it unguarded. Script it before it is guarded, or not at all"
    )


_metas: dict[type, type[_ArmedMeta]] = {}


def _meta_for(meta: type) -> type[_ArmedMeta]:
    """The armed metaclass for classes of a metaclass, known to pickle and copy."""
    if meta not in _metas:
        bases = (_ArmedMeta,) if meta is type else (_ArmedMeta, meta)
        armed = type("_ArmedMeta", bases, {})
        copyreg.pickle(armed, _reduce_armed)
        _metas[meta] = armed
    return _metas[meta]


def _reduce_armed(armed: Any) -> tuple[Any, ...]:
    return _itself, (armed._lensnet_original,)


def _itself(cls: type) -> type:
    return cls


def _touch(module: nn.Module) -> None:
    """Change the dict of a module, and change it back.

    Code that torch 2.9 compiled before does not look at a class again whose instance has not
    changed (``use_recursive_dict_tags_for_guards``), and would run on without a tripwire.
    """
    module.__dict__["_lensnet_touched"] = None
    del module.__dict__["_lensnet_touched"]


def _runs(module: nn.Module) -> bool:
    """Whether a module has a forward, in Python."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return type(module).forward is not nn.Module.forward or "forward" in module.__dict__
