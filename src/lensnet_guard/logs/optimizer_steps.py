"""Numbers the steps of torch's optimizers, for as long as a log that observes wants to know.

Torch tells of every step of every optimizer of its own, whoever makes it. Nothing is told of what
DeepSpeed and its like step themselves, nor of a step that runs inside a compiled function.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

_lock = threading.Lock()
_watchers = 0
_hook: RemovableHandle | None = None  # while somebody watches
_taken = 0
# The optimizers that have stepped since the number went up: where a training has several, and each
# of them steps once, that is one step.
_round: list["weakref.ref[Any]"] = []


def taken() -> int:
    """Return how many steps have been taken while somebody watched."""
    return _taken


def watch(watcher: object) -> Callable[[], object]:
    """Count steps from now on; the hook is there once, whoever watches.

    Args:
        watcher: When it is gone, it watches no more.

    Returns:
        What ends it before that.
    """
    global _watchers, _hook
    with _lock:
        _watchers += 1
        if _hook is None:
            _hook = register_optimizer_step_post_hook(_count)
        _round.clear()  # who watches from now on has seen no step
    return weakref.finalize(watcher, _leave)


def _leave() -> None:
    global _watchers, _hook
    with _lock:
        _watchers -= 1
        if not _watchers and _hook is not None:
            _hook.remove()
            _hook = None


def _count(optimizer: Any, *_: object) -> None:
    global _taken
    if torch.compiler.is_compiling():  # a count would break the graph
        return
    seen = [known() for known in tuple(_round)]
    if not seen or any(known is None or known is optimizer for known in seen):
        _taken += 1
        _round.clear()
    _round.append(weakref.ref(optimizer))
