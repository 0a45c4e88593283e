"""The guard: what a user opens, reads and logs of the contract of one module."""

import copy
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Generic, cast

from torch import nn

from lensnet_guard import _schema, _torch_checkpoints, _torch_internals
from lensnet_guard.boundary.admission import Admission
from lensnet_guard.boundary.blocks import (
    context_block,
    micro_step_block,
    scope_block,
)
from lensnet_guard.boundary.doors import check_doors
from lensnet_guard.boundary.inside import Inside
from lensnet_guard.boundary.keeper import (
    GuardKeeper,
    header_of,
    rebuild,  # noqa: F401  # pickles of before name it here
)
from lensnet_guard.boundary.observing import teller
from lensnet_guard.boundary.proxy import keeper_of, proxy_for
from lensnet_guard.boundary.settlement import WindowBlock, opened
from lensnet_guard.boundary.tripwire import Tripwire, guard_behind
from lensnet_guard.calls.budget import MicroStep, Window
from lensnet_guard.calls.context import P, R
from lensnet_guard.calls.errors import VIOLATIONS
from lensnet_guard.calls.policy import CallPolicy, Mode
from lensnet_guard.calls.record import CallRecord, Context, check_context
from lensnet_guard.logs.evidence import write_evidence
from lensnet_guard.logs.history import History
from lensnet_guard.logs.run_log import RunLog
from lensnet_guard.logs.sinks import Sink
from lensnet_guard.untested import tell_untested

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    M = TypeVar("M", bound=nn.Module, default=Any)  # so that a plain `Guard` is one of any module
else:
    from typing import TypeVar

    M = TypeVar("M", bound=nn.Module)


class Guard(Generic[M]):
    """The call contract of one module, enforced. Made by `guard_module` or `lensnet_guard`.

    Longer than others, because it is the whole face of a contract: what its methods do is done by
    the admission, the history and the tripwire behind it.

    Attributes:
        module: What to call: the guarded proxy (the raw module itself when ``mode`` is ``"off"``).
    """

    def __init__(
        self,
        module: M,
        policy: CallPolicy,
        mode: Mode,
        name: str,
        *,
        history: History | None = None,
        inside: Inside | None = None,
        guard_copies: bool = True,
    ) -> None:
        self._history = history or History(name)
        self._admission = Admission(module, policy, mode, self._history, inside or Inside())
        self._tripwire: Tripwire | None = None
        self.module = module
        if mode != "off":
            check_doors(module, policy)
            # The proxy passes for the module, down to its class.
            keeper = GuardKeeper(self, self._admission, guard_copies)
            self.module = cast("M", proxy_for(module, keeper))
            tell_untested([*_torch_checkpoints.losses(), *_torch_internals.losses()])
            admission, tell = self._admission, teller() if mode == "observe" else None
            names = policy.shared_submodules, admission.doors.methods
            self._tripwire = Tripwire(
                module, self, admission.inside, admission.run_behind, *names, tell
            )

    # What the user opens -----------------------------------------------------------------------

    @contextmanager
    def context(self, context: Context) -> Iterator[None]:
        """Declare what this thread or task does.

        Args:
            context: ``"training"`` or ``"inference"``.

        Raises:
            ValueError: Any other word.
            ContextSwitchRefused: To inference inside an open training micro-step.
        """
        check_context(context)
        with opened(self._admission, context_block(self._admission, context)):
            yield

    @contextmanager
    def micro_step(self, step: int = 0, micro_step: int = 0) -> Iterator[MicroStep]:
        """Open a micro-step: in training, every budget of the policy is due when it ends.

        Args:
            step: The number of the optimizer step.
            micro_step: The number of the micro-batch inside it.

        Raises:
            NoContext: Neither training nor inference is declared.
            ContextSwitchRefused: A micro-step is open already.
            BudgetUnmet: At the end, when the body did not raise and made too few calls.
            LensNetViolation: At the end, any violation that the body swallowed.
        """
        numbers = operator.index(step), operator.index(micro_step)  # a record holds no tensor
        block, ledger = micro_step_block(self._admission, *numbers)
        with opened(self._admission, block):
            yield ledger

    def window(self, name: str) -> AbstractContextManager[Window]:
        """Open a window, in which budgets count that are given ``per`` it.

        It may hold micro-steps, or be held by one; and hold stretches of inference, whose calls are
        not counted. Opened in inference, it asks for nothing.

        Args:
            name: ``"step"``, for an optimizer step; or a name that a scope of the policy counts
                ``per``.

        Raises:
            ValueError: No scope of the policy counts in such a window, and calls are not observed
                (a window that is observed is one that `lensnet-guard suggest` can count in).
            RuntimeError: The same block is opened or closed twice.
            ContextSwitchRefused: A window of that name is open already.
            BudgetUnmet: At the end, when the body did not raise and made too few calls.
            LensNetViolation: At the end, any violation that the body swallowed.
        """
        return WindowBlock(self._admission, name)

    @contextmanager
    def sanctioned(self, scope: str) -> Iterator[Window]:
        """Open a sanctioned scope, where a training call is legal.

        Outside any micro-step, a scope that counts per micro-step is one of its own, with its
        budget due.

        Args:
            scope: The name of a scope of the policy.

        Yields:
            The window that its calls are booked in.

        Raises:
            ValueError: The policy has no such scope, or one whose calls are known by their caller
                or state.
            NoContext: As for `micro_step`.
            UnsanctionedCall: The window that the scope counts in is not open.
            BudgetUnmet: As for `micro_step`, when the scope stands alone.
            LensNetViolation: As for `micro_step`.
        """
        block, window = scope_block(self._admission, scope)
        with opened(self._admission, block):
            yield window

    def carry(self, fn: Callable[P, R]) -> Callable[P, R]:
        """Bind a function to what is open here and now, for a thread or an executor to call.

        The context holds in the thread for as long as it runs; a carried micro-step and scope end
        with their own blocks.

        Args:
            fn: The function, which may be a coroutine function.

        Raises:
            TypeError: A generator function, whose body runs only after the call has returned.
        """
        return self._admission.open.carry(fn)

    # What the user reads -----------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The module's name in records, logs and messages."""
        return self._history.module

    @property
    def policy(self) -> CallPolicy:
        """Who may call in training, how often, and in what state."""
        return self._admission.policy

    @property
    def mode(self) -> Mode:
        """What becomes of a violation, for as long as the guard lives.

        ``"enforce"`` raises it, ``"observe"`` only records and logs it, with ``"off"`` nothing is
        installed.
        """
        return self._admission.mode

    @property
    def calls(self) -> tuple[CallRecord, ...]:
        """The newest records of calls, allowed and refused, oldest first."""
        return tuple(self._history.calls)

    @property
    def violations(self) -> tuple[CallRecord, ...]:
        """The newest records of violations, oldest first."""
        return tuple(self._history.violations)

    @property
    def violation_count(self) -> int:
        """Violations so far, also those that the ring no longer holds."""
        return self._history.violation_count

    @property
    def current_context(self) -> Context | None:
        """The context of the running thread or task; None when unset."""
        return self._admission.open.position().context

    def count(self, context: Context | None = None, scope: str | None = None) -> int:
        """Return how many calls were allowed so far; recomputes are not counted.

        Args:
            context: Count the calls of this context only.
            scope: Count the calls of this scope only.

        Raises:
            ValueError: A context or a scope that there is not.
        """
        if context is not None:
            check_context(context)
        if scope is not None and scope not in self.policy.in_full:
            raise ValueError(
                f"{scope!r} is not a scope of {self.name}'s policy, "
                f"which has {sorted(self.policy.in_full)}"
            )
        return self._history.count(context, scope)

    def __repr__(self) -> str:
        calls, violations = self.count(), self.violation_count
        return f"<Guard of {self.name}: {self.mode}, {calls} calls, {violations} violations>"

    # What other code listens to, and adds ------------------------------------------------------

    def add_sink(self, sink: Sink) -> None:
        """Tell a sink of everything that happens to the module from now on."""
        self._history.add_sink(sink)

    def remove_sink(self, sink: Sink) -> None:
        """Tell a sink no more."""
        self._history.remove_sink(sink)

    def violate(self, reason: str, detail: str, frame: FrameType | None = None) -> None:
        """Record, log and raise a violation that other code has found, as `compare_ranks` does.

        Args:
            reason: The name of its class, such as ``"RankDivergence"``.
            detail: What the first line of its message ends in, such as ``": rank 1 made none"``.
            frame: The code that it is about; by default the caller's.

        Raises:
            LensNetViolation: Of that class, in the mode ``"enforce"``.
            ValueError: There is no such class; nothing is recorded.
        """
        if reason not in VIOLATIONS:
            raise ValueError(f"{reason!r} is no violation; there are {', '.join(VIOLATIONS)}")
        here = self._admission.open.position()
        violations = self._admission.violations
        violations.violate(reason, here, detail, kind="micro_step", frame=frame)

    # Logs, copies, the end ---------------------------------------------------------------------

    def start_log(
        self, folder: str | os.PathLike[str], others: "Sequence[Guard[Any]]" = ()
    ) -> None:
        """Log to a folder from now on.

        Args:
            folder: It is made when missing; one process writes one file, and more when it is full.
            others: Guards that log to the same file.

        Raises:
            TypeError: ``folder`` is not a path.
            ValueError: The guard logs already.
        """
        header = header_of(self.mode, self.policy)
        if others:
            guards = (self, *others)
            header = {
                _schema.MODULE: ", ".join(guard.name for guard in guards),
                _schema.MODE: self.mode,
                _schema.POLICIES: {guard.name: guard.policy.to_json() for guard in guards},
            }
        self._history.start_log(folder, header)
        for other in others:
            other.log_beside(self)

    def log_beside(self, other: "Guard[Any]") -> None:
        """Log from now on to the file that another guard has opened, and will end."""
        if (log := other.log) is not None:
            self._history.write_to(log)

    @property
    def log(self) -> RunLog | None:
        """The log that is being written to; None without one."""
        return self._history.log

    @property
    def log_path(self) -> Path | None:
        """The file that the log is being written to; None without one."""
        return self._history.log.path if self._history.log is not None else None

    def evidence(self, folder: str | os.PathLike[str]) -> Path | None:
        """Return the file that tells of the calls so far: the log's, or one that is written now.

        Without a log the newest records are written to ``folder`` as a log is, for
        ``lensnet-guard postmortem``; each line bears the time of this writing.

        Args:
            folder: As for `start_log`.

        Returns:
            Its path; None when it could not be written.

        Raises:
            TypeError: ``folder`` is not a path.
        """
        if self._history.log is not None:
            return self.log_path
        header = {_schema.MODULE: self.name, **header_of(self.mode, self.policy)}
        return write_evidence(folder, header, self._history.newest(), self.policy)

    def end_log(self) -> None:
        """Write ``run.end`` and close the log, if there is one."""
        self._history.end_log()

    def uninstall(self) -> None:
        """Give the raw module back as it was: same classes, same forwards; end the log.

        A proxy that somebody still holds goes on checking its own calls.
        """
        if self._tripwire is not None:
            self._tripwire.disarm()
        self.end_log()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Guard[M]":
        module = copy.deepcopy(self.module, memo)  # by memo, the same copy as an owner's
        return guard_of(module) or Guard(module, self.policy, self.mode, self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.mode == "off":
            return Guard, (self.module, self.policy, self.mode, self.name)
        return guard_of, (self.module,)


def guard_of(module: object) -> Guard[Any] | None:
    """Return the guard of a guarded module, or of a raw module behind a proxy; else None."""
    keeper = keeper_of(module)
    guard = keeper.guard if keeper is not None else guard_behind(module)
    return cast("Guard[Any] | None", guard)
