"""The fixture that guards a module: whatever happens, no violation goes unseen."""

import pytest


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
