"""The stock condition that nobody has changed a module between two of its calls.

What a module is made of is compared with what it was made of when it was last checked: by identity,
by the counters of torch that move with every write in place, and, where it is asked for, by
checksums. No tensor is kept alive for that.
"""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import nn

from lensnet_guard._text import count
from lensnet_guard._torch_internals import holders, transient_buffers, writes_to
from lensnet_guard.calls.adapters import parameters_of_adapters
from lensnet_guard.calls.call import Call
from lensnet_guard.calls.checksum import checksums
from lensnet_guard.calls.record import CallRecord
from lensnet_guard.calls.scope import Condition


@overload
def frozen(call: Call, /) -> str | None: ...
@overload
def frozen(*, fingerprint: bool) -> Condition: ...
def frozen(call: Call | None = None, /, *, fingerprint: bool = False) -> str | Condition | None:
    """No parameter, buffer or submodule has changed since the last call that was checked.

    It stops a reference that an optimizer trains, a loader loads or a trainer replaces, and batch
    norms that take statistics from what they see. What is compared is which tensors there are, and
    the counter that moves with each write in place; no values are read. A change is told once: what
    it made of the module is what the next call is compared with. Buffers that a state dict leaves
    out are a module's own notes (the angles of rotary positions that grow with the sequence), and
    are not compared.

    Writes through ``.data``, as ZeRO makes them, move no counter. They are found by
    ``frozen(fingerprint=True)``, which takes a checksum of all bits at every call, and waits for
    the device.

    Args:
        call: The call as it begins; left out to make the other condition.
        fingerprint: Whether to compare the bits of each tensor too.

    Returns:
        None, or the first that changed, how, and since when; the condition, without a call.
    """
    if call is not None:
        return _BY_COUNTER(call)
    return _Frozen(fingerprint=True) if fingerprint else frozen


vars(frozen)["mistake"] = "moved-weights"


@dataclass(frozen=True, repr=False)
class _Frozen:
    """What `frozen` does, with or without checksums."""

    fingerprint: bool
    mistake: ClassVar[str] = "moved-weights"

    def __call__(self, call: Call) -> str | None:
        before: _Seen | None = call.memory.get(self)
        if before is not None and before.holds():
            return None
        found = list(_content(call.module))
        look = _quick_look(call.module)
        now = call.memory[self] = _Seen(found, look, fingerprint=self.fingerprint)
        return _first_change(before, now, call.earlier)

    def __repr__(self) -> str:
        return f"frozen(fingerprint={self.fingerprint})"


_BY_COUNTER = _Frozen(fingerprint=False)


def frozen_base(call: Call) -> str | None:
    """No parameter is trained, or has changed, but those of adapters of PEFT's that do not work.

    It stops a reference that moves with the policy, where both are one model and the adapters are
    the difference: base weights that somebody has not frozen, biases that are trained along
    (``bias="all"``), an adapter ``"ref"`` that is overwritten. It is for the calls of the
    reference, with the adapters off or that one active; changes are found as `frozen` finds them.
    What is trained is looked for at the first call, and at those after a change.

    Args:
        call: The call as it begins.

    Returns:
        None, or the first parameter that is trained or has changed.
    """
    key = (frozen_base, call.scope)  # each scope has adapters of its own
    before: _Seen | None = call.memory.get(key)
    if before is not None and before.holds():
        return None
    works = parameters_of_adapters(call)
    idle = frozenset(parameter for parameter, does in works.items() if not does)
    found = [
        (path, "parameter", parameter)
        for path, parameter in call.module.named_parameters(remove_duplicate=False)
        if id(parameter) not in idle
    ]
    now = call.memory[key] = _Seen(found, _quick_look(call.module, idle, buffers=False))
    trained = [path for path, _, it in found if it.requires_grad and id(it) not in works]
    return _first_change(before, now, call.earlier) or _in_words(trained, len(found))


vars(frozen_base)["mistake"] = "moved-weights"


def _in_words(trained: list[str], of: int) -> str | None:
    """Return what to say of base weights that are trained; None where there are none."""
    if not trained:
        return None
    what_to_do = "freeze all but the adapters, requires_grad_(False)"
    if all(path.rpartition(".")[2] == "bias" for path in trained):
        what_to_do = 'leave bias= of the adapter\'s config at "none"'
    return (
        f"the parameter {trained[0]} requires grad, as {len(trained)} of {of} of the base model "
        f"do, so the reference is trained with the policy; {what_to_do}"
    )


def _first_change(before: "_Seen | None", now: "_Seen", earlier: CallRecord | None) -> str | None:
    """Return in words what has changed, or what nobody can tell of; None where nothing has."""
    changes = list(_changes(before, now)) if before is not None else []
    if changes:
        return _told(changes, earlier)
    untold = (f"the {i.kind} {path} {i.untold}" for path, i in now.items.items() if i.untold)
    return next(untold, None)


def _told(changes: list[str], earlier: CallRecord | None) -> str:
    """Return in words what changed, and between which calls."""
    others = len(changes) - 1
    more = f", and {count(others, 'other')} changed" if others else ""
    last = f"call {earlier.seq} at {earlier.caller}" if earlier is not None else "none"
    return (
        f"{changes[0]}{more} since the last call that was checked (the call before this one is "
        f"{last})"
    )


_Content = tuple[str, str, Any]
_Look = Callable[[], list[torch.Tensor] | None]


class _Item(NamedTuple):
    """A parameter, buffer or submodule, as it was when it was looked at.

    Attributes:
        kind: Which of these it is.
        find: A weak reference to it.
        version: Its counter of writes; None where it has none.
        bits: Its checksum; None where none was taken.
        untold: Why nobody can tell whether it changes; empty otherwise.
    """

    kind: str
    find: Callable[[], object]
    version: int | None = None
    bits: object = None
    untold: str = ""


class _Seen:
    """What a module was made of when it was last looked at.

    Args:
        found: Path, kind and object of all that is compared.
        look: What looks at it quickly, as `_quick_look` returns it.
        fingerprint: Whether to take checksums.

    Attributes:
        items: All of it, by path.
    """

    def __init__(self, found: list[_Content], look: _Look, *, fingerprint: bool = False) -> None:
        tensors = [thing for _, _, thing in found if isinstance(thing, torch.Tensor)]
        read = _read(tensors) if fingerprint else None
        self._bits = _by_id(tensors, read) if read is not None else None
        bits = iter(read or ())
        self.items: dict[str, _Item] = {}
        for path, kind, thing in found:
            if isinstance(thing, nn.Module):
                self.items[path] = _Item(kind, weakref.ref(thing))
            else:
                self.items[path] = _tensor_item(kind, thing, next(bits, None))
        self._look = look

    def holds(self) -> bool:
        """Return whether it is so still; False too where that cannot be told quickly."""
        tensors = self._look()
        if tensors is None or self._bits is None:
            return tensors is not None
        return _by_id(tensors, _read(tensors)) == self._bits


def _content(module: nn.Module) -> Iterator[_Content]:
    """Yield path, kind and object of all that a module is made of."""
    for path, part in module.named_modules(remove_duplicate=False):
        if path:
            yield path, "submodule", part
        notes = transient_buffers(part)
        for kind, named in (("parameter", part.named_parameters), ("buffer", part.named_buffers)):
            for name, tensor in named(recurse=False, remove_duplicate=False):
                if kind == "buffer" and name in notes:
                    continue
                yield f"{path}.{name}" if path else name, kind, tensor


def _by_id(tensors: list[torch.Tensor], bits: list[Any]) -> dict[int, Any]:
    return dict(zip(map(id, tensors), bits, strict=True))


def _read(tensors: list[torch.Tensor]) -> list[tuple[int, ...] | str]:
    """Return a checksum of each tensor; of one that cannot be read, why not."""
    try:
        return list(checksums(tensors))
    except Exception as error:  # of whatever kind of tensor
        if len(tensors) == 1:
            reason = str(error).partition("\n")[0]
            return [f"cannot be read ({type(error).__name__}: {reason})"]
        return [bits for tensor in tensors for bits in _read([tensor])]


def _tensor_item(kind: str, tensor: torch.Tensor, bits: tuple[int, ...] | str | None) -> _Item:
    version, untold = None, ""
    if isinstance(bits, str):
        untold = bits
    try:
        version = writes_to(tensor)
    except Exception as error:  # of whatever kind of tensor
        if bits is None:
            untold = f"has no counter of writes ({type(error).__name__})"
            if isinstance(error, RuntimeError) and tensor.is_inference():
                untold = (
                    "was made in inference mode, so torch counts no writes to it; make it outside, "
                    "or ask for frozen(fingerprint=True)"
                )
    return _Item(kind, weakref.ref(tensor), version, bits, untold)


def _changes(before: _Seen, now: _Seen) -> Iterator[str]:
    """Yield in words each thing that is not as it was."""
    for path, item in now.items.items():
        was = before.items.get(path)
        if was is None:
            yield f"the {item.kind} {path} was added"
        elif was.find() is not item.find():
            yield f"the {item.kind} {path} was replaced"
        elif was.version != item.version:
            times = count((item.version or 0) - (was.version or 0), "time")
            yield f"the {item.kind} {path} was written in place {times}"
        elif was.bits != item.bits:
            yield f"the {item.kind} {path} was written through .data or the like"
    for path, was in before.items.items():
        if path not in now.items:
            yield f"the {was.kind} {path} is gone"


def _quick_look(
    module: nn.Module, idle: frozenset[int] = frozenset(), *, buffers: bool = True
) -> _Look:
    """Return a function that looks at a whole module in microseconds, many things at each step.

    It looks into the dicts in which the parts of a module keep their things. Of the tensors it has
    weak references only; a submodule that was taken out is let go at the next look.

    Args:
        module: The module.
        idle: Of the parameters those that may change, by their ids.
        buffers: Whether to look at buffers, but for those that a state dict leaves out.

    Returns:
        The function. It returns all tensors of the module if none was written in place and
        everything is what it was; else None, and always where a part has no such dicts, or a tensor
        no counter.
    """
    parts = [part for _, part in module.named_modules(remove_duplicate=False)]
    trees = [own[2] for part in parts if (own := holders(part)) is not None]
    if len(trees) < len(parts):
        return _nothing
    looked = [one for part in parts for one in _looked_at(part, idle, buffers=buffers)]
    dicts = [one.held for one in looked if one.kept is None]
    mixed = [one for one in looked if one.kept is not None]
    full, parents = tuple(filter(None, dicts)), tuple(filter(None, trees))
    empty = [held for held in (*dicts, *trees) if not held]
    things = [thing for held in full for thing in held.values()]  # None: no such bias
    things.extend(thing for one in mixed for thing in one.things())
    children = [child for parent in parents for child in parent.values()]
    tensors = [thing for thing in things if thing is not None]
    try:
        versions = sum(map(writes_to, tensors))
    except Exception:  # of whatever kind of tensor
        return _nothing
    find = [weakref.ref(thing) if thing is not None else _nothing for thing in things]
    all_there = len(tensors) == len(things)
    del things, tensors

    def look() -> list[torch.Tensor] | None:
        # What dicts refer to is their values: in one step, where `values()` would take one each.
        if any(empty) or gc.get_referents(*parents) != children:
            return None
        found = gc.get_referents(*full)
        for one in mixed:
            if not one.has_the_same_names():
                return None
            found.extend(one.things())
        if len(found) != len(find):
            return None
        for ref, thing in zip(find, found, strict=True):
            if ref() is not thing:
                return None
        now = found if all_there else [thing for thing in found if thing is not None]
        return now if sum(map(writes_to, now)) == versions else None

    return look if look() is not None else _nothing


class _LookedAt(NamedTuple):
    """A dict in which a part of a module keeps its parameters or its buffers.

    Attributes:
        held: The dict.
        kept: The names of what is looked at; None where that is all.
        names: All of its names.
        notes: The names that the part says are of no state, as it keeps them.
        noted: What they were.
    """

    held: Mapping[str, Any]
    kept: tuple[str, ...] | None = None
    names: frozenset[str] = frozenset()
    notes: Iterable[str] = ()
    noted: frozenset[str] = frozenset()

    def has_the_same_names(self) -> bool:
        return self.held.keys() == self.names and self.noted == frozenset(self.notes)

    def things(self) -> Iterator[Any]:
        return (self.held[name] for name in self.kept or ())


def _looked_at(part: nn.Module, idle: frozenset[int], *, buffers: bool) -> Iterator[_LookedAt]:
    own = holders(part)
    if own is None:
        return
    left_out = {name for name, thing in own[0].items() if id(thing) in idle} if idle else set()
    yield _all_but(own[0], left_out, ())
    if buffers:
        notes = transient_buffers(part)
        yield _all_but(own[1], set(notes), notes)


def _all_but(held: Mapping[str, Any], left_out: set[str], notes: Iterable[str]) -> _LookedAt:
    if not left_out:
        return _LookedAt(held)
    kept = tuple(name for name in held if name not in left_out)
    return _LookedAt(held, kept, frozenset(held), notes, frozenset(notes))


def _nothing() -> None:
    return None
