"""The contract and the decision: a pure function from what is open to a verdict.

Nothing here touches torch, threads or clocks; the whole table of `decide` is tested exhaustively.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

from lensnet_guard.calls.scope import (
    MICRO_STEP,
    Calls,
    Condition,
    Scope,
    check_caller,
    checked_calls,
    checked_conditions,
    contradiction,
    name_of,
)

Reason = Literal[
    "UnsanctionedCall",
    "BudgetExceeded",
    "NoContext",
    "ReentrantCall",
    "BypassedGuard",
    "ConditionUnmet",
]
Mode = Literal["enforce", "observe", "off"]
"""What a guard does with a violation: raise it, only record and log it, or nothing at all."""

_ONE_PREFERENCE_SCORER: Mapping[str, Any] = MappingProxyType({"preference_scorer": 1})


@dataclass(frozen=True)
class CallPolicy:
    """Who may call the module in training, how often, and in what state.

    Args:
        scopes: Name of a scope -> its `Scope`, or its calls per micro-step alone. The default is
            one ``"preference_scorer"`` call, or no scope when ``sanctioned_callers`` are given
            instead. ``scopes={}`` allows no call in training: the module is for inference only.
        sanctioned_callers: ``"module:qualname"`` of a function -> calls per micro-step, for code
            that cannot be edited to open a scope; short for scopes with a ``caller``.
        shared_submodules: Names of submodules that other models run too (tied embeddings, a shared
            backbone), such as ``("backbone",)``; alone, they may be run by anyone.
        requires: Conditions that every call in training must meet as it begins, besides those of
            its scope. One that shall hold in inference too is made by `inference_too`.
        ensures: Conditions that what a call in training returns must meet, likewise.
        methods: Names of methods (``"generate"``, ``"update_parameters"``); each run of one is one
            call, with all that runs in it.
        parts: Names of submodules (``"score"``) whose runs alone are calls of the module.

    Raises:
        TypeError: A name, a budget or a condition that is none.
        ValueError: A name or a number that cannot be one; scopes of which two always apply to the
            same calls; conditions that contradict each other.
    """

    scopes: Mapping[str, Calls | Scope] = field(default_factory=lambda: _ONE_PREFERENCE_SCORER)
    sanctioned_callers: Mapping[str, Calls] = field(default_factory=dict)
    shared_submodules: tuple[str, ...] = ()
    requires: tuple[Condition, ...] = ()
    ensures: tuple[Condition, ...] = ()
    methods: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for kind, what in (
            ("shared_submodules", "submodules"),
            ("methods", "methods"),
            ("parts", "submodules"),
        ):
            names = getattr(self, kind)
            if not isinstance(names, (tuple, list)) or not all(isinstance(n, str) for n in names):
                raise TypeError(f"{kind} must be names of {what}, not {names!r}")
            object.__setattr__(self, kind, tuple(names))
        for kind in ("requires", "ensures"):
            object.__setattr__(self, kind, checked_conditions(kind, getattr(self, kind)))
        if self.scopes is _ONE_PREFERENCE_SCORER and self.sanctioned_callers:
            object.__setattr__(self, "scopes", {})
        for kind in ("scopes", "sanctioned_callers"):
            checked = _checked_budgets(kind, getattr(self, kind))
            object.__setattr__(self, kind, MappingProxyType(checked))
        for scope in self.scopes:
            if ":" in scope:
                raise ValueError(f"scopes: {scope!r} must not contain ':', which marks a caller")
        for caller in self.sanctioned_callers:
            check_caller("sanctioned_callers", caller)
        _check_apart(self.in_full)
        self._check_conditions()
        if both := set(self.parts) & set(self.shared_submodules):
            raise ValueError(
                f"parts: {min(both)!r} is one of shared_submodules too, whose runs are no calls"
            )

    @cached_property
    def in_full(self) -> Mapping[str, Scope]:
        """Every scope and every sanctioned caller, by its name, written out."""
        scopes = {n: s if isinstance(s, Scope) else Scope(s) for n, s in self.scopes.items()}
        callers = {name: Scope(n, caller=name) for name, n in self.sanctioned_callers.items()}
        return MappingProxyType({**scopes, **callers})

    @property
    def budgets(self) -> dict[str, Calls]:
        """Calls per window of every scope and every sanctioned caller."""
        return {name: scope.calls for name, scope in self.in_full.items()}

    @property
    def windows(self) -> frozenset[str]:
        """The windows that scopes count in, besides micro-steps."""
        return frozenset(scope.per for scope in self.in_full.values()) - {MICRO_STEP}

    def due(self, window: str) -> dict[str, Calls]:
        """Return the budgets of one window."""
        return {name: scope.calls for name, scope in self.in_full.items() if scope.per == window}

    def to_json(self) -> dict[str, Any]:
        """Return the policy as JSON-ready fields, for the log."""
        scopes = {n: s.to_json() for n, s in self.in_full.items() if n in self.scopes}
        fields = {
            "scopes": scopes,
            "sanctioned_callers": {
                n: Scope(c).to_json() for n, c in self.sanctioned_callers.items()
            },
            "shared_submodules": list(self.shared_submodules),
            "requires": list(map(name_of, self.requires)),
            "ensures": list(map(name_of, self.ensures)),
            "methods": list(self.methods),
            "parts": list(self.parts),
        }
        always = ("scopes", "sanctioned_callers", "shared_submodules")
        return {name: value for name, value in fields.items() if value or name in always}

    def __reduce__(self) -> tuple[Any, ...]:
        budgets = dict(self.scopes), dict(self.sanctioned_callers)
        conditions = self.requires, self.ensures
        return type(self), (
            *budgets,
            self.shared_submodules,
            *conditions,
            self.methods,
            self.parts,
        )

    def _check_conditions(self) -> None:
        """Refuse conditions that cannot hold together, of all calls or of one scope's."""
        for name, scope in {"": Scope(), **self.in_full}.items():
            state = (scope.when,) if scope.when is not None else ()
            for kind, conditions in (
                ("requires", (*state, *self.requires, *scope.requires)),
                ("ensures", (*self.ensures, *scope.ensures)),
            ):
                if two := contradiction(conditions):
                    of = f"the scope {name!r}, no call of which could be legal" if name else kind
                    raise ValueError(
                        f"{name_of(two[0])} and {name_of(two[1])} cannot hold together, and "
                        f"CallPolicy asks for both in {of}"
                    )


def decide(
    context: Literal["training", "inference"] | None,
    sanctioned: bool,
    budget_left: int | None,
    reentrant: bool = False,
    recompute: bool = False,
    bypass: bool = False,
    breached: bool = False,
) -> Reason | None:
    """Return the verdict on a run: the name of the violation that it is, or None if it is allowed.

    Args:
        context: What the thread has declared.
        sanctioned: Whether a scope makes the call whose window is open.
        budget_left: Calls that this scope may still make; None for any number.
        reentrant: Whether the module runs already in this thread.
        recompute: Whether activation checkpointing repeats a recorded call.
        bypass: Whether the run did not come through the proxy.
        breached: Whether a condition does not hold that must hold of this call.
    """
    if recompute:
        return None
    if bypass:
        return "BypassedGuard"
    if reentrant:
        return "ReentrantCall"
    if context is None:
        return "NoContext"
    if context == "training":
        if not sanctioned:
            return "UnsanctionedCall"
        if budget_left is not None and budget_left <= 0:
            return "BudgetExceeded"
    return "ConditionUnmet" if breached else None


def _checked_budgets(kind: str, budgets: object) -> dict[str, Any]:
    if not isinstance(budgets, Mapping):
        raise TypeError(f"{kind} must map names to calls per micro-step, not {budgets!r}")
    checked = {}
    for name, budget in budgets.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"{kind}: {name!r} must be a non-empty string")
        full = isinstance(budget, Scope) and kind == "scopes"
        checked[name] = budget if full else checked_calls(kind, name, budget)
    return checked


def _check_apart(scopes: Mapping[str, Scope]) -> None:
    """Refuse two scopes of which both apply whenever one of them does."""
    known = [(name, scope) for name, scope in scopes.items() if not scope.is_opened]
    for (name, one), (other_name, other) in itertools.combinations(known, 2):
        alike = one.when == other.when
        either = one.caller is not None and None in (one.when, other.when)
        if one.caller == other.caller and (alike or either):
            raise ValueError(
                f"the scopes {name!r} and {other_name!r} apply to the same calls, so nobody could "
                "say whose budget one spends; set them apart by caller or when"
            )
