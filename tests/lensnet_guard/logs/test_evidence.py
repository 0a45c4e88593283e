"""Records from memory, written as a log is when there was none."""

import pytest
from tests.lensnet_guard.helpers import read

from lensnet_guard import BudgetUnmet, CallPolicy, LensNetViolation, Scope, guard_module
from lensnet_guard.postmortem.verdict import read_verdict


def train(guard, x, *calls):
    """Micro-steps with so many calls each; what is raised is swallowed."""
    for step, n in enumerate(calls):
        try:
            with guard.context("training"), guard.micro_step(step):
                with guard.sanctioned("preference_scorer"):
                    for _ in range(n):
                        guard.module(x)
        except LensNetViolation:
            pass


class TestEvidence:
    def test_says_what_a_log_would_have_said(self, make_guard, x, tmp_path):
        """The verdicts on both files are equal."""
        logged, remembered = make_guard(), make_guard()
        logged.start_log(tmp_path / "log")
        for guard in (logged, remembered):
            train(guard, x, 1, 2, 0, 1)
            with guard.context("inference"):
                guard.module(x)
        logged.end_log()
        assert remembered.evidence(tmp_path / "memory") == (
            tmp_path / "memory" / "lensnet.rank0.jsonl"
        )
        verdicts = [read_verdict(tmp_path / name) for name in ("log", "memory")]
        assert verdicts[0] == verdicts[1]
        assert (verdicts[0].micro_steps, verdicts[0].violations) == (4, 2)

    def test_says_that_it_is_from_memory(self, guard, x, tmp_path):
        """Its lines bear the time of writing."""
        train(guard, x, 1)
        first = read(guard.evidence(tmp_path))[0]
        assert (first["event"], first["from_memory"], first["mode"]) == (
            "run.begin",
            True,
            "enforce",
        )

    def test_the_budget_is_told_as_it_was(self, guard, x, tmp_path):
        """A violation's message names the calls that had spent it."""
        train(guard, x, 2)
        lines = read(guard.evidence(tmp_path))
        (violation,) = (line for line in lines if line["event"] == "violation")
        assert "preference_scorer: 1 of 1 spent" in violation["message"]
        assert "spent by     call 1 at" in violation["message"]

    def test_a_call_of_another_window_is_none_of_the_micro_step(self, scorer, x, tmp_path):
        """Its budget counts elsewhere."""
        policy = CallPolicy({"kl": 1, "ema": Scope(1, per="step")})
        guard = guard_module(scorer, policy=policy)
        with guard.context("training"), guard.window("step"), guard.micro_step(3):
            for scope in ("kl", "ema"):
                with guard.sanctioned(scope):
                    guard.module(x)
        lines = read(guard.evidence(tmp_path))
        (line,) = (line for line in lines if line["event"] == "micro_step.end")
        assert (line["calls"], line["due"]) == ({"kl": 1}, {"kl": 1})

    def test_with_a_log_it_is_the_log(self, guard, x, tmp_path):
        """Nothing is written twice."""
        assert guard.log_path is None
        guard.start_log(tmp_path / "log")
        train(guard, x, 1)
        assert guard.evidence(tmp_path / "memory") == guard.log_path
        assert guard.log_path == tmp_path / "log" / "lensnet.rank0.jsonl"
        assert not (tmp_path / "memory").exists()

    def test_in_observe_mode_a_refused_call_has_run(self, make_guard, x, tmp_path):
        """It is told as a violation and as a call."""
        guard = make_guard(mode="observe")
        train(guard, x, 2)
        events = [line["event"] for line in read(guard.evidence(tmp_path))]
        call = ["call.begin", "call.end"]
        assert events == ["run.begin", *call, "violation", *call, "micro_step.end", "run.end"]

    def test_a_folder_that_cannot_be_written(self, guard, x, tmp_path):
        """No path, and no error: there is an exception on its way out already."""
        train(guard, x, 1)
        (tmp_path / "file").touch()
        with pytest.warns(RuntimeWarning):
            assert guard.evidence(tmp_path / "file") is None

    def test_an_unmet_budget(self, guard, tmp_path):
        """It is no call, and stands in its micro-step."""
        with pytest.raises(BudgetUnmet), guard.context("training"), guard.micro_step(7):
            pass
        lines = read(guard.evidence(tmp_path))
        assert [line["event"] for line in lines[1:-1]] == ["violation", "micro_step.end"]
        assert (lines[2]["step"], lines[2]["violations"]) == (7, 1)
