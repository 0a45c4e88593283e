"""The stock condition that two models are given the same input, as a reference and its policy."""

import inspect
import weakref
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import wrapt
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdRef

from lensnet_guard._torch_checkpoints import may_be_recomputing, recomputed_checkpoint
from lensnet_guard._torch_internals import eager_only, writes_to
from lensnet_guard.calls.call import Call
from lensnet_guard.calls.record import frame_up
from lensnet_guard.calls.tensors import describe

_EAGER = (
    "same_inputs of lensnet_guard notes in Python what a module is given: leave fullgraph=True out "
    "around that module, which runs with one graph break"
)


@dataclass(frozen=True, repr=False)
class same_inputs:  # noqa: N801  # it is written where it is asked for, as a function is
    """The call is given the very tensor that another model was given in its last call.

    It stops a policy and a reference that are compared on different batches, or on one that was
    padded, truncated or written over in between. The other model must have been called since this
    was last asked. The same memory counts: storage, offset, shape, strides, dtype, and the counter
    of writes in place. No values are read, and no tensor is kept alive.

    The other model is watched by a forward pre-hook, for as long as the condition lives. What it
    runs again for activation checkpointing is no call; what copies of it run is none of its calls.

    Args:
        other: The other model; guarded or not, or its guard.
        name: The argument's name, in the forward of both.
        values: Whether equal values count too. They are compared with one wait for the device, and
            until then the other model's tensor is held.

    Raises:
        TypeError: An argument that is none of these.
        ValueError: The other model's forward cannot be given an argument of that name.
    """

    other: Any  # from then on the raw module
    name: str
    values: bool = False
    mistake: ClassVar[str] = "another-batch"
    _last: "_LastInput" = field(init=False, compare=False)

    def __post_init__(self) -> None:
        module = _module_of(self.other)
        if module is None:
            raise TypeError(f"same_inputs: other must be a module or a guard, not {self.other!r}")
        if not isinstance(self.name, str):
            raise TypeError(f"same_inputs: name must be an argument's name, not {self.name!r}")
        if not isinstance(self.values, bool):
            raise TypeError(f"same_inputs: values must be True or False, not {self.values!r}")
        last = _LastInput(module, self.name, self.values)
        object.__setattr__(self, "other", module)
        object.__setattr__(self, "_last", last)
        handle = module.register_forward_pre_hook(last, with_kwargs=True)
        weakref.finalize(self, handle.remove).atexit = False

    def __call__(self, call: Call) -> str | None:
        """Return None, or how what the call is given differs.

        Args:
            call: The call as it begins.
        """
        last, who = self._last, type(self.other).__name__
        checked = call.memory.get(last, 0)
        call.memory[last] = last.calls
        if last.calls == checked:
            return f"{who} has not been called since {self.name} was last compared; call it first"
        try:
            given = call.argument(self.name)
        except LookupError as error:
            return str(error.args[0])
        if last.given is None:
            return f"{who} was given no {self.name} in its last call"
        difference = last.given.difference(given, who)
        return f"{self.name} {difference}" if difference else None

    def __repr__(self) -> str:
        values = ", values=True" if self.values else ""
        return f"same_inputs({type(self.other).__name__}, {self.name!r}{values})"


def _module_of(other: object) -> nn.Module | None:
    """Return the raw module of what a user calls a model; None where there is none."""
    for found in (other, getattr(other, "module", None)):  # the latter is a guard's
        raw = found.__wrapped__ if isinstance(found, wrapt.ObjectProxy) else found
        if isinstance(raw, nn.Module):
            return raw
    return None


class _LastInput:
    """A hook that notes what a module was given as one of its arguments in its last call.

    A copy, or what is pickled, watches the copy of the module, and starts anew.

    Attributes:
        calls: How many calls it has seen.
        given: What the last one was given; None where it was given no such argument.
    """

    def __init__(self, module: nn.Module, name: str, values: bool) -> None:
        self.calls = 0
        self.given: _Given | None = None
        self._module = weakref.ref(module)
        self._name, self._values = name, values
        self._position = _position(module, name)

    @eager_only(_EAGER)
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a call, unless it is another module's, or torch's checkpoints repeat one."""
        if module is not self._module():
            return
        if may_be_recomputing() and recomputed_checkpoint(frame_up()) is not None:
            return
        self.calls += 1
        self.given = None
        if self._name in kwargs:
            self.given = _Given(kwargs[self._name], keep=self._values)
        elif self._position is not None and self._position < len(args):
            self.given = _Given(args[self._position], keep=self._values)

    def __reduce__(self) -> tuple[Any, ...]:
        state = self._name, self._values, self._position
        return object.__new__, (type(self),), (self._module(), *state)

    def __setstate__(self, state: tuple[nn.Module, str, bool, int | None]) -> None:
        module, self._name, self._values, self._position = state
        self._module = weakref.ref(module)
        self.calls, self.given = 0, None


def _position(module: nn.Module, name: str) -> int | None:
    """Return where an argument may stand by position; None where it cannot, or nobody can tell.

    Raises:
        ValueError: The module's forward takes no such argument.
    """
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # nothing of Python's
        return None
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if name in names:
        return names.index(name)
    known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    if name not in known and len(known) == len(parameters):
        raise ValueError(
            f"same_inputs: the forward of {type(module).__name__} takes no {name!r}, only {known}"
        )
    return None


class _Given:
    """What an argument was, without keeping a tensor alive.

    Args:
        value: The argument.
        keep: Whether to keep a tensor all the same, until it is compared.
    """

    def __init__(self, value: object, *, keep: bool) -> None:
        self._text = _text(value)
        self._place = _place(value)
        self._version = _version(value)
        self._kept = value if keep and isinstance(value, torch.Tensor) else None

    def difference(self, value: object, who: str) -> str | None:
        """Return in words how another argument differs; None where it is the same.

        Args:
            value: The other argument.
            who: Who was given this one.
        """
        kept, self._kept = self._kept, None
        if value is None and self._text == _text(None):
            return None
        if self._place is None or not isinstance(value, torch.Tensor):
            return f"is {_text(value)}, {who} was given {self._text}, and only tensors are compared"
        now = _place(value)
        if self._place == now:
            if self._version == _version(value):
                return None
            return f"was written in place since {who} was given it"
        if kept is None:
            return (
                f"is another tensor ({_text(value)}) than {who} was given in its last call "
                f"({self._text}); give both the same one, or ask for same_inputs(..., values=True)"
            )
        if _version(kept) != self._version:
            return f"cannot be compared: what {who} was given was written in place since"
        if kept.dtype == value.dtype and torch.equal(kept, value.to(kept.device)):
            return None
        return f"has other values ({_text(value)}) than {who} was given ({self._text})"


def _place(value: object) -> tuple[object, ...] | None:
    """Return where a tensor lies, comparable and keeping nothing; None of what is no tensor."""
    if not isinstance(value, torch.Tensor):
        return None
    try:
        layout = value.storage_offset(), value.shape, value.stride(), value.dtype
        # Not its address: memory that was freed is given out again, to the next batch.
        storage = StorageWeakRef(value.untyped_storage())  # type: ignore[no-untyped-call]
        return "in", storage, layout
    except Exception:  # of a kind without storage, or without strides
        return "itself", WeakIdRef(value)


def _version(value: object) -> int | None:
    """Return a tensor's counter of writes; None where it has none."""
    try:
        return writes_to(value) if isinstance(value, torch.Tensor) else None
    except Exception:  # made in inference mode, or of some other kind
        return None


def _text(value: object) -> str:
    try:
        return describe(value) if isinstance(value, torch.Tensor) else type(value).__name__
    except Exception:  # of a kind that has no shape
        return type(value).__name__
