"""Windows, budgets with a least and a most, methods and conditions, as logs of today tell them."""

import pytest
from click.testing import CliRunner
from tests.lensnet_guard.helpers import FILE, X, read
from torch import nn

from lensnet_guard import CallPolicy, Scope, guard_module
from lensnet_guard.cli import main, to_json
from lensnet_guard.postmortem.analysis import analyse
from lensnet_guard.postmortem.events import budgets, is_met
from lensnet_guard.postmortem.trace import trace_events


def breached(call):
    return "it is not"


def observed(folder, **scopes):
    """A guard that observes, and logs."""
    return guard_module(
        nn.Linear(3, 2), policy=CallPolicy(scopes), mode="observe", log=folder, name="critic"
    )


def score(guard, scope, times):
    with guard.sanctioned(scope):
        for _ in range(times):
            guard.module(X)


def generations(guard, *times):
    """A window for each number of calls, in one training."""
    with guard.context("training"):
        for n in times:
            with guard.window("generation"):
                score(guard, "reference", n)
    guard.end_log()


def told(folder, *arguments):
    result = CliRunner().invoke(main, ["postmortem", str(folder), *arguments])
    assert result.exit_code in (0, 1), result.output
    return result.stdout


@pytest.fixture
def reference(tmp_path):
    """A guard whose scope counts one or two calls per generation."""
    return observed(tmp_path, reference=Scope((1, 2), per="generation"))


class TestMicroSteps:
    def test_a_range_was_no_budget(self, tmp_path):
        """One that was kept passed for none, or for a deviation."""
        guard = observed(tmp_path, kl=(1, 2), all=(0, None))
        with guard.context("training"):
            for step, n in enumerate((1, 2, 0)):
                with guard.micro_step(step):
                    score(guard, "kl", n)
        guard.end_log()
        (run,) = analyse([tmp_path]).runs
        assert list(map(str, run.deviations)) == [
            "step 2, micro-step 0: kl made 0 of 1 to 2, all made 0 of 0 or more"
        ]
        assert (run.deviation_count, run.missed_windows) == (1, 0)

    @pytest.mark.parametrize(
        ("due", "kept"),
        [(2, {2}), ((1, 3), {1, 2, 3}), ((0, None), {0, 1, 2, 3, 4}), ((3, None), {3, 4})],
    )
    def test_what_keeps_a_budget(self, due, kept):
        """A number, a range, a range without end."""
        assert {made for made in range(5) if is_met(due, made)} == kept

    def test_budgets_that_are_none(self):
        """In a damaged line the rest counts."""
        odd = {"a": [1, None], "b": [0, 2], "c": 3, "d": [1], "e": [None, 2], "f": [1, "2"]}
        assert budgets({**odd, "g": True, "h": None}) == {"a": (1, None), "b": (0, 2), "c": 3}
        assert budgets([1]) == {}


class TestWindows:
    def test_is_missed(self, tmp_path, reference):
        """It is named, with its number and what was made in it."""
        generations(reference, 1, 2, 0, 1)
        analysis = analyse([tmp_path])
        (run,) = analysis.runs
        assert list(map(str, run.deviations)) == [
            'window "generation" 3: reference made 0 of 1 to 2'
        ]
        assert (run.deviation_count, run.missed_windows) == (0, 1)
        (violation,) = run.violations
        assert (violation.call.kind, violation.call.reason) == ("window", "BudgetUnmet")
        assert 'budget missed in 1 window:\n  window "generation" 3:' in told(tmp_path)

    def test_a_micro_step_and_a_window(self, tmp_path):
        """Each is counted as what it is, and the verdict has both."""
        guard = observed(tmp_path, kl=1, ema=Scope(1, per="step"))
        with guard.context("training"), guard.window("step"), guard.micro_step():
            pass
        guard.end_log()
        lines = (tmp_path / FILE).read_text().splitlines(keepends=True)
        (tmp_path / FILE).write_text("".join(n for n in lines if '"violation"' not in n))
        text = (tmp_path / FILE).read_text().replace('"violations":2,"lost', '"violations":0,"lost')
        (tmp_path / FILE).write_text(text)
        assert analyse([tmp_path]).verdict == "budget missed in 1 micro-step and 1 window"

    @pytest.mark.parametrize("context", ["inference", "training"])
    def test_that_owes_nothing(self, tmp_path, reference, context):
        """One in inference, and one that an exception broke off."""
        with reference.context(context), pytest.raises(KeyError), reference.window("generation"):
            raise KeyError
        with reference.context("inference"), reference.window("generation"):
            pass
        reference.end_log()
        analysis = analyse([tmp_path])
        assert (analysis.verdict, analysis.runs[0].deviations) == ("clean", [])

    def test_is_in_the_pictures(self, tmp_path, reference):
        """A moment in the trace and on the page, for no line tells of its beginning."""
        generations(reference, 1, 0)
        ends = [e for e in trace_events([tmp_path]) if e.get("cat") == "window"]
        assert [(e["ph"], e["name"], e["args"]["due"]) for e in ends] == [
            ("i", "the end of generation", {"reference": (1, 2)})
        ] * 2
        assert CliRunner().invoke(main, ["report", str(tmp_path)]).exit_code == 0
        page = (tmp_path / "report.html").read_text()
        assert "<h3>Budget missed in 1 window</h3>" in page
        assert 'aria-label="windows: 2"' in page
        assert "window with violations: the end of generation" in page


class Teacher(nn.Linear):
    """A module with methods that run it."""

    def generate(self, x):
        return self(x)

    def score(self, x):
        return self(x).sum()


class TestMethods:
    @pytest.fixture
    def log(self, tmp_path):
        """Calls of two methods, and one that raised."""
        policy = CallPolicy({"teacher": 2}, methods=("generate", "score"))
        guard = guard_module(
            Teacher(3, 2), policy=policy, mode="observe", log=tmp_path, name="critic"
        )
        with guard.context("training"), guard.micro_step(), guard.sanctioned("teacher"):
            guard.module.generate(X)
            guard.module.score(X)
        with guard.context("training"):
            guard.module.score(X)
            with pytest.raises(RuntimeError):
                guard.module.score(X[:, :1])
        guard.end_log()
        return tmp_path

    def test_are_named(self, log):
        """Where calls are counted, refused, and where one raised."""
        analysis = analyse([log])
        (run,) = analysis.runs
        allowed = {site.called: n for site, n in run.sites.items() if site.reason is None}
        assert allowed == {"critic.generate": 1, "critic.score": 1}
        assert run.raised is not None
        assert run.raised.called == "critic.score"
        assert "method" not in run.violations[0].differences
        text = told(log)
        assert "UnsanctionedCall of critic.score (record 3)" in text
        names = [e["name"] for e in trace_events([log]) if e["ph"] == "X" and e["cat"] == "call"]
        assert names[:2] == ["critic.generate call 1", "critic.score call 2"]

    def test_are_what_sets_a_call_apart(self, log):
        """Another method than that of the call that was allowed."""
        lines = (log / FILE).read_text()
        (log / FILE).write_text(lines.replace('"method":"score"', '"method":null', 1))
        (run,) = analyse([log]).runs
        assert "method: score (allowed: forward)" in run.violations[0].differences


class TestConditions:
    def test_of_calls_and_of_results(self, tmp_path):
        """Both are told as what they are."""
        guard = observed(tmp_path, a=Scope(requires=(breached,)), b=Scope(ensures=(breached,)))
        with guard.context("training"), guard.micro_step():
            score(guard, "a", 1)
            score(guard, "b", 1)
        guard.end_log()
        (run,) = analyse([tmp_path]).runs
        kinds = [(v.call.kind, v.call.reason) for v in run.violations]
        assert kinds == [("call", "ConditionUnmet"), ("result", "ConditionUnmet")]
        assert run.deviations == []
        assert "ConditionUnmet (record 3)" in told(tmp_path)

    def test_what_logs_of_before_had_not(self, tmp_path):
        """Is in the JSON only where it says something."""
        guard = observed(tmp_path, kl=1)
        with guard.context("training"), guard.micro_step():
            pass
        guard.end_log()
        assert "requires" not in read(tmp_path / FILE)[0]["policy"]
        (run,) = to_json(analyse([tmp_path]))["runs"]
        assert not {"modules", "missed_windows"} & run.keys()
        assert run["deviations"] == [
            {"step": 0, "micro_step": 0, "made": {"kl": 0}, "due": {"kl": 1}}
        ]
        assert "method" not in run["violations"][0]["call"]
