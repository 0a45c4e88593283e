"""Many threads and tasks on one guard: no call lost, none counted twice."""

import asyncio
import collections
import multiprocessing.pool
import sys
import threading

import pytest
import torch
from tests.lensnet_guard.helpers import SCOPE, read
from torch import nn

from lensnet_guard import (
    BudgetExceeded,
    CallPolicy,
    NoContext,
    UnsanctionedCall,
    guard_module,
    lensnet_guard,
)
from lensnet_guard.logs.history import RING_RECORDS

THREADS = 16


X = torch.ones(1)


class Quick(nn.Module):
    """As little work as possible between two decisions; its ``runs`` are counted apart."""

    def __init__(self):
        super().__init__()
        self.runs = collections.deque()  # append is atomic

    def forward(self, x):
        self.runs.append(None)
        return x


@pytest.fixture
def raw():
    return Quick()


@pytest.fixture
def make_guard(raw):
    return lambda **scopes: guard_module(raw, policy=CallPolicy(scopes) if scopes else None)


@pytest.fixture(autouse=True)
def _hectic_scheduler():
    """Threads change places a thousand times as often as they would."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def in_threads():
    """Run a function of a number in many threads that start together; their results in order."""

    def run(work, count=THREADS):
        barrier, results, errors = threading.Barrier(count), [None] * count, []

        def target(number):
            try:
                barrier.wait(timeout=60)
                results[number] = work(number)
            except BaseException as error:
                errors.append(error)

        threads = [
            threading.Thread(target=target, args=(n,), name=f"worker {n}") for n in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        if errors:
            raise errors[0]
        return results

    return run


def attempts(guard, count):
    """Call ``count`` times; how many calls were admitted."""
    admitted = 0
    for _ in range(count):
        try:
            guard.module(X)
        except BudgetExceeded:
            continue
        admitted += 1
    return admitted


class TestThreads:
    def test_no_call_is_lost_or_counted_twice(self, raw, make_guard, in_threads):
        """16 threads of 5,000 training calls, each in micro-steps of its own."""
        guard = make_guard(**{SCOPE: 5})

        def work(number):
            numbers = []
            with guard.context("training"):
                for step in range(1_000):
                    with guard.micro_step(step, number), guard.sanctioned(SCOPE) as ledger:
                        for _ in range(5):
                            guard.module(X)
                    spent = ledger.spent(SCOPE)
                    assert [(r.step, r.micro_step) for r in spent] == [(step, number)] * 5
                    assert {r.thread for r in spent} == {f"worker {number}"}
                    numbers += [record.seq for record in spent]
            assert numbers == sorted(numbers)
            return numbers

        numbers = [seq for seqs in in_threads(work) for seq in seqs]
        total = THREADS * 5_000
        assert sorted(numbers) == list(range(1, total + 1))
        assert guard.count() == guard.count("training", SCOPE) == len(raw.runs) == total
        assert guard.violation_count == 0
        ring = [record.seq for record in guard.calls]
        assert ring == list(range(total - RING_RECORDS + 1, total + 1))

    def test_both_contexts_at_once(self, raw, make_guard, in_threads):
        """Threads in training and in inference are counted where they belong."""
        guard = make_guard(**{SCOPE: 10})

        def work(number):
            with guard.context(("training", "inference")[number % 2]):
                for step in range(20):
                    with guard.micro_step(step), guard.sanctioned(SCOPE):
                        for _ in range(10):
                            guard.module(X)

        in_threads(work)
        assert guard.count("training", SCOPE) == guard.count("inference", SCOPE) == 1_600
        assert len(raw.runs) == guard.count() == 3_200

    def test_budget_of_each_thread_is_its_own(self, raw, make_guard, in_threads):
        """Each thread asks for more than its micro-step allows, and gets exactly that."""
        guard = make_guard(**{SCOPE: 3})

        def work(number):
            admitted = []
            with guard.context("training"):
                for step in range(10):
                    with pytest.raises(BudgetExceeded) as caught:
                        with guard.micro_step(step, number), guard.sanctioned(SCOPE):
                            admitted.append(attempts(guard, 5))
                    assert caught.value.record.thread == f"worker {number}"
                    assert {r.thread for r in caught.value.earlier} == {f"worker {number}"}
            return admitted

        assert in_threads(work) == [[3] * 10] * THREADS
        assert guard.count() == len(raw.runs) == THREADS * 30
        assert guard.violation_count == len(guard.violations) == THREADS * 20
        assert sorted(r.seq for r in guard.calls) == list(range(1, THREADS * 50 + 1))

    def test_one_budget_for_all(self, raw, make_guard, in_threads):
        """In a shared micro-step exactly the budget is admitted, whoever is quicker."""
        guard = make_guard(**{SCOPE: 1_000})
        with guard.context("training"), pytest.raises(BudgetExceeded):
            with guard.micro_step(1), guard.sanctioned(SCOPE) as ledger:
                admitted = in_threads(guard.carry(lambda _: attempts(guard, 100)))
        assert sum(admitted) == guard.count() == len(raw.runs) == 1_000
        assert ledger.calls == {SCOPE: 1_000}
        assert guard.violation_count == len(ledger.violations) == 600
        assert {r.step for r in guard.calls} == {1}
        assert sorted(r.seq for r in guard.calls) == list(range(1, 1_601))

    def test_last_unit_again_and_again(self, raw, make_guard, in_threads):
        """A budget of one, for which all threads compete in every micro-step."""
        guard = make_guard()
        for step in range(40):
            with guard.context("training"), pytest.raises(BudgetExceeded):
                with guard.micro_step(step), guard.sanctioned(SCOPE):
                    carried = guard.carry(lambda _: attempts(guard, 1))
                    assert sum(in_threads(carried, 4)) == 1
        assert (guard.count(), len(raw.runs), guard.violation_count) == (40, 40, 120)

    def test_several_budgets_of_one_micro_step(self, raw, make_guard, in_threads):
        """Threads that share a micro-step and open scopes of their own spend them apart."""
        guard = make_guard(even=100, odd=40)

        def work(number):
            with guard.sanctioned(("even", "odd")[number % 2]):
                return attempts(guard, 10)

        def until_refused(number):
            try:
                return work(number)
            except BudgetExceeded:  # what attempts() swallowed comes out with the scope
                return None

        with guard.context("training"), pytest.raises(BudgetExceeded):
            with guard.micro_step(1) as ledger:
                in_threads(guard.carry(until_refused))
                assert ledger.calls == {"even": 80, "odd": 40}
                with guard.sanctioned("even"):
                    attempts(guard, 20)
        assert ledger.calls == {"even": 100, "odd": 40}
        assert guard.violation_count == 40
        assert len(raw.runs) == guard.count() == 140

    def test_readers_among_callers(self, make_guard, in_threads):
        """Counts, records and texts can be read at any time, and only ever grow."""
        guard = make_guard()

        def work(number):
            counts = []
            with guard.context("inference"):
                for _ in range(200):
                    guard.module(X)
                    counts.append(guard.count("inference"))
                    assert len(guard.calls) >= min(counts[-1], RING_RECORDS)
                    assert "0 violations" in repr(guard)
            return counts == sorted(counts)

        assert in_threads(work) == [True] * THREADS
        assert guard.count() == THREADS * 200

    def test_every_kind_of_thread_starts_unset(self, raw, make_guard, in_thread):
        """Threads, timers and thread pools fail closed, and may be carried."""
        guard = make_guard()
        outcomes = []

        def call():
            try:
                guard.module(X)
                outcomes.append("ran")
            except NoContext:
                outcomes.append("refused")

        with guard.context("inference"), multiprocessing.pool.ThreadPool(1) as pool:
            for fn in (call, guard.carry(call)):
                in_thread(fn)
                timer = threading.Timer(0, fn)
                timer.start()
                timer.join(timeout=30)
                pool.apply(fn)
        assert outcomes == ["refused"] * 3 + ["ran"] * 3
        assert guard.count() == len(raw.runs) == 3


class TestThreadsWithALog:
    def test_every_line_is_there_and_whole(self, raw, make_guard, in_threads, tmp_path):
        """What 16 threads were allowed and refused stands in one file, line by line."""
        guard = make_guard(**{SCOPE: 4})
        guard.start_log(tmp_path)

        def work(number):
            with guard.context("training"):
                for step in range(40):
                    with pytest.raises(BudgetExceeded):
                        with guard.micro_step(step, number), guard.sanctioned(SCOPE):
                            attempts(guard, 5)

        in_threads(work)
        guard.end_log()
        text = (tmp_path / "lensnet.rank0.jsonl").read_text()
        lines = read(tmp_path / "lensnet.rank0.jsonl")
        assert text.endswith("\n")
        by_event = collections.defaultdict(list)
        for line in lines:
            by_event[line["event"]].append(line)
        steps = THREADS * 40
        assert {event: len(of) for event, of in by_event.items()} == {
            **{"run.begin": 1, "run.end": 1, "micro_step.end": steps, "violation": steps},
            **{"call.begin": steps * 4, "call.end": steps * 4},
        }
        assert (lines[0]["event"], lines[-1]["event"]) == ("run.begin", "run.end")
        assert lines[-1]["calls"] == len(raw.runs) == steps * 4
        assert (lines[-1]["violations"], lines[-1]["lost_lines"]) == (steps, 0)
        numbers = [line["seq"] for e in ("call.begin", "violation") for line in by_event[e]]
        assert sorted(numbers) == list(range(1, steps * 5 + 1))
        begun = {}
        for line in lines:
            if line["event"] == "call.begin":
                begun[line["seq"]] = line
            elif line["event"] == "call.end":
                assert line["outcome"] == "returned"
                del begun[line["seq"]]  # a KeyError, had it ended before it began or ended twice
        assert begun == {}
        assert all(line["calls"] == {SCOPE: 4} for line in by_event["micro_step.end"])

    def test_two_guards_in_one_folder(self, in_threads, tmp_path):
        """Guards that log side by side have a file each, with their own calls alone."""
        with (
            lensnet_guard(Quick(), log=tmp_path) as one,
            lensnet_guard(Quick(), log=tmp_path) as other,
        ):

            def work(number):
                guard = (one, other)[number % 2]
                with guard.context("inference"):
                    for _ in range(25):
                        guard.module(X)

            in_threads(work)
        files = sorted(tmp_path.iterdir())
        assert len(files) == 2
        for path in files:
            begun = [line["seq"] for line in read(path) if line["event"] == "call.begin"]
            assert sorted(begun) == list(range(1, THREADS * 25 // 2 + 1))


class TestTasks:
    def test_many_tasks_with_steps_of_their_own(self, raw, make_guard):
        """Tasks that interleave at every call, and go through threads, keep their budgets apart."""
        guard = make_guard(**{SCOPE: 4})

        async def work(number):
            with guard.context("training"):
                for step in range(5):
                    with guard.micro_step(step, number), guard.sanctioned(SCOPE) as ledger:
                        for _ in range(2):
                            guard.module(X)
                            await asyncio.sleep(0)
                            await asyncio.to_thread(guard.module, X)
                    places = {(r.step, r.micro_step) for r in ledger.spent(SCOPE)}
                    assert places == {(step, number)}

        async def main():
            await asyncio.gather(*(work(number) for number in range(THREADS)))

        asyncio.run(main())
        assert guard.count("training", SCOPE) == len(raw.runs) == THREADS * 20
        assert guard.violations == ()

    def test_tasks_that_share_a_micro_step(self, raw, make_guard):
        """Tasks and to_thread inherit one budget, and together spend exactly that."""
        guard = make_guard(**{SCOPE: 20})

        async def work(number):
            await asyncio.sleep(0)
            if number % 2:
                return await asyncio.to_thread(attempts, guard, 5)
            return attempts(guard, 5)

        async def main():
            with guard.context("training"), pytest.raises(BudgetExceeded):
                with guard.micro_step(3), guard.sanctioned(SCOPE):
                    admitted = await asyncio.gather(*(work(n) for n in range(8)))
            return sum(admitted)

        assert asyncio.run(main()) == guard.count() == len(raw.runs) == 20
        assert guard.violation_count == 20

    def test_a_plain_thread_of_a_task_does_not_inherit(self, make_guard, in_thread):
        """What a task has open is not open in a thread that it starts, unless carried there."""
        guard = make_guard()

        async def work():
            # It comes out again as the micro-step ends, for a thread's errors reach nobody.
            with pytest.raises(NoContext), guard.context("training"), guard.sanctioned(SCOPE):
                with pytest.raises(NoContext):
                    in_thread(guard.module, X)
                in_thread(guard.carry(guard.module), X)

        async def main():
            await asyncio.gather(*(work() for _ in range(3)))

        asyncio.run(main())
        assert (guard.count(), guard.violation_count) == (3, 3)

    def test_a_loop_in_another_thread(self, make_guard, in_thread):
        """A loop that runs in a thread of its own starts unset, whatever its creator has open."""
        guard = make_guard()

        async def call():
            guard.module(X)

        with guard.context("inference"):
            with pytest.raises(NoContext):
                in_thread(lambda: asyncio.run(call()))
            in_thread(guard.carry(lambda: asyncio.run(call())))
        with pytest.raises(UnsanctionedCall), guard.context("training"):
            asyncio.run(call())
        assert guard.count() == 1
