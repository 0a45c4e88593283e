"""What is known of a module that was observed: who called it, how often in which window, how."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lensnet_guard import _schema
from lensnet_guard._text import count, short_path
from lensnet_guard.postmortem.events import text, texts, whole
from lensnet_guard.postmortem.own_caller import entered_method, own_caller

MICRO_STEP, STEP = "micro_step", "step"
OPTIMIZER_STEPS = ""  # as torch numbers them, where nobody opens windows; no window has this name
KEPT = 3  # examples of each thing

ADAPTERS = ("adapters_on", "adapters_off")


@dataclass(frozen=True)
class Who:
    """Which calls belong together.

    Attributes:
        scope: The scope that was open in code; None without one, and then they belong to a caller.
        caller: The function that makes them, as a policy names it; None at module level.
        adapters: The state of the module's adapters, where it is what sets calls apart.
    """

    scope: str | None = None
    caller: str | None = None
    adapters: str | None = None


@dataclass(frozen=True)
class Where:
    """Where a call was made; put into words when somebody asks, for most are never told.

    Attributes:
        event: The call's line.
        frame: The number of its caller's frame in the stack.
    """

    event: Mapping[str, Any]
    frame: int

    @property
    def line(self) -> str:
        """The line of code."""
        stack = self.event.get(_schema.STACK)
        known = isinstance(stack, list) and 0 <= self.frame < len(stack)
        found = stack[self.frame] if known else None  # type: ignore[index]
        if not isinstance(found, dict):
            return "an unknown place"
        file, line, function = (
            text(str(found.get(f))) or "?" for f in (_schema.FILE, _schema.LINE, _schema.FUNCTION)
        )
        return f"{short_path(file)}:{line} in {function}"

    @property
    def script(self) -> str:
        """The file that the line is in, as the name of a module and of what is in it."""
        stem = self.line.rpartition(":")[0].rpartition("/")[2].partition(".")[0]
        return f"{stem}:{stem}"

    def __str__(self) -> str:
        step, micro_step = (whole(self.event.get(f)) for f in (_schema.STEP, _schema.MICRO_STEP))
        at = f"at {self.line}"
        return at if step is None else f"step {step}, micro-step {micro_step} {at}"


class Held:
    """How often each condition held of some calls, and of which of them it did not.

    Attributes:
        of: How many calls there were.
        times: Of how many each condition held.
        lacking: Of which it did not, the first of them.
    """

    def __init__(self) -> None:
        self.of = 0
        self.times: Counter[str] = Counter()
        self.lacking: dict[str, list[Where]] = {}
        self._first: list[Where] = []

    def take(self, names: Iterable[str], where: Where) -> None:
        """Take the conditions that held of one more call."""
        held = dict.fromkeys(names)
        for name in held:
            self.lacking.setdefault(name, list(self._first))
        for name, lacking in self.lacking.items():
            if name not in held and len(lacking) < KEPT:
                lacking.append(where)
        self.times.update(list(held))
        self.of += 1
        if self.of <= KEPT:
            self._first.append(where)


@dataclass
class Windows:
    """The windows of one kind that have ended, and were not broken off.

    Attributes:
        total: How many there were.
        labels: The first of them.
    """

    total: int = 0
    labels: list[str] = field(default_factory=list)

    def add(self, label: str) -> None:
        """Count one more."""
        self.total += 1
        if len(self.labels) < KEPT:
            self.labels.append(label)


@dataclass
class Spread:
    """In how many windows of one kind somebody made how many calls.

    Attributes:
        made: Number of calls -> number of windows; of those without any call some may be missing.
        examples: Number of calls -> the first such windows, in words.
        broken_off: The most calls of a window that was broken off, or never ended.
        alone: How many windows were a scope that stood alone, and are no window of anybody else.
    """

    made: Counter[int] = field(default_factory=Counter)
    examples: dict[int, list[str]] = field(default_factory=dict)
    broken_off: int = 0
    alone: int = 0

    def add(self, calls: int, label: str, last: Where | None) -> None:
        """Count one more window."""
        self.made[calls] += 1
        examples = self.examples.setdefault(calls, [])
        if len(examples) < KEPT:
            told = f"{count(calls, 'call')}, the last at {last.line}" if last else "none"
            examples.append(f"{label} ({told})")

    def over(self, windows: Windows) -> Counter[int]:
        """Return numbers of calls -> numbers of windows, those without any call included."""
        missing = windows.total + self.alone - sum(self.made.values())
        return self.made + Counter({0: max(0, missing)})


@dataclass
class Numbered:
    """The calls of one run between the optimizer steps that torch has numbered.

    Attributes:
        steps: How many steps were taken.
        before: The calls before the first.
        after: The calls after the last; None where the log stops before its run does.
        between: The windows in between.
    """

    steps: int = 0
    before: int = 0
    after: int | None = 0
    between: Spread = field(default_factory=Spread)


@dataclass
class Tally:
    """The calls of one `Who`.

    Attributes:
        first: Where the first was made.
        calls: How many there are.
        scopes: The scopes of the observed policy that they belonged to.
        in_backward: How many were made inside a backward pass.
        in_methods: How many were made inside each of the module's own methods.
        held: What held as they began.
        held_of_results: What held of what they returned.
        places: The kinds of windows that were open -> how many calls, and the first of them.
        windows: Kind of window -> in how many there were how many.
        numbered: The same between numbered optimizer steps, of each run.
    """

    first: Where
    calls: int = 0
    scopes: set[str] = field(default_factory=set)
    in_backward: int = 0
    in_methods: Counter[str] = field(default_factory=Counter)
    held: Held = field(default_factory=Held)
    held_of_results: Held = field(default_factory=Held)
    places: dict[frozenset[str], list[Where]] = field(default_factory=dict)
    counts: Counter[frozenset[str]] = field(default_factory=Counter)
    windows: dict[str, Spread] = field(default_factory=dict)
    numbered: list[Numbered] = field(default_factory=list)

    def take(self, event: Mapping[str, Any], where: Where, kinds: frozenset[str]) -> None:
        """Take one more call."""
        self.calls += 1
        self.held.take(texts(event.get(_schema.HELD)), where)
        self.in_backward += event.get(_schema.IN_BACKWARD) is True
        if (method := entered_method(texts(event.get(_schema.CALLERS)))) is not None:
            self.in_methods[method] += 1
        if (scope := text(event.get(_schema.SCOPE))) is not None:
            self.scopes.add(scope)
        self.counts[kinds] += 1
        places = self.places.setdefault(kinds, [])
        if len(places) < KEPT:
            places.append(where)

    def inside(self, kind: str) -> int:
        """Return how many calls were made in windows of a kind."""
        return sum(n for kinds, n in self.counts.items() if kind in kinds)

    def outside(self, kind: str) -> list[Where]:
        """Return the first calls that were not."""
        found = [places for kinds, places in self.places.items() if kind not in kinds]
        return [where for places in found for where in places]


@dataclass
class Observed:
    """What is known of one module, from all runs that observed it.

    Attributes:
        module: The guard's name for it.
        policy: The policy that it was observed with, as the log has it.
        training: The calls in training. Those of a caller are there twice: together, and once more
            by the state of the module's adapters, where it has any.
        unset: Likewise those where no context was declared.
        inference_calls: How many calls there were in inference.
        windows: Kind of window -> those that have ended.
        refused: Reason -> what no policy would have allowed, the first in words, and how many.
        methods: How often each method or part was called.
        ranks: The ranks that have observed it.
        steps: How many optimizer steps torch has numbered, in each run that has.
    """

    module: str
    policy: Mapping[str, Any] = field(default_factory=dict)
    training: dict[Who, Tally] = field(default_factory=dict)
    unset: dict[Who, Tally] = field(default_factory=dict)
    inference_calls: int = 0
    windows: dict[str, Windows] = field(default_factory=dict)
    refused: dict[str, tuple[str, int]] = field(default_factory=dict)
    methods: Counter[str] = field(default_factory=Counter)
    ranks: set[str] = field(default_factory=set)
    steps: list[int] = field(default_factory=list)

    def scope(self, name: object) -> Mapping[str, Any]:
        """Return a scope of the observed policy, written out; one without entries if unknown."""
        scopes = self.policy.get("scopes")
        found = scopes.get(name) if isinstance(scopes, dict) and isinstance(name, str) else None
        return found if isinstance(found, dict) else {}

    def who(self, event: Mapping[str, Any]) -> tuple[Who, int]:
        """Return who makes a call, but for adapters; and the number of the caller's frame."""
        first = max(0, whole(event.get(_schema.CALLER)) or 0)
        callers = texts(event.get(_schema.CALLERS))
        name = text(event.get(_schema.SCOPE))
        known = self.scope(name).get("caller") or (name if name and ":" in name else None)
        if known in callers:
            return Who(caller=known), callers.index(known)
        frame, caller = own_caller(callers, first)
        if name is not None and not {"caller", "when"} & self.scope(name).keys():
            return Who(scope=name), frame
        return Who(caller=caller), frame
