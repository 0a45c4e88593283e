"""Several modules under one contract each, with one context, one micro-step and one log."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

from torch import nn

from lensnet_guard.calls.policy import CallPolicy, Mode
from lensnet_guard.calls.record import Context
from lensnet_guard.calls.scope import STEP
from lensnet_guard.guard import Guard
from lensnet_guard.install import guard_module
from lensnet_guard.tally import Tally, Verdicts


class Guards(Mapping[str, Guard]):
    """The guards of several modules, by name; made by `guard_modules`.

    As a block it gives the raw modules back at its end.

    Args:
        guards: The guards.
    """

    def __init__(self, guards: Mapping[str, Guard]) -> None:
        self._guards = dict(guards)
        self._tallies = {name: Tally(guard) for name, guard in guards.items()}

    def __getitem__(self, name: str) -> Guard:
        return self._guards[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._guards)

    def __len__(self) -> int:
        return len(self._guards)

    @property
    def modules(self) -> dict[str, Any]:
        """What to call: the guarded modules."""
        return {name: guard.module for name, guard in self._guards.items()}

    @property
    def verdict(self) -> Verdicts:
        """What it has come to since the guards were made, a line for each module."""
        return Verdicts({name: tally.verdict() for name, tally in self._tallies.items()})

    @contextmanager
    def context(self, context: Context) -> Iterator[None]:
        """Declare what this thread or task does, to all; as `Guard.context`."""
        with ExitStack() as blocks:
            for guard in self.values():
                blocks.enter_context(guard.context(context))
            yield

    @contextmanager
    def micro_step(self, step: int = 0, micro_step: int = 0) -> Iterator[None]:
        """Open a micro-step of all, at whose end every budget is due; as `Guard.micro_step`.

        Args:
            step: The number of the optimizer step.
            micro_step: The number of the micro-batch inside it.
        """
        with ExitStack() as blocks:
            for guard in self.values():
                blocks.enter_context(guard.micro_step(step, micro_step))
            yield

    @contextmanager
    def window(self, name: str) -> Iterator[None]:
        """Open a window of all whose policies count in it; as `Guard.window`.

        Raises:
            ValueError: No policy does.
        """
        counting = [
            guard
            for guard in self.values()
            if name in guard.policy.windows or guard.mode == "observe"
        ]
        if not counting and name != STEP:
            next(iter(self.values())).window(name).__enter__()  # says which windows there are
        with ExitStack() as blocks:
            for guard in counting:
                blocks.enter_context(guard.window(name))
            yield

    def end_log(self) -> None:
        """Write ``run.end`` and close the log, if there is one."""
        for guard in reversed(self._guards.values()):  # the first has opened it
            guard.end_log()

    def uninstall(self) -> None:
        """Give the raw modules back as they were; end the log."""
        for guard in reversed(self._guards.values()):
            guard.uninstall()

    def __enter__(self) -> "Guards":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.uninstall()

    def __repr__(self) -> str:
        return f"<Guards of {', '.join(map(repr, self.values()))}>"


def guard_modules(
    modules: Mapping[str, nn.Module],
    *,
    policy: CallPolicy | Mapping[str, CallPolicy] | None = None,
    mode: Mode | None = None,
    log: str | os.PathLike[str] | None = None,
) -> Guards:
    """Guard several modules: one context, one micro-step, one log file for all of them.

    ``guards["critic"].module`` is what to call, and ``guards["critic"].sanctioned("values")`` opens
    a scope of one of them.

    Args:
        modules: The raw modules, by the names that records and messages call them.
        policy: The contract of each, by its name, or one for all; as for `guard_module`.
        mode: As for `guard_module`.
        log: As for `guard_module`; one file per process tells of all.

    Returns:
        The guards.

    Raises:
        TypeError: ``modules`` is no mapping of names to modules, or as for `guard_module`.
        ValueError: No module at all, a policy of none of them, or as for `guard_module`. No module
            is guarded then.
    """
    if not isinstance(modules, Mapping):
        raise TypeError(f"modules must map names to modules, not {modules!r}")
    if not modules:
        raise ValueError("there is no module to guard: modules is empty")
    policies = policy if isinstance(policy, Mapping) else dict.fromkeys(modules, policy)
    if unknown := sorted(policies.keys() - modules.keys()):
        raise ValueError(
            f"policy: there is no module {unknown[0]!r} among those to guard, "
            f"{', '.join(map(repr, modules))}"
        )
    guards: dict[str, Guard] = {}
    with ExitStack() as undo:
        for name, module in modules.items():
            guards[name] = guard_module(module, policy=policies.get(name), mode=mode, name=name)
            undo.callback(guards[name].uninstall)
        first, *others = guards.values()
        if log is not None and first.mode != "off":
            first.start_log(log, others)
        undo.pop_all()
    return Guards(guards)
