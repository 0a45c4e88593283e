"""Scopes as values: what can be one, and in which words."""

import copy
import pickle
import re

import pytest

from lensnet_guard import CallPolicy, Scope
from lensnet_guard.calls.scope import contradiction, name_of


def still(call):
    """A condition that always holds."""


def loud(call):
    """Another one."""


class About:
    """A condition about something, equal by what it says."""

    def __init__(self, about, says):
        self.about, self.says = about, says

    def __call__(self, call):
        return None

    def __eq__(self, other):
        return repr(self) == repr(other)

    def __hash__(self):
        return hash(self.says)

    def __repr__(self):
        return f"{self.about}({self.says})"


ON, OFF = About("adapters", "on"), About("adapters", "off")


class TestBudgets:
    @pytest.mark.parametrize(
        ("calls", "least", "most", "words"),
        [
            (1, 1, 1, "1"),
            (10**20, 10**20, 10**20, str(10**20)),
            ((0, 4), 0, 4, "0 to 4"),
            ([1, 2], 1, 2, "1 to 2"),
            ((3, 3), 3, 3, "3 to 3"),
            ((0, None), 0, None, "0 or more"),
            ((2, None), 2, None, "2 or more"),
        ],
    )
    def test_can_be(self, calls, least, most, words):
        """An integer is exact, a pair is least and most, and None is no limit."""
        scope = Scope(calls)
        assert (scope.least, scope.most, scope.budget) == (least, most, words)
        assert CallPolicy({"kl": calls}).in_full["kl"] == scope

    @pytest.mark.parametrize(
        "calls", [None, True, "1", 1.0, (1,), (1, 2, 3), (None, 1), (1, "2"), {}]
    )
    def test_cannot_be(self, calls):
        """The message shows what was given."""
        message = f"must be an int, or a pair (least, most), not {calls!r}"
        with pytest.raises(TypeError, match=re.escape(f"Scope: the budget of 'calls' {message}")):
            Scope(calls)
        with pytest.raises(TypeError, match=re.escape(f"scopes: the budget of 'kl' {message}")):
            CallPolicy({"kl": calls})

    @pytest.mark.parametrize("calls", [0, -1, (0, 0), (-1, 2)])
    def test_no_call_at_all(self, calls):
        """A scope of no calls can be left out."""
        with pytest.raises(
            ValueError, match=re.escape(f"must be at least 1 call, not {calls!r}; ")
        ):
            Scope(calls)

    def test_more_asked_for_than_allowed(self):
        """The numbers of a pair are in order."""
        message = (
            "Scope: the budget of 'calls' must be (least, most), and (4, 1) asks for more than it "
            "allows"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            Scope((4, 1))


class TestScope:
    def test_is_a_value(self):
        """Equal by what it says, by every way to copy it, and not to be changed."""
        scope = Scope((0, 4), per="generation", caller="m:f", when=still, requires=[loud])
        assert scope == Scope((0, 4), "generation", "m:f", still, (loud,))
        assert scope == pickle.loads(pickle.dumps(scope)) == copy.deepcopy(scope)
        with pytest.raises(AttributeError):
            scope.calls = 9

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"per": ""}, TypeError, 'Scope: per must be "micro_step", "step" or the name of a'),
            ({"per": None}, TypeError, "Scope: per must be"),
            ({"caller": 3}, TypeError, "Scope: a caller must be 'module:qualname', not 3"),
            ({"caller": "f"}, ValueError, "Scope: 'f' must read 'module:qualname', such as "),
            ({"when": "off"}, TypeError, "Scope: when must be a condition, not 'off'"),
            (
                {"requires": still},
                TypeError,
                "requires must be a tuple of conditions, such as (no_",
            ),
            ({"requires": ("no_grad",)}, TypeError, "requires must be a tuple of conditions"),
            ({"requires": (About,)}, TypeError, "requires: About is a class; make a condition of"),
            ({"ensures": still}, TypeError, "ensures must be a tuple of conditions"),
        ],
    )
    def test_refuses_what_cannot_be_one(self, arguments, error, message):
        """The message names the argument and shows what was given."""
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            Scope(**arguments)

    def test_names_of_conditions(self):
        """As they are written in code."""
        assert name_of(still) == "still"
        assert name_of(ON) == "adapters(on)"

    def test_contradiction(self):
        """Two different conditions about one thing; the same one twice is none."""
        assert contradiction((still, ON, loud, OFF)) == (ON, OFF)
        assert contradiction((ON, About("adapters", "on"), still, still)) is None


class TestPolicy:
    @pytest.mark.parametrize(
        "scopes",
        [
            {"a": Scope(caller="m:f"), "b": Scope(2, caller="m:f")},
            {"a": Scope(caller="m:f"), "b": Scope(caller="m:f", when=still)},
            {"a": Scope(when=still), "b": Scope((1, 2), when=still)},
            {"a": Scope(caller="m:f", when=still), "b": Scope(caller="m:f", when=still)},
        ],
    )
    def test_refuses_two_scopes_of_the_same_calls(self, scopes):
        """Whose budget would a call spend?"""
        message = (
            "the scopes 'a' and 'b' apply to the same calls, so nobody could say whose budget one "
            "spends; set them apart by caller or when"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            CallPolicy(scopes)

    def test_refuses_a_scope_of_a_sanctioned_caller(self):
        """The short form is a scope like the others."""
        with pytest.raises(ValueError, match="the scopes 'a' and 'm:f' apply to the same calls"):
            CallPolicy({"a": Scope(caller="m:f")}, {"m:f": 1})

    @pytest.mark.parametrize(
        "scopes",
        [
            {"a": Scope(caller="m:f"), "b": Scope(caller="m:g")},
            {"a": Scope(caller="m:f"), "b": Scope(when=still)},
            {"a": Scope(caller="m:f", when=ON), "b": Scope(caller="m:f", when=OFF)},
            {"a": Scope(when=ON), "b": Scope(when=OFF), "c": 1, "d": Scope(per="step")},
        ],
    )
    def test_scopes_that_are_set_apart(self, scopes):
        """By caller, by state, or by being opened."""
        assert dict(CallPolicy(scopes).in_full).keys() == scopes.keys()

    @pytest.mark.parametrize(
        ("policy", "where"),
        [
            ({"requires": (ON, OFF)}, "requires"),
            ({"ensures": (ON, still, OFF)}, "ensures"),
            (
                {"scopes": {"kl": Scope(when=ON)}, "requires": (OFF,)},
                "the scope 'kl', no call of which could be legal",
            ),
            (
                {"scopes": {"kl": Scope(when=ON, requires=(OFF,))}},
                "the scope 'kl', no call of which could be legal",
            ),
            (
                {"scopes": {"kl": Scope(ensures=(ON,))}, "ensures": (OFF,)},
                "the scope 'kl', no call of which could be legal",
            ),
        ],
    )
    def test_refuses_conditions_that_contradict_each_other(self, policy, where):
        """A scope that nothing can ever reach is told when the policy is made."""
        with pytest.raises(ValueError, match=r"adapters\(o\w+\) cannot hold together") as caught:
            CallPolicy(**policy)
        assert str(caught.value).endswith(f"asks for both in {where}")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"methods": "generate"}, "methods must be names of methods, not 'generate'"),
            ({"parts": [1]}, "parts must be names of submodules, not [1]"),
        ],
    )
    def test_refuses_names_that_are_none(self, arguments, message):
        """A string is no list of names."""
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            CallPolicy(**arguments)

    def test_refuses_a_part_that_is_shared(self):
        """A submodule that anybody may run cannot be counted."""
        message = "parts: 'score' is one of shared_submodules too, whose runs are no calls"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            CallPolicy(parts=("score",), shared_submodules=("model", "score"))

    def test_windows_and_what_is_due_in_them(self):
        """Each scope counts in one window."""
        policy = CallPolicy(
            {"kl": 1, "reference": Scope((0, 4), per="generation"), "ema": Scope(per="step")},
            {"m:f": 2},
        )
        assert policy.windows == {"generation", "step"}
        assert policy.due("micro_step") == {"kl": 1, "m:f": 2}
        assert policy.due("generation") == {"reference": (0, 4)}
        assert policy.due("step") == {"ema": 1}
        assert policy.budgets == {"kl": 1, "reference": (0, 4), "ema": 1, "m:f": 2}

    def test_survives_pickling(self):
        """With everything in it."""
        policy = CallPolicy(
            {"kl": 1, "reference": Scope((0, 4), per="generation", when=still)},
            requires=(still,),
            ensures=(loud,),
            methods=("generate",),
            parts=("score",),
            shared_submodules=("backbone",),
        )
        assert pickle.loads(pickle.dumps(policy)) == policy == copy.deepcopy(policy)
        assert policy != CallPolicy({"kl": 1})

    def test_to_json(self):
        """A log says all of it, and of the short forms what it always said."""
        policy = CallPolicy(
            {"kl": 1, "reference": Scope((0, 4), per="generation", when=ON, ensures=(loud,))},
            {"m:f": 2},
            requires=(still,),
            methods=("generate",),
        )
        assert policy.to_json() == {
            "scopes": {
                "kl": 1,
                "reference": {
                    "calls": [0, 4],
                    "per": "generation",
                    "when": "adapters(on)",
                    "ensures": ["loud"],
                },
            },
            "sanctioned_callers": {"m:f": 2},
            "shared_submodules": [],
            "requires": ["still"],
            "methods": ["generate"],
        }
