"""Admission: each call of a module is decided on, booked, recorded and run here, or refused.

The proxy and the tripwire lead every run of the module to this place, by whatever door it comes.
"""

import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import nn

from lensnet_guard._torch_checkpoints import is_composable, stops_recomputing
from lensnet_guard.boundary.hazards import CompiledCalls
from lensnet_guard.boundary.profiling import in_range
from lensnet_guard.boundary.recompute import Recomputes
from lensnet_guard.boundary.tripwire import Inside, describe_part
from lensnet_guard.calls.context import OpenBlocks, Position
from lensnet_guard.calls.errors import build_violation
from lensnet_guard.calls.policy import CallPolicy, Mode, decide
from lensnet_guard.calls.record import CallRecord, Kind, describe_inputs, find_caller, frame_up
from lensnet_guard.logs.history import History, Refusal


class Admission:
    """The contract of one module, applied to each of its runs.

    Args:
        module: The raw module.
        policy: Who may call it in training, and how often per micro-step.
        mode: ``"enforce"`` raises violations; with the others they are only recorded and logged.
        history: It takes the records, and knows who else is told.
        inside: It says whether a thread is inside an admitted run.

    Attributes:
        policy: The same.
        budgets: Those of the policy, put together once.
        mode: The same.
        history: The same.
        inside: The same.
        open: The blocks that are open in each thread and task.
        compiled: The calls of the module as long as it is compiled.
    """

    def __init__(
        self, module: nn.Module, policy: CallPolicy, mode: Mode, history: History, inside: Inside
    ) -> None:
        self.policy = policy
        self.budgets = policy.budgets
        self.mode = mode
        self.history = history
        self.inside = inside
        self.open = OpenBlocks()
        self.compiled = CompiledCalls(module)
        self._module = module
        self._recomputes = Recomputes()

    # A call ------------------------------------------------------------------------------------

    def run(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: FrameType | None,
    ) -> Any:
        """Admit and run one call, as `Keeper.run` says."""
        return self._execute(self._admit(args, kwargs, frame), run, args, kwargs)

    def _admit(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType | None
    ) -> CallRecord:
        """Decide on a call, book it and record it; raise when it is refused."""
        here = self.open.position()
        ledger, scope = here.micro_step, here.scope
        if scope is None and here.context == "training" and self.policy.sanctioned_callers:
            scope = find_caller(frame, self.policy.sanctioned_callers)
        inputs = describe_inputs(args, kwargs)
        with self.history.lock:  # from reading the budget to spending it
            again = self._recomputes.find(frame)
            spent = len(ledger.spent(scope)) if ledger and scope else 0
            reason = decide(
                here.context,
                ledger is not None and scope is not None,
                self.budgets[scope] - spent if scope else 0,
                self.inside.here,
                again is not None,
            )
            if again is not None:
                return self.history.add_recompute(again.original, here, frame, inputs)
            if reason is None:
                record = self.history.add_call(here, scope, frame, inputs)
                if ledger and scope:
                    ledger.spend(scope, record)
                self._recomputes.remember(record, frame)
                return record
        detail = ""
        if reason == "UnsanctionedCall" and scope in self.policy.sanctioned_callers:
            detail = ": its sanctioned caller runs outside any micro-step, where no budget counts"
        record = self.refuse(Refusal("call", reason, here, frame, scope, inputs, detail))
        self._remember(record, frame)
        return record

    def _remember(self, record: CallRecord, frame: FrameType | None) -> None:
        """Note an observed violation too: when it is recomputed, that is no second one."""
        with self.history.lock:
            self._recomputes.remember(record, frame)

    def run_behind(
        self,
        part: nn.Module,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Refuse a run of the module, or of a part or copy of it, that nobody admitted.

        Args:
            part: What is run.
            run: Its forward.
            args: The arguments by position.
            kwargs: The arguments by name.

        Returns:
            What the forward returns, in observe mode and in a recompute.

        Raises:
            BypassedGuard: The run is refused.
        """
        frame = frame_up(1)
        here = self.open.position()
        inputs = describe_inputs(args, kwargs)
        record = self._repeat_behind(part, frame, here, inputs)
        if record is None:
            reason = decide(here.context, sanctioned=False, budget_left=0, bypass=True)
            detail = describe_part(self._module, part)
            record = self.refuse(Refusal("bypass", reason, here, frame, here.scope, inputs, detail))
            if part is self._module:
                self._remember(record, frame)
        return self._execute(record, run, args, kwargs)

    def _repeat_behind(
        self, part: nn.Module, frame: FrameType, here: Position, inputs: tuple[object, ...]
    ) -> CallRecord | None:
        """Admit a recompute by a checkpoint that holds the module itself, as composable ones do."""
        if part is not self._module:
            return None
        with self.history.lock:
            again = self._recomputes.find(frame, hidden=is_composable(part))
            if again is None:
                return None
            return self.history.add_recompute(again.original, here, frame, inputs)

    def _execute(
        self,
        record: CallRecord,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the module, logging before and after."""
        inside = self.inside
        already_inside = inside.here
        sinks = self.history.sinks
        start = time.perf_counter()
        try:
            earlier = self.compiled.begin(record)
            for sink in sinks:
                sink.begin(record)
                if earlier is not None:
                    sink.hazard(record, earlier)
            inside.here = True
            result = in_range(record, run)(*args, **kwargs)
            self.compiled.end(record, result)
            record.outcome = "returned"
        except BaseException as error:
            stopped = stops_recomputing(error)
            record.outcome = "stopped early" if stopped else f"raised {type(error).__name__}"
            self.compiled.end(record)
            self.history.name_log(error)
            raise
        finally:
            inside.here = already_inside
            record.duration_ms = (time.perf_counter() - start) * 1e3
            for sink in sinks:
                sink.end(record)
        return result

    # Violations --------------------------------------------------------------------------------

    def refuse(self, refusal: Refusal) -> CallRecord:
        """Record and log a violation, then raise it; in observe mode return its record."""
        ledger, scope = refusal.here.micro_step, refusal.scope
        with self.history.lock:
            record = self.history.add_violation(refusal)
            made = ledger.calls if ledger else {}
            earlier = tuple(ledger.spent(scope)) if ledger and scope else ()
        violation = build_violation(
            record, self.policy, made=made, earlier=earlier, detail=refusal.detail
        )
        if ledger is not None:
            ledger.violations.append(violation)
        for sink in self.history.sinks:
            sink.violation(violation)
        if self.mode == "observe":
            return record
        self.history.name_log(violation)
        try:
            raise violation
        finally:
            del violation  # or this frame, which its traceback holds, would hold it

    def require_context(self, what: str) -> Position:
        """Return what is open; refuse ``what`` where no context is declared."""
        here = self.open.position()
        if here.context is None:
            self.violate("NoContext", here, f": {what}")
        return here

    def violate(self, reason: str, here: Position, detail: str) -> None:
        """Refuse something that is not a call.

        Args:
            reason: The name of the violation's class.
            here: What is open.
            detail: What the headline of its message ends in.

        Raises:
            LensNetViolation: Of that class, where violations are raised.
        """
        if self.mode != "off":
            switches = ("NoContext", "ContextSwitchRefused")
            kind: Kind = "context" if reason in switches else "micro_step"
            self.refuse(Refusal(kind, reason, here, frame_up(1), here.scope, detail=detail))
