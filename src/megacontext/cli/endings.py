"""How a command ends: with an exit code of `EXIT_CODES`, and a plain message for what failed."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

import click

from lensnet_guard import LensNetViolation, RankStopped
from megacontext.cli.streams import silence
from megacontext.files import DamagedFileError
from megacontext.training.train_result import TrainingStopped

EXIT_CODES = (
    "Exit codes: 0 done, 1 LensNet was called where it may not be, or not as often as it must, "
    "2 wrong usage, 3 failed otherwise, 130 interrupted, 141 nobody reads the output any more, "
    "143 terminated."
)
_VIOLATION, _FAILED, _INTERRUPTED, _UNREAD, _TERMINATED = 1, 3, 130, 141, 143
_FAILURES = (
    OSError,
    ValueError,
    TypeError,
    ArithmeticError,
    ImportError,
    MemoryError,
    RuntimeError,
)
_OF_STREAMS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@contextmanager
def usage_errors() -> Iterator[None]:
    """Make wrong usage of what does not fit, around what checks a command line.

    Raises:
        click.UsageError: Something does not fit; exit code 2.
    """
    try:
        yield
    except DamagedFileError:
        raise
    except (ValueError, TypeError, FileNotFoundError, FileExistsError) as error:
        raise click.UsageError(str(error)) from error


@contextmanager
def plain_endings(advice: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Tell whatever fails in a few words, around a command, once it is known to be right.

    Args:
        advice: Says how to go on, asked when the command has not come to its end.

    Raises:
        SystemExit: With the code for what happened.
    """
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except RankStopped:  # the guard has said which rank did, and why
        sys.exit(_FAILED)
    except LensNetViolation as violation:
        _end(_VIOLATION, f"{type(violation).__name__}: {violation}", advice())
    except KeyboardInterrupt:
        _end(_INTERRUPTED, "\nInterrupted.", advice())
    except TrainingStopped as stopped:
        _end(_TERMINATED, f"Terminated: {stopped}.", advice())
    except BrokenPipeError:
        silence(sys.stdout)
        _end(_UNREAD, advice())
    except _FAILURES as error:
        _end(_FAILED, f"Error: {_in_words(error)}", advice())
    except Exception:
        _end(_FAILED, traceback.format_exc(), "This is a mistake in megacontext. Please report it.")


class Termination:
    """Lets SIGTERM end a training at the end of a step; a second one ends the process at once.

    So does the first one until it is asked for the first time, for nothing would be lost. Use it as
    a context manager.
    """

    def __init__(self) -> None:
        self._asked = self._heard = False

    def __call__(self) -> bool:
        """Tell whether the training is to end."""
        self._asked = True
        return self._heard

    def __enter__(self) -> "Termination":
        self._before: Any = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        if not self._asked:
            sys.exit(_TERMINATED)
        self._heard = True
        # The system's own way, which does not wait for Python to come back from wherever it is.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with suppress(OSError):  # no print: it may have interrupted one
            os.write(2, b"SIGTERM: the run ends with this step; another one ends it at once.\n")


def _in_words(error: Exception) -> str:
    text = str(error) or type(error).__name__
    no_memory = isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY)
    if no_memory or isinstance(error, MemoryError):
        text = next(iter(text.splitlines()), "")
        return f"there is not enough memory, and smaller sizes need less ({text})"
    if isinstance(error, OSError) and error.filename is None and error.errno in _OF_STREAMS:
        named = error.strerror != os.strerror(error.errno)  # as that of every file is
        if not named:
            silence(sys.stdout)
            return f"cannot write to standard output: {error.strerror}"
    return text


def _end(code: int, *lines: str) -> NoReturn:
    try:
        for line in filter(None, lines):
            click.echo(line, err=True)
    except OSError:  # there is nobody to tell
        silence(sys.stderr)
    sys.exit(code)
