"""The guard: ties the proxy, the open blocks, the policy, the records and the log together."""

import copy
import operator
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from lensnet_guard import _torch_checkpoints, _torch_internals
from lensnet_guard._torch_checkpoints import is_composable, stops_recomputing
from lensnet_guard.budget import MicroStep
from lensnet_guard.context import Block, OpenBlocks, P, Position, R
from lensnet_guard.errors import LensNetViolation, build_violation
from lensnet_guard.evidence import write_evidence
from lensnet_guard.hazards import CompiledCalls
from lensnet_guard.history import History
from lensnet_guard.policy import CallPolicy, decide
from lensnet_guard.profiling import in_range
from lensnet_guard.proxy import GuardedModule, guard_of
from lensnet_guard.recompute import Recomputes
from lensnet_guard.record import CallRecord, Context, Kind, describe_inputs, find_caller
from lensnet_guard.tripwire import Inside, Tripwire, describe_part
from lensnet_guard.untested import tell_untested

if TYPE_CHECKING:
    from lensnet_guard.ranks import Ranks

Mode = Literal["enforce", "observe", "off"]


class Guard:
    """The call contract of one module, enforced. Made by `guard_module` or `lensnet_guard`.

    Attributes:
        module: what to call: the guarded proxy (the raw module itself when ``mode`` is ``"off"``).
        name: the module's name in records, logs and messages.
        policy: who may call in training and how often per micro-step.
        mode: ``"enforce"`` raises on violations, ``"observe"`` only records and logs them, with
            ``"off"`` nothing is installed.
    """

    def __init__(
        self,
        module: nn.Module,
        policy: CallPolicy,
        mode: Mode,
        name: str,
        inside: Inside | None = None,
    ) -> None:
        self.name = name
        self.policy = policy
        self.mode = mode
        self.module: Any = module if mode == "off" else GuardedModule(module, self)
        self._raw = module
        self._budgets = policy.budgets
        self._open = OpenBlocks()
        self._history = History(name)
        self._recomputes = Recomputes()
        self._inside, self._compiled = inside or Inside(), CompiledCalls(module)
        self._ranks: Ranks | None = None  # while they are compared
        self._tripwire: Tripwire | None = None
        if mode != "off":
            tell_untested([*_torch_checkpoints.losses(), *_torch_internals.losses()])
            shared = policy.shared_submodules
            self._tripwire = Tripwire(module, self, self._inside, self._run_behind, shared)

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
        if context == "inference" and here.inside_training_step:
            self._violate("ContextSwitchRefused", here, ": inference was asked for")
        with self._block(Block(context=context)):
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
        due = self._budgets if here.context == "training" else {}
        ledger = MicroStep(*numbers, due, here.context)
        with self._block(Block(micro_step=ledger), ledger, settles=True):
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
            with self._block(Block(scope=scope), ledger):
                yield ledger
            return
        due = {scope: self.policy.scopes[scope]} if here.context == "training" else {}
        ledger = MicroStep(None, None, due, here.context)
        with self._block(Block(micro_step=ledger, scope=scope), ledger, settles=True):
            yield ledger

    def carry(self, fn: Callable[P, R]) -> Callable[P, R]:
        """Bind ``fn`` to what is open here and now, for a thread or an executor to call.

        The context holds in the thread for as long as ``fn`` runs; a carried micro-step and scope
        end with their own blocks.

        Raises:
            TypeError: a generator function, whose body runs only after the call has returned.
        """
        return self._open.carry(fn)

    # What the user reads -----------------------------------------------------------------------

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
        return self._open.position().context

    def count(self, context: Context | None = None, scope: str | None = None) -> int:
        """Allowed calls so far, of one context or scope if given; recomputes are not counted.

        Raises:
            ValueError: a context that there is not.
        """
        if context not in (None, *get_args(Context)):
            raise ValueError(f'context must be "training" or "inference", not {context!r}')
        return self._history.count(context, scope)

    def __repr__(self) -> str:
        calls, violations = self.count(), self.violation_count
        return f"<Guard of {self.name}: {self.mode}, {calls} calls, {violations} violations>"

    # A call ------------------------------------------------------------------------------------

    def _run(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: FrameType | None,
    ) -> Any:
        """Admit and run one call; ``frame`` is that of the proxy's caller, if it has one."""
        return self._execute(self._admit(args, kwargs, frame), run, args, kwargs)

    def _admit(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType | None
    ) -> CallRecord:
        """Decide on a call, book it and record it; raise when it is refused."""
        here = self._open.position()
        ledger, scope = here.micro_step, here.scope
        if scope is None and here.context == "training" and self.policy.sanctioned_callers:
            scope = find_caller(frame, self.policy.sanctioned_callers)
        inputs = describe_inputs(args, kwargs)
        with self._history.lock:  # from reading the budget to spending it
            again = self._recomputes.find(frame)
            spent = len(ledger.spent(scope)) if ledger and scope else 0
            reason = decide(
                here.context,
                ledger is not None and scope is not None,
                self._budgets[scope] - spent if scope else 0,
                self._inside.here,
                again is not None,
            )
            if again is not None:
                return self._history.add_recompute(again.original, here, frame, inputs)
            if reason is None:
                record = self._history.add_call(here, scope, frame, inputs)
                if ledger and scope:
                    ledger.spend(scope, record)
                self._recomputes.remember(record, frame)
                return record
        detail = ""
        if reason == "UnsanctionedCall" and scope in self.policy.sanctioned_callers:
            detail = ": its sanctioned caller runs outside any micro-step, where no budget counts"
        record = self._refuse("call", reason, here, frame, scope, inputs, detail)
        self._remember(record, frame)
        return record

    def _remember(self, record: CallRecord, frame: FrameType | None) -> None:
        """An observed violation too is recomputed: that is no second one."""
        with self._history.lock:
            self._recomputes.remember(record, frame)

    def _run_behind(
        self,
        part: nn.Module,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Refuse a run of the module, or of a part or copy of it, that nobody admitted."""
        frame = sys._getframe(1)
        here = self._open.position()
        inputs = describe_inputs(args, kwargs)
        record = self._repeat_behind(part, frame, here, inputs)
        if record is None:
            reason = decide(here.context, sanctioned=False, budget_left=0, bypass=True)
            detail = describe_part(self._raw, part)
            record = self._refuse("bypass", reason, here, frame, here.scope, inputs, detail)
            if part is self._raw:
                self._remember(record, frame)
        return self._execute(record, run, args, kwargs)

    def _repeat_behind(
        self, part: nn.Module, frame: FrameType, here: Position, inputs: tuple[object, ...]
    ) -> CallRecord | None:
        """Admit a recompute by a checkpoint that holds the module itself, as composable ones do."""
        if part is not self._raw:
            return None
        with self._history.lock:
            again = self._recomputes.find(frame, hidden=is_composable(part))
            if again is None:
                return None
            return self._history.add_recompute(again.original, here, frame, inputs)

    def _execute(
        self,
        record: CallRecord,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the module, logging before and after."""
        inside = self._inside
        already_inside = inside.here
        sinks = self._history.sinks
        start = time.perf_counter()
        try:
            earlier = self._compiled.begin(record)
            for sink in sinks:
                sink.begin(record)
                if earlier is not None:
                    sink.hazard(record, earlier)
            inside.here = True
            result = in_range(record, run)(*args, **kwargs)
            self._compiled.end(record, result)
            record.outcome = "returned"
        except BaseException as error:
            stopped = stops_recomputing(error)
            record.outcome = "stopped early" if stopped else f"raised {type(error).__name__}"
            self._compiled.end(record)
            self._history.name_log(error)
            raise
        finally:
            inside.here = already_inside
            record.duration_ms = (time.perf_counter() - start) * 1e3
            for sink in sinks:
                sink.end(record)
        return result

    # Violations --------------------------------------------------------------------------------

    def _refuse(
        self,
        kind: Kind,
        reason: str | None,
        here: Position,
        frame: FrameType | None,
        scope: str | None,
        inputs: tuple[object, ...] = (),
        detail: str = "",
    ) -> CallRecord:
        """Record and log a violation, then raise it; in observe mode return its record."""
        ledger = here.micro_step
        with self._history.lock:
            record = self._history.add_violation(kind, reason, here, scope, frame, inputs)
            made = ledger.calls if ledger else {}
            earlier = tuple(ledger.spent(scope)) if ledger and scope else ()
        violation = build_violation(record, self.policy, made=made, earlier=earlier, detail=detail)
        if ledger is not None:
            ledger.violations.append(violation)
        for sink in self._history.sinks:
            sink.violation(violation)
        if self.mode == "observe":
            return record
        self._history.name_log(violation)
        try:
            raise violation
        finally:
            del violation  # or this frame, which its traceback holds, would hold it

    def _violate(self, reason: str, here: Position, detail: str) -> None:
        """Refuse something that is not a call."""
        if self.mode != "off":
            switches = ("NoContext", "ContextSwitchRefused")
            kind: Kind = "context" if reason in switches else "micro_step"
            self._refuse(kind, reason, here, sys._getframe(1), here.scope, detail=detail)

    def _require_context(self, what: str) -> Position:
        here = self._open.position()
        if here.context is None:
            self._violate("NoContext", here, f": {what}")
        return here

    # Blocks ------------------------------------------------------------------------------------

    @contextmanager
    def _block(
        self, block: Block, ledger: MicroStep | None = None, *, settles: bool = False
    ) -> Iterator[None]:
        """Hold a block open; violations that its body swallowed come out again when it ends.

        Args:
            ledger: the micro-step that the block works in.
            settles: whether that micro-step ends with the block.
        """
        enforced = ledger if self.mode == "enforce" else None
        here = self._open.position()
        try:
            here = self._open.push(block)  # kept, for the block may end in another thread
            yield
            if enforced is not None:
                enforced.raise_swallowed()
            if ledger is not None and settles and (unmet := ledger.unmet()):
                made = ", ".join(f"{s} made {n} of {due} calls" for s, (n, due) in unmet.items())
                self._violate("BudgetUnmet", here, f": {made}")
            if self._ranks and ledger is not None and settles and ledger.context == "training":
                self._ranks.settle(ledger.step, ledger.micro_step)
        except BaseException as error:
            for earlier, last in self._compiled.blame(error):
                for sink in self._history.sinks:
                    sink.overwritten(last, earlier, error)
            if enforced is not None:
                enforced.note_swallowed(error)
            if ledger is not None and settles and not isinstance(error, LensNetViolation):
                ledger.raised = type(error).__name__
            raise
        finally:
            self._open.remove(block)
            if ledger is not None and settles:
                for sink in self._history.sinks:
                    sink.micro_step(self.name, here.context, ledger)
                ledger.forget_tracebacks()

    # Copies, logs, the end ---------------------------------------------------------------------

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
        self._history.start_log(folder, self._header())

    @property
    def log_path(self) -> Path | None:
        """The file that the log is being written to; None without one."""
        return self._history.log.path if self._history.log is not None else None

    def evidence(self, folder: str | os.PathLike[str]) -> Path | None:
        """The file that tells of the calls so far: the log's, or one that is written now.

        Without a log the newest records are written to ``folder`` as a log is, for
        ``lensnet-guard postmortem``; each line bears the time of this writing.

        Returns:
            Its path; None when it could not be written.

        Raises:
            TypeError: ``folder`` is not a path.
        """
        if self._history.log is not None:
            return self.log_path
        header = {"module": self.name, **self._header()}
        return write_evidence(folder, header, self._history.newest(), self.policy)

    def _header(self) -> dict[str, Any]:
        """What the first line of a log says of the contract."""
        return {"mode": self.mode, "policy": self.policy.to_json()}

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
