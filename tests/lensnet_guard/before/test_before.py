"""Logs and pickles that an earlier guard has left (`make`) are read, whatever has moved since."""

import importlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from lensnet_guard import BudgetExceeded, CallPolicy, Guard, UnsanctionedCall, guard_of
from lensnet_guard.cli import to_json
from lensnet_guard.postmortem import analyse, read_verdict

HERE = Path(__file__).parent
POLICY = CallPolicy({"critic": 1}, {"train:score": 2}, ("0",))
X = torch.ones(2, 3)


@pytest.fixture(scope="module")
def values():
    return pickle.loads((HERE / "values.pkl").read_bytes())


def allowed_and_refused(guard):
    """One call as the policy has it, and one that it has no place for."""
    with guard.context("training"):
        with guard.sanctioned("critic"):
            assert guard.module(X).shape == (2, 1)
        with pytest.raises(UnsanctionedCall):
            guard.module(X)


class TestLog:
    def test_the_findings_are_those_of_then(self, monkeypatch):
        """Every field of the post-mortem, as that guard's own has told it."""
        monkeypatch.chdir(HERE)
        found = json.loads(json.dumps(to_json(analyse(["run"])), default=vars))
        assert found == json.loads(Path("findings.json").read_text())

    def test_the_verdict_counts_it(self):
        """The verdict for programs, of the same log."""
        found = read_verdict(HERE / "run")
        assert (found.micro_steps, found.calls, found.violations) == (6, 5, 2)
        assert found.ended
        assert not found.clean


class TestPickles:
    def test_a_saved_module_is_guarded_again(self):
        """`torch.save` of a whole guarded module: weights, contract and name."""
        module = torch.load(HERE / "module.pt", weights_only=False)
        guard = guard_of(module)
        assert (guard.name, guard.mode, guard.policy) == ("critic", "enforce", POLICY)
        allowed_and_refused(guard)

    def test_guards(self, values):
        """A guard, and one that is off."""
        assert isinstance(values["guard"], Guard)
        assert (values["guard"].name, values["guard"].policy) == ("critic", POLICY)
        allowed_and_refused(values["guard"])
        assert (values["off"].mode, values["off"].policy) == ("off", POLICY)
        assert values["off"].module(X).shape == (2, 1)

    def test_the_class_of_a_guarded_part(self, values):
        """It comes out as the class that was armed."""
        assert values["class of a part"] is nn.Sequential

    def test_what_a_guard_has_written_down(self, values):
        """A policy, a micro-step, records of every kind, and a violation."""
        assert values["policy"] == POLICY
        assert values["micro-step"].calls == {"critic": 1}
        assert values["micro-step"].unmet() == {}
        (call,) = values["micro-step"].spent("critic")
        kinds = [record.kind for record in values["records"]]
        assert kinds == [*["call", "recompute"] * 3, "call", "micro_step"]
        assert call.caller.file == values["records"][0].stack()[-1].file == "/project/make.py"
        assert call.inputs == ("float32[2, 3] cpu",)
        assert type(values["violation"]) is BudgetExceeded
        assert values["violation"].record.seq == values["violation"].earlier[0].seq + 2


class TestNames:
    @pytest.mark.parametrize(
        "name",
        [
            *("armed_class.itself", "budget.MicroStep", "compiled.CompileState", "copies.rebuild"),
            *("errors.BudgetUnmet", "guard.Guard", "hazards.LensNetHazard", "policy.CallPolicy"),
            *("proxy.guard_of", "record.CallRecord", "record.Frame"),
        ],
    )
    def test_what_a_pickle_may_name(self, name):
        """By the module that it was in, it is found where it is now: the very same object."""
        module, _, leaf = name.partition(".")
        found = getattr(importlib.import_module(f"lensnet_guard.{module}"), leaf)
        assert found is getattr(importlib.import_module(found.__module__), leaf)

    @pytest.mark.parametrize("name", ["lensnet_guard.nothing", "lensnet_guard.calls.copies"])
    def test_what_never_was(self, name):
        """It is not found, as ever."""
        with pytest.raises(ModuleNotFoundError, match=name):
            importlib.import_module(name)
