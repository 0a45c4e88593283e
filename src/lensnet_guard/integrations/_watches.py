"""The guarded modules of one training: what `Watch` does for one, done for all of them together."""

import atexit
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, ParamSpec, TypeVar

import torch.distributed as dist

import lensnet_guard
from lensnet_guard import CallPolicy, Guard, Guards, Mode
from lensnet_guard.integrations._watch import Abandoned, Contract, Log, Watch, leave
from lensnet_guard.tally import Verdict, Verdicts

P = ParamSpec("P")
R = TypeVar("R")

Target = str | Guard | Guards | Mapping[str, CallPolicy | None]
"""An attribute's name, a guard; or of several modules the names with policies, or the guards."""


class NothingChecked(RuntimeError):
    """A training has ended without a micro-step of a guarded module, so no call was checked."""


def contracts_for(
    target: Target,
    policy: CallPolicy | None = None,
    mode: Mode | None = None,
    log: Log | None = None,
) -> dict[str, Contract]:
    """Return the contract of each module, by its name.

    Raises:
        TypeError: As `Contract`; a mapping with other values than policies.
        ValueError: As `Contract`; no module at all, or one policy beside several.
    """
    if isinstance(target, Guards):
        return {name: Contract(guard, policy, mode, log) for name, guard in target.items()}
    if not isinstance(target, Mapping):
        name = target.name if isinstance(target, Guard) else str(target)
        return {name: Contract(target, policy, mode, log)}
    if policy is not None:
        raise ValueError(
            "several modules are named, each with its own policy; leave the argument policy out"
        )
    if not target:
        raise ValueError("no module is named: the mapping from attributes to policies is empty")
    policies: dict[str, CallPolicy | None] = {}
    for name, own in target.items():
        if own is not None and not isinstance(own, CallPolicy):
            raise TypeError(f"the policy of {name!r} must be a CallPolicy, not {own!r}")
        policies[name] = own
    first = next(iter(policies))
    return {
        name: Contract(name, own, mode, log if name == first else None)
        for name, own in policies.items()
    }


def watches_for(
    contracts: Mapping[str, Contract],
    root: Any,
    *,
    must_be_found: bool = True,
    compare_ranks: bool = False,
    ranges: bool = True,
) -> "Watches":
    """Return the watches of modules that hang at one root.

    Args:
        contracts: What to guard, by name.
        root: Where to look for them.
        must_be_found: As for `Watch`.
        compare_ranks: As for `Watches`.
        ranges: As for `Watches`.
    """
    return Watches(
        {name: Watch(one, root, must_be_found=must_be_found) for name, one in contracts.items()},
        compare_ranks=compare_ranks,
        ranges=ranges,
    )


class Watches:
    """Guards the modules of one training. Made before the trainer wraps anything.

    Args:
        watches: Of each module, by its name. All log to the file of the first.
        compare_ranks: Whether the ranks of a distributed training compare what they call.
        ranges: As for `lensnet_guard.compare_ranks`.
    """

    def __init__(
        self, watches: Mapping[str, Watch], *, compare_ranks: bool = False, ranges: bool = True
    ) -> None:
        self._watches = dict(watches)
        self._compare_ranks, self._ranges = compare_ranks, ranges
        self._logs = ExitStack()
        self._ranks = ExitStack()

    @property
    def guards(self) -> dict[str, Guard]:
        """The guards that there are so far."""
        found = {name: watch.guard for name, watch in self._watches.items()}
        return {name: guard for name, guard in found.items() if guard is not None}

    def open(self) -> Guard:
        """Guard them, or check that they still are; inference context from now on.

        Returns:
            The first guard.

        Raises:
            GuardLost: As `Watch.open`; no module is guarded then.
            TypeError: As `Watch.open`.
            ValueError: As `Watch.open`.
        """
        with ExitStack() as undo:
            for watch in self._watches.values():
                undo.callback(watch.close)
                watch.open()
            undo.callback(self._logs.close)
            self._start_log()
            undo.pop_all()
        return next(iter(self.guards.values()))

    def _start_log(self) -> None:
        """Let all write to one file, whose first line tells of each."""
        first, *others = self.guards.values()
        log = next(iter(self._watches.values())).log
        others = [guard for guard in others if guard.mode != "off" and guard.log is None]
        if log is not None and first.mode != "off":
            self._logs.callback(first.end_log)
            first.start_log(log, others)
        elif first.log is not None:
            for guard in others:
                guard.log_beside(first)
        for guard in others:
            self._logs.callback(guard.end_log)

    def begin_training(self) -> None:
        """Count from here, and compare the ranks until `conclude` or `close`.

        All ranks come here together. Where there is one process only, nothing is compared.
        """
        self._leave_ranks()  # of a training before, from which somebody has caught an exception,
        self._each(Watch.cut_short)  # as accelerate does where a batch was too large
        self._each(Watch.count_from_here)
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        compared = {name: guard for name, guard in self.guards.items() if guard.mode != "off"}
        if self._compare_ranks and together and compared:
            atexit.register(self._at_exit)
            self._ranks.enter_context(lensnet_guard.compare_ranks(compared, ranges=self._ranges))

    def _leave_ranks(self, error: BaseException | None = None) -> None:
        """Say to the other ranks, if they still compare, that this one has stopped, and why."""
        atexit.unregister(self._at_exit)
        ranks, self._ranks = self._ranks, ExitStack()
        leave(ranks, error or Abandoned("its training was closed before its end"))

    def _at_exit(self) -> None:
        """Say so as Python ends: a trainer tells its callbacks of no exception."""
        self._leave_ranks(getattr(sys, "last_value", None))

    def close(self, error: BaseException | None = None) -> None:
        """Close whatever is open, and put back what was there before `open`."""
        with ExitStack() as last:
            last.callback(self._logs.close)
            last.callback(self._each, lambda watch: watch.close(error), backwards=True)
            self._leave_ranks(error)

    def enter(self, context: Literal["training", "inference"] | None) -> None:
        """Switch to a context; micro-steps that never ended are given up."""
        self._each(lambda watch: watch.enter(context))

    def begin_step(self, step: int, micro_step: int) -> None:
        """Open a training micro-step of all.

        Raises:
            GuardLost: As `Watch.begin_step`; no micro-step is open then.
            BudgetUnmet: As `Watch.begin_step`.
        """
        try:
            for watch in self._watches.values():
                watch.begin_step(step, micro_step)
        except BaseException as error:
            self.abandon(error)
            raise

    @contextmanager
    def window(self, name: str) -> Iterator[None]:
        """Open a window of all whose policies count in it; one in a micro-step.

        Raises:
            LensNetViolation: As the end of ``guard.window``.
        """
        with ExitStack() as blocks:
            for watch in self._watches.values():
                blocks.enter_context(_window(watch, name))
            yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """Leave nothing of a training open that is cut short, whoever catches what has cut it."""
        try:
            yield
        except BaseException as error:
            with ExitStack() as last:
                last.callback(self._each, partial(Watch.cut_short, error=error))
                self._leave_ranks(error)
            raise
        finally:
            self.enter("inference")

    def freed(self, method: Callable[P, R]) -> Callable[P, R]:
        """Have a method run outside of whatever is open as it is called, as in `Watch.freed`."""
        for watch in self._watches.values():
            method = watch.freed(method)
        return method

    def end_step(self) -> None:
        """Close the micro-steps that are open, and settle their budgets.

        Raises:
            LensNetViolation: As `Watch.end_step`, the first.
        """
        self._each(Watch.end_step)

    def abandon(self, error: BaseException | None = None) -> None:
        """Close micro-steps that were cut short: no budget is due."""
        self._each(lambda watch: watch.abandon(error))

    def verdict(self) -> Verdict | Verdicts:
        """Return what it has come to: of one module its own, of several a line for each."""
        verdicts = Verdicts({name: watch.verdict() for name, watch in self._watches.items()})
        return verdicts if len(verdicts) > 1 else next(iter(verdicts.values()))

    def conclude(self, *, trained: bool = True) -> Verdict | Verdicts:
        """Settle the last optimizer step of a training that has come to its end; as `verdict`.

        Args:
            trained: Whether there was anything to train; not so in a run resumed at its end.

        Raises:
            BudgetUnmet: That step has made too few calls.
            NothingChecked: There was no micro-step, where violations are raised.
            RankDivergence: The ranks differ.
            RankStopped: Another rank raised.
        """
        if trained:
            self._each(Watch.end_optimizer_step)
            self._check_begun()
        self._ranks.close()
        atexit.unregister(self._at_exit)
        return self.verdict()

    def _check_begun(self) -> None:
        guards = self.guards.values()
        enforced = any(guard.mode == "enforce" for guard in guards)
        if enforced and not any(watch.begun for watch in self._watches.values()):
            raise NothingChecked(
                f"the training has ended without a micro-step, so no call of "
                f"{' and '.join(guard.name for guard in guards)} was checked.\n"
                "  what to do   This trainer has not come to the hooks that open micro-steps. Look "
                "whether the callback was given to the trainer that trains; in a trainer with a "
                "loop of its own open them there, `with guard.micro_step(step):`; or guard with "
                'mode="observe".'
            )

    def leave_evidence(self, error: BaseException, folder: Log | None) -> None:
        """Say on an exception where the calls are written down, as `Watch.leave_evidence`."""
        self._each(lambda watch: watch.leave_evidence(error, folder))

    def _each(self, act: Callable[[Watch], object], *, backwards: bool = False) -> None:
        """Do something to all, whatever one of them raises; the first such is raised again."""
        watches = list(self._watches.values())
        raised: list[BaseException] = []
        for watch in reversed(watches) if backwards else watches:
            try:
                act(watch)
            except BaseException as error:  # noqa: PERF203  # each must come to its end
                raised.append(error)
        if raised:
            try:
                raise raised[0]
            finally:
                raised.clear()  # or this frame, which its traceback holds, would hold it


def _window(watch: Watch, name: str) -> AbstractContextManager[object]:
    """Return a block that is a window, if the policy counts in it; of a micro-step the first.

    Another stays closed, so that its calls are too many; unless they are only observed.
    """
    guard, micro_step = watch.guard, watch.micro_step
    assert guard is not None
    counts = name in guard.policy.windows or guard.mode == "observe"
    had = micro_step is not None and name in micro_step.ended and guard.mode != "observe"
    return guard.window(name) if counts and not had else nullcontext()
