"""Peers: which of the other ranks' processes are known to have ended, or give no sign of life."""

import time
from collections.abc import Sequence
from typing import Any

from lensnet_guard.ranks.processes import Process, has_ended

BEAT_S = 1.0  # between signs of life
SILENT_S = 10.0  # without one, before it is said


class Peers:
    """What this rank knows of the others' processes.

    It asks the kernel for those on its own machine, and hears the next rank's signs of life through
    the store, wherever that one runs. Silence proves nothing: a process may be stopped for a while.

    Args:
        rank: The number of this rank.
        processes: Those of all ranks, in order.
    """

    def __init__(self, rank: int, processes: Sequence[Process]) -> None:
        self._rank, self._next = rank, (rank + 1) % len(processes)
        here = processes[rank].place
        self._near = {
            number: process
            for number, process in enumerate(processes)
            if number != rank and here and process.place == here
        }
        self._looked = self._heard = time.monotonic()
        self._beats: bytes | None = None
        self._silent = False

    def is_time(self) -> bool:
        """Whether it is time for the next sign of life."""
        now = time.monotonic()
        if now - self._looked < BEAT_S:
            return False
        self._looked = now
        return True

    def lost(self) -> int | None:
        """Return a rank whose process has ended, each once."""
        for number, process in self._near.items():
            if has_ended(process):
                del self._near[number]
                return number
        return None

    def exchange(self, store: Any) -> str | None:
        """Give a sign of life, and look for the next rank's.

        Returns:
            What is to be said of it, once; mostly None.
        """
        store.add(f"beat{self._rank}", 1)
        if self._beats is None:
            store.add(f"beat{self._next}", 0)  # it is there from now on
        beats, now = store.get(f"beat{self._next}"), time.monotonic()
        silence, was_silent = now - self._heard, self._silent
        if beats != self._beats:
            self._beats, self._heard, self._silent = beats, now, False
            return f"rank {self._next} is heard again" if was_silent else None
        if silence < SILENT_S or was_silent:
            return None
        self._silent = True
        return (
            f"rank {self._next} has been silent for {silence:.0f} s: its process or its machine is "
            "stopped, or cut off; nothing is ended because of that"
        )
