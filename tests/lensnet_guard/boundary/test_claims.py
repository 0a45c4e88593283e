"""Whose call it is, and what must hold of it."""

import re

import pytest
import torch
from tests.lensnet_guard.helpers import X
from torch import nn

from lensnet_guard import (
    BudgetExceeded,
    BudgetUnmet,
    CallPolicy,
    ConditionUnmet,
    ReentrantCall,
    Scope,
    UnsanctionedCall,
    guard_module,
)


class Switch(nn.Module):
    """A module with a state; ``runs`` counts its forwards."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.on = True
        self.runs = 0

    def forward(self, x, scale=1.0):
        self.runs += 1
        return self.linear(x) * scale


def is_on(call):
    """Whether the module is switched on."""
    return None if call.module.on else "it is off"


def is_off(call):
    """Whether it is switched off."""
    return "it is on" if call.module.on else None


is_on.about = is_off.about = "switch"


def wrong_when_on(call):
    """As `is_off`, and it names what explains it."""
    return is_off(call)


def wrong_when_off(call):
    """As `is_on`, likewise."""
    return is_on(call)


wrong_when_on.mistake = wrong_when_off.mistake = "reference-with-adapters"


def never(call):
    """No call meets it, and it names what explains that."""
    return "it never holds"


never.mistake = "called-twice"


def outer(module, on):
    return inner(module, on)


def inner(module, on):
    module.on = on
    return module(X)


OUTER, INNER = f"{__name__}:outer", f"{__name__}:inner"


def guarded(mode=None, **policy):
    return guard_module(Switch(), policy=CallPolicy(**policy), mode=mode)


class TestScopes:
    def test_by_state(self):
        """The base pass and the policy pass of one module are two scopes of one guard."""
        guard = guarded(scopes={"base": Scope(1, when=is_off), "policy": Scope(2, when=is_on)})
        with guard.context("training"):
            with guard.micro_step():
                for on in (True, False, True):
                    inner(guard.module, on)
            assert [call.scope for call in guard.calls] == ["policy", "base", "policy"]
            with pytest.raises(BudgetUnmet, match="base made 0 of 1 calls"), guard.micro_step():
                for on in (True, True):
                    inner(guard.module, on)

    def test_by_caller_and_state(self):
        """The caller alone is not enough where the scope names a state too."""
        scope = Scope((0, 2), caller=OUTER, when=is_off)
        guard = guarded(scopes={"base": scope, "rest": Scope((0, None), when=is_on)})
        with guard.context("training"), guard.micro_step():
            outer(guard.module, False)
            outer(guard.module, True)
            inner(guard.module, True)
        assert [call.scope for call in guard.calls] == ["base", "rest", "rest"]

    def test_the_inner_caller_counts(self):
        """Of two callers on the stack; the outer one where the inner one's state does not hold."""
        guard = guarded(
            scopes={
                "outer": Scope((0, 9), caller=OUTER),
                "inner": Scope((0, 9), caller=INNER, when=is_off),
            }
        )
        with guard.context("training"), guard.micro_step():
            outer(guard.module, False)
            outer(guard.module, True)
        assert [call.scope for call in guard.calls] == ["inner", "outer"]

    def test_one_that_is_open_goes_first(self):
        """Before any caller or state."""
        guard = guarded(scopes={"kl": (0, 9), "inner": Scope((0, 9), caller=INNER)})
        with guard.context("training"), guard.micro_step(), guard.sanctioned("kl"):
            inner(guard.module, True)
        assert [call.scope for call in guard.calls] == ["kl"]

    def test_none_applies(self):
        """A call in another state is nobody's."""
        guard = guarded(scopes={"base": Scope((0, 1), when=is_off)})
        with guard.context("training"), pytest.raises(UnsanctionedCall) as caught:
            with guard.micro_step():
                inner(guard.module, True)
        assert str(caught.value).splitlines()[0] == (
            "Switch was called in training outside its sanctioned scope: not in the scope 'base', "
            "for is_off: it is on."
        )
        assert guard.module.runs == 0

    def test_one_that_is_spent(self):
        """The message says why the call is in no other scope: that may be what is wrong."""
        guard = guarded(scopes={"base": Scope(1, when=is_off), "policy": Scope(1, when=is_on)})
        with pytest.raises(BudgetExceeded) as refused, guard.context("training"):
            with guard.micro_step():
                inner(guard.module, False)
                inner(guard.module, False)
        assert str(refused.value).splitlines()[0] == (
            "Switch was called in training more often than its budget allows: not in the scope "
            "'policy', for is_on: it is off."
        )

    def test_the_state_is_what_is_wrong(self):
        """Where the scope of another state has a call to make, the call was meant to be that one.

        Whatever else does not hold of it as a call of the scope that it has come to.
        """
        base = Scope((0, 1), when=wrong_when_on, requires=(never,))
        guard = guarded(scopes={"base": base, "policy": Scope((0, 1), when=wrong_when_off)})
        with pytest.raises(ConditionUnmet) as refused, guard.context("training"):
            with guard.micro_step():
                inner(guard.module, False)
        assert str(refused.value).splitlines()[0].partition("allow: ")[2] == (
            "not in the scope 'policy', for wrong_when_off: it is off; so it is one of 'base', and "
            "never: it never holds."
        )
        assert refused.value.mistake == "reference-with-adapters"

    def test_the_state_is_not_what_is_wrong(self):
        """Where the scope of the other state has made its calls, this is no other one of its."""
        base = Scope((0, 1), when=wrong_when_on, requires=(never,))
        guard = guarded(scopes={"base": base, "policy": Scope((0, 1), when=wrong_when_off)})
        with pytest.raises(ConditionUnmet) as refused, guard.context("training"):
            with guard.micro_step():
                inner(guard.module, True)
                inner(guard.module, False)
        assert "allow: never: it never holds." in str(refused.value)
        assert refused.value.mistake == "called-twice"

    @pytest.mark.parametrize(
        ("calls", "mistake"),
        [([True, True], "reference-with-adapters"), ([False, True, True], "called-twice")],
    )
    def test_a_call_too_many_of_the_wrong_state(self, calls, mistake):
        """It is one in the wrong state, as long as one is due in the right one."""
        base = Scope((0, 1), when=wrong_when_on)
        guard = guarded(scopes={"base": base, "policy": Scope((0, 1), when=wrong_when_off)})
        with pytest.raises(BudgetExceeded) as refused, guard.context("training"):
            with guard.micro_step():
                for on in calls:
                    inner(guard.module, on)
        assert refused.value.mistake == mistake

    def test_a_second_call_where_the_other_state_has_made_its_least(self):
        """More of the other may come, but need not: so it is one too many of its own."""
        base = Scope(1, when=wrong_when_on)
        guard = guarded(scopes={"base": base, "policy": Scope((1, None), when=wrong_when_off)})
        with pytest.raises(BudgetExceeded) as refused, guard.context("training"):
            with guard.micro_step():
                for on in (False, True, True):
                    inner(guard.module, not on)
        assert refused.value.mistake == "called-twice"

    def test_a_call_inside_a_call_is_told_as_that(self):
        """Whatever state the module is in."""
        base, policy = Scope((0, 1), when=wrong_when_on), Scope((0, 1), when=wrong_when_off)
        guard = guarded(scopes={"base": base, "policy": policy})
        guard.module.register_forward_pre_hook(lambda *_: guard.module(X))
        with pytest.raises(ReentrantCall) as refused, guard.context("training"):
            with guard.micro_step():
                inner(guard.module, False)
        assert "not in the scope" not in str(refused.value)
        assert refused.value.mistake == "called-twice"

    def test_a_call_of_no_state(self):
        """What the state is wrong for explains it."""
        guard = guarded(scopes={"base": Scope((0, 1), caller=INNER, when=wrong_when_on)})
        with pytest.raises(UnsanctionedCall) as refused, guard.context("training"):
            with guard.micro_step():
                inner(guard.module, True)
        assert refused.value.mistake == "reference-with-adapters"

    def test_a_state_that_cannot_be_told(self):
        """What a condition raised is in the message."""

        def broken(call):
            return 1 / 0

        guard = guarded(scopes={"base": Scope((0, 1), caller=INNER, when=broken)})
        with guard.context("training"), pytest.raises(UnsanctionedCall) as caught:
            with guard.micro_step():
                inner(guard.module, True)
        assert "broken: the condition raised ZeroDivisionError: division by zero." in str(
            caught.value
        )

    def test_two_apply(self):
        """Where that cannot be seen in the policy, the call is refused and names both."""
        guard = guarded(
            scopes={"a": Scope((0, 9), when=is_on), "b": Scope((0, 9), when=lambda call: None)}
        )
        with guard.context("training"), pytest.raises(UnsanctionedCall) as caught:
            with guard.micro_step():
                inner(guard.module, True)
        assert str(caught.value).startswith(
            "Switch was called in training outside its sanctioned scope: the scopes 'a' and 'b' "
            "both apply to it."
        )
        assert guard.module.runs == 0

    def test_inference_asks_for_no_scope(self):
        """There a state is not even looked at."""
        guard = guarded(scopes={"a": Scope(when=lambda call: 1 / 0)})
        with guard.context("inference"):
            guard.module(X)
        assert [call.scope for call in guard.calls] == [None]


class TestConditions:
    def test_of_every_call_and_of_a_scope(self):
        """Both are asked, the policy's first; the refused call never ran, and spent nothing."""
        asked = []

        def first(call):
            asked.append("first")

        def second(call):
            asked.append("second")
            return None if call.module.on else "it is off"

        guard = guarded(
            scopes={"kl": Scope((0, 2), requires=(second,)), "free": (0, 2)}, requires=(first,)
        )
        with guard.context("training"), guard.micro_step() as ledger:
            with guard.sanctioned("free"):
                inner(guard.module, False)
            assert asked == ["first"]
            with pytest.raises(ConditionUnmet), guard.sanctioned("kl"):
                inner(guard.module, False)
            with pytest.raises(ConditionUnmet), guard.sanctioned("kl"):
                inner(guard.module, True)
            assert ledger.calls == {"kl": 1, "free": 1}
            ledger.violations.clear()
        assert asked == ["first", "first", "second", "first", "second"]
        assert guard.module.runs == 2

    def test_the_message(self, monkeypatch):
        """Which condition, what was found, and where it came from."""
        guard = guarded(scopes={"kl": 1}, requires=(is_off,))
        with guard.context("training"), pytest.raises(ConditionUnmet) as caught:
            with guard.sanctioned("kl"):
                guard.module(X)
        lines = str(caught.value).splitlines()
        assert lines[0] == (
            "Switch was called in a state that its contract does not allow: is_off: it is on."
        )
        assert lines[-1] == (
            "  what to do   Bring about that state where the call is made; or, if calls are right "
            "without it, leave the condition out of CallPolicy."
        )
        assert caught.value.record.reason == "ConditionUnmet"

    def test_sees_the_call(self):
        """Its module, arguments by either way, context, scope, gradients and the call before."""
        seen = []

        def look(call):
            seen.append(
                (call.method, call.context, call.scope, call.grad_enabled, call.argument("scale"))
            )
            seen.append(call.earlier and call.earlier.seq)
            with pytest.raises(LookupError, match=r"no argument 'mask', only \['scale', 'x'\]"):
                call.argument("mask")

        guard = guarded(scopes={"kl": 2}, requires=(look,))
        with guard.context("training"), guard.sanctioned("kl"):
            guard.module(X, 2.0)
            with torch.no_grad():
                guard.module(x=X, scale=3.0)
        assert seen == [
            *(("forward", "training", "kl", True, 2.0), None),
            *(("forward", "training", "kl", False, 3.0), 1),
        ]

    @pytest.mark.parametrize(
        ("condition", "found"),
        [
            (lambda call: 1 / 0, "the condition raised ZeroDivisionError: division by zero"),
            (lambda call: True, "the condition returned True, and must return None or a text"),
            (lambda call: False, "the condition returned False, and must return None or a text"),
            (lambda: None, "the condition raised TypeError: "),
        ],
    )
    @pytest.mark.parametrize("kind", ["requires", "ensures"])
    def test_one_that_cannot_answer_does_not_hold(self, condition, found, kind):
        """A condition that raises stops the call, as one that does not hold."""
        guard = guarded(scopes={"kl": 1}, **{kind: (condition,)})
        with guard.context("training"), pytest.raises(ConditionUnmet, match=re.escape(found)):
            with guard.sanctioned("kl"):
                guard.module(X)
        assert guard.module.runs == (kind == "ensures")

    def test_not_asked_in_inference(self):
        """Unless they are marked as asked everywhere."""

        def everywhere(call):
            return "never"

        guard = guarded(scopes={"kl": 1}, requires=(is_off,))
        with guard.context("inference"):
            guard.module(X)
        everywhere.in_inference = True
        guard = guarded(scopes={"kl": 1}, requires=(is_off, everywhere))
        with guard.context("inference"), pytest.raises(ConditionUnmet, match="everywhere: never"):
            guard.module(X)
        assert guard.module.runs == 0

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_not_asked_of_a_recompute(self, reentrant):
        """A recompute is no call: gradients are on in it, whatever the call required."""
        asked = []
        guard = guarded(scopes={"kl": 1}, requires=(asked.append,), ensures=(asked.append,))
        x = X.clone().requires_grad_()
        with guard.context("training"), guard.sanctioned("kl"):
            out = torch.utils.checkpoint.checkpoint(guard.module, x, use_reentrant=reentrant)
        out.sum().backward()
        assert guard.module.runs == 2
        assert len(asked) == 2  # as the call began, and of what it returned

    def test_a_spent_budget_is_told_first(self):
        """A call that is one too many is not looked at any more."""
        asked = []
        guard = guarded(scopes={"kl": 1}, requires=(asked.append,), mode="observe")
        with guard.context("training"), guard.sanctioned("kl"):
            guard.module(X)
            guard.module(X)
        assert [r.reason for r in guard.violations] == ["BudgetExceeded"]
        assert len(asked) == 1

    def test_observed(self):
        """The breach is written down, the call runs, and is one of those that were due."""
        guard = guarded(scopes={"kl": 1}, requires=(is_off,), mode="observe")
        with guard.context("training"), guard.sanctioned("kl") as ledger:
            assert guard.module(X).shape == (2, 2)
        assert [r.reason for r in guard.violations] == ["ConditionUnmet"]
        assert ledger.calls == {"kl": 1}
        assert guard.module.runs == 1


def small(call):
    """Whether what came out is small."""
    return f"{call.result.abs().max():.0f} is too much" if call.result.abs().max() > 9 else None


class TestResults:
    def test_is_asked_of_what_is_returned(self):
        """The call has run, and is spent; its result goes nowhere."""
        guard = guarded(scopes={"kl": (0, 2)}, ensures=(small,))
        with torch.no_grad():
            guard.module.linear.weight.fill_(1)
            guard.module.linear.bias.fill_(0)
        with guard.context("training"), guard.micro_step() as ledger, guard.sanctioned("kl"):
            guard.module(X)
            with pytest.raises(ConditionUnmet) as caught:
                guard.module(X, scale=4.0)
            assert ledger.calls == {"kl": 2}
            ledger.violations.clear()
        assert str(caught.value).splitlines()[0] == (
            "Switch returned what its contract does not allow (call 2): small: 12 is too much."
        )
        assert caught.value.record.kind == "result"
        assert [(call.kind, call.outcome) for call in guard.calls] == [("call", "returned")] * 2

    def test_observed(self):
        """The result is given back."""
        guard = guarded(scopes={"kl": 1}, ensures=(lambda call: "wrong",), mode="observe")
        with guard.context("training"), guard.sanctioned("kl"):
            assert guard.module(X).shape == (2, 2)
        assert [r.kind for r in guard.violations] == ["result"]

    def test_not_asked_of_what_raises(self):
        """The exception goes on its way."""
        guard = guarded(scopes={"kl": 1}, ensures=(lambda call: "wrong",))
        with guard.context("training"), pytest.raises(RuntimeError, match="mat1"):
            with guard.sanctioned("kl"):
                guard.module(torch.ones(2, 5))
        assert guard.violation_count == 0
