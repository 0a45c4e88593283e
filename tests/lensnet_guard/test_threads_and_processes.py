"""Many threads, tasks and processes on one guard: no call lost, none counted twice, none let by."""

import asyncio
import collections
import json
import multiprocessing.pool
import re
import sys
import threading

import pytest
import torch
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
from lensnet_guard.postmortem import analyse

SCOPE = "preference_scorer"
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


def read(path):
    """The lines of a log file, each of which must be one JSON object."""
    return [json.loads(line) for line in path.read_text().splitlines()]


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
            with guard.context("training"), guard.sanctioned(SCOPE):
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


LOADER = """
import json, multiprocessing, os, sys, torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from lensnet_guard import guard_module, guard_of

class Items(Dataset):
    def __init__(self, critic):
        self.critic = critic
    def __len__(self):
        return 8
    def __getitem__(self, index):
        with guard_of(self.critic).context("inference"):
            self.critic(torch.ones(1, 3))
        return torch.tensor([index, os.getpid()])

class Collate:
    def __init__(self, critic):
        self.critic = critic
    def __call__(self, items):
        guard = guard_of(self.critic)
        with guard.context("training"), guard.sanctioned("preference_scorer"):
            self.critic(torch.ones(2, 3))
        return torch.stack(items), guard.count("inference"), guard.count("training")

def main():
    guard = guard_module(nn.Linear(3, 2), log="log")
    with guard.context("inference"):
        guard.module(torch.ones(1, 3))
    loader = DataLoader(
        Items(guard.module),
        batch_size=2,
        num_workers=2,
        collate_fn=Collate(guard.module),
        multiprocessing_context=sys.argv[1],
    )
    workers = {}
    for items, inference, training in loader:
        with guard.context("inference"):
            guard.module(torch.ones(1, 3))
        for _, pid in items.tolist():
            workers[pid] = workers.get(pid, 0) + 1
    counts = guard.count("inference"), guard.count("training"), guard.violation_count
    guard.end_log()
    print(json.dumps([os.getpid(), workers, counts]))

if __name__ == "__main__":
    main()
"""


REFUSED = """
import sys, torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from lensnet_guard import guard_module

class Items(Dataset):
    def __init__(self, critic):
        self.critic = critic
    def __len__(self):
        return 2
    def __getitem__(self, index):
        return self.critic(torch.ones(1, 3))

if __name__ == "__main__":
    guard = guard_module(nn.Linear(3, 2), log="log")
    loader = DataLoader(Items(guard.module), num_workers=1, multiprocessing_context=sys.argv[1])
    try:
        list(loader)
    except Exception as error:
        print(type(error).__name__)
        print(error)
        print(guard.violation_count)
    guard.end_log()
"""


class TestDataLoaderWorkers:
    @pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
    def test_each_process_writes_its_own_log(self, run_python, tmp_path, method):
        """Workers whose dataset and collate hold the guarded module log beside their parent."""
        result = run_python(LOADER, method)
        assert result.returncode == 0, result.stderr
        parent, workers, counts = json.loads(result.stdout)
        assert counts == [5, 0, 0]  # of the parent; what workers do is theirs
        assert len(workers) == 2
        by_process = {}
        for path in (tmp_path / "log").iterdir():
            lines = read(path)
            assert lines[0]["event"] == "run.begin"
            begun = [line for line in lines if line["event"] == "call.begin"]
            ended = [line["seq"] for line in lines if line["event"] == "call.end"]
            numbers = [line["seq"] for line in begun]
            assert numbers == sorted(set(numbers)) == ended, path.name
            contexts = collections.Counter(line["context"] for line in begun)
            by_process.setdefault(lines[0]["process.pid"], collections.Counter()).update(contexts)
        assert by_process.pop(parent) == {"inference": 5}
        assert set(by_process) == set(map(int, workers))
        for pid, contexts in by_process.items():
            items = workers[str(pid)]
            assert contexts == {"inference": items, "training": items // 2}
        own = read(tmp_path / "log" / "lensnet.rank0.jsonl")
        assert own[0]["process.pid"] == parent
        assert [line["event"] for line in own] == [
            *("run.begin", *("call.begin", "call.end") * 5),
            "run.end",
        ]
        assert (own[-1]["verdict"], own[-1]["calls"], own[-1]["lost_lines"]) == ("clean", 5, 0)

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_a_violation_in_a_worker(self, run_python, tmp_path, method):
        """It stops the parent's loop with all of its text, and stands in the worker's log."""
        result = run_python(REFUSED, method)
        assert result.returncode == 0, result.stderr
        _, *message, count = result.stdout.splitlines()
        assert any(line.startswith("lensnet_guard.NoContext: ") for line in message)
        assert any(re.search(r" in (Items\.)?__getitem__$", line) for line in message)
        assert count == "0"  # it is the worker's violation
        logs = {path.name: read(path) for path in (tmp_path / "log").iterdir()}
        events = {name: [line["event"] for line in lines] for name, lines in logs.items()}
        assert events.pop("lensnet.rank0.jsonl") == ["run.begin", "run.end"]
        (worker,) = events.values()
        assert worker[:2] == ["run.begin", "violation"]

    def test_a_violation_in_a_worker_keeps_its_type(self, run_python):
        """`except LensNetViolation` around the loop catches what happens in a worker."""
        result = run_python(REFUSED, "fork")
        assert result.stdout.splitlines()[0] == "NoContext", result.stderr


EPOCHS = """
import sys, torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from lensnet_guard import guard_module, guard_of

class Items(Dataset):
    def __init__(self, critic, context):
        self.critic, self.context = critic, context
    def __len__(self):
        return 2
    def __getitem__(self, index):
        with guard_of(self.critic).context(self.context):
            return self.critic(torch.ones(1, 3)).detach()

if __name__ == "__main__":
    guard = guard_module(nn.Linear(3, 2), mode="observe")
    for context in ("training", "inference"):
        guard.start_log("log")
        with guard.context("inference"):
            guard.module(torch.ones(1, 3))
        items = Items(guard.module, context)
        list(DataLoader(items, num_workers=2, multiprocessing_context=sys.argv[1]))
        guard.end_log()
"""


class TestWorkersInThePostMortem:
    @pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
    def test_workers_of_the_very_same_run_were_an_earlier_one(self, run_python, tmp_path, method):
        """Nor has anybody died: a worker's log says whose it is, and ends as its process does."""
        result = run_python(EPOCHS, method)
        assert result.returncode == 0, result.stderr
        analysis = analyse([tmp_path / "log"])
        assert analysis.verdict.startswith("2 violations in 2 workers, the first UnsanctionedCall")
        (parent,) = {run.pid for run in analysis.runs if run.parent is None}
        assert [run.parent for run in analysis.runs if run.pid != parent] == [parent] * 4
        assert [run.state for run in analysis.runs] == ["ended"] * 6


class TestFork:
    def test_while_another_thread_holds_the_history(self, run_python):
        """A forked child does not wait for a lock whose holder exists in its parent only."""
        result = run_python(
            """
            import copy, os, signal, threading, torch
            from torch import nn
            from lensnet_guard import NoContext, guard_module, guard_of

            guard = guard_module(nn.Linear(3, 2))
            other = guard_of(copy.deepcopy(guard.module))
            holding, done = threading.Event(), threading.Event()

            def hold():
                with guard._history.lock, other._history.lock:
                    holding.set()
                    done.wait()

            thread = threading.Thread(target=hold)
            thread.start()
            holding.wait()
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                for each in (guard, other):
                    with each.context("inference"):
                        each.module(torch.ones(1, 3))
                    try:
                        each.module(torch.ones(1, 3))
                    except NoContext:
                        pass
                os._exit(10 * guard.count() + other.violation_count)
            _, status = os.waitpid(child, 0)
            done.set()
            thread.join()
            with guard.context("inference"):
                guard.module(torch.ones(1, 3))
            print(os.waitstatus_to_exitcode(status), guard.count(), guard.violation_count)
            """
        )
        assert result.stdout == "11 1 0\n", result.stderr

    def test_again_and_again_among_busy_threads(self, run_python, tmp_path):
        """Forks at random moments, with a log open: no child hangs, no line is torn or doubled."""
        result = run_python(
            """
            import os, signal, sys, threading, torch
            from torch import nn
            from lensnet_guard import guard_module

            sys.setswitchinterval(1e-5)
            guard = guard_module(nn.Identity(), log="log")
            stop = threading.Event()

            def work():
                while not stop.is_set():
                    guard.module(0)

            with guard.context("inference"):
                threads = [threading.Thread(target=guard.carry(work)) for _ in range(4)]
                for thread in threads:
                    thread.start()
                statuses = []
                for _ in range(20):
                    child = os.fork()
                    if child == 0:
                        signal.alarm(30)
                        for _ in range(3):
                            guard.module(0)
                        guard.end_log()
                        os._exit(0)
                    statuses.append(os.waitpid(child, 0)[1])
                stop.set()
                for thread in threads:
                    thread.join()
            guard.end_log()
            print(statuses.count(0), guard.count())
            """
        )
        assert result.returncode == 0, result.stderr
        exited, calls = map(int, result.stdout.split())
        assert exited == 20
        files = list((tmp_path / "log").iterdir())
        assert len(files) == 21
        for path in files:
            lines = read(path)
            begun = [line["seq"] for line in lines if line["event"] == "call.begin"]
            assert len(begun) == len(set(begun)) == lines[-1]["calls"], path.name
            if path.name == "lensnet.rank0.jsonl":
                assert sorted(begun) == list(range(1, calls + 1))
            else:
                assert len(begun) == 3

    def test_child_stands_where_its_parent_stood(self, run_python):
        """A fork is a copy: open blocks are open in the child, and what it spends is its own."""
        result = run_python(
            """
            import os, torch
            from torch import nn
            from lensnet_guard import BudgetExceeded, guard_module

            guard = guard_module(nn.Linear(3, 2))
            with guard.context("training"), guard.sanctioned("preference_scorer"):
                child = os.fork()
                guard.module(torch.ones(1, 3))
                if child == 0:
                    try:
                        guard.module(torch.ones(1, 3))
                    except BudgetExceeded:
                        os._exit(guard.count())
                _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status), guard.count(), guard.violation_count)
            """
        )
        assert result.stdout == "1 1 0\n", result.stderr


class TestQueues:
    @pytest.mark.parametrize("method", ["fork", "spawn"])
    @pytest.mark.parametrize("library", ["multiprocessing", "torch.multiprocessing"])
    def test_proxy_there_and_back(self, run_python, method, library):
        """Through a queue it arrives guarded; records and violations come back as they are."""
        result = run_python(
            f"""
            import sys, torch
            import {library} as mp
            from torch import nn
            from lensnet_guard import BypassedGuard, CallPolicy, NoContext, guard_module, guard_of

            X = torch.ones(1, 3)

            def work(inbox, outbox):
                critic = inbox.get()
                guard = guard_of(critic)
                try:
                    critic(X)
                except NoContext as error:
                    outbox.put(error)
                try:
                    critic.__wrapped__(X)
                except BypassedGuard as error:
                    outbox.put(error)
                with guard.context("training"), guard.sanctioned("critic"):
                    scores = critic(X)
                    critic(X)
                outbox.put((guard.name, guard.policy, guard.calls, scores.tolist()))
                outbox.put(critic)
                inbox.get()

            if __name__ == "__main__":
                context = mp.get_context(sys.argv[1])
                policy = CallPolicy({{"critic": 2}})
                guard = guard_module(nn.Linear(3, 2), policy=policy, name="critic")
                inbox, outbox = context.Queue(), context.Queue()
                process = context.Process(target=work, args=(inbox, outbox))
                process.start()
                inbox.put(guard.module)
                unset, behind = outbox.get(timeout=60), outbox.get(timeout=60)
                name, same, calls, scores = outbox.get(timeout=60)
                back = outbox.get(timeout=60)
                with guard_of(back).context("inference"):
                    expected = back(X).tolist()
                inbox.put(None)
                process.join(60)
                print(process.exitcode, name, same == policy, scores == expected)
                print(type(unset).__name__, unset.record.caller.function)
                print(type(behind).__name__, behind.record.kind)
                print([(r.seq, r.verdict) for r in calls], {{r.caller.function for r in calls}})
                print(guard_of(back).count(), guard.count(), guard.violation_count)
            """,
            method,
        )
        assert result.stdout.splitlines() == [
            "0 critic True True",
            "NoContext work",
            "BypassedGuard bypass",
            "[(1, 'refuse'), (2, 'refuse'), (3, 'allow'), (4, 'allow')] {'work'}",
            "1 0 0",
        ], result.stderr
