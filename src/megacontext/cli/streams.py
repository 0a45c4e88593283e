"""The standard streams of a command: none of them stops it in the middle of a word."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from rich.console import Console


def open_streams() -> None:
    """Make the standard streams such that no text and no missing stream stops a command.

    What an encoding cannot write is written as an escape. A stream that is closed leads nowhere:
    else the next file that is opened would be where others write their messages to.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # not all that tests put there have it
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def silence(stream: TextIO) -> None:
    """Let what is left in a stream go nowhere: Python would complain of it at its end."""
    with suppress(OSError, ValueError):  # it is no file
        number, nowhere = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


class PipeConsole(Console):
    """A console that raises BrokenPipeError when nobody reads it; rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        """Let the error through; rich calls this while it handles it."""
        raise
