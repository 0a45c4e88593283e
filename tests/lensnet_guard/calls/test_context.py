"""What is open in this thread or task: contexts, micro-steps and scopes."""

import asyncio
import contextlib
import contextvars
import gc
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.lensnet_guard.calls.places import UNSET, where
from tests.lensnet_guard.helpers import SCOPE

from lensnet_guard import (
    BudgetExceeded,
    BudgetUnmet,
    ContextSwitchRefused,
    NoContext,
    UnsanctionedCall,
)
from lensnet_guard.calls.context import Block, OpenBlocks


class TestContext:
    def test_unset_at_first(self, guard, x):
        """A new guard has no context, and refuses to guess one."""
        assert guard.current_context is None
        with pytest.raises(NoContext):
            guard.module(x)

    @pytest.mark.parametrize("context", ["training", "inference"])
    def test_holds_inside_the_block_only(self, guard, context):
        """The block declares; after it nothing is declared any more."""
        with guard.context(context):
            assert guard.current_context == context
        assert guard.current_context is None

    def test_nests(self, guard):
        """Inner contexts win, and each end brings the outer one back."""
        seen = []
        with guard.context("training"):
            with guard.context("inference"):
                with guard.context("training"), guard.context("training"):
                    seen.append(guard.current_context)
                seen.append(guard.current_context)
            seen.append(guard.current_context)
        assert seen == ["training", "inference", "training"]
        assert where(guard) == UNSET

    @pytest.mark.parametrize("word", ["train", "Training", "", None, 0, True, [], ("training",)])
    def test_any_other_word_is_refused(self, guard, word):
        """A misspelt context is an error where it is spelt, and declares nothing."""
        message = f'context must be "training" or "inference", not {word!r}'
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"), guard.context(word):
            pytest.fail("the block was entered")
        assert where(guard) == UNSET

    def test_is_a_decorator_too(self, guard, x):
        """A context can be put on a function, call after call."""

        @guard.context("inference")
        def score():
            return guard.module(x)

        score()
        score()
        assert guard.count("inference") == 2
        assert guard.current_context is None

    def test_cannot_be_entered_twice(self, guard):
        """One context object is one block."""
        block = guard.context("inference")
        with block:
            pass
        with pytest.raises((AttributeError, RuntimeError)), block:
            pytest.fail("entered twice")
        assert where(guard) == UNSET

    def test_is_that_of_one_guard(self, make_guard, x):
        """What one guard is told says nothing to another."""
        one, other = make_guard(), make_guard()
        with one.context("inference"):
            one.module(x)
            with pytest.raises(NoContext):
                other.module(x)

    def test_training_inside_inference_and_back(self, guard, x):
        """Training inside inference has its own micro-step; afterwards inference is free again."""
        with guard.context("inference"):
            guard.module(x)
            with guard.context("training"):
                with pytest.raises(UnsanctionedCall):
                    guard.module(x)
                with guard.sanctioned(SCOPE):
                    guard.module(x)
            guard.module(x)
        assert (guard.count("inference"), guard.count("training")) == (2, 1)

    def test_training_inside_an_inference_scope_is_not_sanctioned_by_it(self, guard, x):
        """A change of context hides the micro-step and the scope outside it."""
        with guard.context("inference"), guard.micro_step(1), guard.sanctioned(SCOPE):
            with guard.context("training"):
                assert where(guard) == ("training", None, None)
                with pytest.raises(UnsanctionedCall):
                    guard.module(x)
            assert where(guard) == ("inference", 1, SCOPE)
            guard.module(x)

    def test_same_context_again_keeps_the_micro_step(self, guard, x):
        """A helper that declares the context that holds already changes nothing."""
        with guard.context("training"), guard.micro_step(1), guard.sanctioned(SCOPE):
            with guard.context("training"):
                assert where(guard) == ("training", 1, SCOPE)
                guard.module(x)
            with guard.context("training"), pytest.raises(BudgetExceeded):
                guard.module(x)
            guard._admission.open.position().micro_step.violations.clear()

    def test_inference_inside_a_training_micro_step_is_refused(self, guard):
        """That is how a helper would slip through; what was open stays open."""
        with guard.context("training"), pytest.raises(ContextSwitchRefused) as last:
            with guard.micro_step(1):
                with pytest.raises(ContextSwitchRefused) as first, guard.context("inference"):
                    pytest.fail("the block was entered")
                assert where(guard) == ("training", 1, None)
        assert last.value is first.value

    def test_inference_inside_a_lone_scope_is_refused(self, guard, x):
        """A scope that stands alone is a micro-step too."""
        with (
            guard.context("training"),
            pytest.raises(ContextSwitchRefused),
            guard.sanctioned(SCOPE),
            guard.context("inference"),
        ):
            pytest.fail("the block was entered")
        assert where(guard) == UNSET

    def test_inference_behind_a_repeated_training_context_is_refused(self, guard):
        """To say training again inside the micro-step does not open a way out of it."""
        with (
            guard.context("training"),
            pytest.raises(ContextSwitchRefused),
            guard.micro_step(),
            guard.context("training"),
            guard.context("inference"),
        ):
            pytest.fail("the block was entered")

    def test_inference_inside_training_without_micro_step(self, guard, x):
        """Between micro-steps a switch to inference is legal: evaluation during training."""
        with guard.context("training"), guard.context("inference"):
            guard.module(x)
        assert guard.count("inference") == 1


ERRORS = [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration]


class TestStateAfterExceptions:
    @pytest.mark.parametrize("error", [*ERRORS, asyncio.CancelledError])
    def test_every_block_is_closed(self, guard, x, error):
        """Whatever leaves the blocks, leaves none of them open behind it."""
        mine = error("mine")
        with pytest.raises(BaseException) as caught:
            with guard.context("training"), guard.micro_step(1), guard.sanctioned(SCOPE):
                guard.module(x)
                raise mine
        assert mine in (caught.value, caught.value.__cause__)
        assert where(guard) == UNSET
        assert guard.violations == ()
        with guard.context("training"), guard.sanctioned(SCOPE):
            guard.module(x)

    @pytest.mark.parametrize("error", ERRORS)
    def test_raised_by_the_module(self, scorer, guard, x, error):
        """An exception out of forward closes the blocks and ends the run."""

        def fail():
            raise error("mine")

        scorer.inside = fail
        with contextlib.suppress(BaseException):
            with guard.context("training"), guard.sanctioned(SCOPE):
                guard.module(x)
        scorer.inside = None
        assert where(guard) == UNSET
        with guard.context("inference"):
            guard.module(x)
        assert [r.outcome for r in guard.calls] == [f"raised {error.__name__}", "returned"]

    def test_outer_blocks_stay_open(self, guard):
        """Only the blocks that the exception leaves are closed."""
        with guard.context("training"), pytest.raises(BudgetUnmet), guard.micro_step(1):
            with contextlib.suppress(KeyError), guard.sanctioned(SCOPE):
                assert where(guard) == ("training", 1, SCOPE)
                raise KeyError
            assert where(guard) == ("training", 1, None)

    def test_refused_blocks_leave_nothing_open(self, guard):
        """A block that was refused is not half open."""
        for block in (guard.micro_step(), guard.sanctioned(SCOPE)):
            with pytest.raises(NoContext), block:
                pytest.fail("the block was entered")
        assert where(guard) == UNSET


class TestGenerators:
    """A generator may hold a block open, and be closed late, out of order or elsewhere."""

    def scoring(self, guard, step=1):
        with guard.context("training"), guard.micro_step(step), guard.sanctioned(SCOPE):
            yield guard

    def test_open_between_yields(self, guard, x):
        """What a suspended generator has open holds for its consumer too."""
        for inside in self.scoring(guard):
            inside.module(x)
        assert where(guard) == UNSET
        assert guard.count("training", SCOPE) == 1

    def test_closed_early(self, guard):
        """close() ends the blocks; nothing is due, for the body did not finish."""
        generator = self.scoring(guard)
        next(generator)
        generator.close()
        assert where(guard) == UNSET
        assert guard.violations == ()

    def test_closed_by_garbage_collection(self, guard):
        """A forgotten generator's blocks end with it."""
        generator = self.scoring(guard)
        next(generator)
        assert guard.current_context == "training"
        del generator
        gc.collect()
        assert where(guard) == UNSET

    def test_closed_out_of_order(self, make_guard):
        """Closing the outer of two first leaves the inner one's blocks, whole."""
        guard = make_guard()
        outer = self.scoring(guard, step=1)
        next(outer)

        def declared():
            with guard.context("training"):
                yield

        inner = declared()
        next(inner)
        outer.close()
        assert where(guard) == ("training", None, None)
        inner.close()
        assert where(guard) == UNSET

    def test_closed_inside_a_later_block(self, guard, x):
        """A generator that ends inside a later block does not end that block."""
        generator = self.scoring(guard)
        next(generator)
        with guard.context("training"):
            generator.close()
            assert where(guard) == ("training", None, None)
            with guard.sanctioned(SCOPE):
                guard.module(x)
        assert where(guard) == UNSET

    def test_closed_from_another_thread(self, guard, x, in_thread):
        """What is closed elsewhere is closed here as well, and the other thread stays unset."""
        generator = self.scoring(guard)
        next(generator)

        def close():
            generator.close()
            return where(guard)

        assert in_thread(close) == UNSET
        with pytest.raises(NoContext):
            guard.module(x)
        assert where(guard) == UNSET

    def test_opened_in_another_thread(self, guard, in_thread, x):
        """A block counts in the thread that opened it, wherever its generator goes."""
        generator = self.scoring(guard)
        in_thread(next, generator)
        assert where(guard) == UNSET
        generator.close()
        assert where(guard) == UNSET

    def test_settled_from_another_thread(self, guard, in_thread):
        """A generator that runs to its end in another thread settles its micro-step there."""
        generator = self.scoring(guard)
        next(generator)
        with pytest.raises(BudgetUnmet) as caught:
            in_thread(next, generator, name="finisher")
        assert caught.value.record.thread == "finisher"
        assert where(guard) == UNSET

    def test_record_of_a_budget_settled_elsewhere_lost_its_context(self, guard, in_thread):
        """The record tells of the micro-step that ended, wherever it was ended."""
        generator = self.scoring(guard, step=5)
        next(generator)
        with pytest.raises(BudgetUnmet) as caught:
            in_thread(next, generator)
        record = caught.value.record
        assert (record.context, record.step, record.micro_step) == ("training", 5, 0)


class TestThreads:
    def test_start_unset(self, guard, x, in_thread):
        """A thread inherits nothing, so work nobody declared is refused, not guessed."""
        with guard.context("inference"):
            assert in_thread(where, guard) == UNSET
            with pytest.raises(NoContext):
                in_thread(guard.module, x)

    def test_do_not_disturb_each_other(self, guard, x):
        """Each of eight threads lives in its own context, blocks and budgets of its own."""
        barrier, seen = threading.Barrier(8), []

        def work(number):
            context = ("training", "inference")[number % 2]
            with guard.context(context), guard.micro_step(number):
                barrier.wait(timeout=30)
                with guard.sanctioned(SCOPE):
                    guard.module(x)
                barrier.wait(timeout=30)
                seen.append(where(guard) == (context, number, None))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert seen == [True] * 8
        assert guard.count("training", SCOPE) == guard.count("inference", SCOPE) == 4
        assert guard.violations == ()

    def test_end_of_a_block_disarms_no_other_thread(self, guard, x, in_thread):
        """A thread that leaves its context leaves that of the others alone."""

        def short():
            with guard.context("inference"):
                guard.module(x)

        with guard.context("training"):
            in_thread(short)
            assert guard.current_context == "training"
            with pytest.raises(UnsanctionedCall):
                guard.module(x)


class TestAsyncio:
    def test_tasks_inherit(self, guard, x):
        """A task starts with what is open where it is made."""

        async def call():
            await asyncio.sleep(0)
            guard.module(x)
            return where(guard)

        async def main():
            with guard.context("training"), guard.micro_step(4), guard.sanctioned(SCOPE):
                return await asyncio.create_task(call())

        assert asyncio.run(main()) == ("training", 4, SCOPE)
        assert guard.count("training", SCOPE) == 1

    def test_to_thread_inherits(self, guard, x):
        """asyncio.to_thread carries the context by itself."""

        async def main():
            with guard.context("training"), guard.sanctioned(SCOPE):
                await asyncio.to_thread(guard.module, x)

        asyncio.run(main())
        assert guard.count("training", SCOPE) == 1

    def test_run_in_executor_does_not_inherit(self, guard, x):
        """An executor asked directly starts unset, unless the function is carried."""

        async def main():
            loop = asyncio.get_running_loop()
            with guard.context("inference"):
                with pytest.raises(NoContext):
                    await loop.run_in_executor(None, guard.module, x)
                await loop.run_in_executor(None, guard.carry(guard.module), x)

        asyncio.run(main())
        assert guard.count("inference") == 1

    def test_blocks_of_a_task_stay_in_it(self, guard):
        """Sibling tasks that interleave do not see each other's blocks."""
        seen = []

        async def work(context, step):
            with guard.context(context), guard.micro_step(step):
                for _ in range(3):
                    await asyncio.sleep(0)
                    seen.append(where(guard) == (context, step, None))
                if context == "training":
                    raise KeyError  # so that no budget is due

        async def main():
            tasks = (work(("training", "inference")[n % 2], n) for n in range(6))
            await asyncio.gather(*tasks, return_exceptions=True)
            return where(guard)

        assert asyncio.run(main()) == UNSET
        assert seen == [True] * 18

    def test_a_task_that_outlives_its_block_is_refused(self, guard, x):
        """A block's effect ends with the block, also for tasks started inside it."""

        async def late(event):
            await event.wait()
            with pytest.raises(NoContext):
                guard.module(x)
            return where(guard)

        async def main():
            event = asyncio.Event()
            with guard.context("inference"):
                task = asyncio.create_task(late(event))
                await asyncio.sleep(0)
            event.set()
            return await task

        assert asyncio.run(main()) == UNSET
        assert guard.count() == 0

    def test_a_task_that_outlives_only_the_scope(self, guard, x):
        """In training, what is left after the scope is a call without sanction."""

        async def late(event):
            await event.wait()
            with pytest.raises(UnsanctionedCall):
                guard.module(x)

        async def main():
            event = asyncio.Event()
            with guard.context("training"):
                with guard.sanctioned(SCOPE):
                    task = asyncio.create_task(late(event))
                    guard.module(x)
                event.set()
                await task

        asyncio.run(main())

    def test_a_cancelled_task(self, guard):
        """Cancellation closes the blocks and leaves no unmet budget behind."""

        async def work():
            with guard.context("training"), guard.micro_step():
                await asyncio.sleep(60)

        async def main():
            task = asyncio.create_task(work())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())
        assert guard.violations == ()

    def test_an_async_generator_closed_by_the_loop(self, guard):
        """An abandoned async generator is finalised in another task, and closes its blocks."""

        async def produce():
            with guard.context("training"):
                yield 1
                yield 2

        async def main():
            generator = produce()
            await anext(generator)
            seen = [guard.current_context]
            del generator
            gc.collect()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            return [*seen, guard.current_context]

        assert asyncio.run(main()) == ["training", None]

    def test_a_copied_context(self, guard, x):
        """contextvars.copy_context() is how libraries carry, and it works the same."""
        with guard.context("inference"):
            copied = contextvars.copy_context()
            copied.run(guard.module, x)
        with pytest.raises(NoContext):
            copied.run(guard.module, x)


class TestOpenBlocks:
    def test_closed_frames_are_forgotten(self):
        """A thread that only looks drops the frames that were closed elsewhere."""
        blocks, frame = OpenBlocks(), Block(context="training")
        blocks.push(frame)
        threading.Thread(target=blocks.remove, args=(frame,)).start()
        while not frame.closed:
            pass
        assert blocks.position().blocks == ()
        assert blocks._position.get().blocks == ()

    def test_remove_twice(self):
        """A frame that is closed already can be closed again."""
        blocks, frame = OpenBlocks(), Block(context="training")
        blocks.push(frame)
        blocks.remove(frame)
        blocks.remove(frame)
        assert blocks.position().context is None
