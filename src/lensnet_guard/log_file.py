"""One process's file in a log folder: every line is with the kernel before ``write`` returns.

Nothing here ever raises for the file's sake: one warning, then lost lines are counted.
"""

import itertools
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: two processes of one rank must then use two folders
    fcntl = None  # type: ignore[assignment]

SEGMENT_BYTES = 64 * 2**20  # then the log goes on in a new file
KEPT_SEGMENTS = 8  # full ones beside the current file: 576 MiB in all


class LogFile:
    """``lensnet.rank<R>.jsonl`` in a folder, or the next free name.

    When another log holds that file (of a live process, or of another guard in this one), the name
    is ``lensnet.rank<R>.pid<PID>.jsonl``, then ``lensnet.rank<R>.pid<PID>.2.jsonl`` and so on.

    Attributes:
        path: of the current file; None when there is none.
        lost_lines: lines that could not be written.
        pid: of the process that has opened it; a fork must leave it alone.
    """

    def __init__(self, folder: Path, rank: str) -> None:
        self.path: Path | None = None
        self.lost_lines = 0
        self.pid = os.getpid()
        self._folder = folder
        self._fd: int | None = None
        self._size = 0
        self._torn = False
        self._warned = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in _file_names(re.sub(r"[^\w-]", "_", rank), self.pid):
                if self._take(folder / name):
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
        except OSError as error:
            self.lost_lines += 1
            self._warn(error)

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
        self.path, self._fd = path, fd
        self._size = os.fstat(fd).st_size
        self._torn = self._size > 0 and os.pread(fd, 1, self._size - 1) != b"\n"
        return True

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warn(
                f"lensnet_guard: cannot write the log in {self._folder}: {error}. Enforcement and "
                "the ring buffer go on; lost lines are counted."
            )


def warn(message: str) -> None:
    """Warn, but never raise: where warnings are errors, say it on stderr."""
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=4)
    except RuntimeWarning:
        print(message, file=sys.stderr)


def segments_of(path: Path) -> list[Path]:
    """The full segments of a log, oldest first."""
    found = path.parent.glob(f"{path.stem}.seg*.jsonl")
    return sorted((segment for segment in found if segment_number(segment)), key=segment_number)


def segment_number(path: Path) -> int:
    """The number of a full segment, 0 for any other file."""
    digits = path.name.removesuffix(".jsonl").rpartition(".seg")[2]
    return int(digits) if digits.isdecimal() else 0


def _file_names(rank: str, pid: int) -> Iterator[str]:
    yield f"lensnet.rank{rank}.jsonl"
    yield f"lensnet.rank{rank}.pid{pid}.jsonl"
    for number in itertools.count(2):
        yield f"lensnet.rank{rank}.pid{pid}.{number}.jsonl"
