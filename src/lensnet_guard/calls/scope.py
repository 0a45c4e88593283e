"""A scope: which calls belong together, how many of them are due in which window, in what state.

Nothing here touches torch: a condition is any function, and only its name is asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

from lensnet_guard._text import budget_text

Condition = Callable[[Any], str | None]
"""What must hold of a `lensnet_guard.Call`: returns None when it does, else what was found."""

Calls = int | tuple[int, int | None]
"""A budget: exactly so many calls, or from the first number to the second; None: any number."""

MICRO_STEP, STEP = "micro_step", "step"  # the windows that every training has


@dataclass(frozen=True)
class Scope:
    """Calls that belong together, how many of them are due, and what must hold of each.

    One with neither ``caller`` nor ``when`` is opened in code: ``with guard.sanctioned(name):``.

    Args:
        calls: How many calls are due in each window: exactly so many, or ``(least, most)``, where
            ``most`` may be None for any number.
        per: The window: ``"micro_step"``, ``"step"`` (an optimizer step), or the name of a stretch
            that the trainer opens, as in ``with guard.window("generation"):``.
        caller: ``"module:qualname"`` of a function. The scope is that of the calls that have it on
            their stack, while no scope is open in code.
        when: A condition. The scope is that of the calls of which it holds, while no scope is open
            in code and none of another caller's applies; with ``caller``, of those from there.
        requires: Conditions that each call must meet as it begins.
        ensures: Conditions that what each call returns must meet.

    Raises:
        TypeError: A number, name or condition that is none.
        ValueError: A number or a name that cannot be one.
    """

    calls: Calls = 1
    per: str = MICRO_STEP
    caller: str | None = None
    when: Condition | None = None
    requires: tuple[Condition, ...] = ()
    ensures: tuple[Condition, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "calls", checked_calls("Scope", "calls", self.calls))
        if not isinstance(self.per, str) or not self.per:
            raise TypeError(
                f'Scope: per must be "micro_step", "step" or the name of a window, not {self.per!r}'
            )
        if self.caller is not None:
            check_caller("Scope", self.caller)
        if self.when is not None and not callable(self.when):
            raise TypeError(f"Scope: when must be a condition, not {self.when!r}")
        for kind in ("requires", "ensures"):
            object.__setattr__(self, kind, checked_conditions(kind, getattr(self, kind)))

    @property
    def least(self) -> int:
        """The fewest calls of a window."""
        return self.calls if isinstance(self.calls, int) else self.calls[0]

    @property
    def most(self) -> int | None:
        """The most calls of a window; None when there is no limit."""
        return self.calls if isinstance(self.calls, int) else self.calls[1]

    @property
    def is_opened(self) -> bool:
        """Whether it is opened in code; else its calls are known by caller or state."""
        return self.caller is None and self.when is None

    @property
    def budget(self) -> str:
        """The budget in words, such as ``"1"``, ``"0 to 4"`` or ``"2 or more"``."""
        return budget_text(self.calls)

    def to_json(self) -> Any:
        """Return the scope as JSON-ready fields: its calls alone where there is no more to say."""
        calls = list(self.calls) if isinstance(self.calls, tuple) else self.calls
        fields = {
            "per": self.per if self.per != MICRO_STEP else None,
            "caller": self.caller,
            "when": name_of(self.when) if self.when is not None else None,
            "requires": list(map(name_of, self.requires)),
            "ensures": list(map(name_of, self.ensures)),
        }
        said = {name: value for name, value in fields.items() if value}
        return {"calls": calls, **said} if said else calls


def name_of(condition: Condition) -> str:
    """Return how messages and logs call a condition: as it is written in code."""
    return condition.__qualname__ if isinstance(condition, FunctionType) else repr(condition)


def mistake_of(condition: Condition) -> str | None:
    """Return the entry of docs/mistakes.md that explains a breach of a condition.

    It is what the condition says itself, in its attribute ``mistake``; None where it says nothing.
    """
    mistake = getattr(getattr(condition, "__wrapped__", condition), "mistake", None)
    return mistake if isinstance(mistake, str) else None


def contradiction(conditions: tuple[Condition, ...]) -> tuple[Condition, Condition] | None:
    """Return two conditions that cannot hold together, as far as they tell; None without such.

    Two different ones contradict each other that say they are about the same thing: their attribute
    ``about``, as ``adapters_on`` and ``adapters_off`` have it. One that is asked in inference too
    is no different one for that.
    """
    first: dict[object, Condition] = {}
    for condition in conditions:
        about = getattr(condition, "about", None)
        alone = getattr(condition, "__wrapped__", condition)
        if about is not None and first.setdefault(about, alone) != alone:
            return first[about], alone
    return None


def checked_calls(kind: str, name: str, calls: Any) -> Calls:
    """Return a budget that can be one.

    Raises:
        TypeError: It is neither a whole number nor a pair of such.
        ValueError: It allows no call, or fewer than it asks for.
    """
    pair: Any = calls if isinstance(calls, (tuple, list)) and len(calls) == 2 else None
    least, most = (calls, calls) if pair is None else pair
    if not _is_number(least) or not (_is_number(most) or (pair is not None and most is None)):
        raise TypeError(
            f"{kind}: the budget of {name!r} must be an int, or a pair (least, most), not {calls!r}"
        )
    if least < (pair is None) or most == 0:
        raise ValueError(
            f"{kind}: the budget of {name!r} must be at least 1 call, not {calls!r}; "
            "leave the scope out to allow none, or let it be (0, n)"
        )
    if most is not None and most < least:
        raise ValueError(
            f"{kind}: the budget of {name!r} must be (least, most), and {calls!r} asks for more "
            "than it allows"
        )
    return cast("Calls", least if pair is None else (least, most))


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def checked_conditions(kind: str, conditions: object) -> tuple[Condition, ...]:
    """Return conditions as a tuple.

    Raises:
        TypeError: They are no tuple or list of functions, or one is a class.
    """
    if not isinstance(conditions, (tuple, list)) or not all(map(callable, conditions)):
        raise TypeError(
            f"{kind} must be a tuple of conditions, such as (no_grad,), not {conditions!r}"
        )
    for condition in conditions:
        if isinstance(condition, type):
            raise TypeError(
                f"{kind}: {condition.__name__} is a class; make a condition of it, "
                f"{condition.__name__}(...)"
            )
    return tuple(conditions)


def check_caller(kind: str, caller: object) -> None:
    """Refuse what cannot name a function.

    Raises:
        TypeError: It is no string.
        ValueError: It has not the form ``"module:qualname"``.
    """
    if not isinstance(caller, str):
        raise TypeError(f"{kind}: a caller must be 'module:qualname', not {caller!r}")
    if not all(caller.partition(":")):
        raise ValueError(
            f"{kind}: {caller!r} must read 'module:qualname', "
            "such as 'my_project.scoring:Scorer.score'"
        )
