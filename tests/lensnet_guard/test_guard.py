"""The guard as a whole: calls, swallowed violations, modes."""

import contextlib
import gc
import sys
import threading
import weakref

import pytest
import torch
from tests.lensnet_guard.helpers import SCOPE
from torch import nn

from lensnet_guard import (
    BudgetExceeded,
    ContextSwitchRefused,
    Guard,
    LensNetViolation,
    NoContext,
    ReentrantCall,
    UnsanctionedCall,
    guard_module,
)


class TestRefusedCallsNeverReachTheModule:
    @pytest.mark.parametrize("entry", ["__call__", "forward"])
    def test_forward_hooks_and_parameters(self, scorer, guard, x, entry):
        """Neither hooks nor forward run when a call is refused, and its result is nobody's."""
        seen = []
        scorer.register_forward_pre_hook(lambda *_: seen.append("pre"))
        scorer.register_forward_hook(lambda *_: seen.append("post"))
        call = getattr(guard.module, entry)
        with pytest.raises(NoContext):
            call(x)
        with guard.context("training"):
            with pytest.raises(UnsanctionedCall):
                call(x)
            with pytest.raises(BudgetExceeded), guard.sanctioned(SCOPE):
                call(x)
                call(x)
        assert scorer.runs == guard.count() == 1
        assert len(guard.violations) == 3
        assert len(seen) == (2 if entry == "__call__" else 0)

    def test_reentrant_call(self, scorer, guard, x):
        """A forward that calls the proxy runs once, not twice; the error comes out of it."""
        scorer.inside = lambda: guard.module(x)
        with guard.context("inference"), pytest.raises(ReentrantCall):
            guard.module(x)
        assert scorer.runs == 1
        assert [r.outcome for r in guard.calls] == ["raised ReentrantCall", "refused"]

    def test_reentrancy_ends_with_the_run(self, scorer, guard, x):
        """After a refused re-entry the module can be called as before."""
        scorer.inside = lambda: guard.module(x)
        with guard.context("inference"):
            for _ in range(3):
                with pytest.raises(ReentrantCall):
                    guard.module(x)
            scorer.inside = None
            guard.module(x)
        assert scorer.runs == guard.count() == 4

    def test_reentrancy_swallowed_by_the_forward(self, scorer, guard, x):
        """A forward that hides the refused re-entry does not hide it from its scope."""

        def again():
            with contextlib.suppress(ReentrantCall):
                guard.module(x)

        scorer.inside = again
        with guard.context("training"), pytest.raises(ReentrantCall), guard.sanctioned(SCOPE):
            guard.module(x)
        assert scorer.runs == 1

    def test_other_threads_are_no_reentrancy(self, scorer, guard, x, in_thread):
        """While one thread is inside the module, another may call it."""
        scorer.inside = lambda: (
            scorer.__setattr__("inside", None),
            in_thread(guard.carry(guard.module), x),
        )
        with guard.context("inference"):
            guard.module(x)
        assert scorer.runs == 2

    def test_two_guards_are_no_reentrancy(self, make_guard, x):
        """A guarded module may call another guarded module."""
        outer, inner = make_guard(), make_guard()
        outer.module.inside = lambda: inner.module(x)
        with outer.context("inference"), inner.context("inference"):
            outer.module(x)
        assert outer.count() == inner.count() == 1

    def test_thread_without_any_python_frame_was_a_value_error(self, scorer, guard, x, monkeypatch):
        """A call straight from C, with no Python frame below, is judged like any other."""
        import _thread

        done, errors = threading.Event(), []

        def hook(failure):
            errors.append(failure.exc_value)
            done.set()

        monkeypatch.setattr(sys, "unraisablehook", hook)
        _thread.start_new_thread(guard.module, (x,))
        assert done.wait(timeout=30)
        assert type(errors[0]) is NoContext
        assert "called from" not in str(errors[0])
        assert guard.violations[0].stack() == []
        errors.clear()
        scorer.inside = done.set
        done.clear()
        with guard.context("inference"):
            _thread.start_new_thread(guard.carry(guard.module), (x,))
            assert done.wait(timeout=30)
        assert scorer.runs == 1


class TestOutcomes:
    def test_returned(self, guard, x):
        """The result is the module's own, with its graph."""
        with guard.context("inference"):
            result = guard.module(x)
        result.sum().backward()
        assert guard.module.linear.weight.grad is not None
        assert guard.calls[0].outcome == "returned"

    def test_module_that_raises(self, scorer, guard, x):
        """The module's exception comes out as it is; the budget is spent, the state clean."""
        error = ZeroDivisionError("mine")

        def fail():
            raise error

        scorer.inside = fail
        with guard.context("training"):
            with pytest.raises(BudgetExceeded) as caught, guard.micro_step():
                with guard.sanctioned(SCOPE) as ledger:
                    with pytest.raises(ZeroDivisionError) as first:
                        guard.module(x)
                    assert first.value is error
                    assert ledger.calls == {SCOPE: 1}
                    guard.module(x)
        assert guard.calls[0].outcome == "raised ZeroDivisionError"
        assert guard.calls[0].duration_ms > 0
        assert caught.value.earlier == guard.calls[:1]
        assert scorer.runs == 1

    def test_wrong_arguments(self, guard):
        """Arguments that the module cannot take are the module's error, not the guard's."""
        with guard.context("inference"), pytest.raises(TypeError, match="forward"):
            guard.module()
        assert guard.calls[0].outcome == "raised TypeError"

    def test_arguments_pass_through(self, scorer, guard, x):
        """Positional and keyword arguments arrive as the same objects."""
        seen = []
        scorer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        mark = object()
        with guard.context("inference"):
            guard.module(x, run=mark, self_guard=1, args=2, kwargs=3, frame=4)
        ((args, kwargs),) = seen
        assert args[0] is x
        assert kwargs == {"run": mark, "self_guard": 1, "args": 2, "kwargs": 3, "frame": 4}


class TestCount:
    def test_a_misspelt_context_counted_nothing(self, guard):
        """And the assertion on it passed."""
        with pytest.raises(ValueError, match='must be "training" or "inference", not \'train\''):
            guard.count("train")


class TestSwallowedViolations:
    def swallow(self, guard, x):
        with contextlib.suppress(Exception):
            guard.module(x)

    def test_come_out_at_the_end_of_the_scope(self, make_guard, x):
        """The very same exception is raised again when the scope ends."""
        guard = make_guard(a=1)
        with guard.context("training"), pytest.raises(BudgetExceeded) as last:
            with guard.sanctioned("a"):
                guard.module(x)
                with pytest.raises(BudgetExceeded) as first:
                    guard.module(x)
        assert last.value is first.value
        assert guard.violation_count == 1

    def test_come_out_again_at_the_end_of_the_micro_step(self, guard, x):
        """Swallowed at the scope's end as well, it is there at the micro-step's end."""
        with guard.context("training"), pytest.raises(BudgetExceeded) as last, guard.micro_step():
            with pytest.raises(BudgetExceeded) as first, guard.sanctioned(SCOPE):
                guard.module(x)
                self.swallow(guard, x)
        assert last.value is first.value
        assert guard.violation_count == 1

    def test_of_a_call_outside_the_scope(self, guard, x):
        """An unsanctioned call of the micro-step spoils it, also when its budget is met."""
        with guard.context("training"), pytest.raises(UnsanctionedCall), guard.micro_step():
            self.swallow(guard, x)
            with contextlib.suppress(LensNetViolation), guard.sanctioned(SCOPE):
                guard.module(x)

    def test_of_a_refused_block(self, guard, x):
        """A switch of context that was refused and swallowed comes out too."""
        with guard.context("training"), pytest.raises(ContextSwitchRefused), guard.micro_step():
            with contextlib.suppress(Exception), guard.context("inference"):
                pytest.fail("the block was entered")

    def test_the_first_of_several(self, guard, x):
        """The first violation is the cause of the others, so that is the one raised."""
        with guard.context("training"), pytest.raises(UnsanctionedCall) as caught:
            with guard.micro_step() as ledger:
                self.swallow(guard, x)
                self.swallow(guard, x)
        assert [v.record.seq for v in ledger.violations] == [1, 2]
        assert caught.value.record is ledger.violations[0].record

    def test_in_a_carried_thread(self, guard, x, in_thread):
        """A violation that only a thread saw fails the micro-step that it belongs to."""
        with guard.context("training"), pytest.raises(BudgetExceeded), guard.sanctioned(SCOPE):
            guard.module(x)
            in_thread(guard.carry(lambda: self.swallow(guard, x)))

    def test_goes_before_the_unmet_budget(self, guard, x):
        """A refused call explains the missing one, so the budget is not told of."""
        with guard.context("training"), pytest.raises(UnsanctionedCall), guard.micro_step():
            self.swallow(guard, x)
        assert [r.reason for r in guard.violations] == ["UnsanctionedCall"]

    def test_not_swallowed_is_not_raised_twice(self, guard, x):
        """A violation on its way out passes the blocks once, without notes."""
        with guard.context("training"), pytest.raises(UnsanctionedCall) as caught:
            with guard.micro_step(), guard.context("training"):
                guard.module(x)
        assert not hasattr(caught.value, "__notes__")
        assert caught.value.__context__ is None

    def test_next_micro_step_is_clean(self, guard, x):
        """A swallowed violation spoils its own micro-step only."""
        with guard.context("training"):
            with contextlib.suppress(UnsanctionedCall), guard.micro_step():
                self.swallow(guard, x)
            with guard.micro_step() as ledger, guard.sanctioned(SCOPE):
                guard.module(x)
        assert (guard.violation_count, ledger.violations) == (1, [])

    def test_outside_any_micro_step(self, guard, x):
        """Without a micro-step there is no end to come out at; the record stays."""
        with guard.context("training"):
            self.swallow(guard, x)
        assert [r.reason for r in guard.violations] == ["UnsanctionedCall"]

    def test_is_noted_on_an_unrelated_exception(self, guard, x):
        """Another exception is not replaced; it tells of the violation, once."""
        with guard.context("training"), pytest.raises(ValueError, match="mine") as caught:
            with guard.micro_step(), guard.sanctioned(SCOPE):
                guard.module(x)
                self.swallow(guard, x)
                raise ValueError("mine")
        assert caught.value.__notes__ == [
            "Before this, a LensNetViolation was swallowed: Scorer was called in training more "
            "often than its budget allows."
        ]

    def test_is_not_noted_on_an_exception_that_shows_it(self, guard, x):
        """An exception raised from the violation shows it in its traceback already."""
        with guard.context("training"), pytest.raises(ValueError, match="mine") as caught:
            with guard.micro_step():
                try:
                    guard.module(x)
                except LensNetViolation as error:
                    raise ValueError("mine") from error
        assert not hasattr(caught.value, "__notes__")

    def test_frees_what_the_traceback_held(self, guard, x):
        """After the micro-step is gone, no violation keeps the refused call's tensors alive."""

        def step():
            given = x * 2
            with contextlib.suppress(LensNetViolation), guard.context("training"):
                with guard.micro_step():
                    self.swallow(guard, given)
            return weakref.ref(given)

        ref = step()
        gc.collect()
        assert ref() is None


class TestObserve:
    def test_records_and_runs(self, scorer, x):
        """Every violation is recorded, nothing is raised, every call runs."""
        guard = guard_module(scorer, mode="observe")
        scorer.inside = lambda: scorer.runs == 5 and guard.module(x)
        guard.module(x)
        with guard.micro_step():
            pass
        with guard.context("training"):
            guard.module(x)
            with guard.micro_step():
                with guard.micro_step():
                    guard.module(x)
                with guard.context("inference"):
                    guard.module(x)
                with guard.sanctioned(SCOPE):
                    guard.module(x)
        assert [r.reason for r in guard.violations] == [
            *("NoContext", "NoContext", "UnsanctionedCall", "ContextSwitchRefused"),
            *("UnsanctionedCall", "BudgetUnmet", "ContextSwitchRefused", "ReentrantCall"),
        ]
        assert scorer.runs == 6
        assert guard.count() == 2

    def test_refused_call_that_ran(self, scorer, x):
        """Its verdict says refuse, its outcome says that it returned; no budget is spent."""
        guard = guard_module(scorer, mode="observe")
        with guard.context("training"), guard.sanctioned(SCOPE) as ledger:
            guard.module(x)
            guard.module(x)
        allowed, refused = guard.calls
        assert (refused.verdict, refused.reason) == ("refuse", "BudgetExceeded")
        assert refused.outcome == "returned"
        assert refused.duration_ms > 0
        assert ledger.calls == {SCOPE: 1}
        assert (allowed.verdict, scorer.runs, guard.count()) == ("allow", 2, 1)

    def test_micro_step_forgot_its_violations(self, scorer, x):
        """The ledger knows of the violations that were observed, and raises none."""
        guard = guard_module(scorer, mode="observe")
        with guard.context("training"), guard.micro_step() as ledger:
            guard.module(x)
            with guard.sanctioned(SCOPE):
                guard.module(x)
        assert [type(v) for v in ledger.violations] == [UnsanctionedCall]

    def test_unrelated_exception_has_no_note(self, scorer, x):
        """Nothing was raised, so nothing was swallowed."""
        guard = guard_module(scorer, mode="observe")
        with guard.context("training"), pytest.raises(KeyError) as caught, guard.micro_step():
            guard.module(x)
            raise KeyError
        assert not hasattr(caught.value, "__notes__")

    def test_reentrancy_ends_with_the_outer_run(self, scorer, x):
        """The observed inner run does not end the outer one's."""
        guard = guard_module(scorer, mode="observe")
        scorer.inside = lambda: scorer.runs == 1 and (guard.module(x), guard.module(x))
        with guard.context("inference"):
            guard.module(x)
            guard.module(x)
        assert [r.reason for r in guard.calls] == [None, "ReentrantCall", "ReentrantCall", None]

    def test_mistakes_of_the_user_still_raise(self, scorer):
        """A wrong word is no violation of the contract and is never passed over."""
        guard = guard_module(scorer, mode="observe")
        with pytest.raises(ValueError), guard.context("train"):
            pytest.fail("the block was entered")
        with pytest.raises(ValueError), guard.sanctioned("other"):
            pytest.fail("the block was entered")


class TestOff:
    def test_is_the_raw_module(self, scorer, x):
        """Nothing stands between the user and the module, and nothing is counted."""
        guard = guard_module(scorer, mode="off")
        assert guard.module is scorer
        guard.module(x)
        assert (guard.count(), guard.calls, guard.violations) == (0, (), ())

    def test_blocks_work_and_refuse_nothing(self, scorer, x):
        """Code with contexts, micro-steps and scopes runs as it is."""
        guard = guard_module(scorer, mode="off")
        with guard.micro_step(1), guard.sanctioned(SCOPE):
            guard.module(x)
        with guard.context("training"), guard.micro_step(), guard.micro_step():
            assert guard.current_context == "training"
            with guard.context("inference"):
                assert guard.carry(lambda: guard.current_context)() == "inference"
        assert guard.violation_count == 0
        assert guard.current_context is None


class TestModes:
    @pytest.mark.parametrize("mode", ["enforce", "observe", "off"])
    def test_argument(self, mode):
        """Each mode can be given as argument."""
        assert guard_module(nn.Linear(1, 1), mode=mode).mode == mode

    @pytest.mark.parametrize("mode", ["enforce", "observe", "off"])
    def test_environment(self, monkeypatch, mode):
        """Without an argument LENSNET_GUARD decides."""
        monkeypatch.setenv("LENSNET_GUARD", mode)
        assert guard_module(nn.Linear(1, 1)).mode == mode

    @pytest.mark.parametrize("value", [None, ""])
    def test_default_is_enforce(self, monkeypatch, value):
        """Unset or empty, the variable decides nothing."""
        if value is not None:
            monkeypatch.setenv("LENSNET_GUARD", value)
        assert guard_module(nn.Linear(1, 1)).mode == "enforce"

    def test_argument_goes_before_the_environment(self, monkeypatch):
        """What the code says, no variable can switch off."""
        monkeypatch.setenv("LENSNET_GUARD", "off")
        assert guard_module(nn.Linear(1, 1), mode="enforce").mode == "enforce"
        monkeypatch.setenv("LENSNET_GUARD", "nonsense")
        assert guard_module(nn.Linear(1, 1), mode="observe").mode == "observe"

    def test_environment_is_read_when_the_guard_is_made(self, monkeypatch, x):
        """A later change of the variable changes no existing guard."""
        guard = guard_module(nn.Linear(3, 1))
        monkeypatch.setenv("LENSNET_GUARD", "off")
        with pytest.raises(NoContext):
            guard.module(x)

    @pytest.mark.parametrize("value", ["ENFORCE", "on", "1", " off", "enforce,observe"])
    def test_bad_environment(self, monkeypatch, value):
        """A misspelt variable is an error, never a silent off."""
        monkeypatch.setenv("LENSNET_GUARD", value)
        with pytest.raises(ValueError) as caught:
            guard_module(nn.Linear(1, 1))
        assert str(caught.value) == (
            "the environment variable LENSNET_GUARD must be one of enforce, observe, off, "
            f"not {value!r}"
        )

    @pytest.mark.parametrize("mode", ["", "OFF", True, 0, ["off"]])
    def test_bad_argument(self, mode):
        """A wrong mode is refused by name."""
        with pytest.raises(ValueError) as caught:
            guard_module(nn.Linear(1, 1), mode=mode)
        assert str(caught.value) == f"mode must be one of enforce, observe, off, not {mode!r}"


class TestReading:
    def test_count_by_context_and_scope(self, make_guard, x):
        """Each filter counts what it names; both together count both."""
        guard = make_guard(a=2, b=1)
        with guard.context("inference"):
            guard.module(x)
            with guard.sanctioned("a"):
                guard.module(x)
        with guard.context("training"), guard.micro_step():
            with guard.sanctioned("a"):
                guard.module(x)
                guard.module(x)
            with guard.sanctioned("b"):
                guard.module(x)
        assert guard.count() == 5
        assert guard.count("inference") == 2
        assert guard.count("training") == 3
        assert guard.count(scope="a") == 3
        assert guard.count("training", "a") == 2
        assert guard.count("inference", "b") == 0

    def test_refused_calls_do_not_count(self, guard, x):
        """count() is about calls that ran."""
        for _ in range(3):
            with pytest.raises(NoContext):
                guard.module(x)
        assert (guard.count(), guard.violation_count, len(guard.calls)) == (0, 3, 3)

    def test_calls_and_violations_are_snapshots(self, guard, x):
        """A tuple that was read does not change with later calls."""
        with guard.context("inference"):
            guard.module(x)
            calls = guard.calls
            guard.module(x)
        assert len(calls) == 1
        assert type(calls) is type(guard.violations) is tuple

    def test_repr(self, guard, x):
        """The repr names module and mode, and counts."""
        with guard.context("inference"):
            guard.module(x)
        with contextlib.suppress(NoContext):
            guard.module(x)
        assert repr(guard) == "<Guard of Scorer: enforce, 1 calls, 1 violations>"

    def test_guard_and_module_are_collected(self, make_guard, x):
        """A guard that nobody holds goes, and its module with it."""
        guard = make_guard()
        with guard.context("inference"):
            guard.module(x)
        watched = [weakref.ref(guard), weakref.ref(guard.module.__wrapped__)]
        del guard
        gc.collect()
        assert [ref() for ref in watched] == [None, None]

    def test_isinstance(self, guard):
        """guard_module gives a Guard."""
        assert isinstance(guard, Guard)


class TestRealModules:
    def test_transformer_with_masks(self):
        """An encoder called with keyword masks trains under the guard, once per micro-step."""
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        guard = guard_module(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
        optimizer = torch.optim.SGD(guard.module.parameters(), lr=0.1)
        before = [p.clone() for p in guard.module.parameters()]
        mask = torch.zeros(2, 5, dtype=torch.bool)
        with guard.context("training"):
            for step in range(3):
                with guard.micro_step(step), guard.sanctioned(SCOPE):
                    out = guard.module(torch.randn(2, 5, 8), src_key_padding_mask=mask)
                optimizer.zero_grad()
                out.square().mean().backward()
                optimizer.step()
        assert guard.count("training", SCOPE) == 3
        assert guard.calls[0].inputs == (
            "float32[2, 5, 8] cpu",
            "src_key_padding_mask=bool[2, 5] cpu",
        )
        after = guard.module.parameters()
        assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
