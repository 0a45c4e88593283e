"""Files that are written whole or not at all, locks, and errors that name the file."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from filelock import FileLock, Timeout

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DamagedFileError(ValueError):
    """A file does not hold what it should; the message names it, and says what to do."""


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` when the block ends.

    Whatever stops it, a kill included, leaves the old file or the new one. It is written to
    ``path`` and ``.tmp``, of which only a kill leaves anything.

    Args:
        path: Of the file.
        sync: Force it to the device, so that a power cut loses nothing either.

    Yields:
        The file, to be written to.

    Raises:
        OSError: It cannot be written; named, and what was there is kept.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):  # a full disk must not stay so because of what is of no use
            temporary.unlink()
        cause = _os_error(error)
        if cause is not None:
            raise cannot_write(path, cause) from error
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one.

    Args:
        path: Of the file.
        data: What it is to hold.

    Raises:
        OSError: It cannot be written; named, and what was there is kept.
    """
    with replacing(path) as file:
        file.write(data)


def hold_lock(path: Path, taken: str) -> FileLock:
    """Take a lock against other processes, and against others in this one.

    It is let go by its ``release``, when nobody refers to it any more, and when the process ends,
    however it does. The file stays: to take it away would let two in.

    Args:
        path: Of the lock file; made when there is none.
        taken: What to say when another has it.

    Returns:
        The lock.

    Raises:
        BlockingIOError: Another has it.
        OSError: The file cannot be made.
    """
    lock = FileLock(path, thread_local=False)  # any thread may let go of it
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise BlockingIOError(taken) from None
    return lock


def wait_for_lock(path: Path) -> FileLock:
    """Make a lock that waits as a block with it begins until no process has it.

    It is let go as `hold_lock` says, and its file stays.

    Args:
        path: Of the lock file; made when there is none.

    Returns:
        The lock, which nobody holds yet.
    """
    return FileLock(path)


def cannot_write(path: Path, error: OSError, state: str = "what was there is kept") -> OSError:
    """Make an error of the same number that names the file and its state, and says what to do.

    Args:
        path: Of the file.
        error: What happened.
        state: What is there now.

    Returns:
        The error, to be raised.
    """
    text = f"cannot write {path}: {error.strerror}; {state}"
    if error.errno in _FULL:
        text += ", so make room and try again"
    return OSError(error.errno, text)


@contextmanager
def reading(what: Path | str, advice: str) -> Iterator[None]:
    """Make one error of whatever is wrong with a file, around what reads it and takes it apart.

    Args:
        what: The file, or a place in it.
        advice: What to do about it.

    Raises:
        DamagedFileError: For any exception of the block but those which say that the file cannot be
            opened, or that there is no memory.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, DamagedFileError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        found = next(iter(str(error).splitlines()), type(error).__name__).rstrip(":. ")
        raise DamagedFileError(f"{what} is damaged ({found}); {advice}") from error


def _os_error(error: BaseException) -> OSError | None:
    """Return the failed write behind an exception: torch.save may end in an error of its own."""
    behind: BaseException | None = error
    while isinstance(behind, RuntimeError):
        behind = behind.__cause__ or behind.__context__
    return behind if isinstance(behind, OSError) else None
