"""A trace of a few training steps, taken by torch's profiler, for https://ui.perfetto.dev."""

import gzip
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerAction, ProfilerActivity, profile

from megacontext.files import write_atomically

UNPROFILED_STEPS = 5  # before the first in the trace: they compile, and fill caches
PROFILED_STEPS = 3


@contextmanager
def step_profile(path: Path, steps: int, *, cuda: bool) -> Iterator[Callable[[], object]]:
    """Let `UNPROFILED_STEPS` steps pass, profile `PROFILED_STEPS`, and write their trace.

    A body that raises while it is being profiled leaves a trace of what there is.

    Args:
        path: Of the trace, gzipped JSON in Chrome's format; a kill at any moment leaves the old
            file or the new one.
        steps: How many the body is going to make. Where they are few, fewer pass before the trace,
            and the fewest are all in it; of none there is no trace.
        cuda: Whether to profile what runs on CUDA devices too.

    Yields:
        What to call after each step.

    Raises:
        OSError: The trace cannot be written.
    """
    if not steps:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]

    def write(taken: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "profile.json"
            taken.export_chrome_trace(str(plain))
            write_atomically(path, gzip.compress(plain.read_bytes(), compresslevel=6))

    with profile(
        activities=activities,
        schedule=_schedule(steps),
        on_trace_ready=write,
        # There is one cycle, of which nothing is lost: without this torch 2.10 to 2.12 warn that
        # something is, and where warnings are errors they crash as the profiler is left.
        acc_events=True,
    ) as profiler:
        yield profiler.step


def _schedule(steps: int) -> Callable[[int], ProfilerAction]:
    """Say what the profiler does in each step; torch's own schedules warn without a warm-up."""
    last = min(UNPROFILED_STEPS + PROFILED_STEPS, steps) - 1
    first = last - PROFILED_STEPS + 1  # below 0 where all steps are too few

    def action(step: int) -> ProfilerAction:
        if step == last:
            return ProfilerAction.RECORD_AND_SAVE
        if first <= step < last:
            return ProfilerAction.RECORD
        # The profiler's own start takes time, which shall not lie in the trace.
        return ProfilerAction.WARMUP if step == first - 1 else ProfilerAction.NONE

    return action
