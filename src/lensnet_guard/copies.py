"""Copies and pickles of guarded modules: each has a guard of its own, by the same contract."""

from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from lensnet_guard.guard import Guard


def guarded_copy(guard: "Guard", module: nn.Module, *, shallow: bool) -> Any:
    """Guard a copy of the module: same contract, but its own identity, counts and context.

    A shallow copy runs the submodules of its original: who is inside one is inside the other.
    """
    inside = guard._inside if shallow else None
    copied = type(guard)(module, guard.policy, guard.mode, f"{guard.name} (copy)", inside)
    if guard._history.log is not None:
        copied._history.write_to(guard._history.log)
    return copied.module


def reduced(guard: "Guard", module: nn.Module) -> tuple[Any, ...]:
    """What pickle keeps of a guarded module: the raw one, and its contract."""
    log = guard._history.log
    # A worker process logs beside its parent; a file on disk says nothing of logs.
    spawning = get_spawning_popen() is not None
    place = (log.folder, log.pid) if log is not None and spawning else None
    return rebuild, (place, type(guard), module, guard.policy, guard.mode, guard.name)


def rebuild(place: tuple[Path, int] | None, kind: type["Guard"], *contract: Any) -> Any:
    """Unpickle a guarded module.

    Args:
        place: the log's folder, and the process that logs to it.
    """
    guard = kind(*contract)
    if place is not None:
        folder, parent = place
        guard._history.start_log(folder, guard._header(), parent)
    return guard.module
