"""Settings, logs, reports and workers of a session of tests."""

import json
import re
from collections import defaultdict

import pytest


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
