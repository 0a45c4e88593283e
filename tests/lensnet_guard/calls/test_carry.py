"""Functions that are carried to where other blocks are open, or none."""

import asyncio
import contextlib
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.lensnet_guard.calls.places import UNSET, where
from tests.lensnet_guard.helpers import SCOPE

from lensnet_guard import (
    BudgetExceeded,
    BudgetUnmet,
    ContextSwitchRefused,
    NoContext,
    UnsanctionedCall,
)


class TestCarry:
    def test_into_a_thread(self, guard, x, in_thread):
        """The thread stands where carry was called; before and after it is unset."""
        with guard.context("training"), guard.micro_step(2), guard.sanctioned(SCOPE):
            carried = guard.carry(lambda: (guard.module(x), where(guard))[1])

            def work():
                return where(guard), carried(), where(guard)

            assert in_thread(work) == (UNSET, ("training", 2, SCOPE), UNSET)
        assert guard.count("training", SCOPE) == 1

    def test_passes_arguments_result_and_exception(self, guard):
        """The carried function is the function, also by its name."""

        def named(a, *, b):
            if b is None:
                raise KeyError(a)
            return a, b

        carried = guard.carry(named)
        assert carried(1, b=2) == (1, 2)
        assert carried.__name__ == "named"
        with pytest.raises(KeyError):
            carried(1, b=None)

    def test_any_callable(self, guard, x, in_thread):
        """Modules, partials and bound methods can be carried."""
        with guard.context("inference"):
            for fn in (guard.module, guard.module.forward, functools.partial(guard.module)):
                in_thread(guard.carry(fn), x)
        assert guard.count("inference") == 3

    def test_executor_threads_are_reused_clean(self, guard, x):
        """A pool's thread keeps nothing of what was carried into it, also after an exception."""

        def fail():
            raise KeyError

        with ThreadPoolExecutor(1) as pool, guard.context("inference"):
            pool.submit(guard.carry(guard.module), x).result()
            with pytest.raises(KeyError):
                pool.submit(guard.carry(fail)).result()
            assert pool.submit(where, guard).result() == UNSET
            with pytest.raises(NoContext):
                pool.submit(guard.module, x).result()
            pool.submit(guard.carry(guard.module), x).result()
        assert guard.count("inference") == 2

    def test_replaces_what_the_thread_has_open(self, guard, in_thread):
        """Inside the carried function only what was carried holds; then the thread's own again."""
        with guard.context("inference"):
            carried = guard.carry(where)

        def work():
            with guard.context("training"):
                return carried(guard), where(guard)

        assert in_thread(work) == (("inference", None, None), ("training", None, None))

    def test_context_holds_after_its_block(self, guard, x, in_thread):
        """A background thread may go on in the context that it was given."""
        with guard.context("inference"):
            carried = guard.carry(guard.module)
        in_thread(carried, x)
        carried(x)
        assert guard.count("inference") == 2

    def test_scope_ends_with_its_block(self, guard, x, in_thread):
        """A carried scope that has closed sanctions nothing: its budget was settled."""
        with guard.context("training"):
            with guard.sanctioned(SCOPE):
                carried = guard.carry(guard.module)
                guard.module(x)
            with pytest.raises(UnsanctionedCall):
                in_thread(carried, x)

    def test_scope_that_ends_while_the_function_runs(self, guard, x, in_thread):
        """The scope's end is seen at once, in the midst of the carried function."""
        inside, closed = threading.Event(), threading.Event()

        def work():
            seen = [where(guard)]
            inside.set()
            closed.wait(timeout=30)
            seen.append(where(guard))
            with pytest.raises(UnsanctionedCall):
                guard.module(x)
            return seen

        with ThreadPoolExecutor(1) as pool, guard.context("training"):
            with guard.micro_step(1):
                with guard.sanctioned(SCOPE):
                    future = pool.submit(guard.carry(work))
                    inside.wait(timeout=30)
                    guard.module(x)
            closed.set()
            assert future.result(timeout=30) == [
                ("training", 1, SCOPE),
                ("training", None, None),
            ]

    def test_micro_step_outlives_a_carried_scope(self, guard, x, in_thread):
        """After the scope, its micro-step is still the one that the thread works in."""
        with guard.context("training"), pytest.raises(UnsanctionedCall) as last:
            with guard.micro_step(3):
                with guard.sanctioned(SCOPE):
                    carried = guard.carry(lambda: (where(guard), guard.module(x)))
                    guard.module(x)
                with pytest.raises(UnsanctionedCall) as first:
                    in_thread(carried)
                assert first.value.record.step == 3
        assert last.value is first.value

    def test_of_nothing(self, guard, x, in_thread):
        """Carried from where nothing is declared, nothing is declared there either."""
        carried = guard.carry(guard.module)
        with guard.context("inference"), pytest.raises(NoContext):
            carried(x)

    def test_carried_twice(self, guard, x, in_thread):
        """A carried function can carry on into the next thread."""
        with guard.context("training"), guard.sanctioned(SCOPE):

            def first():
                return in_thread(guard.carry(guard.module), x)

            in_thread(guard.carry(first))
        assert guard.count("training", SCOPE) == 1

    def test_blocks_opened_inside_stay_inside(self, guard, x, in_thread):
        """A thread can open its own scope in the micro-step that it was given."""

        def work():
            with guard.sanctioned(SCOPE):
                guard.module(x)
            return where(guard)

        with guard.context("training"), guard.micro_step(1):
            assert in_thread(guard.carry(work)) == ("training", 1, None)
            assert where(guard) == ("training", 1, None)
        assert guard.count("training", SCOPE) == 1

    def test_budget_is_exact_when_eight_threads_share_it(self, make_guard, x):
        """Of 8 x 25 calls on a budget of 40, exactly 40 run."""
        guard = make_guard(**{SCOPE: 40})
        barrier = threading.Barrier(8)

        def work():
            barrier.wait(timeout=30)
            refused = 0
            for _ in range(25):
                try:
                    with torch.no_grad():
                        guard.module(x)
                except BudgetExceeded:
                    refused += 1
            return refused

        with (
            ThreadPoolExecutor(8) as pool,
            guard.context("training"),
            pytest.raises(BudgetExceeded),
            guard.sanctioned(SCOPE) as ledger,
        ):
            carried = guard.carry(work)
            futures = [pool.submit(carried) for _ in range(8)]
            refused = sum(future.result(timeout=60) for future in futures)
        assert refused == 160
        assert ledger.calls == {SCOPE: 40}
        assert guard.count("training", SCOPE) == guard.count() == 40
        assert guard.violation_count == 160
        assert sorted(r.seq for r in guard.calls) == list(range(1, 201))

    def test_threads_between_reading_a_budget_and_spending_it(self, guard, x, monkeypatch):
        """Two calls that decide at the same moment cannot both spend the last unit."""
        from lensnet_guard.boundary import admission

        decide, together = admission.decide, threading.Barrier(2)

        def slow_decide(*situation):
            reason = decide(*situation)
            with contextlib.suppress(threading.BrokenBarrierError):
                together.wait(timeout=0.3)  # both have decided, unless the lock keeps one out
            return reason

        monkeypatch.setattr(admission, "decide", slow_decide)
        outcomes = []

        def work():
            try:
                guard.module(x)
                outcomes.append("ran")
            except BudgetExceeded:
                outcomes.append("refused")

        with (
            guard.context("training"),
            pytest.raises(BudgetExceeded),
            guard.sanctioned(SCOPE),
        ):
            threads = [threading.Thread(target=guard.carry(work)) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(timeout=30)
        assert sorted(outcomes) == ["ran", "refused"]


class TestCarryOfOtherFunctions:
    def test_a_coroutine_function_lost_the_context_before_its_body_ran(self, guard, x):
        """It is awaited inside the context, in whatever loop and thread."""

        async def score():
            await asyncio.sleep(0)
            return guard.module(x)

        with guard.context("inference"):
            carried = guard.carry(score)
        asyncio.run(carried())
        assert guard.count("inference") == 1
        assert guard.current_context is None

    def test_generator_functions_are_refused(self, guard):
        """Their body runs when nobody can say where."""

        def batches():
            yield 1

        async def more():
            yield 1

        for function in (batches, more):
            with pytest.raises(TypeError, match="carry the function that consumes the generator"):
                guard.carry(function)


class TestContextsThatEndFirst:
    """A context that ends before a block inside it changes nothing about that block's budget."""

    def test_an_inference_micro_step_sanctioned_training_calls(self, guard, x):
        """Once the inference context around it had ended, with training opened inside."""
        outer = guard.context("inference")
        outer.__enter__()
        with guard.micro_step(), guard.sanctioned(SCOPE), guard.context("training"):
            outer.__exit__(None, None, None)
            with pytest.raises(UnsanctionedCall):
                guard.module(x)
        assert guard.count() == 0

    def test_an_inference_call_met_a_training_budget(self, guard, x):
        """Once the training context of an open micro-step had ended."""
        outer = guard.context("training")
        outer.__enter__()
        with pytest.raises(ContextSwitchRefused), guard.micro_step():
            outer.__exit__(None, None, None)
            with guard.context("inference"), guard.sanctioned(SCOPE):
                guard.module(x)
        assert guard.count() == 0

    def test_the_context_outside_took_over_an_open_micro_step(self, guard, x):
        """Calls in inference are free, and meet no budget of training."""
        with pytest.raises(BudgetUnmet), guard.context("inference"):
            inner = guard.context("training")
            inner.__enter__()
            with guard.micro_step():
                inner.__exit__(None, None, None)
                guard.module(x)
        assert (guard.count("inference"), guard.count("training")) == (1, 0)

    def test_a_scope_whose_micro_step_has_ended_blamed_a_sanctioned_caller(self, guard, x):
        """The message spoke of callers that the policy does not have."""
        with guard.context("inference"):
            step = guard.micro_step()
            step.__enter__()
        with guard.context("training"):
            step = guard.micro_step()
            step.__enter__()
            with pytest.raises(UnsanctionedCall) as caught, guard.sanctioned(SCOPE):
                with contextlib.suppress(BudgetUnmet):
                    step.__exit__(None, None, None)
                guard.module(x)
        assert "sanctioned caller" not in str(caught.value)
