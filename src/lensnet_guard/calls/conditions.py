"""The stock conditions that need nothing but the call: how it is made, and what it returned.

Those that remember what was before are `frozen` and `same_inputs`; PEFT's are in `adapters`.
"""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import torch

from lensnet_guard._text import count
from lensnet_guard.calls.call import Call
from lensnet_guard.calls.parts import every_part, first_named
from lensnet_guard.calls.scope import Condition, name_of
from lensnet_guard.calls.tensors import plain, read, tensors_in

_trains = attrgetter("training")


# How a call is made ------------------------------------------------------------------------------


def no_grad(call: Call) -> str | None:
    """Autograd does not record: ``torch.no_grad()`` or inference mode is open.

    It stops a reference or a teacher that is run with gradients: its activations are kept until
    the backward pass, which costs memory and time, and its weights gather gradients.

    Args:
        call: The call as it begins.

    Returns:
        None, or what was found.
    """
    if not call.grad_enabled:
        return None
    return "autograd records; make the call inside torch.no_grad()"


vars(no_grad)["mistake"] = "reference-with-gradients"


def eval_mode(call: Call) -> str | None:
    """No part of the module is in train mode.

    It stops a reference whose dropout is on, or whose batch norms take, and keep, the statistics of
    the batch: log-probabilities then differ from run to run, and a KL that should be 0 is not.

    Args:
        call: The call as it begins.

    Returns:
        None, or the first part that trains and how many do.
    """
    parts = every_part(call.module)
    if not any(map(_trains, parts)):
        return None
    training = [part for part in parts if part.training]
    number, of = len(set(map(id, training))), len(set(map(id, parts)))
    return (
        f"{first_named(call.module, training)} is in train mode, as {number} of "
        f"{count(of, 'module')} are; call eval() on the module"
    )


vars(eval_mode)["mistake"] = "reference-in-train-mode"


@dataclass(frozen=True, repr=False)
class autocast:  # noqa: N801  # it is written where it is asked for, as torch.autocast is
    """Autocast is on with a dtype, or off, for the device that the call runs on.

    That is the device of its first tensor argument, else of the module's first parameter. It stops
    a reference that is run in another precision than the policy, so that their log-probabilities
    differ where their weights do not. What the module's own forward opens is not seen.

    Args:
        dtype: What autocast must cast to, such as ``torch.bfloat16``; None: it must be off.

    Raises:
        TypeError: ``dtype`` is no dtype.
    """

    dtype: torch.dtype | None
    about: ClassVar[str] = "autocast"
    mistake: ClassVar[str] = "reference-out-of-autocast"

    def __post_init__(self) -> None:
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise TypeError(
                f"autocast: the dtype must be one of torch's or None, not {self.dtype!r}"
            )

    def __call__(self, call: Call) -> str | None:
        """Return None, or how autocast is set instead.

        Args:
            call: The call as it begins.
        """
        device = _device_type(call)
        on = torch.is_autocast_enabled(device)
        found = torch.get_autocast_dtype(device) if on else None
        if found == self.dtype:
            return None
        is_now = f"on with {found}" if on else "off"
        block = f'torch.autocast("{device}", {self.dtype})'
        if self.dtype is None:
            block = f'torch.autocast("{device}", enabled=False)'
        return f"autocast is {is_now} for {device}; make the call inside {block}"

    def __repr__(self) -> str:
        return f"autocast({self.dtype})"


def _device_type(call: Call) -> str:
    """Return the type of the device that a call runs on."""
    given = (tensor for _, tensor in tensors_in((call.args, call.kwargs)))
    first = next(given, None)
    if first is None:
        first = next(call.module.parameters(), None)
    return "cpu" if first is None else first.device.type


# What a call returned ----------------------------------------------------------------------------


def finite(call: Call) -> str | None:
    """Every floating tensor in the result is finite; for ``ensures``.

    It stops a reference or a critic that overflows in half precision, before its NaN is in the loss
    and, a step later, in every weight. It reads the values, and so waits for the device, once for
    all tensors.

    Args:
        call: The call with its result.

    Returns:
        None, or the first tensor that is not finite, with how many NaN and infinite values it has.
    """
    found = [(place, _floats(tensor)) for place, tensor in tensors_in(call.result)]
    if all(_are_finite([part for _, parts in found for part in parts])):
        return None
    for place, parts in found:
        if not all(_are_finite(parts)):
            nan, inf = (sum(int(ask(p).sum()) for p in parts) for ask in (torch.isnan, torch.isinf))
            size = sum(part.numel() for part in parts)
            return f"{_named(place)} has {nan} NaN and {inf} infinite of {count(size, 'value')}"
    return None


vars(finite)["mistake"] = "reference-out-of-autocast"


def _floats(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return a tensor's floating values, in dtypes that torch can ask whether they are finite."""
    return [
        part.float() if part.dtype.itemsize == 1 else part
        for part in plain(tensor.detach())
        if part.is_floating_point() or part.is_complex()
    ]


def _are_finite(tensors: list[torch.Tensor]) -> list[bool]:
    """Return of each tensor whether it is finite, waiting for each device once."""
    return read([tensor.isfinite().all() for tensor in tensors])


def detached(call: Call) -> str | None:
    """No tensor in the result requires grad; for ``ensures``.

    It stops a loss that trains a teacher or a target network through what it returned, as when its
    forward opens ``torch.enable_grad()`` or its output is not detached.

    Args:
        call: The call with its result.

    Returns:
        None, or the first tensor that requires grad, and the operator that made it.
    """
    for place, tensor in tensors_in(call.result):
        if tensor.requires_grad:
            maker = f" (by {tensor.grad_fn.name()})" if tensor.grad_fn is not None else ""
            return (
                f"{_named(place)} requires grad{maker}; return it detached, or call the module "
                "inside torch.no_grad()"
            )
    return None


vars(detached)["mistake"] = "reference-with-gradients"


def _named(place: str) -> str:
    return place or "the result"


# In inference too --------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class _InferenceToo:
    """A condition that is asked in inference as well."""

    __wrapped__: Condition
    in_inference: ClassVar[bool] = True

    @property
    def about(self) -> Any:
        return getattr(self.__wrapped__, "about", None)

    def __call__(self, call: Call) -> str | None:
        return self.__wrapped__(call)

    def __repr__(self) -> str:
        return name_of(self.__wrapped__)


def inference_too(*conditions: Condition) -> tuple[Condition, ...]:
    """Return the same conditions, to be asked of calls in inference as well.

    Such as ``CallPolicy(requires=(frozen, *inference_too(eval_mode, no_grad)))``: other conditions
    are asked of calls in training alone.

    Args:
        conditions: Functions of a call, as `CallPolicy` takes them.

    Raises:
        TypeError: One of them is no function.
    """
    for condition in conditions:
        if not callable(condition):
            raise TypeError(f"inference_too takes conditions, such as no_grad, not {condition!r}")
    return tuple(map(_InferenceToo, conditions))
