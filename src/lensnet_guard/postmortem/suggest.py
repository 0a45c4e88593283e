"""From what is known of a module to the strictest policy that its calls have kept.

Nothing here reads logs or writes code; what is said in words is in `suggest_words`.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lensnet_guard._text import count
from lensnet_guard.postmortem import suggest_words as words
from lensnet_guard.postmortem.budgets import Budget, budgets_of
from lensnet_guard.postmortem.events import texts
from lensnet_guard.postmortem.findings import Due
from lensnet_guard.postmortem.tallies import ADAPTERS, MICRO_STEP, Held, Observed, Tally, Who

_CONDITION = re.compile(r"[a-z_]+|autocast\(torch\.\w+\)")  # of a log, this alone becomes code
_REMEMBERS = "frozen"  # it compares with the call that it was asked of before: of all, or of none


@dataclass(frozen=True)
class Rested:
    """A name in a policy, and what it rests on.

    Attributes:
        name: A condition, a method or a submodule.
        on: What it rests on, in words.
    """

    name: str
    on: str


@dataclass(frozen=True)
class SuggestedScope:
    """A scope of the suggested policy.

    Attributes:
        name: Its name.
        calls: How many calls are due in each window; None where no window is known.
        per: The window.
        caller: The function that makes them; None where the scope is opened in code.
        when: The condition by which its calls are known; None without one.
        requires: What else must hold of its calls.
        ensures: What else must hold of what they return.
        on: What it rests on, in words.
    """

    name: str
    calls: Due | None
    per: str
    caller: str | None
    when: str | None
    requires: tuple[str, ...]
    ensures: tuple[str, ...]
    on: str


@dataclass(frozen=True)
class Suggestion:
    """What there is to say of the contract of one module.

    Attributes:
        module: The guard's name for the module.
        seen: Which calls were seen, in words.
        scopes: The scopes of the policy; None where there is none to suggest.
        requires: What held of all calls in training.
        ensures: What held of all that they returned.
        methods: The methods whose runs are calls.
        parts: The submodules whose runs are calls.
        shared_submodules: The submodules whose runs are none.
        to_do: What the program must change before this policy, or any, holds.
        stricter: What would have broken a stricter one.
        remarks: What else is worth a word.
    """

    module: str
    seen: str
    scopes: tuple[SuggestedScope, ...] | None
    requires: tuple[Rested, ...] = ()
    ensures: tuple[Rested, ...] = ()
    methods: tuple[Rested, ...] = ()
    parts: tuple[Rested, ...] = ()
    shared_submodules: tuple[Rested, ...] = ()
    to_do: tuple[str, ...] = ()
    stricter: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def suggest(observed: Observed) -> Suggestion:
    """Return the strictest policy that a module's calls have kept.

    Args:
        observed: What is known of the module.
    """
    tallies = observed.training or observed.unset
    mine = {who: tallies[who] for who in _apart(tallies)}
    to_do = list(words.never_legal(observed))
    found = Suggestion(observed.module, words.seen(observed), ())
    if not mine and not observed.inference_calls:
        nothing = f"no call of {observed.module} was seen: is guard.module in its place?"
        return replace(found, scopes=None, to_do=(nothing, *to_do))
    budgets = budgets_of(observed, mine)
    names = _names(dict(sorted(mine.items(), key=lambda one: budgets[one[0]] is None)))
    if any(budgets.values()):  # whoever calls outside of all windows has no scope then
        to_do += words.strays({names[w]: t for w, t in mine.items() if budgets[w] is None})
        mine = {who: tally for who, tally in mine.items() if budgets[who] is not None}
    requires = _of_all([tally.held for tally in mine.values()], "call")
    ensures = _of_all([tally.held_of_results for tally in mine.values()], "result")
    common = {rested.name for rested in (*requires, *ensures)} | {_REMEMBERS}
    scopes: list[SuggestedScope] = []
    stricter: list[str] = []
    for who, tally in mine.items():
        budget, name = budgets[who], names[who]
        scopes.append(_scope(who, tally, budget, name, common))
        to_do += words.changes(who, tally, budget, name)
        stricter += words.stricter(tally, budget, name, () if who.adapters is None else ADAPTERS)
    to_do += words.unused_windows(observed, filter(None, budgets.values()))
    return replace(
        found,
        scopes=tuple(scopes) if all(budgets[who] for who in mine) else None,
        requires=requires,
        ensures=ensures,
        to_do=tuple(dict.fromkeys(to_do)),
        stricter=tuple(stricter),
        remarks=tuple(words.remarks({names[who]: mine[who] for who in mine})),
        **_doors(observed),
    )


def _scope(
    who: Who, tally: Tally, budget: Budget | None, name: str, common: set[str]
) -> SuggestedScope:
    """Return the scope of somebody's calls, without what is asked of all calls anyway."""
    known = common | (set(ADAPTERS) if who.adapters is not None else set())
    return SuggestedScope(
        name=name,
        calls=budget.calls if budget is not None else None,
        per=budget.window if budget is not None else MICRO_STEP,
        caller=who.caller,
        when=who.adapters,
        requires=tuple(c for c in _always(tally.held) if c not in known),
        ensures=tuple(c for c in _always(tally.held_of_results) if c not in known),
        on=words.rests_on(tally, budget),
    )


# Who calls ----------------------------------------------------------------------------------------


def _apart(tallies: Mapping[Who, Tally]) -> list[Who]:
    """Return who is to have a scope: two of a caller whose calls are set apart by adapters."""
    found = []
    for who, tally in tallies.items():
        if who.adapters is not None:
            continue
        states = [Who(caller=who.caller, adapters=state) for state in ADAPTERS]
        split = [one for one in states if who.scope is None and one in tallies]
        told = sum(tallies[one].calls for one in split) == tally.calls
        found += split if told and len(split) == len(states) else [who]
    return found


def _names(tallies: Mapping[Who, Tally]) -> dict[Who, str]:
    """Return a name for the scope of each."""
    # Scopes that the program opens have theirs.
    names = {who: who.scope for who in tallies if who.scope is not None}
    for who, tally in tallies.items():
        if who not in names:
            taken = set(names.values())
            names[who] = next(name for name in _possible_names(who, tally) if name not in taken)
    return names


def _possible_names(who: Who, tally: Tally) -> Iterator[str]:
    """Yield names, the best first: that of the observed policy, and then the function's."""
    known = [scope for scope in tally.scopes if ":" not in scope]
    if len(known) == 1:
        yield known[0]
    module, _, path = (who.caller or tally.first.script).partition(":")
    parts = [part for part in path.split(".") if part != "<locals>"]
    for name in (parts[-1], ".".join(parts), ".".join((module, *parts))):
        yield f"{name}_{who.adapters}" if who.adapters else name
    yield from (f"{parts[-1]}_{number}" for number in itertools.count(2))


# What held ----------------------------------------------------------------------------------------


def _always(held: Held) -> list[str]:
    """Return the conditions that held of all calls."""
    times = held.times.items()
    return [name for name, n in times if n == held.of and _CONDITION.fullmatch(name)]


def _of_all(helds: Iterable[Held], what: str) -> tuple[Rested, ...]:
    """Return the conditions that held of everybody's calls, or of what they returned."""
    asked = [held for held in helds if held.of]
    every = list(map(_always, asked))
    number = count(sum(held.of for held in asked), what)
    common = [name for name in every[0] if all(name in one for one in every)] if every else []
    return tuple(Rested(name, f"held of all {number}") for name in common)


def _doors(observed: Observed) -> dict[str, Any]:
    """Return the methods and submodules that the observed policy names."""

    def counted(names: Sequence[str]) -> tuple[Rested, ...]:
        return tuple(Rested(n, f"{count(observed.methods[n], 'call')} of it") for n in names)

    named = {kind: texts(observed.policy.get(kind)) for kind in ("methods", "parts")}
    shared = texts(observed.policy.get("shared_submodules"))
    return {
        **{kind: counted(names) for kind, names in named.items()},
        "shared_submodules": tuple(Rested(n, "as in the observed policy") for n in shared),
    }
