"""Ranges in the trace of a torch profiler: one around each run of a guarded module."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import record_function

from lensnet_guard._torch_internals import profiling
from lensnet_guard.calls.record import CallRecord


def in_range(record: CallRecord, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``run``, inside a range of its own while a profiler is active; else as it is."""
    # A range costs more than the rest of the guard, also when nobody looks, and torch.jit.trace
    # would make its name, with the number of this one call, a part of the graph.
    if not profiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return run

    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(range_name(record)):
            return run(*args, **kwargs)

    return ranged


def range_name(record: CallRecord) -> str:
    """Return the name of a run's range, such as ``"LensNet call 17 (preference_scorer)"``.

    The number is the record's ``seq``. In brackets stands why the run is a violation (where it runs
    all the same, in observe mode), else its scope, else its context.
    """
    if record.recompute_of is not None:  # else torch does not show which call it repeats
        return f"{record.module} recompute of call {record.recompute_of}"
    where = record.reason or record.scope or record.context
    return f"{record.module} {record.kind} {record.seq} ({where})"
