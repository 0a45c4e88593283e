"""The contract and the decision: a pure function from what is open to a verdict.

Nothing here touches torch, threads or clocks; the whole table of `decide` is tested exhaustively.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Reason = Literal[
    "UnsanctionedCall", "BudgetExceeded", "NoContext", "ReentrantCall", "BypassedGuard"
]
Mode = Literal["enforce", "observe", "off"]
"""What a guard does with a violation: raise it, only record and log it, or nothing at all."""

_ONE_PREFERENCE_SCORER: Mapping[str, int] = MappingProxyType({"preference_scorer": 1})


@dataclass(frozen=True)
class CallPolicy:
    """Who may call the module in training, and exactly how often per micro-step.

    Args:
        scopes: Name of a sanctioned scope -> calls per micro-step. The default is one
            ``"preference_scorer"`` call, or no scope when ``sanctioned_callers`` are given instead.
        sanctioned_callers: ``"module:qualname"`` of a function -> calls per micro-step, for code
            that cannot be edited to open a scope. It applies when any frame of the call's stack
            runs that function and no scope is open.
        shared_submodules: Names of submodules that other models run too (tied embeddings, a shared
            backbone), such as ``("backbone",)``; alone, they may be run by anyone.

    Raises:
        TypeError: A name that is no string, or a budget that is no whole number.
        ValueError: A name or a number that cannot be one, or a policy that allows no call at all.
    """

    scopes: Mapping[str, int] = field(default_factory=lambda: _ONE_PREFERENCE_SCORER)
    sanctioned_callers: Mapping[str, int] = field(default_factory=dict)
    shared_submodules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = self.shared_submodules
        if not isinstance(names, (tuple, list)) or not all(isinstance(n, str) for n in names):
            raise TypeError(f"shared_submodules must be names of submodules, not {names!r}")
        object.__setattr__(self, "shared_submodules", tuple(names))
        if self.scopes is _ONE_PREFERENCE_SCORER and self.sanctioned_callers:
            object.__setattr__(self, "scopes", {})
        for kind in ("scopes", "sanctioned_callers"):
            budgets = getattr(self, kind)
            _check_budgets(kind, budgets)
            object.__setattr__(self, kind, MappingProxyType(dict(budgets)))
        for scope in self.scopes:
            if ":" in scope:
                raise ValueError(f"scopes: {scope!r} must not contain ':', which marks a caller")
        for caller in self.sanctioned_callers:
            if not all(caller.partition(":")):
                raise ValueError(
                    f"sanctioned_callers: {caller!r} must read 'module:qualname', "
                    "such as 'my_project.scoring:Scorer.score'"
                )
        if not self.budgets:
            raise ValueError(
                "CallPolicy names neither a scope nor a caller, so no training call could ever "
                "be legal; give scopes={...} or sanctioned_callers={...}"
            )

    @property
    def budgets(self) -> dict[str, int]:
        """Calls per micro-step of every scope and every sanctioned caller."""
        return {**self.scopes, **self.sanctioned_callers}

    def to_json(self) -> dict[str, Any]:
        """Return the policy as JSON-ready fields, for the log."""
        return {
            "scopes": dict(self.scopes),
            "sanctioned_callers": dict(self.sanctioned_callers),
            "shared_submodules": list(self.shared_submodules),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        budgets = dict(self.scopes), dict(self.sanctioned_callers)
        return type(self), (*budgets, self.shared_submodules)


def decide(
    context: Literal["training", "inference"] | None,
    sanctioned: bool,
    budget_left: int,
    reentrant: bool = False,
    recompute: bool = False,
    bypass: bool = False,
) -> Reason | None:
    """Return the verdict on a run: the name of the violation that it is, or None if it is allowed.

    Args:
        context: What the thread has declared.
        sanctioned: Whether a sanctioned scope or caller inside a micro-step makes the call.
        budget_left: Calls that this scope may still make.
        reentrant: Whether the module runs already in this thread.
        recompute: Whether activation checkpointing repeats a recorded call.
        bypass: Whether the run did not come through the proxy.
    """
    if recompute:
        return None
    if bypass:
        return "BypassedGuard"
    if reentrant:
        return "ReentrantCall"
    if context is None:
        return "NoContext"
    if context == "inference":
        return None
    if not sanctioned:
        return "UnsanctionedCall"
    if budget_left <= 0:
        return "BudgetExceeded"
    return None


def _check_budgets(kind: str, budgets: object) -> None:
    if not isinstance(budgets, Mapping):
        raise TypeError(f"{kind} must map names to calls per micro-step, not {budgets!r}")
    for name, budget in budgets.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"{kind}: {name!r} must be a non-empty string")
        if isinstance(budget, bool) or not isinstance(budget, int):
            raise TypeError(f"{kind}: the budget of {name!r} must be an int, not {budget!r}")
        if budget < 1:
            raise ValueError(
                f"{kind}: the budget of {name!r} must be at least 1 call per micro-step, "
                f"not {budget}; leave the name out to allow no call"
            )
