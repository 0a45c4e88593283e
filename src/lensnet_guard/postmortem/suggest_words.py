"""What a suggested policy rests on, what would have broken a stricter one, what is to be done."""

from collections.abc import Collection, Iterable, Iterator, Mapping

from lensnet_guard._text import budget_text, count
from lensnet_guard.postmortem.budgets import Budget, named_windows
from lensnet_guard.postmortem.tallies import (
    KEPT,
    MICRO_STEP,
    OPTIMIZER_STEPS,
    Observed,
    Tally,
    Where,
    Who,
)


def seen(observed: Observed) -> str:
    """Return which calls of a module were seen."""
    tallies = observed.training or observed.unset
    calls = sum(tally.calls for who, tally in tallies.items() if who.adapters is None)
    where = "in training" if observed.training or not calls else "in no context"
    free = " (free)" if observed.inference_calls else ""
    ranks = f", on ranks {', '.join(sorted(observed.ranks))}" if len(observed.ranks) > 1 else ""
    return f"{count(calls, 'call')} {where}, {observed.inference_calls} in inference{free}{ranks}"


def rests_on(tally: Tally, budget: Budget | None) -> str:
    """Return what a scope rests on."""
    text = count(tally.calls, "call")
    if budget is not None:
        windows = _in(budget.kind, sum(budget.made.values()))
        text += f", {budget_text(budget.calls)} in each of {windows}"
    return f"{text}; the first at {tally.first.line}"


def _in(kind: str, number: int) -> str:
    """Return so many windows of a kind."""
    if kind == MICRO_STEP:
        return count(number, "micro-step")
    if kind == OPTIMIZER_STEPS:
        return count(number, "optimizer step")
    return f'{count(number, "window")} "{kind}"'


def _one(kind: str) -> str:
    """Return a window of a kind."""
    return _in(kind, 1).removeprefix("1 ")


# What would have broken a stricter one ------------------------------------------------------------


def stricter(
    tally: Tally, budget: Budget | None, name: str, known: Collection[str]
) -> Iterator[str]:
    """Yield what would have broken a stricter scope.

    Args:
        tally: The calls of the scope.
        budget: Its budget.
        name: Its name.
        known: Conditions by which its calls are set apart from others.
    """
    if budget is not None and budget.varies:
        yield _exact(budget, name)
    for held, what in ((tally.held, "calls"), (tally.held_of_results, "results")):
        for condition, times in held.times.items():
            lacking = held.of - times
            # A module that is trained is no frozen one, however many micro-steps a step has.
            few = KEPT if condition == "frozen" else held.of
            if condition not in known and 0 < lacking <= min(few, held.of // 2):
                told = _first(list(map(str, held.lacking[condition])), lacking)
                yield (
                    f"`{condition}` did not hold of {lacking} of {held.of} {what} of {name}: {told}"
                )


def _exact(budget: Budget, name: str) -> str:
    """Return which windows had another number of calls than most."""
    usual = max(filter(None, budget.made), key=lambda n: (budget.made[n], n), default=budget.most)
    others = sum(budget.made.values()) - budget.made[usual]
    told = [text for n in sorted(budget.made) if n != usual for text in budget.examples.get(n, ())]
    if budget.most not in budget.made:
        told.append(f"one that was broken off ({count(budget.most, 'call')})")
        others += 1
    if others > budget.made[usual]:
        each = [f"{n} in {_in(budget.kind, budget.made[n])}" for n in sorted(budget.made)]
        return f"calls of {name} vary: {_first(each, len(each))}"
    text = f"exactly {usual} per {_one(budget.kind)} of {name} would have been broken"
    return f"{text} {count(others, 'time')}: {_first(told, others)}"


def _first(told: list[str], number: int) -> str:
    shown = told[:KEPT]
    return "; ".join([*shown, "…"] if number > len(shown) else shown)


# What is to be done -------------------------------------------------------------------------------


def never_legal(observed: Observed) -> Iterator[str]:
    """Yield what no policy allows."""
    for reason, (first, times) in observed.refused.items():
        yield f"no policy allows a {reason}, seen {count(times, 'time')}: {first}"
    calls = sum(tally.calls for who, tally in observed.unset.items() if who.adapters is None)
    if calls:
        first_call = next(iter(observed.unset.values())).first
        yield (
            f"{count(calls, 'call')} in neither training nor inference, the first {first_call}: "
            'open `with guard.context("training"):` around the training, and '
            '`with guard.context("inference"):` around the rest'
        )


def strays(tallies: Mapping[str, Tally]) -> Iterator[str]:
    """Yield who calls outside of all windows, by the name that a scope of theirs would have."""
    for name, tally in tallies.items():
        yield (
            f"{count(tally.calls, 'call')} of {name} outside of any window, the first {tally.first}"
            ": make them inside one, or in inference"
        )


def changes(who: Who, tally: Tally, budget: Budget | None, name: str) -> Iterator[str]:
    """Yield what must change before somebody's calls can be counted.

    Args:
        who: Who calls.
        tally: The calls.
        budget: Their budget.
        name: The name of their scope.
    """
    if who.scope is None and who.caller is None:
        yield (
            f"{tally.first.line} is in no function that a policy could name: open "
            f'`with guard.sanctioned("{name}"):` around the call'
        )
    if budget is None:
        yield (
            f"no window is known for the {count(tally.calls, 'call')} of {name}: none was open, "
            "and torch took no optimizer step. Open `with guard.micro_step(step):` around each "
            "micro-batch, and observe the run once more"
        )
    elif budget.kind == OPTIMIZER_STEPS:
        yield (
            "no window was open, and torch's own steps were counted: open "
            '`with guard.window("step"):` around each optimizer step'
        )
    if budget is not None and (left := tally.calls - budget.inside):
        first: Iterable[Where] = tally.outside(budget.kind)
        at = "".join(f", the first {where}" for where in list(first)[:1])
        yield (
            f"{count(left, 'call')} of {name} outside of any {_one(budget.kind)}{at}: make them "
            "inside one, or in inference"
        )


def unused_windows(observed: Observed, budgets: Iterable[Budget]) -> Iterator[str]:
    """Yield the windows that the program opens, and in which no scope counts."""
    used = {budget.window for budget in budgets}
    for name in named_windows(observed):
        if name not in used:
            yield f'no scope counts per "{name}": take `with guard.window("{name}"):` out'


def remarks(tallies: Mapping[str, Tally]) -> Iterator[str]:
    """Yield what else is worth a word of the calls, by the name of their scope."""
    for name, tally in tallies.items():
        if tally.in_backward:
            yield f"{count(tally.in_backward, 'call')} of {name} inside a backward pass"
        for method, calls in tally.in_methods.items():
            yield (
                f"{count(calls, 'call')} of {name} inside the module's own method `{method}`, "
                f'which decides how many: `methods=("{method}",)` counts each of its runs as one'
            )
