"""The contract and the decision table."""

import copy
import dataclasses
import inspect
import itertools
import pickle
import re
from types import MappingProxyType
from typing import NamedTuple

import pytest

from lensnet_guard import CallPolicy
from lensnet_guard.calls.policy import decide


class Situation(NamedTuple):
    """What `decide` is given."""

    context: str | None
    sanctioned: bool
    budget_left: int
    reentrant: bool
    recompute: bool
    bypass: bool
    breached: bool


BUDGETS_LEFT = (None, -1, 0, 1, 2, 10**30)
SITUATIONS = [
    Situation(*fields)
    for fields in itertools.product(
        (None, "training", "inference"),
        (False, True),
        BUDGETS_LEFT,
        (False, True),
        (False, True),
        (False, True),
        (False, True),
    )
]

# The table of DESIGN.md, one row after the other: which situations it speaks of, and its verdict.
# A row holds wherever no row above it does.
TABLE = [
    (lambda s: s.recompute, None),
    (lambda s: s.bypass, "BypassedGuard"),
    (lambda s: s.reentrant, "ReentrantCall"),
    (lambda s: s.context is None, "NoContext"),
    (lambda s: s.context == "inference" and not s.breached, None),
    (lambda s: s.context == "inference", "ConditionUnmet"),
    (lambda s: not s.sanctioned, "UnsanctionedCall"),
    (lambda s: s.budget_left is not None and s.budget_left <= 0, "BudgetExceeded"),
    (lambda s: s.breached, "ConditionUnmet"),
    (lambda s: True, None),
]


class TestDecide:
    def test_every_field_is_enumerated(self):
        """A parameter added to decide must be added to this table too."""
        assert list(inspect.signature(decide).parameters) == list(Situation._fields)

    @pytest.mark.parametrize("situation", SITUATIONS, ids=str)
    def test_table(self, situation):
        """Each of the situations gets the verdict of the first row that speaks of it."""
        expected = next(verdict for applies, verdict in TABLE if applies(situation))
        assert decide(*situation) == expected

    def test_every_verdict_occurs(self):
        """No row of the table is dead."""
        assert {decide(*situation) for situation in SITUATIONS} == {
            *(None, "BypassedGuard", "ReentrantCall", "NoContext"),
            *("BudgetExceeded", "UnsanctionedCall", "ConditionUnmet"),
        }

    def test_inference_asks_for_nothing(self):
        """In inference a plain call is allowed whatever is sanctioned and whatever is left."""
        for sanctioned, left in itertools.product((False, True), BUDGETS_LEFT):
            assert decide("inference", sanctioned, left) is None


CONTRACTS = [
    ({"preference_scorer": 1}, {}),
    ({"preference_scorer": 1}, {"m:f": 2}),
    ({}, {"m:f": 1, "m.n:Outer.Inner.method": 10**20}),
    ({"b": 2, "a": 1, "a b": 3, "評価": 4}, {}),
]


class TestCallPolicy:
    def test_default_is_one_preference_scorer_call(self):
        """Without arguments the policy is LensNet's own."""
        assert dict(CallPolicy().scopes) == {"preference_scorer": 1}
        assert dict(CallPolicy().sanctioned_callers) == {}

    def test_sanctioned_callers_replace_the_default_scope(self):
        """Naming callers alone leaves no default scope, whose budget nobody would ever spend."""
        policy = CallPolicy(sanctioned_callers={"m:f": 2})
        assert policy.budgets == {"m:f": 2}
        assert dict(policy.scopes) == {}

    def test_scopes_and_callers_together(self):
        """Given both, both count, also when the scopes are those of the default."""
        policy = CallPolicy({"preference_scorer": 1}, {"m:f": 2})
        assert policy.budgets == {"preference_scorer": 1, "m:f": 2}

    @pytest.mark.parametrize(("scopes", "callers"), CONTRACTS)
    def test_equality_pickle_and_copies(self, scopes, callers):
        """A policy equals any other with the same budgets, by every way to copy it."""
        policy = CallPolicy(scopes, callers)
        assert policy == CallPolicy(dict(scopes), dict(callers))
        assert policy != CallPolicy({**scopes, "another": 1}, callers)
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            assert pickle.loads(pickle.dumps(policy, protocol)) == policy
        assert copy.deepcopy(policy) == policy
        assert copy.copy(policy) == policy

    def test_pickle_of_callers_alone_brings_no_default_scope_back(self):
        """A policy without scopes stays without scopes."""
        policy = pickle.loads(pickle.dumps(CallPolicy(sanctioned_callers={"m:f": 1})))
        assert policy.budgets == {"m:f": 1}

    def test_replace(self):
        """dataclasses.replace gives a checked policy."""
        policy = dataclasses.replace(CallPolicy(), scopes={"critic": 3})
        assert policy.budgets == {"critic": 3}
        with pytest.raises(ValueError, match="at least 1"):
            dataclasses.replace(policy, scopes={"critic": 0})

    def test_is_immutable(self):
        """Neither attributes nor budgets can be changed after the check."""
        policy = CallPolicy()
        with pytest.raises(AttributeError):
            policy.scopes = {"free": 99}
        with pytest.raises(TypeError):
            policy.scopes["preference_scorer"] = 99
        policy.budgets["preference_scorer"] = 99
        assert policy.budgets == {"preference_scorer": 1}

    def test_the_given_dict_can_change_later(self):
        """The policy keeps its own copy of the budgets, also of a view on a dict."""
        mine = {"critic": 1}
        policies = CallPolicy(mine), CallPolicy(MappingProxyType(mine))
        mine["critic"] = 99
        assert [p.budgets for p in policies] == [{"critic": 1}, {"critic": 1}]

    def test_any_name_without_a_colon_is_a_scope(self):
        """Spaces, dots and other alphabets are fine."""
        scopes = {"a b": 1, "a.b": 2, "評価": 3, "\ud800": 4}
        assert CallPolicy(scopes).budgets == scopes

    @pytest.mark.parametrize("kind", ["scopes", "sanctioned_callers"])
    @pytest.mark.parametrize(
        ("budgets", "error", "message"),
        [
            (None, TypeError, "{} must map names to calls per micro-step, not None"),
            (["a"], TypeError, "{} must map names to calls per micro-step, not ['a']"),
            ("a", TypeError, "{} must map names to calls per micro-step, not 'a'"),
            ({1: 1}, TypeError, "{}: 1 must be a non-empty string"),
            ({"": 1}, TypeError, "{}: '' must be a non-empty string"),
            ({None: 1}, TypeError, "{}: None must be a non-empty string"),
            (
                {"m:f": True},
                TypeError,
                "{}: the budget of 'm:f' must be an int, or a pair (least, most), not True",
            ),
            (
                {"m:f": 1.0},
                TypeError,
                "{}: the budget of 'm:f' must be an int, or a pair (least, most), not 1.0",
            ),
            (
                {"m:f": "1"},
                TypeError,
                "{}: the budget of 'm:f' must be an int, or a pair (least, most), not '1'",
            ),
            (
                {"m:f": None},
                TypeError,
                "{}: the budget of 'm:f' must be an int, or a pair (least, most), not None",
            ),
            (
                {"m:f": 0},
                ValueError,
                "{}: the budget of 'm:f' must be at least 1 call, not 0; "
                "leave the scope out to allow none, or let it be (0, n)",
            ),
            (
                {"m:f": -3},
                ValueError,
                "{}: the budget of 'm:f' must be at least 1 call, not -3; "
                "leave the scope out to allow none, or let it be (0, n)",
            ),
        ],
    )
    def test_refuses_what_cannot_be_a_budget(self, kind, budgets, error, message):
        """The message names the argument, the entry and what is wrong with it."""
        with pytest.raises(error) as caught:
            CallPolicy(**{kind: budgets})
        assert str(caught.value) == message.format(kind)

    def test_refuses_a_scope_that_looks_like_a_caller(self):
        """A colon marks a caller, so a scope with one is a mistaken argument."""
        message = "scopes: 'm:f' must not contain ':', which marks a caller"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            CallPolicy(scopes={"m:f": 1})

    @pytest.mark.parametrize("caller", ["f", ":f", "m:", ":"])
    def test_refuses_a_caller_without_module_or_function(self, caller):
        """A caller must name a module and a function, or it could never match."""
        with pytest.raises(ValueError) as caught:
            CallPolicy(sanctioned_callers={caller: 1})
        assert str(caught.value) == (
            f"sanctioned_callers: {caller!r} must read 'module:qualname', "
            "such as 'my_project.scoring:Scorer.score'"
        )

    def test_an_empty_contract(self):
        """Without scopes no call in training is legal: the inference-only contract."""
        policy = CallPolicy(scopes={})
        assert policy.budgets == {}
        assert dict(policy.in_full) == {}
        assert policy.to_json() == {
            "scopes": {},
            "sanctioned_callers": {},
            "shared_submodules": [],
        }
