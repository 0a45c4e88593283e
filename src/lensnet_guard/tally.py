"""Tallies: what a training came to, in a line for each module."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from lensnet_guard._text import count
from lensnet_guard.guard import Guard
from lensnet_guard.logs.sinks import Sink

if TYPE_CHECKING:
    from lensnet_guard.calls.budget import MicroStep
    from lensnet_guard.calls.record import Context


@dataclass(frozen=True)
class Verdict:
    """What a training came to, in this process.

    Attributes:
        module: The guard's name for the module.
        micro_steps: Training micro-steps that ended, those with a violation included.
        calls: Allowed training calls, by scope.
        inference_calls: Calls in inference context.
        violations: Violations of any kind.
    """

    module: str
    micro_steps: int
    calls: Mapping[str, int]
    inference_calls: int
    violations: int

    @property
    def calls_per_micro_step(self) -> float:
        """Allowed training calls per micro-step, on average; 0 without a micro-step."""
        return sum(self.calls.values()) / self.micro_steps if self.micro_steps else 0.0

    def __str__(self) -> str:
        by_scope = ", ".join(f"{scope} {n}" for scope, n in self.calls.items())
        training = count(sum(self.calls.values()), "training call")
        return (
            f"{self.module}: {count(self.micro_steps, 'micro-step')}, "
            f"{training}{f' ({by_scope})' if by_scope else ''}, "
            f"{count(self.inference_calls, 'inference call')}, "
            f"{count(self.violations, 'violation')}"
        )


class Verdicts(dict[str, Verdict]):
    """Those of several modules, by the names that were given to them; as text a line for each."""

    def __str__(self) -> str:
        return "\n".join(map(str, self.values()))


class Tally(Sink):
    """Counts what happens to a module from now on.

    Args:
        guard: The module's guard.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._micro_steps = 0
        self._before = {scope: guard.count("training", scope) for scope in guard.policy.in_full}
        self._inference_before = guard.count("inference")
        self._violations_before = guard.violation_count
        guard.add_sink(self)

    def micro_step(self, module: str, context: "Context | None", ledger: "MicroStep") -> None:
        """Count a training micro-step that was not broken off."""
        if ledger.context == "training" and ledger.raised is None:
            self._micro_steps += 1

    def verdict(self) -> Verdict:
        """Return what it has come to so far."""
        guard = self._guard
        calls = {s: guard.count("training", s) - before for s, before in self._before.items()}
        return Verdict(
            module=guard.name,
            micro_steps=self._micro_steps,
            calls=MappingProxyType(calls),
            inference_calls=guard.count("inference") - self._inference_before,
            violations=guard.violation_count - self._violations_before,
        )

    def close(self) -> None:
        """Count no more."""
        self._guard.remove_sink(self)
