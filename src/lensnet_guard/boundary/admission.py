"""Admission: each call of a module is decided on, booked, recorded and run here, or refused.

The proxy and the tripwire lead every run of the module to this place, by whatever door it comes.
"""

from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

from torch import nn

from lensnet_guard._torch_checkpoints import (
    is_composable,
    recomputed_checkpoint,
)
from lensnet_guard.boundary.claims import NOT_SAID, Claims, first_breach
from lensnet_guard.boundary.doors import Doors
from lensnet_guard.boundary.execution import Execution
from lensnet_guard.boundary.inside import Inside
from lensnet_guard.boundary.observer import Observer
from lensnet_guard.boundary.recompute import Recomputes
from lensnet_guard.boundary.tripwire import describe_part
from lensnet_guard.boundary.violations import Violations
from lensnet_guard.calls.budget import Window
from lensnet_guard.calls.call import Call
from lensnet_guard.calls.callers import Runs
from lensnet_guard.calls.context import OpenBlocks, Position
from lensnet_guard.calls.policy import CallPolicy, Mode, decide
from lensnet_guard.calls.record import CallRecord, describe_inputs, frame_up
from lensnet_guard.calls.scope import MICRO_STEP
from lensnet_guard.logs.history import History, Refusal

_BY_STATE = {"UnsanctionedCall", "BudgetExceeded", "ConditionUnmet"}  # which a state may explain


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
        violations: What becomes of them.
        execution: It runs what is admitted.
        runs: How often the callers of the policy have run; None before the first training.
        doors: By what ways calls come in, besides the proxy's own call.
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
        self.violations = Violations(policy, mode, history, self.open)
        self.execution = Execution(module, history, inside)
        self.runs: Runs | None = None
        self.doors = Doors(module, policy)
        self._module = module
        self._observer = Observer() if mode == "observe" else None
        self._recomputes = Recomputes()
        self._claims = Claims(policy)
        self._asks_nothing = self._observer is None and not self._claims.look_at_results
        self._scopes = policy.in_full
        self._last: CallRecord | None = None
        self._memory: dict[Any, Any] = {}

    def begin_training(self) -> None:
        """Look for the callers of the policy; by now they are all defined.

        Raises:
            ValueError: One of them does not exist, or never runs by that name.
        """
        self.runs = Runs(s.caller for s in self._scopes.values() if s.caller is not None)

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
        if self._asks_nothing:
            return self.execution.run(record, run, args, kwargs)
        note = None
        if self._observer is not None and self.history.log is not None and record.kind == "call":
            observed = self._call(run, args, kwargs, method)
            self._observer.begin(record, observed, frame, self.open.position())
            note = partial(self._observer.end, record, observed)
        result = self.execution.run(record, run, args, kwargs, note)
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
        claims, call, breach = self._claims, None, None
        if claims.look_at_calls:
            call = self._call(run, args, kwargs, method)
        claim = claims.scope_of(here, frame, call)
        scope = claim.scope
        inputs = describe_inputs(args, kwargs)
        with self.history.lock:  # from reading the budget to spending it
            again = self._recomputes.find(frame)
            window: Window | None = here.micro_step
            left = None
            if scope is not None:
                if scope in claims.windows:
                    window = self._window(here, scope)
                left = claims.most[scope]
                if window is not None and left is not None:
                    left -= len(window.spent(scope))
            sanctioned = window is not None and scope is not None
            facts = here.context, sanctioned, left, self.inside.here, again is not None
            reason = decide(*facts)
            if again is not None:
                return self.history.add_recompute(again.original, here, frame, inputs)
            if reason is None and call is not None:  # under the lock, for conditions may remember
                call.context, call.scope, call.earlier = here.context, scope, self._last
                breach = first_breach(claims.requires(here.context, scope), call)
                reason = decide(*facts, breached=breach is not None)
            if reason is None:
                record = self.history.add_call(here, scope, frame, inputs, method)
                if window is not None and scope is not None:
                    window.spend(scope, record)
                self._recomputes.remember(record, frame)
                self._last = record
                return record
            why = claims.explain(claim, breach, here) if reason in _BY_STATE else NOT_SAID
        if reason == "UnsanctionedCall" and scope is not None:
            why = claims.outside(scope, here)
        detail = f": {why.found}" if why.found else ""
        refusal = Refusal("call", reason, here, frame, scope, inputs, detail, method, why.mistake)
        record = self.violations.refuse(refusal)
        with self.history.lock:
            if reason == "ConditionUnmet" and window is not None and scope is not None:
                window.spend(scope, record)  # observed: it runs, and is one of those that were due
            self._recomputes.remember(record, frame)
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
        name, memory = method or "forward", self._memory
        return Call(self._module, name, function, args, kwargs, context, memory=memory)

    def _window(self, here: Position, scope: str) -> Window | None:
        """Return the open window of a scope that does not count per micro-step."""
        # In inference calls are free, and nothing is booked.
        return here.window(self._claims.windows[scope]) if here.context == "training" else None

    def _check_result(
        self, call: Call, record: CallRecord, result: Any, frame: FrameType | None
    ) -> None:
        """Refuse what an admitted call has returned, when it ought not to."""
        call.context, call.scope, call.result = record.context, record.scope, result
        breach = first_breach(self._claims.ensures(record.context, record.scope), call)
        if breach is not None:
            reason, here = "ConditionUnmet", self.open.position()
            detail, scope = f" (call {record.seq}): {breach.found}", record.scope
            what = reason, here, frame, scope, (), detail, record.method, breach.mistake
            self.violations.refuse(Refusal("result", *what))

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
            record = self.violations.refuse(refusal)
            if part is self._module:
                self._remember(record, frame)
        return self.execution.run(record, run, args, kwargs)

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
        hidden = is_composable(part) or self.execution.replaced or bool(self.policy.methods)
        with self.history.lock:
            again = self._recomputes.find(frame, hidden=hidden)
            if again is None:
                return None
            return self.history.add_recompute(again.original, here, frame, inputs)
