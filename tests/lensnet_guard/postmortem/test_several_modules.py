"""A log of several modules: each is told for itself, and nothing is added up that ought not to."""

import json

import pytest
from click.testing import CliRunner
from tests.lensnet_guard.helpers import X
from torch import nn

from lensnet_guard import CallPolicy, Scope, guard_modules
from lensnet_guard.cli import main, to_json
from lensnet_guard.logs import log_file
from lensnet_guard.postmortem import analyse, read_verdict
from lensnet_guard.postmortem.trace import trace_events

POLICIES = {"reference": CallPolicy({"kl": 1}), "critic": CallPolicy({"value": Scope((0, 2))})}


def train(folder, steps=3, reference=lambda step: 1, critic=lambda step: 2):
    """Two modules in one log: calls of each in every micro-step."""
    modules = {name: nn.Linear(3, 2) for name in POLICIES}
    with guard_modules(modules, policy=POLICIES, mode="observe", log=folder) as guards:
        with guards.context("training"):
            for step in range(steps):
                with guards.micro_step(step):
                    call(guards["reference"], "kl", reference(step))
                    call(guards["critic"], "value", critic(step))
        with guards.context("inference"):
            guards["critic"].module(X)


def call(guard, scope, times):
    with guard.sanctioned(scope):
        for _ in range(times):
            guard.module(X)


@pytest.fixture
def folder(tmp_path):
    train(tmp_path)
    return tmp_path


class TestSums:
    def test_are_a_line_each(self, folder):
        """Micro-steps of two modules are not twice as many."""
        (run,) = analyse([folder]).runs
        assert (run.module, run.micro_steps, run.training_calls) == ("reference, critic", 3, 9)
        assert {name: str(sums) for name, sums in run.sums.items()} == {
            "reference": "3 training calls in 3 micro-steps, 0 inference calls, 0 recomputes, "
            "0 violations",
            "critic": "6 training calls in 3 micro-steps, 1 inference call, 0 recomputes, "
            "0 violations",
        }
        assert {name: list(s.micro_step_calls) for name, s in run.sums.items()} == {
            "reference": [1, 1, 1],
            "critic": [2, 2, 2],
        }

    def test_in_every_report(self, folder):
        """For people, for programs, on the page."""
        text = CliRunner().invoke(main, ["postmortem", str(folder)]).stdout
        assert "  reference: 3 training calls in 3 micro-steps, 0 inference calls" in text
        assert "  critic: 6 training calls in 3 micro-steps, 1 inference call" in text
        (run,) = to_json(analyse([folder]))["runs"]
        assert run["modules"]["critic"]["training_calls"] == 6
        assert json.dumps(run["modules"])
        assert CliRunner().invoke(main, ["report", str(folder)]).exit_code == 0
        page = (folder / "report.html").read_text()
        assert "critic: 6 training calls in 3 micro-steps" in page
        assert "micro-step: critic, step 0, micro-step 0" in page

    def test_in_the_verdict_for_programs(self, folder):
        """A line for each module, and its numbers in JSON."""
        verdict = read_verdict(folder)
        lines = str(verdict).splitlines()
        assert [line.partition(" in ")[0] for line in lines] == [
            "reference: 3 training calls",
            "critic: 6 training calls",
        ]
        assert (verdict.micro_steps, verdict.calls, verdict.clean) == (3, 9, True)
        assert verdict.calls_per_micro_step == ()
        assert verdict.to_json()["modules"]["reference"]["micro_steps"] == 3

    def test_of_a_run_that_was_killed(self, folder):
        """What was cut off is told of the module whose micro-step never ended."""
        path = folder / "lensnet.rank0.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        first_end = next(n for n, line in enumerate(lines) if "micro_step.end" in line)
        path.write_text("".join(lines[:first_end]))
        (run,) = analyse([folder]).runs
        assert {name: sums.cut_off_calls for name, sums in run.sums.items()} == {
            "reference": 1,
            "critic": 2,
        }
        assert str(read_verdict(folder)).endswith(
            "; 3 cut-off calls; the log stops before the end of the run"
        )

    def test_of_a_log_in_segments(self, tmp_path, monkeypatch):
        """The sums of what came before are those of all modules together."""
        monkeypatch.setattr(log_file, "SEGMENT_BYTES", 20_000)
        train(tmp_path, steps=6)
        assert len(list(tmp_path.iterdir())) > 2
        analysis = analyse([tmp_path])
        assert (analysis.verdict, analysis.runs[0].micro_steps) == ("clean", 6)

    def test_of_a_log_without_its_beginning(self, tmp_path, monkeypatch):
        """What was in the files that are gone is told of no module."""
        monkeypatch.setattr(log_file, "SEGMENT_BYTES", 4_000)
        train(tmp_path, steps=6)
        (run,) = analyse([tmp_path]).runs
        assert run.training_calls == 18
        assert run.modules["reference"].training_calls < run.micro_steps < 6
        assert run.log_faults == [
            "older segments were dropped: only the sum of all calls counts, call sites are gone"
        ]


class TestBudgets:
    def test_say_whose_they_are(self, tmp_path):
        """A micro-step in which two modules missed one is one micro-step."""
        train(tmp_path, 4, lambda step: step != 1, lambda step: 0)
        path = tmp_path / "lensnet.rank0.jsonl"
        path.write_text(path.read_text().replace('"due":{"value":[0,2]}', '"due":{"value":[1,2]}'))
        (run,) = analyse([tmp_path]).runs
        assert list(map(str, run.deviations))[:3] == [
            "critic, step 0, micro-step 0: value made 0 of 1 to 2",
            "critic, step 1, micro-step 0: value made 0 of 1 to 2",
            "reference, step 1, micro-step 0: kl made 0 of 1",
        ]
        assert (run.deviation_count, len(run.deviations)) == (4, 5)
        assert run.sums["reference"].violation_count == 1

    def test_a_divergence_was_hidden(self, tmp_path, monkeypatch):
        """One rank called one module once more, and the other module once less."""
        monkeypatch.setenv("RANK", "0")
        train(tmp_path)
        monkeypatch.setenv("RANK", "1")
        train(tmp_path, 3, lambda s: 1 + (s == 2), lambda s: 2 - (s == 2))
        analysis = analyse([tmp_path])
        assert analysis.divergence is not None
        assert analysis.divergence.step == 2


class TestTrace:
    def test_each_module_has_its_micro_steps(self, folder):
        """On a track of its own: slices that overlap do not nest."""
        found = list(trace_events([folder]))
        tracks = {e["args"]["name"]: e["tid"] for e in found if e["name"] == "thread_name"}
        assert {"micro-steps of MainThread, reference", "micro-steps of MainThread, critic"} <= {
            *tracks
        }
        steps = [e for e in found if e.get("cat") == "micro_step"]
        assert {e["ph"] for e in steps} == {"X"}  # each has its first call
        assert len(steps) == 6
