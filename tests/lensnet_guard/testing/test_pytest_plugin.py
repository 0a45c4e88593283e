"""The fixtures and the marker that count calls, as their users meet them."""

import pytest
from tests.lensnet_guard.testing.inner import errors


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
