"""The armed class: passes for the class of a part, but asks first before it runs.

It is equal to the original, pickles as the original, and gives out the original's ``forward``; what
is set on it is set on the original, and put back there by whoever patches for a while.
"""

import contextlib
import copyreg
import functools
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.utils import parametrize

_MISSING = object()
_KEPT_PATCHES = 16  # of a class; they nest no deeper


class Arms(Protocol):
    """Who makes armed classes."""

    def change_class(self, part: nn.Module, cls: type) -> None:
        """Make a part an instance of ``cls``, armed."""


def armed_class(original: Any, tripwire: Arms, checked: Mapping[str, Any]) -> type:
    """Return a subclass of the same name with other methods, that otherwise is the original.

    Args:
        original: The class of a part; an `nn.Module`.
        tripwire: What arms a part again that becomes an instance of another class.
        checked: ``forward`` and ``__call__``, which ask first.
    """
    namespace = {
        "__slots__": (),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__init_subclass__": _refuse_subclass,
        "__prepare_scriptable__": refuse_scripting,
        "__class__": property(_class_of, _become),
        "__reduce_ex__": _reduce_part,
        "_lensnet_tripwire": tripwire,
        "_lensnet_original": original,
        "_lensnet_patches": deque(maxlen=_KEPT_PATCHES),
        **checked,
    }
    if "_wrapped_call" in vars(original):  # torch.fx looks for it in type(self) alone
        namespace["_wrapped_call"] = vars(original)["_wrapped_call"]
    # Neither __init_subclass__ nor a metaclass that keeps a registry shall learn of this class:
    # hence type.__new__, and a first base that is there while the class is made, and then gone.
    armed = type.__new__(
        _meta_for(type(original)), original.__name__, (_Silent, original), namespace
    )
    type.__setattr__(armed, "__bases__", (original,))
    return armed


def original_of(cls: type) -> type:
    """Return the class that was armed; any other is its own."""
    return cls._lensnet_original if isinstance(cls, ArmedMeta) else cls


def arms_of(cls: type) -> Any:
    """Return who has made an armed class; None of any other."""
    return cls._lensnet_tripwire if isinstance(cls, ArmedMeta) else None


@dataclass(frozen=True, eq=False)
class _Patch:
    """A class attribute that was set, or deleted, through the armed class.

    Attributes:
        name: The attribute's name.
        before: Its value until then; `_MISSING` without one.
        after: Its value since then, likewise.
    """

    name: str
    before: object
    after: object


class ArmedMeta(type):
    """Makes an armed class pass for its original: equal to it, and what is set is set there."""

    _lensnet_tripwire: Any
    _lensnet_original: Any
    _lensnet_patches: deque[_Patch]

    @property
    def forward(cls) -> Any:
        """The original's: what is read here is wrapped, and put back, by whoever patches it."""
        return cls._lensnet_original.forward

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a new, free module: that is what ``type(part)(...)`` means."""
        return cls._lensnet_original(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls._lensnet_original)

    def __subclasscheck__(cls, subclass: type) -> bool:
        # By inheritance alone: an abstract original (DDP is one) asks each of its subclasses, and
        # thus this one, so asking it in turn would never end.
        return type.__subclasscheck__(cls._lensnet_original, subclass)

    def __eq__(cls, other: object) -> bool:  # type(part) == nn.Linear, as torch's own docs write
        return isinstance(other, type) and original_of(other) is cls._lensnet_original

    # Its own hash all the same: torch keeps dicts from classes to the subclasses it has made of
    # them, and one made of the original would take the tripwire off.
    __hash__ = type.__hash__

    def __setattr__(cls, name: str, value: Any) -> None:  # torch.fx sets forward on type(self)
        # mock and pytest look into vars(cls) for what they will put back. It cannot lie to them,
        # for torch.compile looks there as well.
        mine = vars(cls).get(name, _MISSING)
        newest = cls._newest_patch(name)
        if value is mine or (newest is not None and value is newest.before):
            cls._take_back(newest)
        elif mine is not _MISSING and _is_around(value, mine):
            raise RuntimeError(
                f"{cls.__name__} is guarded, and its {name} was to be wrapped together with the "
                f"guard's check. Wrap that of {cls.__module__}.{cls.__qualname__}, the class "
                "itself, or wrap first and guard afterwards"
            )
        else:
            cls._patch(name, value)

    def __delattr__(cls, name: str) -> None:
        value = vars(cls._lensnet_original).get(name, _MISSING)
        getter = getattr(value, "fget", None)
        if getattr(getter, "__module__", None) == parametrize.__name__:
            raise _changes_class(cls)  # remove_parametrizations, which would go on to do so
        newest = cls._newest_patch(name)
        if newest is not None and value is newest.after:  # mock, of what vars(cls) did not have
            cls._take_back(newest)
        else:
            cls._patch(name, _MISSING)

    def _newest_patch(cls, name: str) -> _Patch | None:
        return next((patch for patch in reversed(cls._lensnet_patches) if patch.name == name), None)

    def _patch(cls, name: str, value: object) -> None:
        before = vars(cls._lensnet_original).get(name, _MISSING)
        _put(cls._lensnet_original, name, value)
        if not (isinstance(before, torch.Tensor) or isinstance(value, torch.Tensor)):  # a cache
            cls._lensnet_patches.append(_Patch(name, before, value))

    def _take_back(cls, patch: _Patch | None) -> None:
        if patch is not None:
            cls._lensnet_patches.remove(patch)
            _put(cls._lensnet_original, patch.name, patch.before)


def _put(cls: type, name: str, value: object) -> None:
    if value is _MISSING:
        delattr(cls, name)
    else:
        setattr(cls, name, value)


def _is_around(value: Any, function: object) -> bool:
    """Return whether a function wraps another, as far as it tells; each would call the other."""
    around = [getattr(value, "__wrapped__", None)]
    for cell in getattr(value, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # a cell that is empty
            around.append(cell.cell_contents)
    return any(inner is function for inner in around)


# Of every armed class -----------------------------------------------------------------------------


def _class_of(part: nn.Module) -> type:
    return type(part)


def _become(part: nn.Module, cls: type) -> None:
    """Set ``part.__class__``, as lazy layers and ToMe do: what it becomes is armed as well."""
    armed: Any = type(part)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(
            f"a guarded {armed.__name__} can only become an nn.Module of another class, not {cls!r}"
        )
    arms_of(armed).change_class(part, cls)


@classmethod  # type: ignore[misc]
def _refuse_subclass(cls: type, /, **_: Any) -> None:
    raise _changes_class(original_of(cls))


def _changes_class(armed: type) -> RuntimeError:
    return RuntimeError(
        f"{armed.__name__} is guarded, and something wants to change its class (fully_shard and "
        "parametrizations do). Do that first and guard afterwards: fully_shard(module); "
        "guard_module(module)"
    )


def refuse_scripting(module: nn.Module) -> None:
    """Refuse ``torch.jit.script``, which asks a module first, and every submodule of it.

    Raises:
        RuntimeError: Always: the script would be a copy without a guard.
    """
    raise RuntimeError(
        f"{type(module).__name__} is guarded by lensnet_guard and cannot be scripted: TorchScript "
        "would run it unguarded. Script it before it is guarded, or not at all"
    )


class _Silent:
    """Keeps ``__init_subclass__`` of what follows it in a class's bases from running.

    It has no ``__slots__``, or else an object could not change to a class with this base.
    """

    def __init_subclass__(cls) -> None:
        pass


# Copies and pickles -------------------------------------------------------------------------------


def _reduce_part(part: nn.Module, protocol: Any) -> Any:
    """Do as the original's ``__reduce_ex__``, which names the class that shall be made."""
    armed: Any = type(part)
    original: Any = original_of(armed)
    reduced = original.__reduce_ex__(part, protocol)
    new: Any = copyreg.__newobj__  # type: ignore[attr-defined]
    if isinstance(reduced, tuple) and reduced[0] is new and reduced[1][0] is armed:
        return _New(armed), reduced[1][1:], *reduced[2:]
    return reduced


class _New:
    """Makes a part of an armed class, for a copy; pickled, it makes one of the original.

    The part has to say so, for cloudpickle asks nobody how to keep a class.
    """

    def __init__(self, armed: Any) -> None:
        self.armed = armed

    def __call__(self, *args: Any) -> Any:
        return self.armed.__new__(self.armed, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        new: Any = copyreg.__newobj__  # type: ignore[attr-defined]
        return functools.partial, (new, original_of(self.armed))


_metas: dict[type, type[ArmedMeta]] = {}


def _meta_for(meta: type) -> type[ArmedMeta]:
    """Return the armed metaclass for classes of a metaclass, known to pickle and copy."""
    if meta not in _metas:
        bases = (ArmedMeta,) if meta is type else (ArmedMeta, meta)
        armed = type("ArmedMeta", bases, {})
        copyreg.pickle(armed, _reduce_armed)
        _metas[meta] = armed
    return _metas[meta]


def _reduce_armed(armed: Any) -> tuple[Any, ...]:
    return itself, (original_of(armed),)


def itself(found: Any) -> Any:
    """Return what is pickled in the place of something else."""
    return found
