"""The tripwire: notices runs of a guarded module that did not come through its proxy.

It swaps the class of the raw module, and of every submodule, for a subclass whose ``forward``
first looks whether this thread is inside an admitted run. That catches a reference taken before
guarding, ``__wrapped__``, ``forward``, ``_call_impl``, ``torch.func.functional_call``, deep copies,
a submodule called alone and a module compiled before it was guarded. Swapping ``__call__`` would
miss ``_call_impl``; a ``forward`` on the instance would make a copy run the original's weights.
"""

import copyreg
import functools
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


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

    Args:
        module: the raw module.
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
        self._armed: list[tuple[nn.Module, type, Callable[..., Any] | None]] = []
        classes: dict[type, type] = {}
        for part in submodules.values():
            original = type(part)
            if id(part) in spared or isinstance(original, _ArmedMeta) or not _runs(part):
                continue
            own_forward = part.__dict__.get("forward")  # as accelerate's hooks leave behind
            if own_forward is not None:
                part.__dict__["forward"] = _checked(own_forward, part, inside, refuse)
            if original not in classes:
                classes[original] = _armed_class(original, guard, inside, refuse)
            part.__class__ = classes[original]
            self._armed.append((part, original, own_forward))

    def disarm(self) -> None:
        """Restore every class and every forward, the same objects as before."""
        for part, original, own_forward in self._armed:
            if own_forward is not None:
                part.__dict__["forward"] = own_forward
            if isinstance(type(part), _ArmedMeta):
                part.__class__ = original
            else:
                warnings.warn(
                    f"lensnet_guard: the class of a guarded {original.__name__} was changed to "
                    f"{type(part).__name__} meanwhile; it is left as it is",
                    RuntimeWarning,
                    stacklevel=3,
                )
        self._armed.clear()


def guard_behind(module: object) -> object | None:
    """The guard that has armed a raw module, None when there is none."""
    armed: type = type(module)
    return armed._lensnet_guard if isinstance(armed, _ArmedMeta) else None


def describe_part(module: nn.Module, part: nn.Module) -> str:
    """What ran, for the headline of a violation: nothing more to say when it was the module."""
    names = {id(inner): name for name, inner in module.named_modules()}
    name = names.get(id(part), f"a copy of {type(part).__name__}")
    return f": {name} was run alone" if name else ""


def strip(module: nn.Module, shallow: bool) -> None:
    """Take the armed classes off a copy, which has inherited those of its original.

    The submodules of a shallow copy are the original's, and stay armed.
    """
    for part in [module] if shallow else module.modules():
        armed: type = type(part)
        if isinstance(armed, _ArmedMeta):
            part.__class__ = armed._lensnet_original


class _ArmedMeta(type):
    """Marks armed classes, so that they pickle as the class that they stand for."""

    _lensnet_guard: object
    _lensnet_original: type


class _Armed:
    """First base of every armed class: keeps the original's ``__init_subclass__`` out of it.

    It has no ``__slots__``, or else an object could not change to a class with this base.
    """

    def __init_subclass__(cls) -> None:
        original = next((b for b in cls.__mro__[1:] if isinstance(b, _ArmedMeta)), None)
        if original is not None:
            raise RuntimeError(
                f"{original.__name__} is guarded, and something wants to change its class "
                "(fully_shard and parametrizations do). Do that first and guard afterwards: "
                "fully_shard(module); guard_module(module)"
            )


def _armed_class(original: type, guard: object, inside: Inside, refuse: Refuse) -> type:
    run: Any = original.forward  # type: ignore[attr-defined]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if inside.here:
            return run(self, *args, **kwargs)
        # __get__ and not MethodType(...), which torch.compile cannot trace
        return refuse(self, run.__get__(self), args, kwargs)

    namespace = {
        "__slots__": (),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_lensnet_guard": guard,
        "_lensnet_original": original,
        "forward": functools.wraps(run)(forward),
    }
    # type.__new__: a metaclass that keeps a registry shall not learn of this class
    return type.__new__(_meta_for(type(original)), original.__name__, (_Armed, original), namespace)


def _checked(run: Callable[..., Any], part: nn.Module, inside: Inside, refuse: Refuse) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs) if inside.here else refuse(part, run, args, kwargs)

    return forward


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


def _runs(module: nn.Module) -> bool:
    """Whether a module has a forward at all; a ModuleList has none."""
    return type(module).forward is not nn.Module.forward or "forward" in module.__dict__
