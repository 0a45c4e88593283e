"""What logs of observed runs tell: of several ranks and modules, broken off, numbered or not."""

import contextlib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tests.lensnet_guard.helpers import FILE, X
from tests.lensnet_guard.postmortem import programs
from tests.lensnet_guard.postmortem.test_suggest import GENERATION, SCORE, made_of, observe
from torch import nn

from lensnet_guard import CallPolicy, Scope, guard_module, guard_modules
from lensnet_guard.cli import main
from lensnet_guard.postmortem.observed import read_observed
from lensnet_guard.postmortem.suggest import suggest

BEFORE = Path(__file__).parents[1] / "before" / "run"


def suggested(folder):
    """What is suggested for the one module of some logs."""
    (observed,), faults = read_observed([folder])
    return suggest(observed), faults


def run(*arguments):
    return CliRunner().invoke(main, ["suggest", *map(str, arguments)])


def ask(guard, times=1):
    for _ in range(times):
        guard.module(X)


def average(guard):
    guard.module(programs.X)


class TestRanks:
    def test_are_taken_together(self, tmp_path, monkeypatch):
        """What one of them has not kept, the policy does not ask for."""
        for rank, odd in (("0", None), ("1", "twice")):
            monkeypatch.setenv("RANK", rank)
            observe(tmp_path, programs.dpo, odd=odd)
        found, faults = suggested(tmp_path)
        assert found.seen == "17 calls in training, 2 in inference (free), on ranks 0, 1"
        assert [(s.calls, s.caller) for s in found.scopes] == [((1, 2), SCORE)]
        assert "1 to 2 in each of 16 micro-steps" in found.scopes[0].on
        assert faults == []

    @pytest.mark.parametrize("ranks", ["01", "10"])
    def test_one_that_never_calls(self, tmp_path, monkeypatch, ranks):
        """Its windows are windows without a call, whether they come before or after the calls."""
        for rank, program in zip(ranks, (programs.dpo, programs.evaluation), strict=True):
            monkeypatch.setenv("RANK", rank)
            observe(tmp_path, program)
        found, _ = suggested(tmp_path)
        assert found.scopes[0].calls == (0, 1)
        assert found.stricter[0].endswith(
            "broken 3 times: step 0, micro-step 0 (none); step 1, micro-step 0 (none); step 2, "
            "micro-step 0 (none)"
        )


class TestSeveralModules:
    def test_each_has_its_policy(self, tmp_path):
        """Executed as printed, `guard_modules` takes them, and the same training keeps them."""
        policies = {"reference": CallPolicy({"kl": (0, None)}), "critic": None, "unused": None}

        def train(policy, mode, log=None):
            modules = {name: nn.Linear(3, 2) for name in policies}
            with guard_modules(modules, policy=policy, mode=mode, log=log) as guards:
                with guards.context("training"):
                    for step in range(3):
                        with guards.micro_step(step), torch.no_grad():
                            with guards["reference"].sanctioned("kl"):
                                ask(guards["reference"])
                            ask(guards["critic"], 2)
                assert mode == "observe" or not any(g.violation_count for g in guards.values())

        train({n: p for n, p in policies.items() if p is not None}, "observe", tmp_path)
        result = run(tmp_path)
        assert result.exit_code == 1
        assert "# Before this holds (unused):\n# - no call of unused was seen: " in result.stdout
        namespace = {}
        exec(result.stdout, namespace)
        found = namespace["policies"]
        assert dict(found["reference"].scopes) == {"kl": 1}
        assert found["critic"].scopes["ask"] == Scope(2, caller=f"{__name__}:ask")
        assert "unused" not in found
        train({**found, "unused": CallPolicy(scopes={})}, "enforce")

    def test_a_copy_has_the_policy_of_its_original(self, tmp_path):
        """Their calls are taken together."""
        guard = guard_module(nn.Linear(3, 2), mode="observe", log=tmp_path, name="critic")
        with guard.context("training"), guard.micro_step():
            ask(guard)
        copied = guard.__deepcopy__({})
        with copied.context("training"), copied.micro_step():
            ask(copied, 2)
        guard.end_log()
        found, _ = suggested(tmp_path)
        assert (found.module, found.scopes[0].calls) == ("critic", (1, 2))


class TestOptimizerSteps:
    def bare(self, folder, steps=3, then=lambda guard: None, blocks=True):
        guard = guard_module(programs.reference(), mode="observe", log=folder)
        training = programs.Training(guard)
        context = guard.context("training") if blocks else contextlib.nullcontext()
        with context:
            for _ in range(steps):
                with torch.no_grad():
                    target = training.score()
                training.backward(target)
                training.step()
                then(guard)
        guard.end_log()

    def test_are_the_windows_where_nobody_opens_any(self, tmp_path):
        """And the program is told to open them, after which the policy holds."""
        self.bare(tmp_path)
        result = run(tmp_path)
        assert result.exit_code == 1
        policy = made_of(result.stdout)
        assert dict(policy.scopes) == {"score": Scope(1, per="step", caller=SCORE)}
        told = " ".join(result.stdout.replace("#", "").split())
        assert "3 calls, 1 in each of 3 optimizer steps; the first at " in told
        assert 'torch\'s own steps were counted: open `with guard.window("step"):` around' in told
        guard = guard_module(programs.reference(), policy=policy)
        programs.unwatched(guard)
        assert guard.violation_count == 0

    def test_what_follows_a_step_belongs_to_it(self, tmp_path):
        """As an average of the weights that is taken after the optimizer's step."""
        self.bare(tmp_path, then=average)
        found, _ = suggested(tmp_path)
        assert {scope.name: scope.calls for scope in found.scopes} == {"score": 1, "average": 1}

    def test_a_step_without_a_call(self, tmp_path):
        """At the end of the run, where no line of a call tells of it."""
        guard = guard_module(programs.reference(), mode="observe", log=tmp_path)
        training = programs.Training(guard)
        with guard.context("training"):
            for step in range(4):
                target = training.score() if step < 2 else programs.X
                training.backward(target)
                training.step()
        guard.end_log()
        found, _ = suggested(tmp_path)
        assert found.scopes[0].calls == (0, 1)

    def test_a_killed_run_has_a_step_that_never_ended(self, tmp_path):
        """It says nothing of how few calls a step has."""
        self.bare(tmp_path)
        lines = (tmp_path / FILE).read_text().splitlines(keepends=True)
        (tmp_path / FILE).write_text("".join(lines[:-1]))
        found, faults = suggested(tmp_path)
        assert found.scopes[0].calls == 1
        assert faults == [f"{tmp_path}/lensnet.rank0: it stops before the end of the run"]

    def test_a_killed_run_says_nothing_of_what_would_have_followed(self, tmp_path):
        """As the average that was to be taken after its last step."""
        self.bare(tmp_path, then=average)
        lines = (tmp_path / FILE).read_text().splitlines(keepends=True)
        last = max(n for n, line in enumerate(lines) if '"violation"' in line)
        (tmp_path / FILE).write_text("".join(lines[:last]))
        found, _ = suggested(tmp_path)
        assert {scope.name: scope.calls for scope in found.scopes} == {"score": 1, "average": 1}

    def test_without_a_context(self, tmp_path):
        """A script that declares none is told where to; who calls and how often is told."""
        self.bare(tmp_path, blocks=False)
        result = run(tmp_path)
        assert result.exit_code == 1
        assert dict(made_of(result.stdout).scopes) == {"score": Scope(1, per="step", caller=SCORE)}
        assert "# reference: 3 calls in no context, 0 in inference" in result.stdout.replace(
            "Sequential", "reference"
        )
        assert "3 calls in neither training nor inference, the first at " in " ".join(
            result.stdout.replace("#", "").split()
        )


class TestNoWindow:
    def test_the_counts_are_given(self, tmp_path):
        """Neither micro-steps nor steps: there is no policy to print."""
        guard = guard_module(nn.Linear(3, 2), mode="observe", log=tmp_path, name="critic")
        with guard.context("training"):
            ask(guard, 5)
        guard.end_log()
        result = run(tmp_path)
        assert result.exit_code == 1
        assert result.stdout == (
            "# critic: 5 calls in training, 0 in inference\n"
            "\n"
            "# Before this holds:\n"
            "# - no window is known for the 5 calls of ask: none was open, and torch took no\n"
            "#   optimizer step. Open `with guard.micro_step(step):` around each micro-batch, and\n"
            "#   observe the run once more\n"
        )

    def test_some_are_outside(self, tmp_path):
        """They are counted apart, and told with their place."""
        guard = guard_module(nn.Linear(3, 2), mode="observe", log=tmp_path)
        with guard.context("training"):
            ask(guard)
            for step in range(4):
                with guard.micro_step(step):
                    ask(guard)
        guard.end_log()
        found, _ = suggested(tmp_path)
        assert found.scopes[0].calls == 1
        (to_do,) = found.to_do
        assert to_do.startswith("1 call of ask outside of any micro-step, the first at ")
        assert to_do.endswith(" in ask: make them inside one, or in inference")

    def test_of_one_caller_alone(self, tmp_path):
        """Whoever calls outside of all windows is told, and the others have a policy."""
        guard = guard_module(nn.Linear(3, 2), mode="observe", log=tmp_path)
        with guard.context("training"):
            Other().ask(guard)
            with guard.micro_step(), torch.no_grad():
                ask(guard)
        guard.end_log()
        found, _ = suggested(tmp_path)
        assert [(scope.name, scope.calls) for scope in found.scopes] == [("ask", 1)]
        assert [rested.name for rested in found.requires] == ["no_grad", "frozen"]
        (to_do,) = found.to_do
        assert to_do.startswith("1 call of Other.ask outside of any window, the first at ")
        assert to_do.endswith("ask: make them inside one, or in inference")

    def test_a_call_at_module_level(self, run_python, tmp_path):
        """No policy can name it, and the program is told what to open."""
        done = run_python(
            """
            import torch
            from lensnet_guard import guard_module
            guard = guard_module(torch.nn.Linear(3, 2), mode="observe", log="run")
            with guard.context("training"):
                for step in range(2):
                    with guard.micro_step(step):
                        guard.module(torch.ones(1, 3))
            guard.end_log()
            """
        )
        assert done.returncode == 0, done.stderr
        result = run(tmp_path / "run")
        assert result.exit_code == 1
        assert '"script": 1,\n' in result.stdout
        assert "script.py:8 in <module> is in no function that a policy could name" in " ".join(
            result.stdout.replace("#", "").split()
        )


class TestWindows:
    def test_that_nothing_counts_in(self, tmp_path):
        """The program would be refused one: it is told to take it out."""
        guard = guard_module(
            nn.Linear(3, 2), mode="observe", log=tmp_path, policy=GENERATION, name="critic"
        )
        with guard.context("training"), guard.window("generation"):
            pass
        with guard.context("training"), guard.micro_step():
            ask(guard)
        guard.end_log()
        found, _ = suggested(tmp_path)
        assert found.to_do == (
            'no scope counts per "generation": take `with guard.window("generation"):` out',
        )

    def test_one_that_the_program_opens_stays_one(self, tmp_path):
        """Although each micro-step has one call, and some generations have more of them."""
        guard = guard_module(nn.Linear(3, 2), mode="observe", log=tmp_path, policy=GENERATION)
        with guard.context("training"):
            for micro_steps in (1, 2):
                with guard.window("generation"):
                    for number in range(micro_steps):
                        with guard.micro_step(0, number):
                            ask(guard)
        guard.end_log()
        found, _ = suggested(tmp_path)
        assert [(s.per, s.calls) for s in found.scopes] == [("generation", (1, 2))]
        assert found.to_do == ()

    def test_one_that_was_broken_off(self, tmp_path):
        """Owes nothing, and may have had more calls than all others."""
        guard = guard_module(nn.Linear(3, 2), mode="observe", log=tmp_path)
        with guard.context("training"):
            for times in (1, 0, 3, 1):
                try:
                    with guard.micro_step():
                        ask(guard, times)
                        if times != 1:
                            raise KeyError
                except KeyError:
                    pass
        guard.end_log()
        found, _ = suggested(tmp_path)
        assert found.scopes[0].calls == (1, 3)
        assert found.stricter[0].endswith("1 time: one that was broken off (3 calls)")

    def test_a_scope_that_stands_alone(self, tmp_path):
        """It is a micro-step of its own, and of nobody else."""
        guard = guard_module(
            nn.Linear(3, 2), mode="observe", log=tmp_path, policy=CallPolicy({"kl": (0, None)})
        )
        with guard.context("training"):
            for _ in range(3):
                with guard.sanctioned("kl"):
                    ask(guard, 2)
                with guard.micro_step():
                    ask(guard)
                    with guard.sanctioned("kl"):
                        ask(guard, 2)
        guard.end_log()
        found, _ = suggested(tmp_path)
        assert {scope.name: scope.calls for scope in found.scopes} == {"kl": 2, "ask": 1}

    def test_a_scope_that_stands_alone_after_micro_steps_without_it(self, tmp_path):
        """Those would have owed its calls."""
        guard = guard_module(
            nn.Linear(3, 2), mode="observe", log=tmp_path, policy=CallPolicy({"kl": (0, None)})
        )
        with guard.context("training"):
            for step in range(2):
                with guard.micro_step(step):
                    pass
            for _ in range(3):
                with guard.sanctioned("kl"):
                    ask(guard, 2)
        guard.end_log()
        found, _ = suggested(tmp_path)
        assert found.scopes[0].calls == (0, 2)


class TestNames:
    def test_are_those_of_the_observed_policy(self, tmp_path):
        """Where it names callers or states; and the caller that it names stays the caller."""
        caller = f"{programs.__name__}:dpo"
        policy = CallPolicy({"reference": Scope((0, None), caller=caller)})
        observe(tmp_path, programs.dpo, policy=policy)
        found, _ = suggested(tmp_path)
        assert [(s.name, s.caller, s.calls) for s in found.scopes] == [("reference", caller, 1)]

    def test_a_sanctioned_caller(self, tmp_path):
        """It becomes a scope with a caller, named after it."""
        caller = f"{programs.__name__}:dpo"
        observe(tmp_path, programs.dpo, policy=CallPolicy(sanctioned_callers={caller: 1}))
        found, _ = suggested(tmp_path)
        assert [(s.name, s.caller) for s in found.scopes] == [("dpo", caller)]

    def test_of_two_functions_alike(self, tmp_path):
        """Each has a name of its own, and a scope that the program opens keeps its own."""
        policy = CallPolicy({"ask": (0, None)})
        guard = guard_module(nn.Linear(3, 2), mode="observe", log=tmp_path, policy=policy)
        with guard.context("training"), guard.micro_step():
            ask(guard)
            Other().ask(guard)
            with guard.sanctioned("ask"):
                ask(guard)
        guard.end_log()
        found, _ = suggested(tmp_path)
        assert [scope.name for scope in found.scopes] == [
            *(f"{__name__}.ask", "Other.ask", "ask"),
        ]

    def test_methods_and_shared_parts_stay(self, tmp_path):
        """A policy without them would refuse what this one lets be."""
        module = nn.Sequential(nn.Linear(3, 2))
        policy = CallPolicy({"any": (0, None)}, shared_submodules=("0",))
        guard = guard_module(module, mode="observe", log=tmp_path, policy=policy)
        with guard.context("training"), guard.micro_step():
            ask(guard)
        guard.end_log()
        assert made_of(run(tmp_path).stdout).shared_submodules == ("0",)


class Generator(nn.Linear):
    @torch.no_grad()
    def generate(self, x, times):
        for _ in range(times):
            x = self(x)
        return x


def distil(guard, times):
    guard.module.generate(X, times)


class TestMethods:
    def test_of_the_module_are_its_own_business(self, tmp_path):
        """Who calls the method is named; and that the method may be what counts."""
        guard = guard_module(Generator(3, 3), mode="observe", log=tmp_path)
        with guard.context("training"):
            for step in range(3):
                with guard.micro_step(step):
                    distil(guard, 1 + step)
        guard.end_log()
        found, _ = suggested(tmp_path)
        assert [(scope.name, scope.calls) for scope in found.scopes] == [("distil", (1, 3))]
        assert found.remarks == (
            "6 calls of distil inside the module's own method `generate`, which decides how "
            'many: `methods=("generate",)` counts each of its runs as one',
        )
        assert found.stricter == (
            "calls of distil vary: 1 in 1 micro-step; 2 in 1 micro-step; 3 in 1 micro-step",
        )


class Other:
    def ask(self, guard):
        guard.module(X)


class TestConditions:
    def test_one_that_did_not_hold_at_first(self, tmp_path):
        """The call that lacked it came before anybody knew of it."""
        guard = guard_module(nn.Linear(3, 2), mode="observe", log=tmp_path)
        with guard.context("training"):
            for step in range(4):
                with guard.micro_step(step), torch.set_grad_enabled(step == 0):
                    ask(guard)
        guard.end_log()
        found, _ = suggested(tmp_path)
        assert [text.partition(" at ")[0] for text in found.stricter] == [
            "`no_grad` did not hold of 1 of 4 calls of ask: step 0, micro-step 0",
            "`detached` did not hold of 1 of 4 results of ask: step 0, micro-step 0",
        ]

    def test_code_of_a_stranger(self, tmp_path):
        """A log's conditions are code, and only such as have the form of one come into it."""
        observe(tmp_path, programs.dpo)
        path = tmp_path / FILE
        path.write_text(path.read_text().replace('"no_grad"', "\"__import__('os').abort()\""))
        found, _ = suggested(tmp_path)
        assert [rested.name for rested in found.requires] == ["eval_mode", "frozen"]


class TestNeverLegal:
    def test_is_told(self, tmp_path):
        """What no policy allows: the program has to change."""
        module = nn.Linear(3, 2)
        guard = guard_module(module, mode="observe", log=tmp_path, name="critic")
        with guard.context("training"):
            with guard.micro_step():
                ask(guard)
                module(X)
                module(X)
        guard.end_log()
        found, _ = suggested(tmp_path)
        (to_do,) = found.to_do
        assert to_do.startswith(
            "no policy allows a BypassedGuard, seen 2 times: critic was run behind its guard's "
            "back, step 0, micro-step 0 at "
        )

    def test_a_call_inside_a_backward_pass(self, tmp_path):
        """It is legal, and worth a word."""
        guard = guard_module(nn.Linear(3, 2), mode="observe", log=tmp_path)
        x = X.clone().requires_grad_()
        with guard.context("training"), guard.micro_step():
            middle = x * 2
            middle.register_hook(lambda _: ask(guard))
            middle.sum().backward()
        guard.end_log()
        found, _ = suggested(tmp_path)
        assert found.remarks == ("1 call of ask inside a backward pass",)
