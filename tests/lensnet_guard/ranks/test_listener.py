"""What hangs before a comparison, in real processes: inside a call, or with one that is killed.

The collectives' time-out is the default of many minutes. That these tests end is what they say.
"""

import re
import textwrap
from pathlib import Path

import pytest
from tests.lensnet_guard.ranks.launcher import Ended, Launcher

# Two guarded modules, one with a collective in each call. `work(rank)` is the training.
RANK = """
import os, signal, sys, time
import torch
import torch.distributed as dist
from torch import nn
from lensnet_guard import CallPolicy, Scope, compare_ranks, guard_modules

class Alone(nn.Linear):
    wait_s = 0.0

    def forward(self, x):
        time.sleep(self.wait_s)
        return super().forward(x)

class Shared(nn.Linear):
    def forward(self, x):
        x = super().forward(x)
        dist.all_reduce(x)
        return x

dist.init_process_group("gloo")
rank = dist.get_rank()
policy = CallPolicy({{"scored": Scope((0, 999))}})
modules = {{"A": Alone(2, 2), "B": Shared(2, 2)}}
guards = guard_modules(modules, policy=policy, mode="{mode}", log={log!r})
x = torch.ones(1, 2)

def score(name):
    with guards[name].sanctioned("scored"):
        guards[name].module(x)

{work}

with guards.context("training"), compare_ranks({compared}, every={every}):
    work(rank)
print("finished", len(guards["B"].violations))
guards.uninstall()
sys.stdout.flush()
os._exit(0)  # a rank may be left behind in a collective, as without a guard
"""


class Runs:
    """Runs the script above."""

    def __init__(self, launcher: Launcher, folder: Path) -> None:
        self._launcher, self._folder = launcher, folder

    def __call__(
        self,
        work: str,
        *,
        world: int = 2,
        every: int = 1,
        mode: str = "enforce",
        compared: str = "guards",
    ) -> list[Ended]:
        self.log = self._folder / "log"
        script = RANK.format(
            work=textwrap.dedent(work), every=every, mode=mode, compared=compared, log=str(self.log)
        )
        return self._launcher.run(self._folder, script, world)


@pytest.fixture
def run_ranks(launcher: Launcher, tmp_path: Path) -> Runs:
    return Runs(launcher, tmp_path)


def lines_told(ended: Ended) -> list[str]:
    """What stderr says first of the ranks' difference: a headline, and a line for each rank."""
    told = re.search(r"^lensnet_guard: rank \d: .*(\n  rank .*)+", ended.err, re.MULTILINE)
    assert told is not None, ended.err
    return told[0].split("\n")


def lines_of(ended: Ended, *, once: bool = True) -> list[str]:
    """What stderr says of the ranks' difference, raised or not: a line for each rank."""
    text = re.sub(r"^\[rank\d\]: ", "", ended.err, flags=re.MULTILINE)  # torch's prefix
    told = re.findall(
        r"^lensnet_guard\S* .*B was not called alike .*:((?:\n  rank .*)+)", text, re.M
    )
    assert told, text
    assert len(told) == 1 or not once, text
    lines: list[str] = told[0].removesuffix(".").split("\n")[1:]
    return lines


def calls_line(made: str, doing: str) -> str:
    """A pattern for the line of a rank, as it begins and ends."""
    return rf"  rank \d       {made}; called from \S+rank\.py:\d+ in score; {doing}"


IN_B = r"has been in call {} of B for \d+ s, at \S+rank\.py:\d+ in Shared\.forward"
LEFT = r"has waited for the others at the end of the block for \d+ s, at \S+rank\.py:\d+ in \S+"
DONE = LEFT.replace("the block", "a micro-step")
ENDED_HERE = "still waits after 4 s and is ended, here:"

THREE_TO_ONE = """
def work(rank):
    for step in range(1 if rank else 3):
        with guards.micro_step(step):
            score("B")
"""


class TestInsideACall:
    def test_three_micro_steps_to_one(self, run_ranks: Runs) -> None:
        """The one waits for an all-reduce in the forward of its second; the other has left."""
        both = run_ranks(THREE_TO_ONE, compared="guards['B']")
        last = "in 1 micro-steps, the last one step 0, micro-step 0"
        for rank, ended in enumerate(both):
            first, second = lines_of(ended)
            assert re.fullmatch(calls_line(f"2 training calls {last}", IN_B.format(2)), first)
            gone = f"1 training calls {last}, and no more to come"
            assert re.fullmatch(calls_line(gone, LEFT), second)
            assert ended.code == 1
            log = (run_ranks.log / f"lensnet.rank{rank}.jsonl").read_text()
            assert "RankDivergence" in log
        waited, left = both
        assert f"rank 0 {ENDED_HERE}" in waited.err
        assert "in all_reduce" in waited.err
        assert "lensnet_guard.RankDivergence: B was not called alike by all ranks" in left.err

    def test_one_module_once_and_three_times(self, run_ranks: Runs) -> None:
        """In one micro-step, and another module alike: DeepSpeed's issue 7998."""
        both = run_ranks(
            """
            def work(rank):
                with guards.micro_step(0):
                    score("A")
                    for _ in range(3 if rank else 1):
                        score("B")
            """
        )
        for ended in both:
            first, second = lines_of(ended)
            once = "1 A, 1 B training calls in 1 micro-steps, the last one step 0, micro-step 0"
            assert re.fullmatch(calls_line(once, DONE), first)
            twice = "1 A, 2 B training calls in 0 micro-steps"
            assert re.fullmatch(calls_line(twice, IN_B.format(2)), second)
            assert ended.code == 1
        assert f"rank 1 {ENDED_HERE}" in both[1].err

    def test_a_rank_without_data_skips_its_call(self, run_ranks: Runs) -> None:
        """Two others wait for it in theirs: verl's issue 6176; compared at every second one."""
        ranks = run_ranks(
            """
            def work(rank):
                for step in range(4):
                    with guards.micro_step(step):
                        if not (rank == 1 and step == 3):
                            score("B")
            """,
            world=3,
            every=2,
        )
        for rank, ended in enumerate(ranks):
            lines = lines_of(ended, once=False)  # one that is ended breaks the others' collective
            made = [line.partition(" training")[0].split()[2:] for line in lines]
            assert made == [["0", "A,", "4", "B"], ["0", "A,", "3", "B"], ["0", "A,", "4", "B"]]
            assert ended.code == 1
            waited = ENDED_HERE in ended.err or "Connection" in ended.err  # with one that was ended
            assert waited == (rank != 1), ended.err

    def test_a_rank_that_can_raise_is_not_ended(self, run_ranks: Runs) -> None:
        """It is told as its next call begins, and raises there."""
        both = run_ranks(
            """
            def work(rank):
                with guards.micro_step(0):
                    for _ in range(1 if rank else 200):
                        score("A")
                        time.sleep(0.1)
            """
        )
        for ended in both:
            assert ended.code == 1
            assert ENDED_HERE not in ended.err
            assert "lensnet_guard.RankDivergence: A was not called alike by" in ended.err
        assert re.search(r'rank.py", line \d+, in score', both[0].err)

    def test_observing_nobody_is_ended(self, run_ranks: Runs) -> None:
        """Told, and written down on both, once; what hangs hangs as without a guard."""
        work = THREE_TO_ONE + "\nleave = os._exit\nos._exit = lambda code: stay(code)\n"
        work += "def stay(code):\n    time.sleep(6)\n    leave(code)\n"
        waited, left = run_ranks(work, compared="guards['B']", mode="observe")
        for rank, ended in enumerate((waited, left)):
            assert len(lines_of(ended)) == 2
            assert ENDED_HERE not in ended.err
            log = (run_ranks.log / f"lensnet.rank{rank}.jsonl").read_text()
            assert log.count('"event":"violation"') == log.count('"RankDivergence"') == 1
        assert (left.code, left.out) == (0, "finished 1\n")
        assert "RuntimeError" in waited.err  # gloo's, as the other ended
        assert "RankStopped" not in waited.err

    def test_a_slow_rank_is_waited_for(self, run_ranks: Runs) -> None:
        """Slow inside a call, between calls, and before it leaves; nothing is said."""
        both = run_ranks(
            """
            def work(rank):
                for step in range(3):
                    slow = rank == step % 2
                    with guards.micro_step(step):
                        modules["A"].wait_s = 2.5 if slow else 0.0
                        score("A")
                        time.sleep(0 if slow else 2.5)
                        score("B")
                time.sleep(2.5 if rank else 0.0)
            """
        )
        for ended in both:
            assert (ended.code, ended.out) == (0, "finished 0\n"), ended.err
            assert "lensnet_guard" not in ended.err


class TestLost:
    @pytest.mark.parametrize("victim", [0, 1])
    def test_a_rank_that_is_killed(self, run_ranks: Runs, victim: int) -> None:
        """Also rank 0, and with it the store that the ranks tell each other through."""
        ranks = run_ranks(
            f"""
            def work(rank):
                with guards.micro_step(0):
                    score("B")
                    if rank == {victim}:
                        os.kill(os.getpid(), signal.SIGKILL)
                    for _ in range(100):
                        time.sleep(0.1)
                        score("A")
            """
        )
        killed, other = ranks[victim], ranks[1 - victim]
        assert (killed.code, other.code) == (-9, 1)
        why = rf"rank {victim} stopped: its process \d+ has ended without a word"
        assert re.search(f"rank {1 - victim} ends, because {why}", other.err), other.err
        assert re.search(f"lensnet_guard.RankStopped: {why}", other.err)
        assert ("hears of the others no more, the store has gone" in other.err) == (victim == 0)

    @pytest.mark.parametrize("victim", [0, 1])
    @pytest.mark.parametrize("steps", [2, 3])
    def test_a_rank_that_is_killed_as_the_others_compare(
        self, run_ranks: Runs, victim: int, steps: int
    ) -> None:
        """As a micro-step ends, and at the end of the block; what gloo says of it says less."""
        ranks = run_ranks(
            f"""
            def work(rank):
                for step in range({steps}):
                    if rank == {victim} and step == 2:
                        os.kill(os.getpid(), signal.SIGKILL)
                    with guards.micro_step(step):
                        score("A")
                if rank == {victim}:
                    os.kill(os.getpid(), signal.SIGKILL)
            """
        )
        killed, other = ranks[victim], ranks[1 - victim]
        assert (killed.code, other.code) == (-9, 1)
        why = rf"RankStopped: rank {victim} stopped: its process \d+ has ended without a word"
        assert re.search(why, other.err), other.err

    def test_a_rank_that_is_silent(self, run_ranks: Runs) -> None:
        """It is stopped for a while: said, and nothing is ended."""
        first, second = run_ranks(
            """
            import subprocess
            import lensnet_guard.ranks.peers
            lensnet_guard.ranks.peers.SILENT_S = 2.0
            def work(rank):
                with guards.micro_step(0):
                    score("B")
                    if rank:
                        subprocess.Popen(["sh", "-c", f"sleep 5; kill -CONT {os.getpid()}"])
                        os.kill(os.getpid(), signal.SIGSTOP)
                        time.sleep(3)
            """
        )
        for ended in (first, second):
            assert (ended.code, ended.out) == (0, "finished 0\n"), ended.err
        assert re.search(r"rank 0 finds that rank 1 has been silent for \d+ s: ", first.err)
        assert "rank 0 finds that rank 1 is heard again" in first.err

    def test_who_stops_is_told_as_a_call_begins(self, run_ranks: Runs) -> None:
        """Long before the micro-step ends."""
        first, second = run_ranks(
            """
            def work(rank):
                with guards.micro_step(0):
                    for _ in range(200):
                        score("A")
                        time.sleep(0.1)
                        if rank:
                            raise KeyError("label")
            """
        )
        assert (first.code, second.code) == (1, 1)
        assert "lensnet_guard.RankStopped: rank 1 stopped: KeyError: 'label'" in first.err
        assert "still waits" not in first.err
