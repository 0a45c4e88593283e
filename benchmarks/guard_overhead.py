"""What a guard adds to every call, beside the ways people count calls today.

Example: python benchmarks/guard_overhead.py
         python benchmarks/guard_overhead.py --json > overhead.json

All rows are measured in one process, in turn, round after round; each figure is the median over
the rounds of the mean time per call, less that of the bare module. The calls are made from under
70 frames of Python, as a trainer's are. The last line relates the whole of a guarded micro-step
(blocks, call, record, log) to a training step of ``make demo``.
"""

import argparse
import itertools
import json
import platform
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import MagicMock, patch

import torch
from rich.progress import Progress
from torch import nn

from lensnet_guard import CallPolicy, CallRecord, Guard, guard_module
from megacontext import TrainConfig, train
from megacontext.training.train_result import StepReport

CALLS = 1_000
DEPTH = 70
Runner = Callable[[], float]


class Bare(nn.Module):
    """Does nothing, so that what is measured is the call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


X = torch.ones(4, 3)


def loop(call: Callable[[torch.Tensor], object]) -> Runner:
    """A round of calls; gives back microseconds per call."""

    def run() -> float:
        start = time.perf_counter()
        for _ in itertools.repeat(None, CALLS):
            call(X)
        return (time.perf_counter() - start) / CALLS * 1e6

    return lambda: at_depth(DEPTH, run)


def at_depth(frames: int, run: Runner) -> float:
    return run() if frames == 0 else at_depth(frames - 1, run)


def guarded(frames: int, log: Path | None = None) -> Runner:
    """Calls in inference context, with that many frames of stack in their records."""
    guard = guard_module(Bare(), log=log)
    calls = loop(guard.module)

    def run() -> float:
        with patch("lensnet_guard.logs.history.CALL_FRAMES", frames), guard.context("inference"):
            return calls()

    return run


def enforce_only() -> Runner:
    """The contract without its records, which no mode leaves out: what deciding alone costs."""
    guard = guard_module(Bare())
    with guard.context("inference"):
        guard.module(X)
    (record,) = guard.calls
    calls = loop(guard.module)

    def run() -> float:
        with ExitStack() as stack:
            stack.enter_context(guard.context("inference"))
            stack.enter_context(patch.object(guard._history, "add_call", Same(record)))
            stack.enter_context(patch("lensnet_guard.boundary.admission.describe_inputs", Same(())))
            return calls()

    return run


class Same:
    """A function that always returns the same."""

    def __init__(self, value: CallRecord | tuple[()]) -> None:
        self.value = value

    def __call__(self, *_: object) -> CallRecord | tuple[()]:
        return self.value


def hooked(hook: Callable[..., None]) -> Runner:
    module = Bare()
    module.register_forward_pre_hook(hook)
    return loop(module)


def micro_steps(log: Path) -> Runner:
    """Whole guarded micro-steps of training: blocks, call, record, log."""
    guard: Guard = guard_module(Bare(), policy=CallPolicy({"scorer": 1}), log=log)

    def step(x: torch.Tensor) -> None:
        with guard.micro_step(7), guard.sanctioned("scorer"):
            guard.module(x)

    steps = loop(step)

    def run() -> float:
        with guard.context("training"):
            return steps()

    return run


def mocked() -> Runner:
    mock = MagicMock(wraps=Bare())
    calls = loop(mock)

    def run() -> float:
        mock.reset_mock()  # or else it keeps every argument of every round alive
        return calls()

    return run


@contextmanager
def all_rows() -> Iterator[dict[str, Runner]]:
    bare = Bare()
    with tempfile.TemporaryDirectory() as folder:
        yield {
            "the bare module": loop(bare),
            'guard, mode="off"': loop(guard_module(bare, mode="off").module),
            "guard, enforce": enforce_only(),
            "guard, enforce + record, 8 frames": guarded(8),
            "guard, enforce + record, 16 frames (the default)": guarded(16),
            "guard, enforce + record, 64 frames": guarded(64),
            "guard, enforce + record, 16 frames + write-through log": guarded(
                16, Path(folder) / "calls"
            ),
            "a whole guarded micro-step with log": micro_steps(Path(folder) / "steps"),
            "a forward_pre_hook that does nothing": hooked(lambda *_: None),
            "unittest.mock.MagicMock(wraps=module)": mocked(),
            "traceback.extract_stack in a forward_pre_hook": hooked(
                lambda *_: traceback.extract_stack() and None
            ),
        }


def demo_step_ms(steps: int = 12) -> float:
    """Median wall time of an optimizer step of the demo, as the trainer runs it."""
    ends: list[float] = []

    def note(_: StepReport) -> None:
        ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainConfig(steps=steps, log_interval=1, warmup_steps=1)
        train(Path(folder) / "run", settings=settings, report=note)
    return statistics.median(b - a for a, b in itertools.pairwise(ends[1:])) * 1e3


def machine() -> str:
    """Processor, cores, Python and torch, for the table's caption."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return (
        f"{names[0]}, {len(names)} cores, {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, one thread"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25, help="of every row (default 25)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {}
    with all_rows() as rows, Progress(transient=True) as progress:
        for _ in progress.track(range(arguments.rounds), description="rounds"):
            for name, run in rows.items():
                times.setdefault(name, []).append(run())
    bare = times.pop("the bare module")
    added = {
        name: statistics.median(a - b for a, b in zip(row, bare, strict=True))
        for name, row in times.items()
    }
    step_ms = demo_step_ms()
    share = added["a whole guarded micro-step with log"] / (step_ms * 1e3)
    if arguments.json:
        figures = {"machine": machine(), "bare_us": statistics.median(bare), "added_us": added}
        print(json.dumps({**figures, "demo_step_ms": step_ms, "share_of_demo_step": share}))
        return
    print(f"{machine()}; a call of the bare module takes {statistics.median(bare):.2f} µs\n")
    print("| | added per call (µs) |\n|---|---:|")
    for name, microseconds in added.items():
        print(f"| {name} | {microseconds:.2f} |")
    print(f"\nA training step of the demo takes {step_ms:.0f} ms; the guard's part is {share:.4%}.")


if __name__ == "__main__":
    main()
