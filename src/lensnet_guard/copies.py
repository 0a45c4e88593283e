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
    folder = log.folder if log is not None and get_spawning_popen() is not None else None
    return rebuild, (folder, type(guard), module, guard.policy, guard.mode, guard.name)


def rebuild(folder: Path | None, kind: type["Guard"], *contract: Any) -> Any:
    """Unpickle a guarded module."""
    guard = kind(*contract)
    if folder is not None:
        guard.start_log(folder)
    return guard.module
