"""What all integrations share: optional libraries, scopes where nobody guards, places."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lensnet_guard import UnsanctionedCall, guard_module
from lensnet_guard.integrations import Verdict, sanctioned
from lensnet_guard.integrations._place import find, locate, replace
from lensnet_guard.integrations._watch import Contract, Watch
from lensnet_guard.integrations._watches import watches_for
from lensnet_guard.postmortem import read_verdict


class TestOptionalLibraries:
    @pytest.mark.parametrize(
        ("name", "extra"),
        [("lightning", "lightning"), ("transformers", "hf"), ("accelerate", "hf")],
    )
    def test_a_missing_one_is_named_with_its_extra(self, monkeypatch, name, extra):
        """What to install is in the message."""
        for library in (name, f"{name}.pytorch"):
            monkeypatch.setitem(sys.modules, library, None)
        monkeypatch.delitem(sys.modules, f"lensnet_guard.integrations.{name}", raising=False)
        with pytest.raises(ImportError) as caught:
            importlib.import_module(f"lensnet_guard.integrations.{name}")
        title = "Lightning" if name == "lightning" else name
        assert str(caught.value) == (
            f"lensnet_guard.integrations.{name} needs {title}; "
            f"install it with: pip install 'lensnet-guard[{extra}]'"
        )

    def test_the_guard_imports_none(self, run_python):
        """Nor does the package of the integrations."""
        done = run_python(
            """
            import sys
            from lensnet_guard import *
            import lensnet_guard.integrations
            print(sorted({"lightning", "transformers", "accelerate"} & sys.modules.keys()))
            """
        )
        assert done.stdout == "[]\n", done.stderr


class TestAnotherWorkingDirectory:
    """Relative folders are those where the integration was made, wherever the trainer goes."""

    @pytest.fixture
    def owner(self, scorer, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "other").mkdir()
        return SimpleNamespace(scorer=scorer)

    def test_the_log_moved_before_the_training_began(self, owner, tmp_path, monkeypatch):
        """Hydra and Lightning change the directory between the callback and its training."""
        contract = Contract("scorer", log="log")
        monkeypatch.chdir("other")
        watches = watches_for({"scorer": contract}, owner)
        guard = watches.open()
        assert guard.log_path == tmp_path / "log" / "lensnet.rank0.jsonl"
        watches.close()

    def test_the_evidence_moved(self, owner, tmp_path, monkeypatch):
        """It is for the folder that the trainer had when it began."""
        watch = Watch(Contract("scorer"), owner)
        watch.open()
        monkeypatch.chdir("other")
        error = RuntimeError()
        watch.leave_evidence(error, "output")
        watch.close(error)
        assert (tmp_path / "output" / "lensnet.rank0.jsonl").exists()

    def test_a_log_that_is_no_path(self):
        """It is refused at once, not when the training starts."""
        with pytest.raises(TypeError, match=r"^log must be a folder's path, not 5$"):
            Contract("scorer", log=5)


class TestSanctioned:
    def test_it_is_the_guards_scope(self, guard, x):
        """And counts there."""
        with guard.context("training"), guard.micro_step():
            with sanctioned(guard.module, "preference_scorer"):
                guard.module(x)
        assert guard.count("training", "preference_scorer") == 1

    def test_it_is_nothing_where_nobody_guards(self, scorer, x):
        """So that the model runs without a trainer."""
        with sanctioned(scorer, "preference_scorer"):
            scorer(x)
        guard = guard_module(scorer, mode="off")
        with sanctioned(guard.module, "preference_scorer"):
            guard.module(x)
        assert scorer.runs == 2

    def test_it_allows_nothing_else(self, guard, x):
        """A call after it is refused."""
        with pytest.raises(UnsanctionedCall), guard.context("training"), guard.micro_step():
            with sanctioned(guard.module, "preference_scorer"):
                guard.module(x)
            guard.module(x)


class TestPlaces:
    def test_a_dotted_path(self):
        """Its message names the class that it starts from."""
        owner = nn.ModuleDict({"inner": nn.ModuleDict({"critic": nn.Linear(1, 1)})})
        place = locate(owner, "inner.critic")
        assert place.module is owner["inner"]["critic"]
        assert place.path == "ModuleDict.inner.critic"

    def test_modules_below_modules_and_modules_that_are_no_submodules(self):
        """A frozen model is often hidden, so that it is neither saved nor trained."""
        hidden = guard_module(nn.Linear(1, 1))
        deep = guard_module(nn.Linear(1, 1))
        owner = nn.ModuleDict({"inner": nn.Module()})
        vars(owner)["reference"] = hidden.module
        owner["inner"].critic = deep.module
        assert find(owner, hidden).path == "ModuleDict.reference"
        assert find(owner, deep).path == "ModuleDict.inner.critic"
        assert find(owner, guard_module(nn.Linear(1, 1))) is None

    def test_modules_in_a_circle(self):
        """As a model and its trainer may hold each other."""
        owner = nn.Module()
        vars(owner)["itself"] = owner
        assert find(owner, guard_module(nn.Linear(1, 1))) is None


class TestReplace:
    def test_every_place_that_holds_this_very_module(self):
        """Hidden modules stay hidden; lists, and objects beside; nothing in the module itself."""
        old, new = nn.Linear(1, 1), nn.Linear(1, 1)
        vars(old)["itself"] = old
        model = nn.ModuleDict({"inner": old, "other": nn.Linear(1, 1)})
        vars(model)["hidden"] = old
        beside = SimpleNamespace(model=old, models=[None, old])
        owner = SimpleNamespace(model=model, beside=beside, kind=nn.Linear)
        places = [place.path for place in replace(owner, old, new)]
        assert sorted(places) == [
            "SimpleNamespace.beside.model",
            "SimpleNamespace.beside.models.1",
            "SimpleNamespace.model.hidden",
            "SimpleNamespace.model.inner",
        ]
        assert model["inner"] is model.hidden is beside.model is beside.models[1] is new
        assert list(dict(model.named_children())) == ["inner", "other"]
        assert vars(old)["itself"] is old

    def test_what_a_compiled_module_runs(self):
        """Its wrapper keeps the call of the module that it was made of."""
        old, new = nn.Linear(1, 1), nn.Linear(1, 1)
        owner = SimpleNamespace(model=torch.compile(old, backend="eager"))
        x = torch.ones(1, 1)
        owner.model(x)
        replace(owner, old, new)
        assert owner.model(x).equal(new(x))
        torch._dynamo.reset()


class TestVerdict:
    def test_in_words(self):
        """One of a thing is singular."""
        verdict = Verdict("critic", 1, {"value": 1, "bonus": 2}, 1, 0)
        assert str(verdict) == (
            "critic: 1 micro-step, 3 training calls (value 1, bonus 2), 1 inference call, "
            "0 violations"
        )
        assert verdict.calls_per_micro_step == 3

    def test_of_no_step_at_all(self):
        """A training that never began has no average."""
        assert Verdict("critic", 0, {"value": 0}, 0, 0).calls_per_micro_step == 0


class TestBrokenOff:
    def test_a_micro_step_that_never_came_to_its_end(self, scorer, tmp_path):
        """The log gives the reason in a public word, and no budget is missed."""
        contracts = {"scorer": Contract("scorer", log=tmp_path)}
        watches = watches_for(contracts, SimpleNamespace(scorer=scorer))
        watches.open()
        watches.begin_step(0, 0)
        watches.enter("inference")
        watches.close()
        lines = map(json.loads, next(tmp_path.iterdir()).read_text().splitlines())
        ended = [line["raised"] for line in lines if line["event"] == "micro_step.end"]
        assert ended == ["Abandoned"]
        assert read_verdict(tmp_path).violations == 0
