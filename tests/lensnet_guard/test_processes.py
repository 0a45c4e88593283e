"""Many processes on one guard: each logs for itself, and refuses as the first would."""

import collections
import json
import re

import pytest
from tests.lensnet_guard.helpers import read

from lensnet_guard.postmortem import analyse

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


SPAWNED = """
import copy, multiprocessing
from torch import nn
from lensnet_guard import guard_module, guard_of

def look(module):
    print(guard_of(module).name, guard_of(copy.deepcopy(module)))

if __name__ == "__main__":
    guard = guard_module(nn.Linear(3, 2), guard_copies=False)
    process = multiprocessing.get_context("spawn").Process(target=look, args=(guard.module,))
    process.start()
    process.join()
"""


def test_a_spawned_process_guards_what_has_raw_copies(run_python):
    """It goes on with the work of its parent, and is no copy that somebody keeps."""
    assert run_python(SPAWNED).stdout == "Linear None\n"


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
