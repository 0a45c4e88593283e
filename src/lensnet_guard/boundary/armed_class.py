"""The armed class: passes for the class of a part, but asks first before it runs.

It is equal to the original, pickles as the original, and gives out the original's ``forward``; what
is set on it is set on the original, and put back there by whoever patches for a while.

Where the guard only observes, what would be refused here is let through, and told of.
"""

import contextlib
import copyreg
import functools
import types
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from lensnet_guard._torch_internals import looks_up_super
from lensnet_guard.calls.record import frame_up

_MISSING = object()
_bases: Any = vars(type)["__bases__"]  # as they are, whatever a metaclass tells
_KEPT_PATCHES = 16  # of one attribute of a class; they nest no deeper


class Arms(Protocol):
    """Who makes armed classes."""

    @property
    def tell(self) -> Callable[[str], None] | None:
        """Tells of what is let through, where the guard observes; None where that is refused."""

    def owns(self, part: nn.Module) -> bool:
        """Return whether this very part was armed here; a copy of it was not."""

    def change_class(self, part: nn.Module, cls: type) -> None:
        """Make a part an instance of ``cls``, armed."""

    def step_aside(self, parts: Iterable[nn.Module]) -> None:
        """Leave parts unarmed from now on, as they would be without a guard."""


def armed_class(
    original: Any, tripwire: Arms, makers: Mapping[str, Callable[[], Any]], set_attribute: Any
) -> type:
    """Return a subclass of the same name with other methods, that otherwise is the original.

    Args:
        original: The class of a part; an `nn.Module`.
        tripwire: What arms a part again that becomes an instance of another class.
        makers: ``forward``, ``__call__`` and other methods -> what makes the function that asks
            first. One that is patched is made anew, and the one before runs what it ran then.
        set_attribute: Its ``__setattr__``.
    """
    namespace = {
        "__slots__": (),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__prepare_scriptable__": prepare_scriptable,
        "__setattr__": set_attribute,
        "__class__": property(_class_of, _become),
        "__reduce_ex__": _reduce_part,
        "_lensnet_tripwire": tripwire,
        "_lensnet_original": original,
        "_lensnet_patches": defaultdict(lambda: deque(maxlen=_KEPT_PATCHES)),
        "_lensnet_makers": makers,
        **{name: make() for name, make in makers.items()},
    }
    if "_wrapped_call" in vars(original):  # torch.fx looks for it in type(self) alone
        namespace["_wrapped_call"] = vars(original)["_wrapped_call"]
    # Neither __init_subclass__ nor a metaclass that keeps a registry shall learn of this class:
    # hence type.__new__, and a first base that is there while the class is made, and then gone.
    meta = _meta_for(type(original), frozenset(makers) - {"__call__"})
    armed = type.__new__(meta, original.__name__, (_Silent, original), namespace)
    _bases.__set__(armed, (original,))
    return armed


def original_of(cls: type) -> type:
    """Return the class that was armed; any other is its own."""
    return cls._lensnet_original if isinstance(cls, ArmedMeta) else cls


def arms_of(cls: type) -> Any:
    """Return who has made an armed class; None of any other."""
    return cls._lensnet_tripwire if isinstance(cls, ArmedMeta) else None


def armed_by(part: nn.Module) -> Any:
    """Return the tripwire that has armed this very part; None for a copy, which looks like it."""
    tripwire = arms_of(type(part))
    return tripwire if tripwire is not None and tripwire.owns(part) else None


@dataclass(frozen=True, eq=False)
class _Patch:
    """A class attribute that was set, or deleted, through the armed class.

    Attributes:
        before: The attribute's value until then; `_MISSING` without one.
        after: Its value since then, likewise.
        checked: What stood in its place on the armed class until then, likewise.
    """

    before: object
    after: object
    checked: object


class ArmedMeta(type):
    """Makes an armed class pass for its original: equal to it, and what is set is set there."""

    _lensnet_tripwire: Any
    _lensnet_original: Any
    _lensnet_patches: dict[str, deque[_Patch]]
    _lensnet_makers: Mapping[str, Callable[[], Any]]

    def __new__(
        mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any
    ) -> Any:
        """Make a subclass of an armed class, as fully_shard does: one of the original instead.

        A part that becomes an instance of it is armed again, by `_become`.
        """
        originals = tuple(map(original_of, bases))
        meta = types.prepare_class(name, originals)[0]
        return meta.__new__(meta, name, originals, namespace, **kwargs)

    @property
    def __bases__(cls) -> tuple[type, ...]:  # type: ignore[override]
        """The original's: remove_parametrizations goes back to the first of them."""
        bases: tuple[type, ...] = _bases.__get__(getattr(cls, "_lensnet_original", cls))
        return bases

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
        if not isinstance(other, type) or original_of(other) is not cls._lensnet_original:
            return False
        return cls is other or not looks_up_super(frame_up(1))

    # Its own hash all the same: torch keeps dicts from classes to the subclasses it has made of
    # them, and one made of the original would take the tripwire off.
    __hash__ = type.__hash__

    def __setattr__(cls, name: str, value: Any) -> None:  # torch.fx sets forward on type(self)
        # mock and pytest look into vars(cls) for what they will put back. It cannot lie to them,
        # for torch.compile looks there as well.
        mine, newest = vars(cls).get(name, _MISSING), cls._newest_patch(name)
        if newest is not None and (value is newest.before or value is newest.checked):
            cls._take_back(name, newest)
            return
        if value is mine:
            return
        if mine is not _MISSING and _is_around(value, mine):
            _refuse_or_tell(
                cls._lensnet_tripwire,
                f"{cls.__name__} is guarded, and its {name} was to be wrapped together with the "
                f"guard's check. Wrap that of {cls.__module__}.{cls.__qualname__}, the class "
                "itself, or wrap first and guard afterwards",
            )
        cls._patch(name, value)

    def __delattr__(cls, name: str) -> None:
        value = vars(cls._lensnet_original).get(name, _MISSING)
        newest = cls._newest_patch(name)
        if newest is not None and value is newest.after:  # mock, of what vars(cls) did not have
            cls._take_back(name, newest)
        else:
            cls._patch(name, _MISSING)

    def _newest_patch(cls, name: str) -> _Patch | None:
        return next(reversed(cls._lensnet_patches[name]), None)

    def _patch(cls, name: str, value: object) -> None:
        before, checked = (vars(c).get(name, _MISSING) for c in (cls._lensnet_original, cls))
        run = getattr(cls._lensnet_original, name, None)
        _put(cls._lensnet_original, name, value)
        if (make := cls._lensnet_makers.get(name)) is not None:
            # Who wraps what was read here calls it from inside: it must not come back to them.
            _run_by(checked, types.SimpleNamespace(**{name: run}))
            _put_on_armed(cls, name, make())
        if not (isinstance(before, torch.Tensor) or isinstance(value, torch.Tensor)):  # a cache
            cls._lensnet_patches[name].append(_Patch(before, value, checked))

    def _take_back(cls, name: str, patch: _Patch) -> None:
        cls._lensnet_patches[name].remove(patch)
        _put(cls._lensnet_original, name, patch.before)
        if name in cls._lensnet_makers:
            _run_by(patch.checked, cls._lensnet_original)
            _put_on_armed(cls, name, patch.checked)


def _put(cls: type, name: str, value: object) -> None:
    if value is _MISSING:
        delattr(cls, name)
    else:
        setattr(cls, name, value)


def _put_on_armed(cls: Any, name: str, function: object) -> None:
    """Set an attribute of an armed class itself, behind the property that gives the original's."""
    meta = type(cls)
    set_class(cls, _meta_for(type(original_of(cls)), frozenset()))
    try:
        type.__setattr__(cls, name, function)
    finally:
        set_class(cls, meta)


def _run_by(checked: Any, original: Any) -> None:
    """Let a function that asks first run what ``original`` has by its name, and no other."""
    cells = zip(checked.__code__.co_freevars, checked.__closure__, strict=True)
    dict(cells)["original"].cell_contents = original


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
    arms: Arms = arms_of(armed)
    if isinstance(cls, type) and issubclass(cls, nn.Module):
        arms.change_class(part, cls)
        return
    message = (
        f"a guarded {armed.__name__} can only become an nn.Module of another class, not {cls!r}"
    )
    if arms.tell is None:
        raise TypeError(message)
    set_class(part, cls)
    arms.step_aside((part,))
    arms.tell(message)


# Goes past a module's own __setattr__: Fabric's hands what it is given to the module inside.
set_class: Callable[[object, type], None] = vars(object)["__class__"].__set__


def _refuse_or_tell(arms: Arms, message: str) -> None:
    if arms.tell is None:
        raise RuntimeError(message)
    arms.tell(message)


def prepare_scriptable(module: Any) -> Any:
    """Refuse ``torch.jit.script``, which asks a module first, and every submodule of it.

    Returns:
        Where the guard observes, the module itself: the tripwire has stepped aside.

    Raises:
        RuntimeError: Otherwise: the script would be a copy without a guard.
    """
    original, arms = original_of(type(module)), arms_of(type(module))
    if arms is not None:
        _refuse_or_tell(
            arms,
            f"{original.__name__} is guarded by lensnet_guard and cannot be scripted: TorchScript "
            "would run it unguarded. Script it before it is guarded, or not at all",
        )
        arms.step_aside(module.modules())
    prepare = getattr(original, "__prepare_scriptable__", None)
    return prepare(module) if prepare is not None else module


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


_metas: dict[tuple[type, frozenset[str]], type[ArmedMeta]] = {}


def _meta_for(meta: type, names: frozenset[str]) -> type[ArmedMeta]:
    """Return the armed metaclass for classes of a metaclass, known to pickle and copy.

    Args:
        meta: The metaclass.
        names: The methods of which classes give out the original's: what is read there is wrapped,
            and put back, by whoever patches it.
    """
    if (meta, names) not in _metas:
        bases = (ArmedMeta,) if meta is type else (ArmedMeta, meta)
        armed = type("ArmedMeta", bases, {name: _of_original(name) for name in names})
        copyreg.pickle(armed, _reduce_armed)
        _metas[meta, names] = armed
    return _metas[meta, names]


def _of_original(name: str) -> property:
    return property(lambda cls: getattr(cls._lensnet_original, name))


def _reduce_armed(armed: Any) -> tuple[Any, ...]:
    return itself, (original_of(armed),)


def itself(found: Any) -> Any:
    """Return what is pickled in the place of something else."""
    return found
