"""Processes: which of the ranks' processes on this machine have ended, as far as Linux tells.

A process that is killed says nothing, and a collective with it may wait for its time-out. Where
the kernel cannot be asked (another machine, another system), nothing is known.
"""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")


class Process(NamedTuple):
    """What tells a process from every other, as whole numbers that ranks can exchange.

    Attributes:
        place: Stands for the machine and its numbering of processes; 0 where that is unknown.
        pid: The process's number there.
        started: When it started, in the kernel's ticks; the number may be given out again.
    """

    place: int
    pid: int
    started: int


def this_process() -> Process:
    """Return what the running process is."""
    pid = os.getpid()
    try:
        names = _PROC / "self/ns/pid", _PROC / "sys/kernel/random/boot_id"
        text = f"{names[0].readlink()} {names[1].read_text()}"
        digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
        return Process(int.from_bytes(digest, "big"), pid, int(_stat(pid)[19]))
    except (OSError, IndexError, ValueError):
        return Process(0, pid, 0)


def has_ended(process: Process) -> bool:
    """Whether a process of this machine has ended, or is a remnant that nobody has waited for."""
    try:
        state, *rest = _stat(process.pid)
        return state in "ZX" or int(rest[18]) != process.started
    except FileNotFoundError:
        return True
    except (OSError, IndexError, ValueError):
        return False


def _stat(pid: int) -> list[str]:
    """Return the fields of a process that come after its name, which may hold anything."""
    return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
