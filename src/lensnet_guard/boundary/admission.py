"""Admission: each call of a module is decided on, booked, recorded and run here, or refused.

The proxy and the tripwire lead every run of the module to this place, by whatever door it comes.
"""

import copy
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from torch import nn

from lensnet_guard._torch_checkpoints import (
    is_composable,
    recomputed_checkpoint,
    stops_recomputing,
)
from lensnet_guard.boundary.claims import Claims, first_breach
from lensnet_guard.boundary.doors import Doors
from lensnet_guard.boundary.forwards import own_forward
from lensnet_guard.boundary.hazards import CompiledCalls
from lensnet_guard.boundary.inside import Inside
from lensnet_guard.boundary.profiling import in_range
from lensnet_guard.boundary.recompute import Recomputes
from lensnet_guard.boundary.tripwire import describe_part
from lensnet_guard.calls.budget import Window
from lensnet_guard.calls.call import Call
from lensnet_guard.calls.context import OpenBlocks, Position
from lensnet_guard.calls.errors import LensNetViolation, build_violation
from lensnet_guard.calls.policy import CallPolicy, Mode, decide
from lensnet_guard.calls.record import CallRecord, Kind, describe_inputs, frame_up
from lensnet_guard.calls.scope import MICRO_STEP
from lensnet_guard.logs.history import History, Refusal


class Admission:
    """The contract of one module, applied to each of its runs.

    Args:
        module: The raw module.
        policy: Who may call it in training, how often, and in what state.
        mode: ``"enforce"`` raises violations; with the others they are only recorded and logged.
        history: It takes the records, and knows who else is told.
        inside: It says whether a thread is inside an admitted run.

    Attributes:
        policy: The same.
        due_in_micro_step: The budgets of a micro-step, put together once.
        mode: The same.
        history: The same.
        inside: The same.
        open: The blocks that are open in each thread and task.
        compiled: The calls of the module as long as it is compiled.
        doors: By what ways calls come in, besides the proxy's own call.
        replaced: Whether a call has run another forward than the class's.
    """

    def __init__(
        self, module: nn.Module, policy: CallPolicy, mode: Mode, history: History, inside: Inside
    ) -> None:
        self.policy = policy
        self.due_in_micro_step = policy.due(MICRO_STEP)
        self.mode = mode
        self.history = history
        self.inside = inside
        self.open = OpenBlocks()
        self.compiled = CompiledCalls(module)
        self.doors = Doors(module, policy)
        self.replaced = False
        self._module = module
        self._recomputes = Recomputes()
        self._claims = Claims(policy)
        self._scopes = policy.in_full
        self._last: CallRecord | None = None
        self._unseen: list[LensNetViolation] = []

    # A call ------------------------------------------------------------------------------------

    def run(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: FrameType | None,
        method: str | None = None,
    ) -> Any:
        """Admit and run one call, as `Keeper.run` says."""
        record = self._admit(run, args, kwargs, frame, method)
        result = self._execute(record, run, args, kwargs)
        if self._claims.look_at_results and record.kind == "call" and record.verdict == "allow":
            self._check_result(self._call(run, args, kwargs, method), record, result, frame)
        return result

    def _admit(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: FrameType | None,
        method: str | None,
    ) -> CallRecord:
        """Decide on a call, book it and record it; raise when it is refused."""
        here = self.open.position()
        claims, call = self._claims, None
        if claims.look_at_calls:
            call = self._call(run, args, kwargs, method)
        scope, detail = here.scope, ""
        if scope is None and here.context == "training":
            scope, detail = claims.scope_of(here, frame, call)
        inputs = describe_inputs(args, kwargs)
        with self.history.lock:  # from reading the budget to spending it
            again = self._recomputes.find(frame)
            window, left = self._left(here, scope)
            facts = here.context, window is not None, left, self.inside.here, again is not None
            reason = decide(*facts)
            if again is not None:
                return self.history.add_recompute(again.original, here, frame, inputs)
            if reason is None and call is not None:  # under the lock, for conditions may remember
                call.context, call.scope, call.earlier = here.context, scope, self._last
                breach = first_breach(claims.requires(here.context, scope), call)
                reason = decide(*facts, breached=breach is not None)
                detail = f": {breach}"
            if reason is None:
                record = self.history.add_call(here, scope, frame, inputs, method)
                if window is not None and scope is not None:
                    window.spend(scope, record)
                self._recomputes.remember(record, frame)
                self._last = record
                return record
        if reason == "UnsanctionedCall" and scope is not None:
            detail = self._outside(scope)
        refusal = Refusal("call", reason, here, frame, scope, inputs, detail, method)
        record = self.refuse(refusal)
        self._remember(record, frame)
        return record

    def _call(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        method: str | None,
    ) -> Call:
        """Return what conditions are asked about."""
        function = self.doors.function(run, method)
        context = self.open.position().context
        return Call(self._module, method or "forward", function, args, kwargs, context)

    def _left(self, here: Position, scope: str | None) -> tuple[Window | None, int | None]:
        """Return the open window that a scope counts in, and the calls that are left in it."""
        if scope is None:
            return None, 0
        full = self._scopes[scope]
        if full.per == MICRO_STEP:
            window: Window | None = here.micro_step
        else:  # in inference calls are free, and nothing is booked
            window = here.window(full.per) if here.context == "training" else None
        most = full.most
        if most is None or window is None:
            return window, most
        return window, most - len(window.spent(scope))

    def _outside(self, scope: str) -> str:
        """Return what to say of a call whose scope is known, and whose window is not open."""
        full = self._scopes[scope]
        if full.per != MICRO_STEP:
            return f': its scope {scope!r} counts per "{full.per}", and no such window is open'
        who = "its sanctioned caller runs" if full.caller is not None else f"its scope {scope!r} is"
        return f": {who} outside any micro-step, where no budget counts"

    def _check_result(
        self, call: Call, record: CallRecord, result: Any, frame: FrameType | None
    ) -> None:
        """Refuse what an admitted call has returned, when it ought not to."""
        call.context, call.scope, call.result = record.context, record.scope, result
        breach = first_breach(self._claims.ensures(record.context, record.scope), call)
        if breach is not None:
            reason, here = "ConditionUnmet", self.open.position()
            detail = f" (call {record.seq}): {breach}"
            self.refuse(
                Refusal("result", reason, here, frame, record.scope, (), detail, record.method)
            )

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
        method: str | None = None,
    ) -> Any:
        """Judge a run of the module, or of a part or copy of it, that did not come by its proxy.

        It is a call by another door, or a part's run in a recompute, which looks like the module's
        own; else it is refused.

        Args:
            part: What is run.
            run: Its forward, its call or a method.
            args: The arguments by position.
            kwargs: The arguments by name.
            method: The name of the method, where the policy counts it.

        Returns:
            What the run returns, where it is admitted or only observed.

        Raises:
            LensNetViolation: The run is refused.
        """
        frame = frame_up(1)
        repeated = part is not self._module and recomputed_checkpoint(frame) is not None
        is_call = method is None and self.doors.admit(part)
        if is_call and (not repeated or self._recomputes.knows(frame)):
            return self.run(run, args, kwargs, frame, self.doors.name_of(part))
        if repeated:
            return self._run_inside(run, args, kwargs)
        here = self.open.position()
        inputs = describe_inputs(args, kwargs)
        record = self._repeat_behind(part, frame, here, inputs)
        if record is None:
            reason = decide(here.context, sanctioned=False, budget_left=0, bypass=True)
            detail = describe_part(self._module, part)
            refusal = Refusal("bypass", reason, here, frame, here.scope, inputs, detail, method)
            record = self.refuse(refusal)
            if part is self._module:
                self._remember(record, frame)
        return self._execute(record, run, args, kwargs)

    def _run_inside(
        self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.inside.here = True
        try:
            return run(*args, **kwargs)
        finally:
            self.inside.here = False

    def _repeat_behind(
        self, part: nn.Module, frame: FrameType, here: Position, inputs: tuple[object, ...]
    ) -> CallRecord | None:
        """Admit a recompute of the module itself, whose first run was not seen to be one.

        The checkpoint opened inside the module's call: a composable one, or in a method or a
        forward that somebody has put in the place of the class's.
        """
        if part is not self._module:
            return None
        hidden = is_composable(part) or self.replaced or bool(self.doors.methods)
        with self.history.lock:
            again = self._recomputes.find(frame, hidden=hidden)
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
        already_inside, running = inside.here, inside.running
        sinks = self.history.sinks
        start = time.perf_counter()
        try:
            earlier = self.compiled.begin(record)
            for sink in sinks:
                sink.begin(record)
                if earlier is not None:
                    sink.hazard(record, earlier)
            inside.here, inside.running = True, own_forward(self._module)
            self.replaced = self.replaced or inside.running is not None
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
            inside.here, inside.running = already_inside, running
            record.duration_ms = (time.perf_counter() - start) * 1e3
            for sink in sinks:
                sink.end(record)
        return result

    # Violations --------------------------------------------------------------------------------

    def refuse(self, refusal: Refusal, due_from: Sequence[str] = ()) -> CallRecord:
        """Record and log a violation, then raise it; in observe mode return its record.

        Args:
            refusal: What is refused.
            due_from: Who should have made calls that are missing.
        """
        here, scope = refusal.here, refusal.scope
        ledger = here.ledger
        with self.history.lock:
            record = self.history.add_violation(refusal)
            made = self._made(here)
            window = here.window(self._scopes[scope].per) if scope is not None else None
            earlier = tuple(window.spent(scope)) if window and scope else ()
        violation = build_violation(
            record,
            self.policy,
            made=made,
            earlier=earlier,
            detail=refusal.detail,
            due_from=due_from,
        )
        if ledger is not None:
            ledger.violations.append(violation)
        elif threading.current_thread() is not threading.main_thread():
            self._unseen.append(copy.copy(violation))  # without frames, for it may be long
        for sink in self.history.sinks:
            sink.violation(violation)
        if self.mode == "observe":
            return record
        self.history.name_log(violation)
        try:
            raise violation
        finally:
            del violation  # or this frame, which its traceback holds, would hold it

    def raise_unseen(self) -> None:
        """Raise a violation that a background thread raised outside of every window.

        Nobody waits for what such a thread raises, so it could pass in silence.
        """
        unseen, self._unseen = self._unseen, []
        if unseen and self.mode == "enforce":
            raise unseen[0]

    def _made(self, here: Position) -> dict[str, int]:
        """Return the calls so far of each scope whose window is open."""
        made = {}
        for name, full in self._scopes.items():
            if (window := here.window(full.per)) is not None:
                made[name] = len(window.spent(name))
        return made

    def require_context(self, what: str) -> Position:
        """Return what is open; refuse ``what`` where no context is declared."""
        here = self.open.position()
        if here.context is None:
            self.violate("NoContext", here, f": {what}")
        return here

    def violate(
        self,
        reason: str,
        here: Position,
        detail: str,
        *,
        kind: Kind = "context",
        due_from: Sequence[str] = (),
    ) -> None:
        """Refuse something that is not a call.

        Args:
            reason: The name of the violation's class.
            here: What is open.
            detail: What the headline of its message ends in.
            kind: Of its record.
            due_from: Who should have made calls that are missing.

        Raises:
            LensNetViolation: Of that class, where violations are raised.
        """
        if self.mode != "off":
            refusal = Refusal(kind, reason, here, frame_up(1), here.scope, detail=detail)
            self.refuse(refusal, due_from)
