"""Windows: budgets that count per optimizer step, or per stretch that the trainer opens."""

import pickle
import re

import pytest
from tests.lensnet_guard.helpers import FILE, X, read
from torch import nn

from lensnet_guard import (
    BudgetExceeded,
    BudgetUnmet,
    CallPolicy,
    ContextSwitchRefused,
    NoContext,
    Scope,
    UnsanctionedCall,
    guard_module,
)


def windowed(mode=None, log=None, **scopes):
    """A guard whose one scope counts per generation, unless others are given."""
    scopes = scopes or {"reference": Scope((1, 2), per="generation")}
    return guard_module(nn.Linear(3, 2), policy=CallPolicy(scopes), mode=mode, log=log)


def score(guard, times=1, scope="reference"):
    with guard.sanctioned(scope):
        for _ in range(times):
            guard.module(X)


def ask(guard):
    guard.module(X)


class TestBudget:
    def test_counts_over_micro_steps_and_steps(self):
        """As GRPO does: scored in the first micro-step, and not at all in those that follow."""
        guard = windowed()
        with guard.context("training"):
            for _ in range(2):
                with guard.window("generation") as window:
                    for step in range(3):
                        for micro_step in range(2):
                            with guard.micro_step(step, micro_step):
                                if (step, micro_step) == (0, 0):
                                    score(guard, 2)
                assert window.calls == {"reference": 2}
        assert (guard.count("training", "reference"), guard.violation_count) == (4, 0)

    def test_one_that_has_ended(self):
        """A call that comes after it, in the same micro-step: it is one too many."""
        caller = f"{__name__}:ask"
        guard = windowed(reference=Scope((1, 2), per="generation", caller=caller))
        with guard.context("training"), pytest.raises(UnsanctionedCall) as refused:
            with guard.micro_step() as micro_step:
                with pytest.raises(KeyError), guard.window("generation"):
                    raise KeyError("mine")
                assert micro_step.ended == set()  # it was broken off
                with guard.window("generation"):
                    ask(guard)
                assert micro_step.ended == {"generation"}
                ask(guard)
        told = "'reference' counts per \"generation\", and that of this micro-step has ended."
        assert str(refused.value).splitlines()[0].endswith(told)
        assert refused.value.mistake == "called-twice"

    def test_one_of_the_micro_step_before(self):
        """It is none of this one's."""
        caller = f"{__name__}:ask"
        guard = windowed(reference=Scope((1, 2), per="generation", caller=caller))
        with guard.context("training"), pytest.raises(UnsanctionedCall) as refused:
            with guard.micro_step(), guard.window("generation"):
                ask(guard)
            with guard.micro_step(1):
                ask(guard)
        assert 'counts per "generation", and no such window is open.' in str(refused.value)
        assert refused.value.mistake == "called-from-elsewhere"

    def test_counts_outside_of_micro_steps(self):
        """As PPO does: a rollout is scored, and trained on afterwards."""
        guard = windowed()
        with guard.context("training"):
            with guard.window("generation"):
                score(guard)
            with guard.micro_step():
                pass
        assert guard.violation_count == 0

    def test_too_many(self):
        """The message has the window's own numbers, and the calls that spent it."""
        guard = windowed()
        with guard.context("training"), guard.window("generation"), guard.micro_step(4, 1):
            with pytest.raises(BudgetExceeded) as caught:
                score(guard, 3)
            lines = str(caught.value).splitlines()
            guard._admission.open.position().micro_step.violations.clear()
        assert lines[0] == "Linear was called in training more often than its budget allows."
        assert '  budget       reference: 2 of 1 to 2 spent in this window "generation"' in lines
        assert [call.seq for call in caught.value.earlier] == [1, 2]

    def test_too_few(self):
        """It is told as the window ends, not before."""
        guard = windowed()
        with guard.context("training"), pytest.raises(BudgetUnmet) as caught:
            with guard.window("generation"), guard.micro_step(3):
                pass
        lines = str(caught.value).splitlines()
        assert lines[:2] == [
            "A window ended before the call budget of Linear was met: in 'generation' reference "
            "made 0 of 1 to 2 calls.",
            '  due from     `with guard.sanctioned("reference"):`, which was not opened',
        ]
        assert caught.value.record.kind == "window"
        assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args

    def test_a_window_that_raises_owes_nothing(self):
        """What ends a training early is told instead."""
        guard = windowed()
        with guard.context("training"), pytest.raises(KeyError), guard.window("generation"):
            raise KeyError("mine")
        assert guard.violation_count == 0

    def test_without_limit(self):
        """Any number, from the least on."""
        guard = windowed(ema=Scope((2, None), per="step"))
        with guard.context("training"):
            with guard.window("step"):
                score(guard, 50, "ema")
            with pytest.raises(BudgetUnmet, match="'step' ema made 1 of 2 or more calls"):
                with guard.window("step"):
                    score(guard, 1, "ema")

    def test_of_several_scopes_in_several_windows(self):
        """Each scope counts in its own window, whatever else is open."""
        guard = windowed(kl=1, ema=Scope(1, per="step"), reference=Scope((0, 3), per="generation"))
        with guard.context("training"), guard.window("generation") as generation:
            for step in range(2):
                with guard.window("step"):
                    for micro_step in range(2):
                        with guard.micro_step(step, micro_step):
                            score(guard, 1, "kl")
                    score(guard, 1, "ema")
            score(guard, 3)
        assert generation.calls == {"reference": 3}
        assert {s: guard.count("training", s) for s in ("kl", "ema", "reference")} == {
            "kl": 4,
            "ema": 2,
            "reference": 3,
        }
        assert guard.violation_count == 0


class TestBlocks:
    def test_inference_inside_is_free(self):
        """An evaluation in the midst of a window is not counted in it."""
        guard = windowed()
        with guard.window("generation") as window:
            with guard.context("training"):
                score(guard)
            with guard.context("inference"):
                for _ in range(5):
                    guard.module(X)
                score(guard, 5)
        assert window.calls == {"reference": 1}
        assert guard.violation_count == 0

    def test_opened_in_inference_it_asks_for_nothing(self):
        """The same trainer code evaluates."""
        guard = windowed()
        with guard.context("inference"), guard.window("generation"):
            guard.module(X)
        assert guard.violation_count == 0

    def test_opened_before_any_context(self):
        """A window may hold the context's block; what it asks for is due."""
        guard = windowed()
        with pytest.raises(BudgetUnmet), guard.window("generation"), guard.context("training"):
            pass

    def test_twice_at_once(self):
        """A window in a window of its own name is refused; one after the other is not."""
        guard = windowed(mode="observe")
        with guard.context("training"), guard.window("generation"):
            score(guard)
            with guard.window("generation"):
                score(guard)
        assert [r.reason for r in guard.violations] == ["ContextSwitchRefused"]
        guard = windowed()
        with guard.context("training"), pytest.raises(ContextSwitchRefused) as caught:
            with guard.window("generation"), guard.window("generation"):
                pytest.fail("it was opened")
        assert str(caught.value).startswith(
            "Linear cannot change context inside an open micro-step: another window 'generation' "
            "was asked for."
        )

    def test_opened_or_closed_twice(self):
        """One window object is one block, whoever opens and closes it; nothing is settled twice."""
        guard = windowed(mode="observe")
        window = guard.window("generation")
        this = r"^this window 'generation' of Linear is "
        with pytest.raises(RuntimeError, match=f"{this}not open, and was to be closed$"):
            window.__exit__(None, None, None)
        window.__enter__()
        with pytest.raises(RuntimeError, match=f"{this}opened already; open another, "):
            window.__enter__()
        window.__exit__(None, None, None)
        with pytest.raises(RuntimeError, match=f"{this}closed already$"):
            window.__exit__(None, None, None)
        assert guard._admission.open.position().blocks == ()
        assert [r.reason for r in guard.violations] == ["BudgetUnmet"]

    def test_refused_it_is_not_open(self):
        """What could not be opened can be opened later."""
        guard = windowed()
        later = guard.window("generation")
        with guard.window("generation") as first:
            with pytest.raises(ContextSwitchRefused):
                later.__enter__()
            first.violations.clear()
            with guard.context("training"):
                score(guard)
        with later, guard.context("training"):
            score(guard)
        assert guard.violation_count == 1

    @pytest.mark.parametrize("name", ["generatoin", "micro_step", "", None, 3])
    def test_a_name_that_no_scope_counts_in(self, name):
        """A window in which nothing would be counted is a mistake."""
        message = (
            f"{name!r} is not a window of Linear's policy, whose scopes count per "
            "['generation', 'micro_step']"
        )
        guard = windowed()
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"), guard.window(name):
            pytest.fail("it was opened")

    def test_any_window_is_observed(self, tmp_path):
        """What a contract could count in is to be found out; nothing is due there."""
        guard = guard_module(nn.Linear(3, 2), policy=CallPolicy({}), mode="observe", log=tmp_path)
        with guard.context("training"), guard.window("rollout"):
            guard.module(X)
        guard.end_log()
        ended = [line["window"] for line in read(tmp_path / FILE) if line["event"] == "window.end"]
        assert ended == ["rollout"]

    def test_every_training_has_optimizer_steps(self):
        """A trainer may open them for any policy."""
        guard = windowed(kl=1)
        with guard.context("training"), guard.window("step"), guard.micro_step():
            score(guard, 1, "kl")
        assert guard.violation_count == 0

    def test_a_scope_whose_window_is_not_open(self):
        """It is refused where it is opened, and a call of its caller where it is made."""
        guard = windowed()
        with guard.context("training"), pytest.raises(UnsanctionedCall) as caught:
            with guard.micro_step():
                score(guard)
        lines = str(caught.value).splitlines()
        assert lines[0] == (
            "Linear was called in training outside its sanctioned scope: the scope 'reference' was "
            "opened, and no window 'generation' is open."
        )
        assert (
            '  budget       reference: 1 to 2 in each window "generation", and none is open'
            in lines
        )

    def test_a_caller_whose_window_is_not_open(self):
        """The message says which window is missing, and what to open."""
        caller = f"{__name__}:score_by_name"
        guard = windowed(reference=Scope(1, per="generation", caller=caller))
        with guard.context("training"), guard.micro_step():
            with pytest.raises(UnsanctionedCall) as caught:
                score_by_name(guard)
            guard._admission.open.position().micro_step.violations.clear()
        lines = str(caught.value).splitlines()
        assert lines[0].endswith(
            "its scope 'reference' counts per \"generation\", and no such window is open."
        )
        told = f'Only calls from {caller} inside `with guard.window("generation"):` are legal.'
        assert lines[-2].endswith(told)

    def test_in_observe_mode_nothing_is_raised(self):
        """All of the above is written down, and runs."""
        guard = windowed(mode="observe")
        with guard.context("training"):
            score(guard)
            with guard.window("generation"):
                pass
            with guard.window("generation"):
                score(guard, 3)
        assert [r.reason for r in guard.violations] == [
            *("UnsanctionedCall", "UnsanctionedCall", "BudgetUnmet", "BudgetExceeded"),
        ]

    def test_a_swallowed_violation_comes_out(self):
        """At the window's end, where no micro-step is open."""
        guard = windowed()
        with guard.context("training"), pytest.raises(UnsanctionedCall):
            with guard.window("generation"):
                score(guard)
                with pytest.raises(UnsanctionedCall):
                    guard.module(X)

    def test_a_scope_needs_a_context(self):
        """As ever."""
        guard = windowed()
        with pytest.raises(NoContext), guard.window("generation") as window:
            score(guard)
        assert window.calls == {"reference": 0}


def score_by_name(guard):
    guard.module(X)


class TestNames:
    @pytest.mark.parametrize("scope", ["typo", "", "m:f"])
    def test_count_of_a_scope_that_there_is_not(self, scope):
        """A count of 0 for a misspelt scope would pass for good."""
        message = f"{scope!r} is not a scope of Linear's policy, which has ['reference']"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            windowed().count(scope=scope)

    def test_a_scope_of_a_caller_cannot_be_opened(self):
        """Its calls are known by who makes them."""
        guard = windowed(kl=Scope(caller=f"{__name__}:score_by_name"))
        message = (
            "the scope 'kl' of Linear's policy is not opened in code: its calls are known by their "
            "caller or their state"
        )
        with guard.context("training"), pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            with guard.sanctioned("kl"):
                pytest.fail("it was opened")

    def test_inference_only(self):
        """The contract without scopes refuses every training call, and says so."""
        guard = guard_module(nn.Linear(3, 2), policy=CallPolicy(scopes={}))
        with guard.context("inference"):
            guard.module(X)
        with guard.context("training"), guard.micro_step():
            pass
        with guard.context("training"), pytest.raises(UnsanctionedCall) as caught:
            guard.module(X)
        assert str(caught.value).splitlines()[-2:] == [
            "  what to do   Remove the call, or run it in inference context outside the "
            "micro-step: the contract, CallPolicy(scopes={}), allows no call in training.",
            "  explained by lensnet-guard explain called-from-elsewhere",
        ]


class TestLog:
    def test_a_window_is_a_line(self, tmp_path):
        """With its name, what was made and what was due."""
        guard = windowed(log=tmp_path)
        with guard.context("training"), guard.window("generation"):
            score(guard)
        guard.end_log()
        (line,) = (n for n in read(tmp_path / FILE) if n["event"] == "window.end")
        del line["timestamp"]
        assert line == {
            "module": "Linear",
            "context": "training",
            "window": "generation",
            "calls": {"reference": 1},
            "due": {"reference": [1, 2]},
            "violations": 0,
            "raised": None,
            "event": "window.end",
        }
