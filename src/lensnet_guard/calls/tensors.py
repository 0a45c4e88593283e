"""Tensors in what calls take and return: where each of them stands, and what it is made of."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

_MOST_NESTED = 16  # containers within containers; what holds itself has no end


def tensors_in(value: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a value, each with its place in it.

    Args:
        value: A tensor, or tuples, lists, mappings, dataclasses and named tuples of such, nested.
        place: Of the value itself.
        depth: How many containers it is in.

    Yields:
        A place such as ``"logits"`` (by key), ``"[0]"`` (by number), ``".hidden_states[3]"`` (by
        attribute), empty where the value is a tensor itself; and the tensor.
    """
    if isinstance(value, torch.Tensor):
        yield place, value
        return
    if depth < _MOST_NESTED:
        for step, item in _items(value, top=not place):
            yield from tensors_in(item, place + step, depth + 1)


def _items(value: Any, *, top: bool) -> Iterator[tuple[str, Any]]:
    """Yield what a container holds, and how its places go on from the container's."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            # A tensor used as a key would show its values.
            name = str(key) if isinstance(key, (str, int)) else f"<{type(key).__name__}>"
            yield name if top else f".{name}", item
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from ((f".{name}", item) for name, item in zip(value._fields, value, strict=True))
    elif isinstance(value, (tuple, list)):
        yield from ((f"[{number}]", item) for number, item in enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield f".{field.name}", getattr(value, field.name, None)


def plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors that hold a tensor's values in this process.

    That is the tensor itself, or what a wrapper of torch's protocol wraps: the local shard of a
    DTensor, the values of a nested tensor, the parts of a quantised one. Operators on the wrapper
    might wait for other ranks.
    """
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        return
    names, _ = flatten()
    for part in (getattr(tensor, name) for name in names):
        if isinstance(part, torch.Tensor):  # a DTensor names its mesh too
            yield from plain(part)


def read(scalars: Sequence[torch.Tensor]) -> list[Any]:
    """Return what scalars of one dtype hold, waiting for each device once."""
    by_device: dict[torch.device, list[int]] = {}
    for number, scalar in enumerate(scalars):
        by_device.setdefault(scalar.device, []).append(number)
    values: list[Any] = [None] * len(scalars)
    for numbers in by_device.values():
        told = torch.stack([scalars[number] for number in numbers]).tolist()
        for number, value in zip(numbers, told, strict=True):
            values[number] = value
    return values


def describe(tensor: torch.Tensor) -> str:
    """Return dtype, shape and device in words: ``"int64[2, 31] cpu"``."""
    return tensor_text(tensor.shape, tensor.dtype, tensor.device)


@lru_cache(maxsize=1_024)
def tensor_text(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> str:
    """Return in words what was noted of a tensor."""
    return f"{str(dtype).removeprefix('torch.')}{list(shape)} {device}"
