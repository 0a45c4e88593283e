"""The guard as a whole: how often a scope or a caller may call, and must."""

import contextlib

import pytest
from tests.lensnet_guard.helpers import SCOPE

from lensnet_guard import (
    BudgetExceeded,
    BudgetUnmet,
    CallPolicy,
    ContextSwitchRefused,
    MicroStep,
    UnsanctionedCall,
    guard_module,
)


def asks():
    """A caller that makes no call."""


CALLER = f"{__name__}:asks"


class TestBudgets:
    def test_exactly_one(self, guard, x):
        """One call is due, one is allowed."""
        with guard.context("training"), guard.micro_step(), guard.sanctioned(SCOPE):
            guard.module(x)
        assert guard.violations == ()

    def test_training_call_outside_any_scope(self, guard, x):
        """A micro-step alone sanctions nothing."""
        with guard.context("training"), pytest.raises(UnsanctionedCall), guard.micro_step():
            guard.module(x)

    @pytest.mark.parametrize("n", [1, 2, 5])
    def test_n(self, make_guard, x, n):
        """n calls are due and n are allowed, neither n - 1 nor n + 1."""
        guard = make_guard(**{SCOPE: n})
        with guard.context("training"):
            with guard.sanctioned(SCOPE) as ledger:
                for _ in range(n):
                    guard.module(x)
            assert ledger.calls == {SCOPE: n}
            with pytest.raises(BudgetUnmet, match=f"made {n - 1} of {n} calls"):
                with guard.sanctioned(SCOPE):
                    for _ in range(n - 1):
                        guard.module(x)
            with pytest.raises(BudgetExceeded) as caught, guard.sanctioned(SCOPE):
                for _ in range(n + 1):
                    guard.module(x)
        assert len(caught.value.earlier) == n
        assert guard.count() == 3 * n - 1

    def test_a_budget_beyond_any_machine_word(self, make_guard, x):
        """Budgets are Python integers: huge ones just are never met."""
        guard = make_guard(**{SCOPE: 10**30})
        with guard.context("training"), pytest.raises(BudgetUnmet, match=f"1 of {10**30}"):
            with guard.sanctioned(SCOPE):
                guard.module(x)

    def test_lone_scope_is_its_own_micro_step(self, guard, x):
        """Each opening outside a micro-step has the full budget."""
        with guard.context("training"):
            for _ in range(3):
                with guard.sanctioned(SCOPE) as ledger:
                    guard.module(x)
                assert (ledger.step, ledger.micro_step) == (None, None)
        assert guard.count("training", SCOPE) == 3

    def test_lone_scope_demands_its_own_budget_only(self, make_guard, x):
        """Other scopes are not due in a scope that stands alone."""
        guard = make_guard(a=1, b=1)
        with guard.context("training"), guard.sanctioned("a"):
            guard.module(x)
        assert guard.violations == ()

    def test_micro_step_demands_every_budget(self, make_guard, x):
        """A scope that never opened is due all the same, a sanctioned caller too."""
        guard = make_guard(callers={CALLER: 1}, a=1, b=1)
        made = f"b made 0 of 1 calls, {CALLER} made 0 of 1 calls"
        with guard.context("training"), pytest.raises(BudgetUnmet, match=made):
            with guard.micro_step(), guard.sanctioned("a"):
                guard.module(x)

    def test_two_openings_share_the_budget(self, guard, x):
        """In one micro-step the scope's budget is one, however often the scope is opened."""
        with guard.context("training"), pytest.raises(BudgetExceeded), guard.micro_step():
            with guard.sanctioned(SCOPE):
                guard.module(x)
            with guard.sanctioned(SCOPE):
                guard.module(x)
        assert guard.count() == 1

    def test_two_openings_may_spend_it_together(self, make_guard, x):
        """A budget of two can be spent by one call in each of two openings."""
        guard = make_guard(**{SCOPE: 2})
        with guard.context("training"), guard.micro_step():
            for _ in range(2):
                with guard.sanctioned(SCOPE):
                    guard.module(x)
        assert guard.violations == ()

    def test_scope_inside_a_scope(self, make_guard, x):
        """The innermost scope pays, and the outer one pays again after it."""
        guard = make_guard(a=1, b=1)
        with guard.context("training"), guard.micro_step() as ledger, guard.sanctioned("a"):
            with guard.sanctioned("b"):
                guard.module(x)
            guard.module(x)
        assert ledger.calls == {"a": 1, "b": 1}

    def test_lone_scope_inside_a_lone_scope(self, make_guard, x):
        """The inner scope works in the micro-step of the outer one, where it is not due."""
        guard = make_guard(a=1, b=1)
        with guard.context("training"), guard.sanctioned("a") as outer:
            with guard.sanctioned("b") as inner:
                assert inner is outer
            guard.module(x)
        assert outer.calls == {"a": 1}

    def test_every_micro_step_starts_fresh(self, guard, x):
        """The budget comes back with the next micro-step, also after one that broke it."""
        with guard.context("training"):
            for number in range(3):
                with contextlib.suppress(BudgetExceeded), guard.micro_step(number):
                    with guard.sanctioned(SCOPE):
                        guard.module(x)
                        guard.module(x)
        assert guard.count() == guard.violation_count == 3

    def test_not_due_when_the_body_raised(self, guard):
        """An exception on its way out is not replaced by an unmet budget."""
        with guard.context("training"):
            for block in (guard.micro_step, lambda: guard.sanctioned(SCOPE)):
                with pytest.raises(KeyError), block():
                    raise KeyError
        assert guard.violations == ()

    def test_inference_has_no_budget(self, guard, x):
        """In inference a scope and a micro-step count, and neither demand nor forbid."""
        with guard.context("inference"):
            with guard.micro_step(), guard.sanctioned(SCOPE) as ledger:
                for _ in range(5):
                    guard.module(x)
            with guard.micro_step(), guard.sanctioned(SCOPE):
                pass
            with guard.sanctioned(SCOPE):
                pass
        assert ledger.calls == {SCOPE: 5}
        assert guard.count("inference", SCOPE) == 5

    @pytest.mark.parametrize("scope", ["other", "", None, 3, CALLER])
    def test_unknown_scope(self, make_guard, scope):
        """A scope that the policy does not have is refused by name, with those that it has."""
        guard = make_guard(callers={CALLER: 1}, b=1, a=1)
        with guard.context("training"), pytest.raises(ValueError) as caught:
            guard.sanctioned(scope).__enter__()
        assert str(caught.value) == (
            f"{scope!r} is not a scope of Scorer's policy, which has ['a', 'b']"
        )

    def test_micro_step_in_a_micro_step(self, guard):
        """There is one micro-step at a time, in either context."""
        for context in ("training", "inference"):
            with (
                guard.context(context),
                pytest.raises(ContextSwitchRefused, match="another micro-step was asked for"),
                guard.micro_step(),
                guard.micro_step(),
            ):
                pytest.fail("the block was entered")

    def test_micro_step_in_a_lone_scope(self, guard):
        """A lone scope is a micro-step already."""
        with (
            guard.context("training"),
            pytest.raises(ContextSwitchRefused),
            guard.sanctioned(SCOPE),
            guard.micro_step(),
        ):
            pytest.fail("the block was entered")

    @pytest.mark.parametrize("number", ["1", 1.5, None, [1]])
    def test_step_that_is_no_integer(self, guard, number):
        """Steps are numbers, and a wrong one is refused before anything opens."""
        with guard.context("inference"):
            for wrong in ((number, 0), (0, number)):
                with pytest.raises(TypeError, match="integer"):
                    guard.micro_step(*wrong).__enter__()
            assert guard._admission.open.position().micro_step is None

    def test_yields_the_ledger(self, guard):
        """Both blocks give their micro-step, which tells what was spent."""
        with guard.context("inference"), guard.micro_step(2**70, -1) as ledger:
            assert isinstance(ledger, MicroStep)
            assert (ledger.step, ledger.micro_step) == (2**70, -1)


class Pipeline:
    """Code that cannot be edited, whose one method may call."""

    def score(self, guard, x, calls=1):
        return [self.helper(guard, x) for _ in range(calls)]

    def helper(self, guard, x):
        return guard.module(x)

    def other(self, guard, x):
        return guard.module(x)


class TestSanctionedCallers:
    @pytest.fixture
    def caller(self):
        return f"{__name__}:Pipeline.score"

    @pytest.fixture
    def guard(self, scorer, caller):
        return guard_module(scorer, policy=CallPolicy(sanctioned_callers={caller: 2}))

    def test_any_frame_of_the_stack(self, guard, x, caller):
        """The named function need not make the call itself."""
        with guard.context("training"), guard.micro_step() as ledger:
            Pipeline().score(guard, x, calls=2)
        assert ledger.calls == {caller: 2}
        assert {r.scope for r in guard.calls} == {caller}
        assert guard.count("training", caller) == 2

    def test_budget(self, guard, x):
        """Too many and too few are violations as for a scope."""
        with guard.context("training"):
            with pytest.raises(BudgetExceeded), guard.micro_step():
                Pipeline().score(guard, x, calls=3)
            with pytest.raises(BudgetUnmet), guard.micro_step():
                Pipeline().score(guard, x)

    def test_other_functions_are_refused(self, guard, x):
        """A method of the same class that is not named is not sanctioned."""
        with guard.context("training"), pytest.raises(UnsanctionedCall), guard.micro_step():
            Pipeline().other(guard, x)

    def test_needs_a_micro_step(self, scorer, guard, x):
        """Without a micro-step no budget counts, so the call is refused and does not run."""
        with guard.context("training"), pytest.raises(UnsanctionedCall) as caught:
            Pipeline().score(guard, x)
        assert "runs outside any micro-step" in str(caught.value)
        assert scorer.runs == 0

    def test_inference_does_not_look_for_callers(self, guard, x):
        """In inference the caller is free, and its calls belong to no scope."""
        with guard.context("inference"):
            Pipeline().score(guard, x, calls=5)
        assert guard.calls[0].scope is None

    def test_an_open_scope_goes_first(self, scorer, x, caller):
        """A caller applies where no scope is open."""
        policy = CallPolicy({"a": 1}, {caller: 1})
        guard = guard_module(scorer, policy=policy)
        with guard.context("training"), guard.micro_step() as ledger:
            with guard.sanctioned("a"):
                Pipeline().score(guard, x)
            Pipeline().score(guard, x)
        assert ledger.calls == {"a": 1, caller: 1}
