"""Words and paths that more than one module writes. Light to import."""

import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import orjson


def count(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 call``, ``2 calls``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def budget_text(calls: int | tuple[int, int | None]) -> str:
    """Return a budget in words, such as ``"1"``, ``"0 to 4"`` or ``"2 or more"``."""
    if isinstance(calls, int):
        return str(calls)
    least, most = calls
    return f"{least} or more" if most is None else f"{least} to {most}"


def explained_by(mistake: str) -> str:
    """Return the line that a message ends with: which entry of docs/mistakes.md explains it."""
    return f"  explained by lensnet-guard explain {mistake}"


def moment(seconds: float | None) -> str:
    """Return seconds since the epoch as a date in UTC, for logs of machines in many places."""
    try:
        at = datetime.fromtimestamp(seconds, timezone.utc) if seconds else None
    except (OverflowError, ValueError, OSError):  # a damaged line's idea of a time
        at = None
    return f"{at:%Y-%m-%d %H:%M:%S} UTC" if at else "at an unknown time"


def short_path(path: str) -> str:
    """Return a path relative to the working directory, when it lies below it, for a terminal."""
    try:
        return path.removeprefix(os.getcwd() + os.sep)
    except FileNotFoundError:  # the working directory is gone
        return path


def absolute(folder: str | os.PathLike[str]) -> Path:
    """Return where a log's folder is now, for a process that may change its working directory.

    Raises:
        TypeError: ``folder`` is not a path.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"log must be a folder's path, not {folder!r}")
    try:
        return Path(folder).absolute()
    except FileNotFoundError:  # there is no working directory: no file will be made either
        return Path(folder)


def add_note(error: BaseException, note: str) -> None:
    """Add a note to an exception, once.

    Python 3.10 has no notes and prints none. They are kept by the same name all the same, where
    pytest and other tools look for them.
    """
    notes = getattr(error, "__notes__", [])
    if note not in notes:
        error.__notes__ = [*notes, note]  # type: ignore[attr-defined, unused-ignore]


def json_line(value: Any) -> bytes:
    """Return a value as JSON in one line, whatever a damaged log has put into its strings."""
    try:
        return orjson.dumps(value, default=vars)
    except TypeError:  # a lone surrogate, or a number above 64 bits
        return json.dumps(value, default=vars).encode()
