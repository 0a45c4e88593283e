"""Ranks: real processes that call unequally, or one of which is refused."""

import re
import textwrap
from collections.abc import Callable
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
            message = told(ended)[told(ended).rindex("lensnet_guard.RankDivergence") :]
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
            import lensnet_guard.ranks.listener
            lensnet_guard.ranks.listener.GRACE_S = 1.0
            import time
            sys.excepthook = lambda *_: time.sleep(6)  # it lives on, so gloo waits
            def batches(rank): return range(6)
            def within(rank, step):
                if rank == 1 and step == 2:
                    raise KeyError("label")
                if rank == 0 and step == 2:
                    wait_for_ever()
            def wait_for_ever():
                dist.barrier()
            """,
        )
        assert (first.code, second.code) == (1, 1)
        assert "rank 0 still waits after 1 s and is ended, here:" in first.err
        assert "in wait_for_ever" in first.err
        assert first.seconds < 60

    def test_a_rank_that_saves_what_there_is_is_not_ended(self, run_ranks: Runs) -> None:
        """It runs on, and raises as it comes to the guard."""
        first, second = run_ranks(
            """
            import time, lensnet_guard.ranks.listener
            lensnet_guard.ranks.listener.GRACE_S = 1.0
            def batches(rank): return range(6)
            def within(rank, step):
                if rank == 1 and step == 2:
                    raise KeyError("label")
                if rank == 0 and step == 2:
                    time.sleep(2.5)  # an upload, a thread that writes
                    print("saved")
            """,
        )
        assert (first.code, second.code) == (1, 1)
        assert first.out == "saved\n"
        assert "still waits" not in first.err
        assert "RankStopped: rank 1 stopped: KeyError: 'label'" in first.err

    def test_observing_it_ends_nobody_else(self, run_ranks: Runs) -> None:
        """It is said; the others go on, and compare no more."""
        first, second = run_ranks(
            """
            import lensnet_guard.ranks.listener
            lensnet_guard.ranks.listener.GRACE_S = 0.5
            model = guard.module  # no collective that would hang by itself
            def batches(rank): return range(4)
            def within(rank, step):
                if rank == 1 and step == 1:
                    raise KeyError("label")
                if rank == 0 and step == 1:
                    import time
                    time.sleep(2)
            """,
            mode="observe",
        )
        assert (first.code, second.code) == (0, 1)
        assert first.out == "finished 4 0\n"
        assert "rank 0 hears that rank 1 stopped: KeyError: 'label'" in first.err
        assert "still waits" not in first.err


SEVERAL = """
import datetime, sys
import torch
import torch.distributed as dist
from contextlib import ExitStack
from torch import nn
from lensnet_guard import CallPolicy, Scope, compare_ranks, guard_module

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=300))
rank = dist.get_rank()
policy = CallPolicy({{"free": Scope((0, None)), "due": 1}})

def guarded(name, mode="enforce"):
    return guard_module(nn.Identity(), policy=policy, name=name, mode=mode)

def call(guard, scope, times):
    with guard.sanctioned(scope):
        for _ in range(times):
            guard.module(torch.ones(1))

{definitions}

guards = make(rank)
with ExitStack() as contexts:
    for guard in guards.values():
        contexts.enter_context(guard.context("training"))
    with compare_ranks(guards, ranges={ranges}):
        for step in range(3):
            with ExitStack() as steps:
                for guard in guards.values():
                    steps.enter_context(guard.micro_step(step))
                work(rank, step)
                for guard in guards.values():
                    call(guard, "due", 1)
print("finished", *(guard.violation_count for guard in guards.values()))
"""
FREELY = """
def make(rank): return {"a": guarded("a"), "b": guarded("b")}
def work(rank, step): call(guards["b"], "free", rank * step)
"""


@pytest.fixture
def run_several(launcher: Launcher, tmp_path: Path) -> Callable[..., list[Ended]]:
    """What runs the script above as two ranks."""

    def run(definitions: str, *, ranges: bool = True) -> list[Ended]:
        script = SEVERAL.format(definitions=textwrap.dedent(definitions), ranges=ranges)
        return launcher.run(tmp_path, script)

    return run


class TestSeveral:
    def test_calls_that_each_rank_makes_as_it_likes(
        self, run_several: Callable[..., list[Ended]]
    ) -> None:
        """Of a scope with a range; where they need not be equal nothing is said."""
        for ended in run_several(FREELY, ranges=False):
            assert (ended.code, ended.out) == (0, "finished 0 0\n"), ended.err
        for ended in run_several(FREELY):
            assert ended.code == 1
            assert "RankDivergence: b was not called alike by all ranks" in ended.err

    def test_guards_in_another_order(self, run_several: Callable[..., list[Ended]]) -> None:
        """They go by their names."""
        for ended in run_several(
            """
            def make(rank): return {name: guarded(name) for name in ("ba" if rank else "ab")}
            def work(rank, step): call(guards["b"], "free", step)
            """
        ):
            assert (ended.code, ended.out) == (0, "finished 0 0\n"), ended.err

    def test_other_guards(self, run_several: Callable[..., list[Ended]]) -> None:
        """Said on both ranks at once, where the numbers that they compared did not even match."""
        for ended in run_several(
            """
            def make(rank): return {name: guarded(name) for name in ("a" if rank else "ab")}
            def work(rank, step): pass
            """
        ):
            assert ended.code == 1
            assert (
                "ValueError: compare_ranks must be opened alike on all ranks, with the same "
                "modules:\n" in ended.err
            )
            assert "  rank 0       a, b, every 1\n" in ended.err
            assert "  rank 1       a, every 1\n" in ended.err

    def test_the_mode_of_the_module_that_differs(
        self, run_several: Callable[..., list[Ended]]
    ) -> None:
        """One that is observed beside one that is enforced: written down, and nobody is ended."""
        for ended in run_several(
            """
            def make(rank): return {"a": guarded("a"), "b": guarded("b", "observe")}
            def work(rank, step): call(guards["b"], "free", rank)
            """
        ):
            assert (ended.code, ended.out) == (0, "finished 0 1\n"), ended.err
            assert "b was not called alike by all ranks" in ended.err

    def test_who_goes_on_after_an_observed_difference(
        self, run_several: Callable[..., list[Ended]]
    ) -> None:
        """Nobody compares any more; one that has come to its end, with the store, is not lost."""
        first, second = run_several(
            """
            import time
            def make(rank): return {"a": guarded("a"), "b": guarded("b", "observe")}
            def work(rank, step):
                call(guards["b"], "free", rank)
                if step:
                    time.sleep(3 * (rank + 1))
            """
        )
        for ended in (first, second):
            assert (ended.code, ended.out) == (0, "finished 0 1\n"), ended.err
            assert "stopped" not in ended.err

    def test_many_modules_in_few_words(self, run_several: Callable[..., list[Ended]]) -> None:
        """Those that differ are named, and some more."""
        for ended in run_several(
            """
            def make(rank): return {f"m{n:02}": guarded(f"m{n:02}") for n in range(40)}
            def work(rank, step): call(guards["m31"], "free", rank)
            """
        ):
            assert ended.code == 1
            assert "\n  rank 0       1 m00, 1 m01, 1 m02, 1 m31, 36 of 36 others" in told(ended)
            assert "\n  rank 1       1 m00, 1 m01, 1 m02, 2 m31, 36 of 36 others" in told(ended)


def told(ended: Ended) -> str:
    """What stderr says, without torch's prefix of each line."""
    return re.sub(r"^\[rank\d\]: ", "", ended.err, flags=re.MULTILINE)


class TestBadUse:
    @pytest.mark.parametrize("guards", [None, [], {"critic": nn.Linear(1, 1)}])
    def test_what_are_no_guards(self, guards: object) -> None:
        """Named, with what it takes."""
        message = (
            "^compare_ranks takes a guard, or a mapping of names to guards as guard_modules "
            f"returns it, not {re.escape(repr(guards))}$"
        )
        with pytest.raises(TypeError, match=message), compare_ranks(guards):  # type: ignore[arg-type]
            pytest.fail("it was opened")

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
