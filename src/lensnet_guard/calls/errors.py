"""The violations, and the words in which each explains itself.

A violation carries all its evidence: the record of the refused call, the earlier calls that spent
the budget, and a message that says what happened, where, and what to do. It survives pickling.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lensnet_guard._text import explained_by
from lensnet_guard.calls.scope import MICRO_STEP, STEP, name_of

if TYPE_CHECKING:
    from lensnet_guard.calls.policy import CallPolicy
    from lensnet_guard.calls.record import CallRecord, Frame
    from lensnet_guard.calls.scope import Scope


class LensNetViolation(Exception):
    """A broken call contract. Never raised itself, only as one of its subclasses.

    Attributes:
        record: The refused call (or the unmet budget) with its stack and context; None only where
            somebody made the exception anew from its text, as DataLoader does for its workers.
        earlier: The allowed calls of the same micro-step that had spent the budget before.
        mistake: The name by which ``lensnet-guard explain`` tells more; None where a condition of
            the user's own was breached that names none.
    """

    mistake: str | None = None
    headline = "{module} broke its call contract"
    remedy = ""

    def __init__(
        self,
        message: str,
        record: "CallRecord | None" = None,
        earlier: Sequence["CallRecord"] = (),
    ) -> None:
        super().__init__(message)
        self.record = record
        self.earlier = tuple(earlier)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.record, self.earlier), self.__dict__


class UnsanctionedCall(LensNetViolation):
    """A training call outside every sanctioned scope."""

    headline = "{module} was called in training outside its sanctioned scope"
    remedy = "Remove the call, or run it in inference context outside the micro-step. {sanction}."


class BudgetExceeded(LensNetViolation):
    """A training call in a sanctioned scope whose budget is spent."""

    headline = "{module} was called in training more often than its budget allows"
    remedy = (
        "Score everything in one batched call, or raise the budget in CallPolicy "
        "if the contract really allows more."
    )


class BudgetUnmet(LensNetViolation):
    """A micro-step, or another window, that ended with fewer calls than its budget."""

    headline = "A {window} ended before the call budget of {module} was met"
    remedy = (
        "Find why the call was skipped (an early return, a cached result, an empty batch), "
        "or lower the budget in CallPolicy."
    )


class ConditionUnmet(LensNetViolation):
    """A call in a state in which it is not legal, or what a call returned and ought not to."""

    headline = "{module} was called in a state that its contract does not allow"
    remedy = (
        "Bring about that state where the call is made; or, if calls are right without it, leave "
        "the condition out of CallPolicy."
    )


class NoContext(LensNetViolation):
    """A call, a scope or a micro-step where neither training nor inference is declared."""

    headline = "{module} was used in a thread that has declared neither training nor inference"
    remedy = (
        'Declare it with `guard.context("training")` or `guard.context("inference")`. Threads '
        "and executors start without one: bind their function with `guard.carry(fn)`."
    )


class ReentrantCall(LensNetViolation):
    """A call made from inside a running call of the same module."""

    headline = "{module} was called from inside its own running call"
    remedy = "The module's forward, or a hook on it, calls the guarded module: remove that call."


class BypassedGuard(LensNetViolation):
    """A run of the module that did not come through the proxy."""

    headline = "{module} was run behind its guard's back"
    remedy = (
        "Call guard.module, not the module behind it or a part of it. A part that another model "
        "runs too is named in CallPolicy(shared_submodules=...)."
    )


class ContextSwitchRefused(LensNetViolation):
    """A switch to inference inside an open training micro-step, or another micro-step in one."""

    headline = "{module} cannot change context inside an open micro-step"
    remedy = (
        "Close the micro-step first. Helpers that run inside it work in its context and on its "
        "budget."
    )


class RankDivergence(LensNetViolation):
    """Ranks of a distributed run that have not made the same calls."""

    headline = "{module} was not called alike by all ranks, which hangs what they do together:"
    remedy = (
        "Let all ranks decide alike: from what they share (reduce it first), never from one "
        "rank's own data; and give each as many batches."
    )


VIOLATIONS: Mapping[str, type[LensNetViolation]] = MappingProxyType(
    {
        violation.__name__: violation
        for violation in (
            UnsanctionedCall,
            BudgetExceeded,
            BudgetUnmet,
            ConditionUnmet,
            NoContext,
            ReentrantCall,
            BypassedGuard,
            ContextSwitchRefused,
            RankDivergence,
        )
    }
)  # by the reason that a record gives


# The entry of docs/mistakes.md that explains a violation, by its reason, and by the window that a
# budget counts in where that matters. What explains a breached condition the condition says itself.
MISTAKES: Mapping[tuple[str, str | None], str] = MappingProxyType(
    {
        ("UnsanctionedCall", None): "called-from-elsewhere",
        ("NoContext", None): "called-from-elsewhere",
        ("ContextSwitchRefused", None): "called-from-elsewhere",
        ("BudgetExceeded", None): "called-twice",
        ("BudgetExceeded", STEP): "ema-every-micro-step",
        ("ReentrantCall", None): "called-twice",
        ("BudgetUnmet", None): "called-conditionally",
        ("BudgetUnmet", STEP): "ema-never",
        ("BypassedGuard", None): "bypassed-wrapper",
        ("RankDivergence", None): "unequal-ranks",
    }
)


def mistake_for(reason: str | None, window: str | None = None) -> str | None:
    """Return the entry of docs/mistakes.md that explains a violation; None where none does.

    Args:
        reason: The name of the violation's class.
        window: The window that its budget counts in.
    """
    reason = str(reason)
    return MISTAKES.get((reason, window), MISTAKES.get((reason, None)))


class RankStopped(RuntimeError):
    """Another rank of a distributed run has raised, and says why."""


# A traceback names them as who catches them does, and a pickle by what never moves.
for _public in (LensNetViolation, *VIOLATIONS.values(), RankStopped):
    _public.__module__ = "lensnet_guard"


def build_violation(
    record: "CallRecord",
    policy: "CallPolicy",
    *,
    made: Mapping[str, int] = MappingProxyType({}),
    earlier: Sequence["CallRecord"] = (),
    detail: str = "",
    due_from: Sequence[str] = (),
    mistake: str | None = None,
) -> LensNetViolation:
    """Return the exception for a refused record; tests pin its message line by line.

    Args:
        record: What is refused; its ``reason`` names the class.
        policy: The contract that it breaks.
        made: Calls so far of each scope whose window is open.
        earlier: The calls that spent the budget.
        detail: What else the headline should say.
        due_from: Who should have made the calls that are missing, and whether it ran.
        mistake: What explains it, where its reason and its scope do not tell.
    """
    violation = VIOLATIONS[str(record.reason)]
    headline = violation.headline if record.kind != "result" else _WRONG_RESULT
    window = "window" if record.kind == "window" else "micro-step"
    called = record.module if record.method is None else f"{record.module}.{record.method}"
    lines = [f"{headline.format(module=called, window=window)}{detail}."]
    lines.extend(_row("due from" if n == 0 else "", who) for n, who in enumerate(due_from))
    stack = record.stack()
    first = stack.index(record.caller) if stack else 0
    if unmet := violation is BudgetUnmet:  # where it was noticed says little, least in a framework
        first = _first_own(stack, first) or first
    shown = stack[first : first + (1 if unmet else 3)]
    if not unmet and (own := _first_own(stack, first) or 0) > first + 2:
        shown[2] = stack[own]  # behind an engine that wraps the module, say
    for number, frame in enumerate(shown):
        title = "ended at" if unmet else "called from"
        lines.append(_row(title if number == 0 else "", frame))
    where = str(record.context or "unset")
    if record.step is not None:
        where += f", step {record.step}, micro-step {record.micro_step}"
    lines.append(_row("context", f"{where} (thread {record.thread})"))
    lines.append(_row("scope", record.scope or "none open"))
    for name, scope in policy.in_full.items():
        lines.append(_row("budget", f"{name}: {_spent(made.get(name), scope)}"))
    lines.extend(_row("spent by", f"call {c.seq} at {c.caller}{_end_of(c)}") for c in earlier)
    remedy = violation.remedy.format(sanction=_sanction(policy))
    if not policy.in_full and violation is UnsanctionedCall:
        remedy = _INFERENCE_ONLY
    lines.append(_row("what to do", remedy))
    spent = policy.in_full.get(record.scope or "")
    mistake = mistake or mistake_for(record.reason, spent.per if spent is not None else None)
    if mistake is not None:
        lines.append(explained_by(mistake))
    error = violation("\n".join(lines), record, earlier)
    error.mistake = mistake
    return error


def _first_own(stack: "Sequence[Frame]", first: int) -> int | None:
    """Return the number of the innermost frame that is no library's; None without one."""
    own = (n for n, frame in enumerate(stack) if n >= first and not _is_installed(frame.file))
    return next(own, None)


def _is_installed(file: str) -> bool:
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


_WRONG_RESULT = "{module} returned what its contract does not allow"
_INFERENCE_ONLY = (
    "Remove the call, or run it in inference context outside the micro-step: the contract, "
    "CallPolicy(scopes={}), allows no call in training."
)


def _spent(made: int | None, scope: "Scope") -> str:
    """Return what became of a budget so far."""
    if scope.per == MICRO_STEP:
        return f"{made or 0} of {scope.budget} spent"
    if made is None:
        return f'{scope.budget} in each window "{scope.per}", and none is open'
    return f'{made} of {scope.budget} spent in this window "{scope.per}"'


def _sanction(policy: "CallPolicy") -> str:
    """Return what makes a training call legal."""
    opened = [name for name, scope in policy.in_full.items() if scope.is_opened]
    if opened:
        blocks = " or ".join(f'`with guard.sanctioned("{name}"):`' for name in opened)
        return f"Only the contract's one caller opens {blocks}"
    inside: dict[str, list[str]] = {}
    for scope in policy.in_full.values():
        block = "micro_step(step)" if scope.per == MICRO_STEP else f'window("{scope.per}")'
        state = f"with {name_of(scope.when)}" if scope.when is not None else ""
        who = f"from {scope.caller}" if scope.caller else state
        inside.setdefault(f"`with guard.{block}:`", []).append(who)
    calls = ", ".join(f"{' or '.join(who)} inside {block}" for block, who in inside.items())
    return f"Only calls {calls} are legal"


def _end_of(call: "CallRecord") -> str:
    """Return how a call ended, when it did not return: then its budget is spent all the same."""
    return f", which {call.outcome}" if call.outcome and "raised" in call.outcome else ""


def _row(title: str, text: object) -> str:
    return f"  {title:<12} {text}"
