"""Ranks: real processes that call unequally, or one of which is refused."""

import re
import textwrap
from pathlib import Path

import pytest
from tests.lensnet_guard.ranks.launcher import Ended, Launcher
from torch import nn

from lensnet_guard import compare_ranks, guard_module

# Every rank trains a small critic behind DistributedDataParallel: its backward is the collective
# that hangs. `batches(rank)` says which steps a rank makes; `within(rank, step)` runs in each.
RANK = """
import datetime, os, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from lensnet_guard import CallPolicy, compare_ranks, guard_module

torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=300))
rank = dist.get_rank()
guard = guard_module(nn.Linear(4, 1), policy=CallPolicy({{"critic": 1}}), mode="{mode}")
model = DistributedDataParallel(nn.Sequential(guard.module))
step = 0

def score(x):
    return model(x)

{definitions}

with guard.context("training"), compare_ranks(guard, every={every}):
    for step in batches(rank):
        with guard.micro_step(step):
            with guard.sanctioned("critic"):
                loss = score(torch.randn(2, 4)).mean()
            within(rank, step)
        loss.backward()
print("finished", guard.count("training"), guard.violation_count)
for record in guard.violations:
    print(record.reason)
dist.destroy_process_group()
"""
WAITS = (
    r"called from \S+rank\.py:\d+ in score; "
    r"has waited for the others at the end of a micro-step for \d s, at \S+rank\.py:\d+ in <module>"
)
ALIKE = "def batches(rank): return range(6)\ndef within(rank, step): pass"


class Runs:
    """Runs the script above."""

    def __init__(self, launcher: Launcher, folder: Path) -> None:
        self._launcher, self._folder = launcher, folder

    def __call__(
        self, definitions: str, *, world: int = 2, every: int = 1, mode: str = "enforce"
    ) -> list[Ended]:
        script = RANK.format(definitions=textwrap.dedent(definitions), every=every, mode=mode)
        return self._launcher.run(self._folder, script, world)


@pytest.fixture
def run_ranks(launcher: Launcher, tmp_path: Path) -> Runs:
    return Runs(launcher, tmp_path)


class TestAlike:
    @pytest.mark.parametrize("every", [1, 4])
    def test_ranks_that_call_alike_train(self, run_ranks: Runs, every: int) -> None:
        """Nothing is raised, nothing is recorded."""
        for ended in run_ranks(ALIKE, every=every):
            assert (ended.code, ended.out) == (0, "finished 6 0\n"), ended.err

    def test_blocks_leave_nothing_open(self, run_ranks: Runs) -> None:
        """A block of its own for every epoch of a long run."""
        for ended in run_ranks(
            """
            import gc
            def opened():
                for _ in range(5):
                    with guard.context("training"), compare_ranks(guard):
                        pass
                gc.collect()
                return len(os.listdir("/proc/self/fd"))
            assert opened() >= opened()
            def batches(rank): return range(1)
            def within(rank, step): pass
            """,
        ):
            assert ended.code == 0, ended.err

    def test_one_block_inside_another(self, run_ranks: Runs) -> None:
        """An epoch inside a run: both compare, and the outer one goes on afterwards."""
        for ended in run_ranks(
            """
            def batches(rank):
                yield 0
                with compare_ranks(guard):
                    yield from (1, 2)
                yield 3
            def within(rank, step): pass
            """,
        ):
            assert (ended.code, ended.out) == (0, "finished 4 0\n"), ended.err

    def test_a_single_rank_has_nothing_to_compare(self, run_ranks: Runs) -> None:
        """The same script on one process."""
        (ended,) = run_ranks(ALIKE, world=1)
        assert (ended.code, ended.out) == (0, "finished 6 0\n"), ended.err


class TestDivergence:
    def test_a_batch_that_one_rank_skips(self, run_ranks: Runs) -> None:
        """Raised on both, naming both callers, before the backward that would have hung."""
        both = run_ranks(
            """
            def batches(rank): return [0, 1, 2, 4, 5] if rank else range(6)
            def within(rank, step): pass
            """,
        )
        for rank, ended in enumerate(both):
            assert ended.code == 1
            told = re.sub(r"^\[rank\d\]: ", "", ended.err, flags=re.MULTILINE)  # torch's prefix
            message = told[told.rindex("lensnet_guard.RankDivergence") :]
            assert re.fullmatch(
                r"""lensnet_guard\.RankDivergence: Linear was not called alike by all """
                rf"""ranks, which hangs what they do together:
  rank 0       4 training calls in 4 micro-steps, the last one step 3, micro-step 0; {WAITS}
  rank 1       4 training calls in 4 micro-steps, the last one step 4, micro-step 0; {WAITS}\.
  called from  .*rank\.py:\d+ in <module>
(               <frozen runpy>.*
)*  context      training, step [34], micro-step 0 \(thread MainThread\)
  scope        none open
  budget       critic: 1 of 1 spent
  what to do   Let all ranks decide alike: from what they share \(reduce it first\), never from """
                r"""one rank's own data; and give each as many batches\.
  explained by lensnet-guard explain unequal-ranks
""",
                message,
            ), message
            assert ended.seconds < 60, f"rank {rank} waited"

    def test_a_rank_that_has_fewer_batches(self, run_ranks: Runs) -> None:
        """It leaves the block, where the others meet it; compared at every third micro-step."""
        both = run_ranks(
            """
            def batches(rank): return range(2 if rank else 6)
            def within(rank, step): pass
            """,
            every=3,
        )
        for ended in both:
            assert ended.code == 1
            assert "RankDivergence" in ended.err or "RankStopped" in ended.err

    def test_observing_it_is_written_down(self, run_ranks: Runs) -> None:
        """A call more than the budget, which observe mode lets pass, on one rank of three."""
        ranks = run_ranks(
            """
            def batches(rank): return range(2)
            def within(rank, step):
                if rank == 2 and step == 1:
                    guard.module(torch.randn(1, 4))
            """,
            world=3,
            mode="observe",
        )
        assert [ended.code for ended in ranks] == [0, 0, 0]
        assert [ended.out.split()[3:] for ended in ranks] == [
            ["RankDivergence"],
            ["RankDivergence"],
            ["UnsanctionedCall", "RankDivergence"],
        ]

    def test_observing_a_rank_with_fewer_batches_hung_the_others(self, run_ranks: Runs) -> None:
        """Once the ranks have differed nobody compares, and nobody waits."""
        ranks = run_ranks(
            """
            model = guard.module  # no collective that would hang by itself
            def batches(rank): return range(6 if rank else 3)
            def within(rank, step): pass
            """,
            mode="observe",
        )
        for ended in ranks:
            assert ended.code == 0, ended.err
            assert ended.out.split()[3:] == ["RankDivergence"]
            assert ended.seconds < 60


class TestStopped:
    def test_a_refused_call_ends_all_ranks(self, run_ranks: Runs) -> None:
        """Those that wait in a collective too, with the message, long before its time-out."""
        first, second = run_ranks(
            """
            def batches(rank): return range(6)
            def within(rank, step):
                if rank == 0 and step == 3:
                    guard.module(torch.randn(1, 4))
            """,
            every=100,
        )
        assert (first.code, second.code) == (1, 1)
        assert "lensnet_guard.UnsanctionedCall: Linear was called in training outside" in first.err
        assert (
            "lensnet_guard: rank 1 ends, because rank 0 stopped: UnsanctionedCall: Linear was "
            "called in training outside its sanctioned scope." in second.err
        )
        assert "lensnet_guard.RankStopped: rank 0 stopped: UnsanctionedCall" in second.err
        assert second.seconds < 60

    def test_any_exception_is_told(self, run_ranks: Runs) -> None:
        """Bad data on one rank."""
        first, second = run_ranks(
            """
            def batches(rank): return range(6)
            def within(rank, step):
                if rank == 1 and step == 2:
                    raise KeyError("label")
            """,
        )
        assert (first.code, second.code) == (1, 1)
        assert "RankStopped: rank 1 stopped: KeyError: 'label'" in first.err

    def test_an_interrupt_of_all_ranks_stays_one(self, run_ranks: Runs) -> None:
        """Ctrl-C goes to every process of a terminal; no rank is told of another's."""
        ranks = run_ranks(
            """
            def batches(rank): return range(6)
            def within(rank, step):
                if step == 2:
                    raise KeyboardInterrupt
            """,
        )
        for ended in ranks:
            assert "KeyboardInterrupt" in ended.err.splitlines()[-1], ended.err
            assert "lensnet_guard.RankStopped" not in ended.err

    def test_a_rank_that_no_longer_comes_back_is_ended(self, run_ranks: Runs) -> None:
        """It waits for something that never comes; where, is said."""
        first, second = run_ranks(
            """
            import time, lensnet_guard.ranks.listener
            lensnet_guard.ranks.listener.GRACE_S = 1.0
            def batches(rank): return range(6)
            def within(rank, step):
                if rank == 1 and step == 2:
                    raise KeyError("label")
                if rank == 0 and step == 2:
                    wait_for_ever()
            def wait_for_ever():
                time.sleep(200)
            """,
        )
        assert (first.code, second.code) == (1, 1)
        assert "rank 0 still waits after 1 s and is ended, here:" in first.err
        assert "in wait_for_ever" in first.err
        assert first.seconds < 60


class TestBadUse:
    def test_without_a_process_group(self) -> None:
        """Said at once."""
        guard = guard_module(nn.Linear(1, 1))
        with (
            pytest.raises(RuntimeError, match=r"the ranks that call Linear cannot be compared: "),
            compare_ranks(guard),
        ):
            pass

    def test_no_guard(self) -> None:
        """Of a mapping that was filtered too well."""
        with pytest.raises(ValueError, match="nothing to compare: the mapping of guards is empty"):
            with compare_ranks({}):
                pass

    @pytest.mark.parametrize(("every", "error"), [(0, ValueError), (1.5, TypeError)])
    def test_intervals_that_are_none(self, every: float, error: type[Exception]) -> None:
        """0 and fractions."""
        guard = guard_module(nn.Linear(1, 1))
        with pytest.raises(error), compare_ranks(guard, every=every):  # type: ignore[arg-type]
            pass
