"""What a log notes of observed calls: who makes them, in what windows, and what held."""

import functools
import re

import pytest
import torch
from tests.lensnet_guard.helpers import FILE, X, read
from torch import nn
from torch.utils.checkpoint import checkpoint

from lensnet_guard import CallPolicy, Scope, frozen, guard_module
from lensnet_guard.boundary import observer
from lensnet_guard.calls.callers import check_caller_exists

HERE = __name__


def observed(folder, module=None, mode="observe", **keywords):
    return guard_module(module or nn.Linear(3, 2), mode=mode, log=folder, **keywords)


def noted(guard, folder, event="call.begin"):
    """The lines of one kind."""
    guard.end_log()
    return [line for line in read(folder / FILE) if line["event"] == event]


def ask(guard, x=X):
    return guard.module(x)


def changed(module):
    with torch.no_grad():
        module.weight.add_(1)


class Owner:
    def __init__(self, guard):
        self.guard = guard

    @functools.lru_cache(maxsize=0)  # noqa: B019
    def ask(self):
        return ask(self.guard)

    @torch.no_grad()
    def ask_without_grad(self):
        return ask(self.guard)


class TestCallers:
    def test_are_named_as_a_policy_names_them(self, tmp_path):
        """Each of a function of ours is one that a policy may name, and applies."""
        guard = observed(tmp_path)
        Owner(guard).ask()
        Owner(guard).ask_without_grad()
        first, second = noted(guard, tmp_path)
        assert first["callers"][:2] == [f"{HERE}:ask", f"{HERE}:Owner.ask"]
        assert f"{HERE}:Owner.ask_without_grad" in second["callers"]
        for line in (first, second):
            assert len(line["callers"]) == len(line["stack"])
            functions = [frame["code.function.name"] for frame in line["stack"]]
            named = [name.partition(":")[2] for name in line["callers"]]
            # Before Python 3.11 a frame does not tell its function's whole name.
            assert all(name.endswith(f) for name, f in zip(named, functions, strict=True))
            for name in line["callers"]:
                if name.startswith(f"{HERE}:") and "<" not in name:
                    check_caller_exists(name)

    def test_of_violations_too(self, tmp_path):
        """They run all the same."""
        guard = observed(tmp_path)
        with guard.context("training"):
            ask(guard)
        (line,) = noted(guard, tmp_path)
        assert (line["reason"], line["callers"][0]) == ("UnsanctionedCall", f"{HERE}:ask")
        assert len(noted(guard, tmp_path, "violation")) == 1


class TestWindows:
    def test_that_are_open(self, tmp_path):
        """By name, the innermost first; without the micro-step, which has numbers."""
        policy = CallPolicy({"any": Scope((0, None), per="generation")})
        guard = observed(tmp_path, policy=policy)
        with guard.context("training"), guard.window("generation"):
            ask(guard)
            with guard.window("step"), guard.micro_step():
                ask(guard)
        ask(guard)
        told = [line.get("windows") for line in noted(guard, tmp_path)]
        assert told == [["generation"], ["step", "generation"], None]


class TestHeld:
    def held(self, folder, *calls, module=None, policy=None):
        """What held in each of some calls of a function of the guard."""
        guard = observed(folder, module, policy=policy)
        with guard.context("training"):
            for call in calls:
                call(guard)
        return [line["held"] for line in noted(guard, folder)]

    def test_each_condition(self, tmp_path):
        """By the name that it has in code, where it held, and only there."""
        module = nn.Linear(3, 2)

        def with_(*blocks):
            def call(guard):
                with torch.no_grad() if "no_grad" in blocks else torch.enable_grad():
                    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in blocks):
                        guard.module.train("eval" not in blocks)
                        if "change" in blocks:
                            changed(module)
                        ask(guard)

            return call

        combinations = (("no_grad",), ("eval",), ("autocast",), ("change",), ("no_grad", "eval"))
        assert self.held(tmp_path, *(with_(*blocks) for blocks in combinations), module=module) == [
            ["no_grad", "frozen"],
            ["eval_mode", "frozen"],
            ["frozen", "autocast(torch.bfloat16)"],
            [],
            ["no_grad", "eval_mode", "frozen"],
        ]

    def test_names_are_code(self):
        """Evaluated, each is a condition that a policy takes."""
        names = [observer.name_of(c) for c in (*observer._OF_CALLS, *observer._OF_RESULTS)]
        names += [observer.name_of(c) for c in observer._OF_ADAPTERS]
        space = {"torch": torch}
        exec(f"from lensnet_guard import {', '.join({n.partition('(')[0] for n in names})}", space)
        for name in names:
            assert observer.name_of(CallPolicy(requires=(eval(name, space),)).requires[0]) == name
        assert len(names) == 8

    def test_results(self, tmp_path):
        """In the line of the end; not where there is none."""
        guard = observed(tmp_path)
        ask(guard)
        with torch.no_grad():
            ask(guard)
        with pytest.raises(RuntimeError):
            ask(guard, X[:, :1])
        ends = noted(guard, tmp_path, "call.end")
        assert [line.get("held") for line in ends] == [[], ["detached"], None]

    def test_a_result_without_tensors(self, tmp_path):
        """Of nothing anything holds, which is no reason to ask for it."""

        class Nothing(nn.Module):
            def forward(self, x):
                return {"loss": None}

        guard = observed(tmp_path, Nothing())
        ask(guard)
        (line,) = noted(guard, tmp_path, "call.end")
        assert line["held"] == []

    def test_in_each_context_apart(self, tmp_path):
        """A policy asks in training alone: what a call in inference has seen, it has not."""
        module = nn.Linear(3, 2)
        guard = observed(tmp_path, module)
        for context in ("training", "inference", "training"):
            with guard.context(context):
                if context == "inference":
                    changed(module)
                ask(guard)
        told = ["frozen" in line["held"] for line in noted(guard, tmp_path)]
        assert told == [True, True, False]

    @pytest.mark.parametrize("log", [True, False])
    def test_the_policys_own_memory_is_its_own(self, tmp_path, log):
        """A change that only the log has been told of is told to the policy too."""
        module = nn.Linear(3, 2)
        policy = CallPolicy({"frozen": Scope((0, None), requires=(frozen,)), "free": (0, None)})
        guard = guard_module(module, mode="observe", policy=policy, log=tmp_path if log else None)
        with guard.context("training"), guard.micro_step():
            for scope in ("frozen", "free", "frozen"):
                with guard.sanctioned(scope):
                    if scope == "free":
                        changed(module)
                    ask(guard)
        assert [record.reason for record in guard.violations] == ["ConditionUnmet"]
        guard.end_log()

    def test_what_cannot_be_asked_does_not_hold(self, tmp_path, monkeypatch):
        """Observing never raises."""

        def broken(*_):
            raise RuntimeError("mine")

        monkeypatch.setattr(observer, "_OF_CALLS", (broken, *observer._OF_CALLS))
        monkeypatch.setattr(observer, "has_adapters", broken)
        monkeypatch.setattr(observer, "_OF_RESULTS", (broken,))
        assert self.held(tmp_path, ask) == [["frozen"]]

    def test_a_recompute_is_no_call(self, tmp_path):
        """Its line has no notes."""
        guard = observed(tmp_path)
        x = X.clone().requires_grad_()
        with guard.context("training"), guard.micro_step(), guard.sanctioned("preference_scorer"):
            out = checkpoint(guard.module, x, use_reentrant=False)
        out.sum().backward()
        call, again = noted(guard, tmp_path)
        assert (call["kind"], again["kind"]) == ("call", "recompute")
        assert "held" in call
        assert not {"held", "callers"} & again.keys()

    def test_adapters_of_a_module_that_has_some(self, tmp_path):
        """On or off; a module without any is asked neither."""
        peft = pytest.importorskip("peft", reason="the extra named test is not installed")
        base = nn.Sequential(nn.Linear(3, 2))
        model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"]))

        def off(guard):
            with guard.module.disable_adapter():
                ask(guard)

        found = self.held(tmp_path, ask, off, module=model)
        assert [[n for n in held if "adapters" in n] for held in found] == [
            ["adapters_on"],
            ["adapters_off"],
        ]


class TestNothing:
    """Is noted, asked or counted where nobody reads it."""

    @pytest.mark.parametrize(("mode", "log"), [("enforce", True), ("observe", False)])
    def test_without_an_observing_log(self, tmp_path, monkeypatch, mode, log):
        """The conditions are not even asked."""
        asked = []
        monkeypatch.setattr(observer, "_OF_CALLS", (asked.append,))
        guard = observed(tmp_path if log else None, mode=mode)
        with guard.context("inference"):
            ask(guard)
        assert asked == []
        if log:
            (begin,) = noted(guard, tmp_path)
            assert not {"held", "callers", "optimizer_step"} & begin.keys()

    def test_is_kept_in_records(self, tmp_path):
        """What one log has taken, no other line has."""
        guard = observed(tmp_path)
        ask(guard)
        assert guard.calls[0].notes == {"held": []}
        assert "callers" not in guard.calls[0].to_log()
        guard.end_log()


class TestBackward:
    def test_a_call_inside_it(self, tmp_path):
        """Is told; no other line says anything of it."""
        guard = observed(tmp_path)
        x = X.clone().requires_grad_()
        middle = x * 2
        middle.register_hook(lambda _: (ask(guard), None)[1])
        middle.sum().backward()
        ask(guard)
        told = [line.get("in_backward") for line in noted(guard, tmp_path)]
        assert told == [True, None]


def test_nothing_changes(tmp_path):
    """The same weights, the same random numbers, the same outputs as without a guard."""
    found = []
    for log in (None, tmp_path):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5), nn.BatchNorm1d(2))
        optimizer = torch.optim.Adam(module.parameters())
        run = module if log is None else observed(log, module).module
        for _ in range(3):
            run(X).sum().backward()
            optimizer.step()
        state = {re.sub("^_.*", "", k): v.tolist() for k, v in module.state_dict().items()}
        found.append((state, torch.rand(3).tolist()))
    assert found[0] == found[1]
