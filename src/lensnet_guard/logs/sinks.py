"""Sinks: whoever wants to be told of calls and violations as they happen. Light to import.

A guard's log is a sink, and so is a test that counts calls. A sink listens to one guard
(`Guard.add_sink`) or to all guards of the process, those to come included (`add_to_all`).
"""

import os
import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lensnet_guard.calls.budget import MicroStep, Window
    from lensnet_guard.calls.errors import LensNetViolation
    from lensnet_guard.calls.record import CallRecord, Context


class Sink:
    """Is told what happens to a guarded module, in the thread where it happens.

    A class derived from this one says only what it cares for; the rest does nothing.
    """

    def begin(self, record: "CallRecord") -> None:
        """Take a call or a recompute that is about to run."""

    def end(self, record: "CallRecord") -> None:
        """Take one that has returned or raised."""

    def violation(self, error: "LensNetViolation") -> None:
        """Take a violation that is about to be raised (in observe mode, that would be)."""

    def hazard(self, record: "CallRecord", earlier: "CallRecord") -> None:
        """Take a call that is about to run, and will overwrite an output of an earlier one.

        Args:
            record: The call.
            earlier: The call whose output is still in use.
        """

    def overwritten(
        self, record: "CallRecord", earlier: "CallRecord", error: BaseException
    ) -> None:
        """Take what torch has raised, because a call wrote over an output of an earlier one.

        Args:
            record: The call.
            earlier: The call whose output it was.
            error: What torch has raised.
        """

    def settled(self, ledger: "MicroStep") -> None:
        """Take a training micro-step whose body has not raised, before it ends.

        When violations are raised, it has made the calls that were due. In the modes ``"observe"``
        and ``"off"`` some may be missing, as ``ledger.unmet()`` says.

        What this raises leaves the block of the micro-step, which is broken off by it.

        Args:
            ledger: The micro-step.
        """

    def micro_step(self, module: str, context: "Context | None", ledger: "MicroStep") -> None:
        """Take a micro-step that has ended, however it did.

        Args:
            module: The guard's name for the module.
            context: The context in which it ended.
            ledger: The micro-step.
        """

    def window(self, module: str, ledger: "Window") -> None:
        """Take another window that has ended, however it did.

        Args:
            module: The guard's name for the module.
            ledger: The window.
        """


class Source:
    """Tells sinks. `sinks` is replaced, never changed: it may be read without a lock.

    ``lock`` is for whoever derives from this. Re-entrant: a garbage collection inside the locked
    region may run code that calls again. A forked process gets a new one.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        with _registry:
            self.sinks: tuple[Sink, ...] = _sinks_of_all
            _sources.add(self)

    def add_sink(self, sink: Sink) -> None:
        """Tell a sink of everything from now on."""
        with _registry:
            self.sinks = (*self.sinks, sink)

    def remove_sink(self, sink: Sink) -> None:
        """Tell a sink no more."""
        with _registry:
            self.sinks = tuple(other for other in self.sinks if other is not sink)


_registry = threading.RLock()
_sources: "weakref.WeakSet[Source]" = weakref.WeakSet()
_sinks_of_all: tuple[Sink, ...] = ()


def add_to_all(sink: Sink) -> None:
    """Tell a sink of everything that any guard of the process sees from now on."""
    global _sinks_of_all
    with _registry:
        _sinks_of_all = (*_sinks_of_all, sink)
        for source in list(_sources):
            source.add_sink(sink)


def remove_from_all(sink: Sink) -> None:
    """Tell a sink no more."""
    global _sinks_of_all
    with _registry:
        _sinks_of_all = tuple(other for other in _sinks_of_all if other is not sink)
        for source in list(_sources):
            source.remove_sink(sink)


def _renew_locks() -> None:
    """Make new locks in a fork: it copies one as a thread held it that is not in the child."""
    global _registry
    _registry = threading.RLock()
    for source in list(_sources):
        source.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
