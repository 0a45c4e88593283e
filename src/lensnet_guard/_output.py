"""What a command writes: to standard output, whatever that is, and to files that are its own."""

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import click

_HEAD_BYTES = 1_024  # in which a file says what has made it


def show(text: str | bytes) -> None:
    """Write to standard output; exits with 2 where that cannot be done, as on a full device.

    Nothing happens where it is closed, or its reader has seen enough.

    Args:
        text: Characters that the output's encoding lacks come out as their escapes; bytes as they
            are.
    """
    out = sys.stdout
    if out is None:  # closed before the program started
        return
    try:
        if isinstance(text, bytes) and hasattr(out, "buffer"):
            out.buffer.write(text)
        elif isinstance(text, bytes):  # a stream of text alone, as in notebooks
            out.write(text.decode())
        else:
            encoding = out.encoding or "utf-8"
            out.write(text.encode(encoding, "backslashreplace").decode(encoding))
        out.flush()
    except BrokenPipeError:
        _drop(out.fileno())
    except OSError as error:
        _drop(out.fileno())
        fail(OSError(f"cannot write to standard output: {error.strerror}"))


def _drop(descriptor: int) -> None:
    """What is still in the buffer would fail once more as the interpreter exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def fail(error: OSError) -> NoReturn:
    """Exit with 2, and one line that says why, if anybody can read it."""
    with contextlib.suppress(OSError):
        click.echo(f"lensnet-guard: {error}", err=True)
    sys.exit(2)


def require_own(path: Path, inputs: Iterable[Path], mark: bytes, *, force: bool) -> None:
    """Make sure that a file may be written over.

    Args:
        path: Where a command is to write.
        inputs: What it reads, if it is there.
        mark: What stands at the beginning of the files that the command makes.
        force: Write over any file but the inputs.

    Raises:
        FileExistsError: It is an input; or it is there, holds something, and has no such mark.
        OSError: It cannot be read.
    """
    if not path.is_file():
        return
    if any(file.exists() and path.samefile(file) for file in inputs):
        raise FileExistsError(
            f"{path} is read for this, so it is not written over; choose another file with -o"
        )
    if force or path.stat().st_size == 0:
        return
    with path.open("rb") as file:
        if mark not in file.read(_HEAD_BYTES):
            raise FileExistsError(
                f"{path} holds something else, so it is not written over; choose another file with "
                "-o, or replace it with --force"
            )
