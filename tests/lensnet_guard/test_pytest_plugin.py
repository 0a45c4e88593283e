"""The plugin as its users meet it: test files in an empty folder, run by pytest itself."""

import json
import re
import textwrap
from collections import defaultdict

import pytest

from lensnet_guard.logs.sinks import remove_from_all
from lensnet_guard.testing.plugin_session import TALLY

PREAMBLE = """
import contextlib, os, threading
import pytest, torch
from torch import nn
from lensnet_guard import *

X = torch.ones(2, 3)

def new(**keywords):
    return guard_module(nn.Linear(3, 2), name="critic", **keywords)

def call(guard, times=1):
    with guard.context("inference"):
        for _ in range(times):
            guard.module(X)

def sneaky(guard):
    with contextlib.suppress(Exception):
        guard.module(X)
"""


@pytest.fixture(autouse=True)
def _apart(request: pytest.FixtureRequest) -> None:
    """What the inner sessions do in this process is not this session's."""
    remove_from_all(request.node.stash[TALLY])


@pytest.fixture
def run(pytester: pytest.Pytester):
    """Run tests written after a preamble; in this process unless told otherwise."""

    def run(tests: str, *arguments: str, subprocess: bool = False) -> pytest.RunResult:
        lines = tests.splitlines()
        indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
        body = "\n".join(line[indent:] for line in lines)
        pytester.makepyfile(test_it=PREAMBLE + body)
        how = pytester.runpytest_subprocess if subprocess else pytester.runpytest_inprocess
        return how("-p", "no:cacheprovider", *arguments)

    return run


def errors(result: pytest.RunResult) -> list[str]:
    """The lines that pytest shows of what was raised."""
    lines = [line[1:] for line in result.outlines if line.startswith("E   ")]
    return textwrap.dedent("\n".join(lines)).splitlines()


class TestAssertLensnetCalls:
    def test_as_many_as_expected(self, run):
        """The captured records are there during the block and after it."""
        result = run(
            """
            def test(assert_lensnet_calls):
                guard = new()
                with assert_lensnet_calls() as calls:
                    call(guard)
                    assert len(calls) == 1
                    assert calls[0] is guard.calls[0]
                with assert_lensnet_calls(0):
                    pass
                with assert_lensnet_calls(n=3, context="inference", guard=guard):
                    call(guard, 3)
                call(guard)
                assert len(calls) == 1
            """
        )
        result.assert_outcomes(passed=1)

    def test_too_many(self, run):
        """Expected and got, then every call, numbered, with who made it; nothing of the plugin."""
        result = run(
            """
            def test(assert_lensnet_calls):
                guard = new()
                with guard.context("training"):
                    with assert_lensnet_calls(info="score everything in one batch"):
                        with guard.sanctioned("preference_scorer"):
                            guard.module(X)
                        sneaky(guard)
            """
        )
        result.assert_outcomes(failed=1)
        assert errors(result) == [
            "Failed: expected exactly 1 call, got 2:",
            "    1. critic(float32[2, 3] cpu) in training, scope preference_scorer",
            "       at test_it.py:25 in test",
            "    2. critic(float32[2, 3] cpu) in training refused as UnsanctionedCall",
            "       at test_it.py:18 in sneaky",
            "score everything in one batch",
        ]
        result.stdout.fnmatch_lines([">*with assert_lensnet_calls(*", "test_it.py:23: Failed"])
        result.stdout.no_fnmatch_line("*expectation.py*")

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ("", "expected exactly 1 call, got none."),
            ("n=2", "expected exactly 2 calls, got none."),
            ('context="training"', "expected exactly 1 call in training, got none."),
            ('scope="kl", guard=guard', "expected exactly 1 call of critic in scope kl, got none."),
        ],
    )
    def test_none(self, run, arguments, expected):
        """The message says what was counted."""
        result = run(
            f"""
            def test(assert_lensnet_calls):
                guard = new()
                with assert_lensnet_calls({arguments}):
                    pass
            """
        )
        assert errors(result) == [f"Failed: {expected}"]

    def test_calls_that_the_filter_leaves_out_are_told(self, run):
        """Or else one looks for them in the wrong place."""
        result = run(
            """
            def test(assert_lensnet_calls):
                guard = new()
                with assert_lensnet_calls(context="training"):
                    call(guard, 2)
            """
        )
        assert errors(result) == [
            "Failed: expected exactly 1 call in training, got none.",
            "Other calls, in another context or scope: 2.",
        ]

    def test_many_calls_are_grouped(self, run):
        """Equal ones stand together with their number."""
        result = run(
            """
            def test(assert_lensnet_calls):
                guard = new()
                with assert_lensnet_calls(0), guard.context("inference"):
                    for _ in range(40):
                        guard.module(X)
                    guard.module(X[:1])
            """
        )
        assert errors(result) == [
            "Failed: expected no call, got 41:",
            "  40 x critic(float32[2, 3] cpu) in inference",
            "       at test_it.py:24 in test",
            "   1 x critic(float32[1, 3] cpu) in inference",
            "       at test_it.py:25 in test",
        ]

    def test_full_stacks(self, run):
        """With -v every frame that was kept."""
        result = run(
            """
            def helper(guard):
                call(guard)

            def test(assert_lensnet_calls):
                with assert_lensnet_calls(0):
                    helper(new())
            """,
            "-v",
        )
        assert errors(result)[:5] == [
            "Failed: expected no call, got 1:",
            "    1. critic(float32[2, 3] cpu) in inference",
            "       at test_it.py:14 in call",
            "          test_it.py:21 in helper",
            "          test_it.py:25 in test",
        ]

    def test_an_exception_of_the_body_goes_first(self, run):
        """A count that is wrong because the body broke off is no news."""
        result = run(
            """
            def test(assert_lensnet_calls):
                with assert_lensnet_calls(1):
                    raise ZeroDivisionError("the news")
            """
        )
        assert errors(result) == ["ZeroDivisionError: the news"]

    def test_calls_of_other_threads_and_of_new_guards_count(self, run):
        """Without guard= every guard alive is watched, and those made meanwhile."""
        result = run(
            """
            def test(assert_lensnet_calls):
                old = new()
                with assert_lensnet_calls(3):
                    call(old)
                    call(new())
                    thread = threading.Thread(target=call, args=(old,))
                    thread.start()
                    thread.join()

            def test_of_one_guard(assert_lensnet_calls):
                guard, other = new(), new()
                with assert_lensnet_calls(1, guard=guard.module):
                    call(guard)
                    call(other)
            """
        )
        result.assert_outcomes(passed=2)

    def test_recomputes_do_not_count(self, run):
        """Nobody made them."""
        result = run(
            """
            from torch.utils.checkpoint import checkpoint

            def test(assert_lensnet_calls):
                guard = new()
                with assert_lensnet_calls(1), guard.context("inference"):
                    x = X.clone().requires_grad_()
                    checkpoint(guard.module, x, use_reentrant=False).sum().backward()
            """
        )
        result.assert_outcomes(passed=1)

    def test_nested(self, run):
        """Each block counts for itself."""
        result = run(
            """
            def test(assert_lensnet_calls):
                guard = new()
                with assert_lensnet_calls(3):
                    call(guard)
                    with assert_lensnet_calls(2):
                        call(guard, 2)
            """
        )
        result.assert_outcomes(passed=1)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("-1", "ValueError: exact must not be negative, and is -1"),
            ("True", "TypeError: exact must be a number of calls, not True"),
            ("1.0", "TypeError: exact must be a number of calls, not 1.0"),
            (
                'context="train"',
                'ValueError: context must be "training" or "inference", not \'train\'',
            ),
            ("scope=3", "TypeError: scope must be a name, not 3"),
            ("guard=X", "TypeError: guard must be a Guard or a guarded module, not Tensor"),
        ],
    )
    def test_wrong_arguments(self, run, arguments, message):
        """They fail before the block, not after it."""
        result = run(
            f"""
            def test(assert_lensnet_calls):
                with assert_lensnet_calls({arguments}):
                    raise AssertionError("ran")
            """
        )
        assert errors(result) == [message]

    def test_guards_that_are_off(self, run):
        """The message says why nothing was counted."""
        result = run(
            """
            def test(assert_lensnet_calls):
                model = new().module
                with assert_lensnet_calls(1):
                    model(X)
            """,
            "--lensnet-guard=off",
        )
        assert errors(result) == [
            "Failed: expected exactly 1 call, got none.",
            "LENSNET_GUARD is off: guards without a mode of their own record nothing.",
        ]


class TestOtherFixtures:
    def test_assert_max(self, run):
        """Fewer are fine, more are not."""
        result = run(
            """
            def test_fewer(assert_max_lensnet_calls):
                with assert_max_lensnet_calls(2, context="inference") as calls:
                    call(new())
                assert len(calls) == 1

            def test_more(assert_max_lensnet_calls):
                with assert_max_lensnet_calls(0):
                    call(new())
            """
        )
        result.assert_outcomes(passed=1, failed=1)
        assert errors(result)[0] == "Failed: expected at most 0 calls, got 1:"

    def test_lensnet_calls(self, run):
        """Captures without asserting, from the fixture's setup on."""
        result = run(
            """
            def test(lensnet_calls):
                assert len(lensnet_calls) == 0
                guard = new()
                call(guard, 2)
                sneaky(guard)
                assert [c.verdict for c in lensnet_calls] == ["allow", "allow", "refuse"]
                assert [v.reason for v in lensnet_calls.violations] == ["NoContext"]
                assert lensnet_calls[0].caller.function == "call"
            """
        )
        result.assert_outcomes(passed=1)


class TestLensnetGuard:
    def test_is_restored_afterwards(self, run):
        """The owner has its very module back."""
        result = run(
            """
            class Owner:
                critic = None

            owner, raw = Owner(), nn.Linear(3, 2)
            owner.critic = raw

            def test(lensnet_guard):
                guard = lensnet_guard(owner, attribute="critic")
                assert owner.critic is guard.module
                call(guard)

            def test_after():
                assert owner.critic is raw
                assert type(raw) is nn.Linear
            """
        )
        result.assert_outcomes(passed=2)

    def test_a_violation_that_the_code_under_test_swallows(self, run):
        """Fails the test, with the whole message."""
        result = run(
            """
            def test(lensnet_guard):
                sneaky(lensnet_guard(nn.Linear(3, 2)))
            """
        )
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines(
            [
                "1 violation did not reach the test: swallowed on the way, or raised in another "
                "thread. Where it is meant to happen, let the test itself catch it "
                '(pytest.raises), or guard with mode="observe".',
                "NoContext: Linear was used in a thread that has declared neither*",
                "  called from  test_it.py:18 in sneaky",
            ]
        )

    def test_a_violation_in_another_thread(self, run):
        """Pytest's own warning about the thread is not needed for that."""
        result = run(
            """
            def test(lensnet_guard):
                guard = lensnet_guard(nn.Linear(3, 2))
                thread = threading.Thread(target=sneaky, args=(guard,))
                thread.start()
                thread.join()
            """
        )
        result.assert_outcomes(failed=1)

    @pytest.mark.parametrize(
        "seen",
        [
            "with pytest.raises(NoContext): guard.module(X)",
            "with contextlib.suppress(NoContext): guard.module(X)",
            "with pytest.raises(NoContext): (lambda: guard.module(X))()",
        ],
    )
    def test_a_violation_that_the_test_itself_handles(self, run, seen):
        """Is what the test is about."""
        result = run(
            f"""
            def test(lensnet_guard):
                guard = lensnet_guard(nn.Linear(3, 2))
                {seen}

            class TestClass:
                @pytest.mark.parametrize("n", [1])
                def test_in_a_class(self, lensnet_guard, n):
                    guard = lensnet_guard(nn.Linear(3, 2))
                    {seen}
            """
        )
        result.assert_outcomes(passed=2)

    @pytest.mark.parametrize(
        "expected",
        [
            "with pytest.raises(NoContext): guard.module(X)",
            "with pytest.raises(NoContext) as caught: guard.module(X)",
            "with pytest.raises(Exception, match='Linear was used'): guard.module(X)",
            "pytest.raises(NoContext, guard.module, X)",
        ],
    )
    def test_a_helper_that_expects_a_violation_failed_the_test(self, run, expected):
        """A function, a base class, another file: `pytest.raises` is the test's, wherever it is."""
        result = run(
            f"""
            def refused(guard):
                {expected}

            class Base:
                def refused(self, guard):
                    refused(guard)

            class TestClass(Base):
                def test_in_a_class(self, lensnet_guard):
                    self.refused(lensnet_guard(nn.Linear(3, 2)))

            def test_alone(lensnet_guard):
                refused(lensnet_guard(nn.Linear(3, 2)))

            def test_in_a_thread(lensnet_guard):
                guard = lensnet_guard(nn.Linear(3, 2))
                thread = threading.Thread(target=refused, args=(guard,))
                thread.start()
                thread.join()
            """
        )
        result.assert_outcomes(passed=3)

    def test_a_helper_that_expects_one_violation_of_two(self, run):
        """The swallowed one still fails the test, also inside `pytest.raises`."""
        result = run(
            """
            def refused(guard, before):
                with pytest.raises(NoContext):
                    before(guard)
                    guard.module(X)

            def test_swallowed(lensnet_guard):
                refused(lensnet_guard(nn.Linear(3, 2)), sneaky)

            def test_expected(lensnet_guard):
                refused(lensnet_guard(nn.Linear(3, 2)), id)
            """
        )
        result.assert_outcomes(failed=1, passed=1)
        result.stdout.fnmatch_lines(["1 violation did not reach the test: swallowed on the way*"])

    def test_a_helper_that_expects_something_else(self, run):
        """Its `pytest.raises` fails as ever, and is the same class afterwards."""
        result = run(
            """
            leave = pytest.RaisesExc.__exit__

            def test(lensnet_guard):
                with pytest.raises(ZeroDivisionError):
                    lensnet_guard(nn.Linear(3, 2)).module(X)

            def test_nothing(lensnet_guard):
                with pytest.raises(ZeroDivisionError):
                    pass

            def test_after():
                assert pytest.RaisesExc.__exit__ is leave
            """
        )
        result.assert_outcomes(failed=2, passed=1)
        result.stdout.fnmatch_lines(
            [
                "E  *lensnet_guard.NoContext: Linear was used in a thread that has*",
                ">  *with pytest.raises(ZeroDivisionError):",
                "E  *Failed: DID NOT RAISE*ZeroDivisionError*",
            ]
        )

    def test_in_a_hypothesis_test(self, run):
        """The function that Hypothesis runs is the test too."""
        result = run(
            """
            from hypothesis import given, settings, strategies as st, HealthCheck

            @settings(suppress_health_check=list(HealthCheck), max_examples=3, database=None)
            @given(st.integers())
            def test(lensnet_guard, n):
                guard = lensnet_guard(nn.Linear(3, 2))
                with pytest.raises(NoContext):
                    guard.module(X)
            """
        )
        result.assert_outcomes(passed=1)

    def test_in_observe_mode_nothing_fails(self, run):
        """Who asks to observe is told by the summary."""
        result = run(
            """
            def test(lensnet_guard):
                sneaky(lensnet_guard(nn.Linear(3, 2), mode="observe"))
            """
        )
        result.assert_outcomes(passed=1)
        result.stdout.fnmatch_lines(["LensNet: 0 calls in 1 test, 0 violations (1 more*"])

    def test_after_the_test(self, run):
        """A violation during teardown is an error there."""
        result = run(
            """
            @pytest.fixture
            def late(lensnet_guard):
                guard = lensnet_guard(nn.Linear(3, 2))
                yield
                thread = threading.Thread(target=sneaky, args=(guard,))
                thread.start()
                thread.join()

            def test(late):
                pass
            """
        )
        result.assert_outcomes(passed=1, errors=1)


class TestWhatReachedTheTest:
    @pytest.mark.parametrize(
        "seen",
        [
            "pytest.raises(NoContext, guard.module, X)",
            "pytest.raises(NoContext, lambda: guard.module(X))",
            "(lambda: [check() for check in [lambda: expect(guard)]])()",
        ],
    )
    def test_other_ways_to_expect_a_violation_failed(self, run, seen):
        """What pytest itself has caught, or code of the test, was seen."""
        result = run(
            f"""
            def test(lensnet_guard):
                def expect(guard):
                    with pytest.raises(NoContext):
                        guard.module(X)

                guard = lensnet_guard(nn.Linear(3, 2))
                {seen}
            """
        )
        result.assert_outcomes(passed=1)

    def test_unittest_failed(self, run):
        """assertRaises takes the traceback off what it has caught."""
        result = run(
            """
            import unittest

            class Test(unittest.TestCase):
                @pytest.fixture(autouse=True)
                def _guard(self, lensnet_guard):
                    self.guard = lensnet_guard(nn.Linear(3, 2))

                def test(self):
                    with self.assertRaises(NoContext):
                        self.guard.module(X)
            """
        )
        result.assert_outcomes(passed=1)

    def test_a_test_that_was_over_kept_its_tensors(self, run):
        """By the tracebacks of the violations that it had provoked."""
        result = run(
            """
            import gc, weakref
            seen = []

            def test_first(lensnet_guard):
                guard = lensnet_guard(nn.Linear(3, 2))
                large = torch.ones(1000)
                seen.append(weakref.ref(large))
                with pytest.raises(NoContext):
                    guard.module(X)

            def test_second():
                gc.collect()
                assert seen[0]() is None
            """
        )
        result.assert_outcomes(passed=2)


class TestHostileSessions:
    def test_a_test_that_removed_the_variable_ended_the_session(self, run):
        """The mode is put back all the same."""
        result = run(
            """
            @pytest.mark.lensnet_guard("off")
            def test():
                os.environ.pop("LENSNET_GUARD", None)

            def test_next():
                assert new().mode == "enforce"
            """
        )
        result.assert_outcomes(passed=2)

    def test_a_log_that_cannot_be_written_ended_the_session(self, run, pytester):
        """Where warnings are errors it is told on stderr."""
        pytester.path.joinpath("file").touch()
        result = run("def test(): call(new())", "-Werror", "--lensnet-log=file/x", subprocess=True)
        result.assert_outcomes(passed=1)

    @pytest.mark.parametrize("log", ["123", "'a\\0b'"])
    def test_a_marker_with_a_wrong_log_ended_the_session(self, run, log):
        """It is refused before anything runs."""
        result = run(
            f"""
            @pytest.mark.lensnet_guard(log={log})
            def test():
                pass
            """
        )
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(["*@pytest.mark.lensnet_guard: log must be a folder's path*"])


class TestMarker:
    @pytest.mark.parametrize(
        ("marker", "calls", "message"),
        [
            ("exact=1", 1, None),
            ("1", 1, None),
            ("min=1", 3, None),
            ("max=3", 3, None),
            ("min=1, max=2", 2, None),
            ('exact=0, context="training"', 3, None),
            ("exact=2", 1, "expected exactly 2 calls, got 1:"),
            ("min=2", 1, "expected at least 2 calls, got 1:"),
            ("max=1", 2, "expected at most 1 call, got 2:"),
            ("min=2, max=3", 4, "expected 2 to 3 calls, got 4:"),
        ],
    )
    def test_whole_test(self, run, marker, calls, message):
        """Calls of fixtures are not the test's."""
        result = run(
            f"""
            @pytest.fixture
            def guard():
                guard = new()
                call(guard)
                return guard

            @pytest.mark.lensnet_calls({marker})
            def test(guard):
                call(guard, {calls})
            """
        )
        result.assert_outcomes(passed=message is None, failed=message is not None)
        if message is not None:
            result.stdout.fnmatch_lines([f"@pytest.mark.lensnet_calls: {message}"])

    @pytest.mark.parametrize(
        ("marker", "message"),
        [
            ("", "expect either an exact number of calls, or min or max or both"),
            ("1, max=2", "expect either an exact number of calls, or min or max or both"),
            ("min=2, max=1", "at least 2 and at most 1 calls cannot be"),
            ("exact=-1", "exact must not be negative, and is -1"),
            ("often=1", "*unexpected keyword argument 'often'"),
        ],
    )
    def test_wrong_ones_are_refused_before_anything_runs(self, run, marker, message):
        """With the test's name."""
        result = run(
            f"""
            @pytest.mark.lensnet_calls({marker})
            def test():
                raise AssertionError("ran")
            """
        )
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(
            [f"ERROR: test_it.py::test: @pytest.mark.lensnet_calls: {message}"]
        )

    def test_markers_are_registered(self, run):
        """So that --strict-markers knows them."""
        result = run("def test(): pass", "--markers")
        result.stdout.fnmatch_lines(
            ["@pytest.mark.lensnet_calls(*", "@pytest.mark.lensnet_guard(*"]
        )


class TestSettings:
    MODE = """
        def test():
            assert new().mode == "{}"
    """

    @pytest.mark.parametrize(
        ("marker", "option", "ini", "environment", "mode"),
        [
            (None, None, None, None, "enforce"),
            (None, None, None, "off", "off"),
            (None, None, "observe", "off", "observe"),
            (None, "enforce", "observe", "off", "enforce"),
            ("off", "enforce", "observe", None, "off"),
        ],
    )
    def test_mode(self, run, pytester, monkeypatch, marker, option, ini, environment, mode):
        """Marker over option over ini over environment."""
        if environment:
            monkeypatch.setenv("LENSNET_GUARD", environment)
        if ini:
            pytester.makeini(f"[pytest]\nlensnet_guard = {ini}")
        mark = f'@pytest.mark.lensnet_guard("{marker}")' if marker else "# no marker"
        result = run(
            f"""
            {mark}
            def test():
                assert new().mode == "{mode}"

            def test_explicit():
                assert new(mode="observe").mode == "observe"
            """,
            *([f"--lensnet-guard={option}"] if option else []),
        )
        result.assert_outcomes(passed=2)

    def test_environment_is_given_back(self, run, monkeypatch):
        """Nothing of a session is left behind in the process."""
        import os

        monkeypatch.setenv("LENSNET_GUARD", "observe")
        run(
            """
            @pytest.mark.lensnet_guard("off")
            def test():
                assert os.environ["LENSNET_GUARD"] == "off"

            def test_next():
                assert os.environ["LENSNET_GUARD"] == "enforce"
            """,
            "--lensnet-guard=enforce",
        ).assert_outcomes(passed=2)
        assert os.environ["LENSNET_GUARD"] == "observe"

    @pytest.mark.parametrize(
        ("ini", "marker", "message"),
        [
            ("maybe", "", "the ini key lensnet_guard must be one of enforce, observe, off, not 'm"),
            (
                "off",
                '@pytest.mark.lensnet_guard("on")',
                "test_it.py::test: @pytest.mark.lensnet_guard must be one of enforce, observe, off",
            ),
            (
                "off",
                "@pytest.mark.lensnet_guard(level=3)",
                "test_it.py::test: @pytest.mark.lensnet_guard: *unexpected keyword argument",
            ),
        ],
    )
    def test_wrong_ones(self, run, pytester, ini, marker, message):
        """Refused, saying where they stand."""
        pytester.makeini(f"[pytest]\nlensnet_guard = {ini}")
        result = run(
            f"""
            {marker or "# no marker"}
            def test():
                pass
            """,
            subprocess=True,
        )
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines([f"*{message}*"])

    @pytest.mark.parametrize(
        ("marker", "option", "ini", "environment"),
        [
            (False, False, False, True),
            (False, False, True, True),
            (False, True, True, True),
            (True, True, True, True),
        ],
    )
    def test_log(self, run, pytester, monkeypatch, marker, option, ini, environment):
        """The same order for the folder of the log."""
        if environment:
            monkeypatch.setenv("LENSNET_LOG", "from_environment")
        if ini:
            pytester.makeini("[pytest]\nlensnet_log = from_ini")
        mark = '@pytest.mark.lensnet_guard(log="from_marker")' if marker else "# no marker"
        run(
            f"""
            {mark}
            def test():
                call(new())
            """,
            *(["--lensnet-log=from_option"] if option else []),
        ).assert_outcomes(passed=1)
        names = ["marker"] * marker + ["option"] * option + ["ini"] * ini + ["environment"]
        folders = sorted(path.name for path in pytester.path.glob("from_*"))
        assert folders == [f"from_{names[0]}"]


class TestLog:
    def test_what_is_written(self, run, pytester):
        """Every guard's calls between the lines of their test."""
        run(
            """
            def test_one():
                call(new())

            def test_two():
                sneaky(new())
            """,
            "--lensnet-log=log",
        ).assert_outcomes(passed=2)
        (file,) = (pytester.path / "log").iterdir()
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line["event"] for line in lines] == [
            *("run.begin", "test.begin", "call.begin", "call.end", "test.end"),
            *("test.begin", "violation", "test.end", "run.end"),
        ]
        assert [line["test"] for line in lines if line["event"] == "test.begin"] == [
            "test_it.py::test_one",
            "test_it.py::test_two",
        ]
        assert (lines[-1]["calls"], lines[-1]["violations"]) == (1, 1)

    def test_a_crash_leaves_the_call_in_flight(self, run, pytester):
        """A test that kills the process is explained by its log."""
        run(
            """
            class Killer(nn.Module):
                def forward(self, x):
                    os.kill(os.getpid(), 9)

            def test():
                guard = guard_module(Killer())
                call(guard)
            """,
            "--lensnet-log=log",
            subprocess=True,
        )
        (file,) = (pytester.path / "log").iterdir()
        last = json.loads(file.read_text().splitlines()[-1])
        assert (last["event"], last["module"]) == ("call.begin", "Killer")


class TestReport:
    def test_a_failing_test_that_made_calls_gets_a_section(self, run):
        """Whatever it failed for."""
        result = run(
            """
            def test():
                call(new())
                raise AssertionError

            def test_without():
                raise AssertionError
            """
        )
        section = [line for line in result.outlines if "LensNet calls" in line]
        assert len(section) == 1
        result.stdout.fnmatch_lines(
            [
                "*- LensNet calls -*",
                "    1. critic(float32[[]2, 3] cpu) in inference",
                "       at test_it.py:14 in call",
            ]
        )

    @pytest.mark.parametrize(
        ("tests", "line"),
        [
            ("def test(): call(new(), 3)", "LensNet: 3 calls in 1 test, 0 violations"),
            (
                "def test():\n    with pytest.raises(NoContext): new().module(X)",
                "LensNet: 0 calls in 1 test, 0 violations (1 more in tests that passed)",
            ),
            (
                "def test(): sneaky(new())",
                "LensNet: 0 calls in 1 test, 0 violations (1 more in tests that passed)",
            ),
            ("def test(): new().module(X)", "LensNet: 0 calls in 1 test, 1 violation"),
        ],
    )
    def test_summary(self, run, tests, line):
        """One line; violations that tests provoke on purpose are told apart."""
        assert line in run(tests).outlines

    def test_no_line_where_no_call_was_made(self, run):
        """Nobody's output is longer for having this installed."""
        run("def test(): pass").stdout.no_fnmatch_line("LensNet:*")


XDIST = """
    @pytest.mark.parametrize("n", range(12))
    def test_calls(n, assert_lensnet_calls):
        with assert_lensnet_calls(n):
            call(new(), n)

    class TestOne:
        def test_a(self): call(new())
        def test_b(self): call(new())

    def test_refused(): new().module(X)
"""


class TestXdist:
    @pytest.mark.parametrize(
        "arguments",
        [("-n4",), ("-n2", "--dist=loadscope"), ("-p", "no:xdist")],
        ids=["n4", "loadscope", "without"],
    )
    def test_sums_and_logs(self, run, pytester, arguments):
        """One summary, one log per process, exceptions whole."""
        result = run(XDIST, "--lensnet-log=log", *arguments, subprocess=True)
        result.assert_outcomes(passed=14, failed=1)
        assert "LensNet: 68 calls in 14 tests, 1 violation" in result.outlines
        text = result.stdout.str()
        assert "NoContext: critic was used in a thread that has declared neither" in text
        assert re.search(r"called from +test_it\.py:\d+ in test_refused", text)
        by_event = defaultdict(list)
        for log in (pytester.path / "log").iterdir():
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            assert lines[0]["event"] == "run.begin"
            assert lines[-1]["event"] == "run.end"
            for line in lines:
                by_event[line["event"]].append(line)
        # A worker that begins when another has ended goes on in the file that it left.
        processes = {line["process.pid"] for line in by_event["run.begin"]}
        assert len(processes) == len(by_event["run.begin"]) == len(by_event["run.end"])
        tests = [line["test"] for line in by_event["test.begin"]]
        assert len(tests) == len(set(tests)) == 15
        assert sum(line["calls"] for line in by_event["run.end"]) == 68

    @pytest.mark.parametrize(
        ("marker", "message"),
        [
            ("lensnet_calls(min=2, max=1)", "at least 2 and at most 1 calls cannot be"),
            ('lensnet_guard("on")', "must be one of enforce, observe, off, not 'on'"),
        ],
    )
    def test_a_wrong_marker_ended_in_an_assertion_of_xdist(self, run, marker, message):
        """A worker cannot tell of a usage error: the test fails with it."""
        result = run(
            f"""
            @pytest.mark.{marker}
            def test():
                raise AssertionError("ran")
            """,
            "-n2",
            subprocess=True,
        )
        result.assert_outcomes(errors=1)
        result.stdout.fnmatch_lines([f"test_it.py::test: @pytest.mark.*{message}"])

    def test_a_worker_that_dies(self, run):
        """What it had reported is in the sum."""
        result = run(
            """
            def test_first(): call(new())

            class Killer(nn.Module):
                def forward(self, x):
                    os.kill(os.getpid(), 9)

            def test_second(): call(guard_module(Killer()))
            """,
            "-n1",
            subprocess=True,
        )
        result.assert_outcomes(passed=1, failed=1)
        assert "LensNet: 1 call in 1 test, 0 violations" in result.outlines


class TestStandingAside:
    def test_torch_is_not_imported_for_tests_without_it(self, pytester):
        """A project's small tests start as fast as before."""
        pytester.makepyfile("import sys\n\ndef test(): assert 'torch' not in sys.modules")
        pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)

    def test_installed_and_nothing_else(self, pytester):
        """An empty folder, no conftest: the fixture is there."""
        pytester.makepyfile(
            "def test_x(assert_lensnet_calls):\n    with assert_lensnet_calls(0): ..."
        )
        pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)
