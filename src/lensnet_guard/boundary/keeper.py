"""What a proxy asks of its guard: calls, copies, and what pickle keeps."""

from collections.abc import Callable
from multiprocessing.context import get_spawning_popen
from typing import Any

from torch import nn

from lensnet_guard.boundary.admission import Admission
from lensnet_guard.logs.history import History


class GuardKeeper:
    """The `Keeper` of a guard's proxy. Copies and pickles get a guard of their own, alike.

    Args:
        guard: The guard.
        admission: It decides on the calls.
        rebuild: It makes the guarded module anew from what pickle has kept.
    """

    def __init__(self, guard: Any, admission: Admission, rebuild: Callable[..., Any]) -> None:
        self.guard = guard
        self.name = guard.name
        self.run = admission.run  # itself, for a method in between would cost every call a frame
        self.inside = admission.inside
        self.entered = admission.doors.entered
        self.methods = admission.doors.methods
        self._admission = admission
        self._rebuild = rebuild

    @property
    def replaced(self) -> bool:
        """Whether a call has run another forward than the class's."""
        return self._admission.execution.replaced

    def copy(self, module: nn.Module, *, shallow: bool) -> Any:
        """Guard a copy of the module, which logs where its original does."""
        guard, name = self.guard, f"{self.name} (copy)"
        history = History(name)
        if (log := self._admission.history.log) is not None:
            history.write_to(log)
        # A shallow copy runs the submodules of its original: who is inside one is inside the other.
        inside = self._admission.inside if shallow else None
        copied = type(guard)(module, guard.policy, guard.mode, name, history=history, inside=inside)
        return copied.module

    def reduce(self, module: nn.Module) -> tuple[Any, ...]:
        """Return what pickle keeps of the guarded module."""
        guard, log = self.guard, self._admission.history.log
        # A worker process logs beside its parent; a file on disk says nothing of logs.
        spawning = get_spawning_popen() is not None
        place = (log.folder, log.pid) if log is not None and spawning else None
        return self._rebuild, (place, type(guard), module, guard.policy, guard.mode, guard.name)
