"""Whose call it is, and what must hold of it: the policy's scopes and conditions, applied."""

from collections.abc import Iterable, Mapping
from types import FrameType, MappingProxyType
from typing import NamedTuple

from lensnet_guard.calls.call import Call
from lensnet_guard.calls.callers import find_caller
from lensnet_guard.calls.context import Position
from lensnet_guard.calls.policy import CallPolicy
from lensnet_guard.calls.record import Context
from lensnet_guard.calls.scope import MICRO_STEP, Condition, mistake_of, name_of

CALLED_TWICE = "called-twice"  # as docs/mistakes.md calls it


class Breach(NamedTuple):
    """A condition that does not hold.

    Attributes:
        found: Which it is, and what it found.
        mistake: The entry of docs/mistakes.md that explains it; None where it names none.
    """

    found: str
    mistake: str | None


class Claim(NamedTuple):
    """Whose call one is.

    Attributes:
        scope: The scope that it belongs to, if any.
        why: Why it belongs to none, where that is not what it has missed.
        missed: The scopes that it might belong to in another state, by name, with what does not
            hold.
    """

    scope: str | None
    why: str = ""
    missed: Mapping[str, Breach] = MappingProxyType({})


NOT_SAID = Breach("", None)


class Claims:
    """What a policy says of single calls, put together once.

    Args:
        policy: The contract.

    Attributes:
        look_at_calls: Whether scopes or conditions ask for more of a call than who makes it.
        look_at_results: Whether conditions ask for what calls return.
        most: How many calls each scope may make in a window; None for any number.
        windows: Of scopes that do not count per micro-step the window that they count in.
    """

    def __init__(self, policy: CallPolicy) -> None:
        scopes = policy.in_full
        self._policy = policy
        self.most = {name: scope.most for name, scope in scopes.items()}
        self.windows = {n: scope.per for n, scope in scopes.items() if scope.per != MICRO_STEP}
        self._by_caller: dict[str, list[str]] = {}
        self._by_state: list[str] = []
        for name, scope in scopes.items():
            if scope.caller is not None:
                self._by_caller.setdefault(scope.caller, []).append(name)
            elif scope.when is not None:
                self._by_state.append(name)
        self._plain = {s.caller: n for n, s in scopes.items() if s.caller and s.when is None}
        self._whens = {name: scope.when for name, scope in scopes.items()}
        conditions = [s.requires for s in scopes.values()]
        whens = [when for when in self._whens.values() if when is not None]
        self.look_at_calls = bool(whens or policy.requires or any(conditions))
        self.look_at_results = bool(policy.ensures or any(s.ensures for s in scopes.values()))

    def scope_of(self, here: Position, frame: FrameType | None, call: Call | None) -> Claim:
        """Return the scope that a call belongs to, if any; and why it belongs to no other.

        Args:
            here: The blocks that are open.
            frame: The innermost frame of who calls.
            call: The call; needed where `look_at_calls`.
        """
        if here.scope is not None or here.context != "training":
            return Claim(here.scope)
        missed: dict[str, Breach] = {}
        if self._by_caller:
            caller, frame = find_caller(frame, self._by_caller)
            if caller in self._plain:
                return Claim(self._plain[caller])
            while caller is not None:
                if found := self._holding(self._by_caller[caller], call, missed):
                    return _only(found, missed)
                caller, frame = find_caller(frame, self._by_caller)
        if found := self._holding(self._by_state, call, missed):
            return _only(found, missed)
        return Claim(None, missed=missed)

    def explain(self, claim: Claim, breach: Breach | None, here: Position) -> Breach:
        """Return what to say of a call that is refused, and which mistake it is.

        A scope that the call has missed by its state, and of which a call is still to come, is what
        was meant; so that state is what is wrong, whatever else is.

        Args:
            claim: Whose call it is.
            breach: What does not hold of it as a call of that scope, if that is why.
            here: The blocks that are open.
        """
        meant = (one for name, one in claim.missed.items() if self._is_due(name, here))
        missed = next(meant, NOT_SAID)
        why = claim.why or _in_words(claim.missed)
        if breach is None:
            return Breach(why, missed.mistake)
        if missed is NOT_SAID:
            return breach
        found = f"{why}; so it is one of {claim.scope!r}, and {breach.found}"
        return Breach(found, missed.mistake or breach.mistake)

    def _is_due(self, scope: str, here: Position) -> bool:
        """Whether a call of a scope is still to come, or may well be where none must."""
        full, window = self._policy.in_full[scope], here.window(self.windows.get(scope, MICRO_STEP))
        if window is None:
            return False
        expected = full.least or full.most
        return expected is None or len(window.spent(scope)) < expected

    def outside(self, scope: str, here: Position) -> Breach:
        """Return what to say of a call whose scope is known, and whose window is not open."""
        full = self._policy.in_full[scope]
        if full.per != MICRO_STEP:
            its = f'its scope {scope!r} counts per "{full.per}"'
            if here.micro_step is not None and full.per in here.micro_step.ended:
                return Breach(f"{its}, and that of this micro-step has ended", CALLED_TWICE)
            return Breach(f"{its}, and no such window is open", None)
        who = "its sanctioned caller runs" if full.caller is not None else f"its scope {scope!r} is"
        return Breach(f"{who} outside any micro-step, where no budget counts", None)

    def requires(self, context: Context | None, scope: str | None) -> Iterable[Condition]:
        """Return what must hold of a call as it begins."""
        own = self._policy.in_full[scope].requires if scope is not None else ()
        return _of(context, self._policy.requires, own)

    def ensures(self, context: Context | None, scope: str | None) -> Iterable[Condition]:
        """Return what must hold of that which a call returns."""
        own = self._policy.in_full[scope].ensures if scope is not None else ()
        return _of(context, self._policy.ensures, own)

    def _holding(
        self, names: Iterable[str], call: Call | None, missed: dict[str, Breach]
    ) -> list[str]:
        """Return the scopes whose state holds, of those whose caller is right.

        What does not hold of the others is added to ``missed``.
        """
        holding = []
        for name in names:
            when = self._whens[name]
            breach = first_breach((when,), call) if when is not None and call is not None else None
            if breach is None:
                holding.append(name)
            else:
                missed[name] = breach
        return holding


def first_breach(conditions: Iterable[Condition], call: Call) -> Breach | None:
    """Return the first condition that does not hold of a call, and why; None when all do."""
    for condition in conditions:
        if (found := finding(condition, call)) is not None:
            return Breach(f"{name_of(condition)}: {found}", mistake_of(condition))
    return None


def finding(condition: Condition, call: Call) -> str | None:
    """Ask a condition; one that cannot answer does not hold, and says so."""
    try:
        found: object = condition(call)
    except Exception as error:  # it is the user's, and observing never raises
        return f"the condition raised {type(error).__name__}: {error}"
    if found is None or isinstance(found, str):
        return found
    return f"the condition returned {found!r}, and must return None or a text"


def _of(
    context: Context | None, common: tuple[Condition, ...], own: tuple[Condition, ...]
) -> Iterable[Condition]:
    if context == "training":
        return (*common, *own) if own else common
    return [condition for condition in common if getattr(condition, "in_inference", False)]


def _only(found: list[str], missed: Mapping[str, Breach]) -> Claim:
    """Return the one scope that applies; none where several do, which would be anybody's guess."""
    if len(found) == 1:
        return Claim(found[0], missed=missed)
    return Claim(None, f"the scopes {' and '.join(map(repr, found))} both apply to it")


def _in_words(missed: Mapping[str, Breach]) -> str:
    return "; ".join(f"not in the scope {name!r}, for {one.found}" for name, one in missed.items())
