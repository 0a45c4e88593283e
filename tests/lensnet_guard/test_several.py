"""Several modules under one block: one context, one micro-step, one log, a line for each."""

import re

import pytest
from tests.lensnet_guard.helpers import FILE, X, events, read
from torch import nn

from lensnet_guard import (
    BudgetUnmet,
    CallPolicy,
    Guards,
    NoContext,
    Scope,
    UnsanctionedCall,
    guard_module,
    guard_modules,
    guard_of,
)

KL = CallPolicy({"kl": 1})
VALUES = CallPolicy({"values": 2})


@pytest.fixture
def modules():
    return {"reference": nn.Linear(3, 2), "critic": nn.Linear(3, 1)}


@pytest.fixture
def guards(modules):
    return guard_modules(modules, policy={"reference": KL, "critic": VALUES})


def train(guards, steps=3):
    """A good training."""
    with guards.context("training"):
        for step in range(steps):
            with guards.micro_step(step):
                with guards["reference"].sanctioned("kl"):
                    guards["reference"].module(X)
                with guards["critic"].sanctioned("values"):
                    guards["critic"].module(X)
                    guards["critic"].module(X)
    with guards.context("inference"):
        guards["critic"].module(X)


class TestBlocks:
    def test_a_good_training(self, guards):
        """Has a verdict with a line for each."""
        train(guards)
        assert str(guards.verdict) == (
            "reference: 3 micro-steps, 3 training calls (kl 3), 0 inference calls, 0 violations\n"
            "critic: 3 micro-steps, 6 training calls (values 6), 1 inference call, 0 violations"
        )
        assert guards.verdict["critic"].calls_per_micro_step == 2

    def test_each_keeps_its_own_books(self, guards):
        """What one is allowed, the other is not; and each is due."""
        with guards.context("training"):
            with pytest.raises(BudgetUnmet, match="of critic was met: values made 0 of 2 calls"):
                with guards.micro_step():
                    with guards["reference"].sanctioned("kl"):
                        guards["reference"].module(X)
            with pytest.raises(UnsanctionedCall, match=r"^critic was called"), guards.micro_step():
                with guards["reference"].sanctioned("kl"):
                    guards["critic"].module(X)

    def test_blocks_end_whatever_is_raised(self, guards):
        """In all of them."""
        for block in (lambda: guards.context("training"), lambda: guards.context("inference")):
            with pytest.raises(KeyError), block(), guards.micro_step():
                raise KeyError("mine")
        for guard in guards.values():
            assert guard._admission.open.position().blocks == ()
        with pytest.raises(NoContext), guards.micro_step():
            pytest.fail("it was opened")

    def test_a_window_of_those_that_count_in_it(self, modules):
        """The others are not asked."""
        rollout = CallPolicy({"kl": Scope((1, 9), per="rollout")})
        guards = guard_modules(modules, policy={"reference": rollout, "critic": VALUES})
        with guards.context("training"):
            with pytest.raises(BudgetUnmet), guards.window("rollout"):
                pass
            with guards.window("rollout"), guards["reference"].sanctioned("kl"):
                guards["reference"].module(X)
            with guards.window("step"):  # of every training, whoever counts in it
                pass
        with pytest.raises(ValueError, match="'rolout' is not a window of reference's policy"):
            with guards.window("rolout"):
                pytest.fail("it was opened")

    def test_gives_the_modules_back(self, modules):
        """As a block, also by an exception."""
        classes = {name: type(module) for name, module in modules.items()}
        with pytest.raises(KeyError), guard_modules(modules) as guards:
            assert guard_of(guards.modules["critic"]) is guards["critic"]
            raise KeyError("mine")
        assert {name: type(module) for name, module in modules.items()} == classes
        assert all(guard_of(module) is None for module in modules.values())


class TestLog:
    def test_one_file_tells_of_all(self, modules, tmp_path):
        """Its header has the contract of each, and it goes on to the end of the last."""
        policy = {"reference": KL, "critic": VALUES}
        with guard_modules(modules, policy=policy, log=tmp_path) as guards:
            train(guards)
        assert [path.name for path in tmp_path.iterdir()] == [FILE]
        lines = read(tmp_path / FILE)
        assert lines[0]["module"] == "reference, critic"
        assert lines[0]["policies"] == {"reference": KL.to_json(), "critic": VALUES.to_json()}
        assert events(lines).count("run.end") == 1
        assert events(lines)[-1] == "run.end"
        assert {line["module"] for line in lines if line["event"] == "call.begin"} == set(modules)

    def test_of_one_module_is_as_ever(self, modules, tmp_path):
        """A header with its policy."""
        with guard_modules({"critic": modules["critic"]}, policy=VALUES, log=tmp_path):
            pass
        header = read(tmp_path / FILE)[0]
        assert (header["module"], header["policy"]) == ("critic", VALUES.to_json())

    def test_off_writes_none(self, modules, tmp_path):
        """Nor does it install anything."""
        guards = guard_modules(modules, mode="off", log=tmp_path / "log")
        assert guards.modules == modules
        assert not (tmp_path / "log").exists()


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"modules": [nn.Linear(1, 1)]}, TypeError, "modules must map names to modules, not ["),
            ({"modules": {}}, ValueError, "there is no module to guard: modules is empty"),
            ({"modules": {"critic": None}}, TypeError, "only an nn.Module can be guarded, not Non"),
            (
                {"policy": {"teacher": KL}},
                ValueError,
                "policy: there is no module 'teacher' among those to guard, 'reference', 'critic'",
            ),
            ({"policy": {"critic": 1}}, TypeError, "policy must be a CallPolicy, not 1"),
            ({"mode": "strict"}, ValueError, "mode must be one of enforce, observe, off, not 'str"),
        ],
    )
    def test_is_refused_and_nothing_is_guarded(self, modules, arguments, error, message):
        """The message shows what was given."""
        given = {"modules": modules} | arguments
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            guard_modules(given.pop("modules"), **given)
        assert all(guard_of(module) is None for module in modules.values())

    def test_the_second_of_two_is_guarded_already(self, modules):
        """Then the first is given back."""
        guard_module(modules["critic"])
        with pytest.raises(ValueError, match="is guarded already"):
            guard_modules(modules)
        assert guard_of(modules["reference"]) is None

    def test_is_a_mapping(self, guards):
        """Of guards, by name."""
        assert list(guards) == ["reference", "critic"]
        assert len(guards) == 2
        assert isinstance(guards, Guards)
        assert repr(guards) == (
            "<Guards of <Guard of reference: enforce, 0 calls, 0 violations>, "
            "<Guard of critic: enforce, 0 calls, 0 violations>>"
        )
