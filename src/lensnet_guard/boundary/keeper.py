"""What a proxy asks of its guard: calls, copies, and what pickle keeps."""

from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any

from torch import nn

from lensnet_guard import _schema
from lensnet_guard.boundary.admission import Admission
from lensnet_guard.calls.policy import CallPolicy, Mode
from lensnet_guard.logs.history import History


class GuardKeeper:
    """The `Keeper` of a guard's proxy.

    Args:
        guard: The guard.
        admission: It decides on the calls.
        guard_copies: Whether copies and pickles get a guard of their own, alike; otherwise they are
            raw. Not asked for shallow copies, and where a process is spawned.
    """

    def __init__(self, guard: Any, admission: Admission, guard_copies: bool) -> None:
        self.guard = guard
        self.name = guard.name
        self.run = admission.run  # itself, for a method in between would cost every call a frame
        self.inside = admission.inside
        self.entered = admission.doors.entered
        self.methods = admission.doors.methods
        self._admission = admission
        self._guard_copies = guard_copies

    @property
    def replaced(self) -> bool:
        """Whether a call has run another forward than the class's."""
        return self._admission.execution.replaced

    def copy(self, module: nn.Module, *, shallow: bool) -> Any:
        """Guard a copy of the module, which logs where its original does; or leave it raw."""
        guard, name = self.guard, f"{self.name} (copy)"
        history = History(name)
        if (log := self._admission.history.log) is not None:
            history.write_to(log)
        # A shallow copy runs the submodules of its original: who is inside one is inside the other.
        inside = self._admission.inside if shallow else None
        copied = type(guard)(
            *(module, guard.policy, guard.mode, name),
            history=history,
            inside=inside,
            guard_copies=self._guard_copies,
        )
        if not self._guard_copies and not shallow:
            copied.uninstall()
            return module
        return copied.module

    def reduce(self, module: nn.Module) -> tuple[Any, ...]:
        """Return what pickle keeps of the guarded module."""
        guard, log = self.guard, self._admission.history.log
        # A worker process logs beside its parent; a file on disk says nothing of logs.
        spawning = get_spawning_popen() is not None
        if not self._guard_copies and not spawning:
            return _itself, (module,)
        place = (log.folder, log.pid) if log is not None and spawning else None
        contract = (guard.policy, guard.mode, guard.name)
        return rebuild, (place, type(guard), module, *contract, self._guard_copies)


def _itself(module: nn.Module) -> nn.Module:
    """Unpickle a module that was guarded, as a raw one: its parts say what they are."""
    return module


def rebuild(
    place: tuple[Path, int] | None,
    kind: type[Any],
    module: nn.Module,
    policy: CallPolicy,
    mode: Mode,
    name: str,
    guard_copies: bool = True,
) -> Any:
    """Unpickle a guarded module.

    Args:
        place: The log's folder, and the process that logs to it; None without a log.
        kind: The class of its guard.
        module: The raw module.
        policy: Its contract.
        mode: Of its guard.
        name: Of its guard.
        guard_copies: Of its guard; pickles of before do not say.

    Returns:
        The module, guarded.
    """
    history = History(name)
    guard = kind(module, policy, mode, name, history=history, guard_copies=guard_copies)
    if place is not None:
        folder, parent = place
        history.start_log(folder, header_of(mode, policy), parent)
    return guard.module


def header_of(mode: Mode, policy: CallPolicy) -> dict[str, Any]:
    """Return what the first line of a log says of the contract."""
    return {_schema.MODE: mode, _schema.POLICY: policy.to_json()}
