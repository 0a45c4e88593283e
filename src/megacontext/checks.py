"""Refusals of values that make no sense, each with the name of what was given."""

import math
from collections.abc import Sequence
from dataclasses import Field, fields
from typing import Any, ClassVar, Protocol

import numpy as np


class HasFields(Protocol):
    """A dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


def check_int(name: str, value: Any) -> None:
    """Refuse what is no integer (True and False are none).

    Args:
        name: What the value is called.
        value: Anything.

    Raises:
        TypeError: It is none; the message has its name.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, not {value!r}")


def check_at_least(name: str, value: Any, bound: int) -> None:
    """Refuse what is no integer, or one below a bound.

    Args:
        name: What the value is called.
        value: Anything.
        bound: The least that it may be.

    Raises:
        TypeError: It is no integer.
        ValueError: It is below the bound.
    """
    check_int(name, value)
    if value < bound:
        raise ValueError(f"{name} must be at least {bound}, not {value}")


def check_number(name: str, value: Any) -> None:
    """Refuse what is no real number (True and False are none, an infinity is one).

    Args:
        name: What the value is called.
        value: Anything.

    Raises:
        TypeError: It is no number.
        ValueError: It is nan.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if math.isnan(value):
        raise ValueError(f"{name} must be a number, not nan")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse what is none of the choices.

    Args:
        name: What the value is called.
        value: Anything.
        choices: What it may be.

    Raises:
        ValueError: It is none of them; the message names the field and the choices.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def check_numbers(config: HasFields, may_be_zero: Sequence[str]) -> None:
    """Check the int and float fields of a dataclass: each must be finite and positive.

    Args:
        config: The dataclass.
        may_be_zero: Names of fields that need not be positive, only not negative.

    Raises:
        TypeError: A field of another type; the message names it.
        ValueError: A field out of bounds; the message names it.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type is int:
            check_int(field.name, value)
        elif field.type is float:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{field.name} must be a number, not {value!r}")
        else:
            continue
        if field.name in may_be_zero:
            if value < 0:
                raise ValueError(f"{field.name} must not be negative, but is {value}")
        elif not 0 < value < math.inf:
            raise ValueError(f"{field.name} must be positive, not {value}")


def check_types(config: HasFields, *types: type) -> None:
    """Check the fields of a dataclass that are of simple types.

    Args:
        config: The dataclass.
        types: Which types: ``bool``, ``str``.

    Raises:
        TypeError: A field of another type; the message names it.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type in types and type(value) is not field.type:
            raise TypeError(f"{field.name} must be a {field.type.__name__}, not {value!r}")
