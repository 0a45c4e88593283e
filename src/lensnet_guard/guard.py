"""The guard: ties the proxy, the open blocks, the policy, the records and the log together."""

import copy
import functools
import itertools
import operator
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import torch
from torch import nn

from lensnet_guard.budget import MicroStep
from lensnet_guard.context import Frame, OpenBlocks, Position
from lensnet_guard.errors import build_violation
from lensnet_guard.log import RunLog
from lensnet_guard.policy import CallPolicy, Situation, decide
from lensnet_guard.proxy import GuardedModule, guard_of
from lensnet_guard.record import (
    CallRecord,
    Context,
    Kind,
    capture_stack,
    describe_inputs,
    find_caller,
)

Mode = Literal["enforce", "observe", "off"]
P = ParamSpec("P")
R = TypeVar("R")

RING_RECORDS = 4_096  # the newest records that guard.calls and guard.violations hold
CALL_FRAMES = 16  # frames kept of an allowed call: enough to see the caller, cheap to take
VIOLATION_FRAMES = 64


class Guard:
    """The call contract of one module, enforced. Made by `guard_module` or `lensnet_guard`.

    Attributes:
        module: what to call: the guarded proxy (the raw module itself when ``mode`` is ``"off"``).
        name: the module's name in records, logs and messages.
        policy: who may call in training and how often per micro-step.
        mode: ``"enforce"`` raises on violations, ``"observe"`` only records and logs them, with
            ``"off"`` nothing is installed.
        violation_count: violations so far, also those that the ring no longer holds.
    """

    def __init__(self, module: nn.Module, policy: CallPolicy, mode: Mode, name: str) -> None:
        self.name = name
        self.policy = policy
        self.mode = mode
        self.module: Any = module if mode == "off" else GuardedModule(module, self)
        self.violation_count = 0
        self._budgets = policy.budgets
        self._open = OpenBlocks()
        self._log: RunLog | None = None
        # Re-entrant: a garbage collection inside the locked region may run code that calls again.
        self._lock = threading.RLock()
        self._sequence = itertools.count(1)
        self._calls: deque[CallRecord] = deque(maxlen=RING_RECORDS)
        self._violations: deque[CallRecord] = deque(maxlen=RING_RECORDS)
        self._counts: Counter[tuple[Context | None, str | None]] = Counter()
        self._running: set[int] = set()  # threads inside the module

    # What the user opens -----------------------------------------------------------------------

    @contextmanager
    def context(self, context: Context) -> Iterator[None]:
        """Declare what this thread or task does: ``"training"`` or ``"inference"``.

        Raises:
            ValueError: any other word.
            ContextSwitchRefused: to inference inside an open training micro-step.
        """
        if context not in get_args(Context):
            raise ValueError(f'context must be "training" or "inference", not {context!r}')
        here = self._open.position()
        if context == "inference" and here.context == "training" and here.micro_step is not None:
            self._violate("ContextSwitchRefused", here, ": inference was asked for")
        with self._block(Frame(context=context)):
            yield

    @contextmanager
    def micro_step(self, step: int = 0, micro_step: int = 0) -> Iterator[MicroStep]:
        """Open a micro-step: in training, every budget of the policy is due when it ends.

        Raises:
            NoContext: neither training nor inference is declared.
            ContextSwitchRefused: a micro-step is open already.
            BudgetUnmet: at the end, when the body did not raise and made too few calls.
            LensNetViolation: at the end, any violation that the body swallowed.
        """
        here = self._require_context("a micro-step was opened")
        if here.micro_step is not None:
            self._violate("ContextSwitchRefused", here, ": another micro-step was asked for")
        numbers = operator.index(step), operator.index(micro_step)  # a record holds no tensor
        ledger = MicroStep(*numbers, self._budgets if here.context == "training" else {})
        with self._block(Frame(micro_step=ledger), ledger, settles=True):
            yield ledger

    @contextmanager
    def sanctioned(self, scope: str) -> Iterator[MicroStep]:
        """Open a sanctioned scope, the only place where a training call is legal.

        Outside any micro-step it is a micro-step of its own, with this scope's budget due.

        Raises:
            ValueError: the policy has no such scope.
            NoContext, BudgetUnmet, LensNetViolation: as for `micro_step`.
        """
        if scope not in self.policy.scopes:
            raise ValueError(
                f"{scope!r} is not a scope of {self.name}'s policy, "
                f"which has {sorted(self.policy.scopes)}"
            )
        here = self._require_context(f"the scope {scope!r} was opened")
        ledger = here.micro_step
        if ledger is not None:
            with self._block(Frame(scope=scope), ledger):
                yield ledger
            return
        due = {scope: self.policy.scopes[scope]} if here.context == "training" else {}
        ledger = MicroStep(None, None, due)
        with self._block(Frame(micro_step=ledger, scope=scope), ledger, settles=True):
            yield ledger

    def carry(self, fn: Callable[P, R]) -> Callable[P, R]:
        """Bind ``fn`` to what is open here and now, for a thread or an executor to call.

        The context holds in the thread for as long as ``fn`` runs; a carried micro-step and scope
        end with their own blocks.
        """
        position = self._open.position()

        @functools.wraps(fn)
        def carried(*args: P.args, **kwargs: P.kwargs) -> R:
            with self._open.resumed(position):
                return fn(*args, **kwargs)

        return carried

    # What the user reads -----------------------------------------------------------------------

    @property
    def calls(self) -> tuple[CallRecord, ...]:
        """The newest records of calls, allowed and refused, oldest first."""
        return tuple(self._calls)

    @property
    def violations(self) -> tuple[CallRecord, ...]:
        """The newest records of violations, oldest first."""
        return tuple(self._violations)

    @property
    def current_context(self) -> Context | None:
        """The context of the running thread or task; None when unset."""
        return self._open.position().context

    def count(self, context: Context | None = None, scope: str | None = None) -> int:
        """Allowed calls so far, of one context or scope if given; recomputes are not counted."""
        with self._lock:
            counts = list(self._counts.items())
        return sum(n for (c, s), n in counts if context in (None, c) and scope in (None, s))

    def __repr__(self) -> str:
        return (
            f"<Guard of {self.name}: {self.mode}, {self.count()} calls, "
            f"{self.violation_count} violations>"
        )

    # A call ------------------------------------------------------------------------------------

    def _run(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: FrameType | None,
    ) -> Any:
        """Admit, log and run one call; ``frame`` is that of the proxy's caller, if it has one."""
        record = self._admit(args, kwargs, frame)
        if self._log is not None:
            self._log.write("call.begin", **record.to_log())
        thread = threading.get_ident()
        outermost = thread not in self._running
        start = time.perf_counter()
        try:
            self._running.add(thread)
            result = run(*args, **kwargs)
            record.outcome = "returned"
        except BaseException as error:
            record.outcome = f"raised {type(error).__name__}"
            raise
        finally:
            record.duration_ms = (time.perf_counter() - start) * 1e3
            if outermost:
                self._running.discard(thread)
            if self._log is not None:
                end = {name: getattr(record, name) for name in ("seq", "outcome", "duration_ms")}
                self._log.write("call.end", module=self.name, **end)
        return result

    def _admit(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType | None
    ) -> CallRecord:
        """Decide on a call, book it and record it; raise when it is refused."""
        here = self._open.position()
        ledger, scope = here.micro_step, here.scope
        if scope is None and here.context == "training" and self.policy.sanctioned_callers:
            scope = find_caller(frame, self.policy.sanctioned_callers)
        inputs = describe_inputs(args, kwargs)
        with self._lock:  # from reading the budget to spending it
            spent = len(ledger.spent(scope)) if ledger and scope else 0
            reason = decide(
                Situation(
                    context=here.context,
                    sanctioned=ledger is not None and scope is not None,
                    budget_left=self._budgets[scope] - spent if scope else 0,
                    reentrant=threading.get_ident() in self._running,
                )
            )
            if reason is None:
                record = self._record("call", None, here, scope, frame, inputs)
                self._calls.append(record)
                self._counts[here.context, scope] += 1
                if ledger and scope:
                    ledger.spend(scope, record)
                return record
        detail = ""
        if reason == "UnsanctionedCall" and scope is not None:
            detail = ": its sanctioned caller runs outside any micro-step, where no budget counts"
        return self._refuse("call", reason, here, frame, scope, inputs, detail)

    def _record(
        self,
        kind: Kind,
        reason: str | None,
        here: Position,
        scope: str | None,
        frame: FrameType | None,
        inputs: tuple[object, ...],
    ) -> CallRecord:
        ledger = here.micro_step
        return CallRecord(
            seq=next(self._sequence),
            module=self.name,
            kind=kind,
            verdict="allow" if reason is None else "refuse",
            reason=reason,
            context=here.context,
            scope=scope,
            step=ledger.step if ledger else None,
            micro_step=ledger.micro_step if ledger else None,
            thread=threading.current_thread().name,
            grad_enabled=torch.is_grad_enabled(),
            outcome=None if reason is None else "refused",
            _stack=capture_stack(frame, CALL_FRAMES if reason is None else VIOLATION_FRAMES),
            _inputs=inputs,
        )

    # Violations --------------------------------------------------------------------------------

    def _refuse(
        self,
        kind: Kind,
        reason: str,
        here: Position,
        frame: FrameType | None,
        scope: str | None,
        inputs: tuple[object, ...] = (),
        detail: str = "",
    ) -> CallRecord:
        """Record and log a violation, then raise it; in observe mode return its record."""
        ledger = here.micro_step
        with self._lock:
            record = self._record(kind, reason, here, scope, frame, inputs)
            self.violation_count += 1
            self._violations.append(record)
            if kind == "call":
                self._calls.append(record)
            made = ledger.calls if ledger else {}
            earlier = tuple(ledger.spent(scope)) if ledger and scope else ()
        violation = build_violation(record, self.policy, made=made, earlier=earlier, detail=detail)
        if ledger is not None:
            ledger.violations.append(violation)
        if self._log is not None:
            self._log.write("violation", **record.to_log(), message=str(violation))
        if self.mode == "observe":
            return record
        raise violation

    def _violate(self, reason: str, here: Position, detail: str) -> None:
        """Refuse something that is not a call."""
        if self.mode != "off":
            kind: Kind = "micro_step" if reason == "BudgetUnmet" else "context"
            self._refuse(kind, reason, here, sys._getframe(1), here.scope, detail=detail)

    def _require_context(self, what: str) -> Position:
        here = self._open.position()
        if here.context is None:
            self._violate("NoContext", here, f": {what}")
        return here

    # Blocks ------------------------------------------------------------------------------------

    @contextmanager
    def _block(
        self, frame: Frame, ledger: MicroStep | None = None, *, settles: bool = False
    ) -> Iterator[None]:
        """Hold a frame open; violations that its body swallowed come out again when it ends.

        Args:
            ledger: the micro-step that the block works in.
            settles: whether that micro-step ends with the block.
        """
        inside = self._open.push(frame)  # kept, for the block may end in another thread
        enforced = ledger if self.mode == "enforce" else None
        try:
            yield
            if enforced is not None:
                enforced.raise_swallowed()
            if ledger is not None and settles and (unmet := ledger.unmet()):
                made = ", ".join(f"{s} made {n} of {due} calls" for s, (n, due) in unmet.items())
                self._violate("BudgetUnmet", inside, f": {made}")
        except BaseException as error:
            if enforced is not None:
                enforced.note_swallowed(error)
            raise
        finally:
            self._open.remove(frame)
            if ledger is not None and settles and self._log is not None:
                self._log.write(
                    "micro_step.end",
                    module=self.name,
                    context=inside.context,
                    step=ledger.step,
                    micro_step=ledger.micro_step,
                    calls=ledger.calls,
                    violations=len(ledger.violations),
                )

    # Copies, pickles, logs ---------------------------------------------------------------------

    def _guard_copy(self, module: nn.Module) -> GuardedModule:
        """Guard a copy of the module: same contract, but its own identity, counts and context."""
        copied = Guard(module, self.policy, self.mode, f"{self.name} (copy)")
        if self._log is not None:
            copied._write_to(self._log)
        guarded: GuardedModule = copied.module
        return guarded

    def _reduce_module(self, module: nn.Module) -> tuple[Any, ...]:
        return _rebuild_module, (module, self.policy, self.mode, self.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Guard":
        module = copy.deepcopy(self.module, memo)  # by memo, the same copy as an owner's
        return guard_of(module) or Guard(module, self.policy, self.mode, self.name)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.mode == "off":
            return Guard, (self.module, self.policy, self.mode, self.name)
        return guard_of, (self.module,)

    def start_log(self, folder: str | os.PathLike[str]) -> None:
        """Log to a folder from now on, see `lensnet_guard.log`.

        Raises:
            TypeError: ``folder`` is not a path.
            ValueError: the guard logs already.
        """
        if self._log is not None and not self._log.closed:
            raise ValueError(f"{self.name} already logs to {self._log.folder}")
        policy = {
            "scopes": dict(self.policy.scopes),
            "sanctioned_callers": dict(self.policy.sanctioned_callers),
        }
        self._write_to(RunLog(folder, {"module": self.name, "mode": self.mode, "policy": policy}))

    def end_log(self) -> None:
        """Write ``run.end`` and close the log, if there is one."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def _write_to(self, log: RunLog) -> None:
        self._log = log
        log.add_writer(self)


def _rebuild_module(module: nn.Module, policy: CallPolicy, mode: Mode, name: str) -> Any:
    """Unpickle a guarded module."""
    return Guard(module, policy, mode, name).module
