"""One process's file in a log folder: a line that ``write`` has returned from survives SIGKILL.

Nothing here ever raises for the file's sake: one warning, then lost lines are counted.
"""

import itertools
import os
import re
import stat
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from lensnet_guard._text import count

try:
    import fcntl
except ImportError:  # Windows: two processes of one rank must then use two folders
    fcntl = None  # type: ignore[assignment]

SEGMENT_BYTES = 64 * 2**20  # then the log goes on in a new file
KEPT_SEGMENTS = 8  # full ones beside the current file: 576 MiB in all
LOOK_S = 1.0  # between looks whether the file is still there, which cost as much as half a line


class LogFile:
    """``lensnet.rank<R>.jsonl`` in a folder, or the next free name.

    When another log holds that file (of a live process, or of another guard in this one), the name
    is ``lensnet.rank<R>.pid<PID>.jsonl``, then ``lensnet.rank<R>.pid<PID>.2.jsonl`` and so on.

    Args:
        pid: Of the process that writes it; a fork must leave it alone.

    Attributes:
        path: Of the current file; None when there is none.
        lost_lines: Lines that could not be written, or went with a file that somebody removed.
    """

    def __init__(self, folder: Path, pid: int) -> None:
        self.path: Path | None = None
        self.lost_lines = 0
        self.pid = pid
        self._folder = folder
        self._fd: int | None = None
        self._size = 0
        self._lines = 0
        self._look_at = 0.0
        self._torn = False
        self._warned = False

    def open(self, rank: str) -> None:
        """Take the first free name; the folder is made when missing."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for name in _file_names(re.sub(r"[^\w-]", "_", rank), self.pid):
                if self._take(self._folder / name):
                    break
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            self._warn(error)

    @property
    def full(self) -> bool:
        """Whether it is time for `next_segment`."""
        return self._size >= SEGMENT_BYTES

    def write(self, line: bytes) -> None:
        """Append a line that ends in a newline."""
        if self._fd is None:
            self.lost_lines += 1
            return
        try:
            if self._torn:  # finish the half line that an earlier failure left behind
                line = b"\n" + line
            written = os.write(self._fd, line)
            self._size += written
            self._torn = written != len(line)
            if self._torn:
                raise OSError("the line was written in part only")
            self._lines += 1
        except OSError as error:
            self.lost_lines += 1
            self._warn(error)

    @property
    def is_open(self) -> bool:
        """Whether lines can be written."""
        return self._fd is not None

    @property
    def due(self) -> bool:
        """Whether it is time to `look`."""
        return self.full or time.monotonic() >= self._look_at

    def look(self) -> str | None:
        """Return what became of the file: "removed", "moved" or "emptied"; None if nothing."""
        self._look_at = time.monotonic() + LOOK_S
        if self.path is None or self._fd is None:
            return None
        try:
            ours = os.fstat(self._fd)
            if stat.S_ISREG(ours.st_mode) and ours.st_size < self._size:
                return "emptied"
            if os.path.samestat(ours, os.stat(self.path)):
                return None
        except FileNotFoundError:
            pass
        except OSError:  # that nobody may look says nothing of the file
            return None
        return "moved" if ours.st_nlink else "removed"

    def renew(self, fate: str) -> int | None:
        """Go on at the path after what `look` has found; tell of it, and count the lines lost.

        What was moved with its folder is written on where it is now.

        Returns:
            The number of the full segment before the new file, 0 without one; None when there is
            no new file.
        """
        path, fd = self.path, self._fd
        assert path is not None
        assert fd is not None
        told = f"{path} was {fate} while the log was written"
        if fate != "moved":
            self.lost_lines += self._lines
            told += f", and {count(self._lines, 'line')} with it"
        try:
            if fate == "emptied":
                self._size, self._lines, self._torn = 0, 0, False
            elif self._take(path):
                os.close(fd)
            else:
                raise OSError(f"another process has taken {path}")
        except OSError as error:
            self.path = None
            if fate == "moved":
                self._tell(f"{told}, which goes on where the file is now")
            else:
                self.close()
                self._warn(OSError(f"{told}; {error}"))
            return None
        self._tell(f"{told}, which goes on in a new file there")
        done = segments_of(path)
        return segment_number(done[-1]) if done else 0

    def next_segment(self) -> int | None:
        """Set the full file aside, drop the oldest, go on in a new one; gives back its number."""
        if self.path is None or self._fd is None:
            return None
        self._size = 0  # whatever happens, not again before as many bytes have been written
        try:
            done = segments_of(self.path)
            number = segment_number(done[-1]) + 1 if done else 1
            os.rename(self.path, self.path.with_suffix(f".seg{number:05}.jsonl"))
            for path in segments_of(self.path)[:-KEPT_SEGMENTS]:
                path.unlink()
            full, self._fd = self._fd, None
            try:
                if not self._take(self.path):
                    raise OSError(f"another process has taken {self.path}")
            finally:  # a reader sees all the while that the log is being written
                os.close(full)
        except OSError as error:
            self._warn(error)
            return None
        return number

    def close(self) -> None:
        """Close the file; what is written afterwards is lost."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _take(self, path: Path) -> bool:
        """Open for appending under an advisory lock; False when another live process holds it."""
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        for last in (False, False, True) if fcntl is not None else ():
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if last:
                    os.close(fd)
                    return False
                time.sleep(0.001)  # a reader that looks whether the log is written holds it shortly
            except OSError:  # a file system without locks: go on without one
                break
        self.path, self._fd, self._lines = path, fd, 0
        self._look_at = time.monotonic() + LOOK_S
        self._size = os.fstat(fd).st_size
        self._torn = self._size > 0 and os.pread(fd, 1, self._size - 1) != b"\n"
        return True

    def _warn(self, error: Exception) -> None:
        self._tell(f"cannot write the log in {self._folder}: {error}")

    def _tell(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            warn(
                f"lensnet_guard: {what}. Enforcement and the ring buffer go on; lost lines are "
                "counted."
            )


def warn(message: str) -> None:
    """Warn, but never raise: where warnings are errors, say it on stderr."""
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    except RuntimeWarning:
        print(message, file=sys.stderr)


def segments_of(path: Path) -> list[Path]:
    """Return the full segments of a log, oldest first."""
    found = path.parent.glob(f"{path.stem}.seg*.jsonl")
    return sorted((segment for segment in found if segment_number(segment)), key=segment_number)


def segment_number(path: Path) -> int:
    """Return the number of a full segment, 0 for any other file."""
    digits = path.name.removesuffix(".jsonl").rpartition(".seg")[2]
    return int(digits) if digits.isdecimal() else 0


def _file_names(rank: str, pid: int) -> Iterator[str]:
    yield f"lensnet.rank{rank}.jsonl"
    yield f"lensnet.rank{rank}.pid{pid}.jsonl"
    for number in itertools.count(2):
        yield f"lensnet.rank{rank}.pid{pid}.{number}.jsonl"
