"""In which window the calls of somebody vary least, and by how much."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lensnet_guard.postmortem.findings import Due
from lensnet_guard.postmortem.tallies import (
    MICRO_STEP,
    OPTIMIZER_STEPS,
    STEP,
    Observed,
    Spread,
    Tally,
    Who,
    Windows,
)


@dataclass(frozen=True)
class Budget:
    """How often somebody calls in one kind of window.

    Attributes:
        kind: The kind of window.
        made: Number of calls -> number of windows.
        most: The most calls of a window, one that was broken off included.
        inside: How many of the calls were made in such windows.
        examples: Number of calls -> such windows, in words.
    """

    kind: str
    made: Counter[int]
    most: int
    inside: int
    examples: Mapping[int, Sequence[str]]

    @property
    def calls(self) -> Due:
        """The strictest budget that was kept."""
        least = min(self.made)
        return least if least == self.most else (least, self.most)

    @property
    def varies(self) -> int:
        """By how many calls windows differ."""
        return self.most - min(self.made)

    @property
    def window(self) -> str:
        """The window, as a scope counts per it."""
        return STEP if self.kind == OPTIMIZER_STEPS else self.kind


def budgets_of(observed: Observed, tallies: Mapping[Who, Tally]) -> dict[Who, Budget | None]:
    """Return a budget for each, in the window in which its calls vary least.

    Windows that the program opens by name are refused where nothing counts per them: so each of
    them is the window of somebody whose calls are all made in it, if there is anybody.

    Args:
        observed: What is known of the module.
        tallies: The calls of each.

    Returns:
        The budgets; None where no window is known.
    """
    found = {who: _candidates(observed, tally) for who, tally in tallies.items()}
    chosen = {who: ranked[0] if ranked else None for who, ranked in found.items()}
    for name in named_windows(observed):
        taken = [budget.kind for budget in chosen.values() if budget is not None]
        if name in taken:
            continue
        free = {
            who: budget
            for who, ranked in found.items()
            for budget in ranked
            if budget.kind == name
            and budget.inside == tallies[who].calls
            and ranked[0].kind in (MICRO_STEP, STEP)
        }
        if free:
            who = min(free, key=lambda one: free[one].varies)
            chosen[who] = free[who]
    return chosen


def named_windows(observed: Observed) -> list[str]:
    """Return the names of the windows that the program has opened, but for steps."""
    return sorted(observed.windows.keys() - {MICRO_STEP, STEP})


def _candidates(observed: Observed, tally: Tally) -> list[Budget]:
    """Return a budget in each window in which there were calls, the one to be chosen first."""
    order = [MICRO_STEP, STEP, *named_windows(observed)]
    found = []
    for kind in order:
        spread = tally.windows.get(kind, Spread())
        made = spread.over(observed.windows.get(kind, Windows()))
        most = max([*made, spread.broken_off])
        if made and most and (inside := tally.inside(kind)):
            found.append(Budget(kind, made, most, inside, spread.examples))
    found.sort(key=lambda one: (-one.inside, one.varies, order.index(one.kind)))
    if not found and (numbered := _numbered(observed, tally)) is not None:
        found = [numbered]
    return found


def _numbered(observed: Observed, tally: Tally) -> Budget | None:
    """Return a budget between optimizer steps that torch has numbered; None where it has not.

    A step of the training ends with its optimizer's, or soon after it: calls that follow it, as an
    average of the weights does, belong to the step that has been. Whichever fits is taken.
    """
    runs = [run for run in tally.numbered if run.steps]
    if not runs:
        return None
    between: Counter[int] = Counter()
    examples: dict[int, list[str]] = {}
    broken_off = 0
    for run in runs:
        between += run.between.over(Windows(run.steps - 1))
        broken_off = max(broken_off, run.between.broken_off)
        for calls, told in run.between.examples.items():
            examples.setdefault(calls, []).extend(told)
    elsewhere = sum(observed.steps) - sum(run.steps for run in runs)  # in runs without such a call
    between += Counter({0: elsewhere})
    before = between + Counter([run.before for run in runs])
    after = between + Counter([run.after for run in runs if run.after is not None])
    left_out = {
        "before": sum(run.after or 0 for run in runs),
        "after": sum(run.before for run in runs),
    }
    found = [
        Budget(
            OPTIMIZER_STEPS,
            made,
            max([*made, broken_off]),
            tally.calls - left_out[which],
            examples,
        )
        for which, made in (("before", before), ("after", after))
        if made and any([*made, broken_off])
    ]
    return min(found, key=lambda one: (-one.inside, one.varies), default=None)
