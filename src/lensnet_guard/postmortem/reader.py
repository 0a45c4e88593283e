"""The lines of log files, one at a time and in bounded memory, whatever is in them."""

import contextlib
import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson

from lensnet_guard import _schema

try:
    import fcntl
except ImportError:  # Windows: a log that is still being written looks like that of a dead process
    fcntl = None  # type: ignore[assignment]

_BOM = b"\xef\xbb\xbf"  # what some editors put in front of a file that they save
MAX_LINE_BYTES = 16 * 2**20  # a longer line is no log line
_LOG_NAME = re.compile(r"(?P<log>lensnet\.rank.+?)(?:\.seg(?P<segment>\d+))?\.jsonl")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file.

    Attributes:
        number: From 1, in its file.
        event: The JSON object; None when the line is none, or names no event.
        torn: The file ends within it; what is whole but for its newline is not torn.
    """

    number: int
    event: dict[str, Any] | None
    torn: bool


def find_logs(targets: Iterable[str | os.PathLike[str]]) -> dict[str, list[Path]]:
    """Return the files of each log, full segments first, in the order in which they were written.

    Args:
        targets: Run folders and log files.

    Raises:
        FileNotFoundError: A target does not exist, or a folder holds no log.
    """
    targets = tuple(targets)
    for target in map(Path, targets):
        if not _files(target, "lensnet.rank"):
            what = "neither a file nor a folder" if target.exists() else "no such file or folder"
            what = "no lensnet.rank*.jsonl in" if target.is_dir() else f"{what}:"
            raise FileNotFoundError(f"{what} {target}")
    return _find(targets)


class OpenFile(NamedTuple):
    """A file of a log, opened for reading.

    Attributes:
        lines: None when it cannot be opened; ``error`` says why.
        held: A live process was writing to it.
    """

    path: Path
    lines: BinaryIO | None
    held: bool = False
    error: OSError | None = None


def open_logs(targets: Iterable[str | os.PathLike[str]]) -> Iterator[tuple[str, list[OpenFile]]]:
    """Yield each log with its files, as they were at one moment.

    A live process sets full files aside and drops the oldest; a file that is open stays.

    Raises:
        FileNotFoundError: A target does not exist, or a folder holds no log.
    """
    targets = tuple(targets)
    for log, paths in find_logs(targets).items():
        for attempt in range(_TRIES):
            with contextlib.ExitStack() as stack:
                files = [_open(path, stack) for path in paths]
                now = _find(targets, log).get(log, paths)
                if now == paths or attempt == _TRIES - 1:
                    yield log, files
                    break
                paths = now


_TRIES = 1_000


def _find(
    targets: Iterable[str | os.PathLike[str]], only: str | None = None
) -> dict[str, list[Path]]:
    """Return the files of each log, or of one."""
    logs: dict[str, list[Path]] = {}
    seen: set[Path] = set()
    name = "lensnet.rank" if only is None else os.path.basename(only)
    for target in map(Path, targets):
        for path in _files(target, name):
            log = _log(path)
            if only in (None, log) and path.resolve() not in seen:
                seen.add(path.resolve())
                logs.setdefault(log, []).append(path)
    return {log: sorted(paths, key=segment_of) for log, paths in sorted(logs.items())}


def _files(target: Path, name: str) -> list[Path]:
    found = sorted(target.glob(f"{glob.escape(name)}*.jsonl")) if target.is_dir() else [target]
    return [path for path in found if path.is_file()]  # a pipe would be waited for


def _log(path: Path) -> str:
    name = _LOG_NAME.fullmatch(path.name)
    return str(path.parent / (name["log"] if name else path.name))


def segment_of(path: Path) -> float:
    """Return the number of a full segment; the current file, without one, comes last."""
    name = _LOG_NAME.fullmatch(path.name)
    return int(name["segment"]) if name and name["segment"] else float("inf")


def _open(path: Path, stack: contextlib.ExitStack) -> OpenFile:
    try:
        file = stack.enter_context(path.open("rb"))
    except OSError as error:
        return OpenFile(path, None, error=error)
    return OpenFile(path, file, _is_held(file))


def _is_held(file: BinaryIO) -> bool:
    """Return whether a live process is writing the file."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            pass
    return False


def read_lines(
    file: BinaryIO, progress: Callable[[int], object] = lambda _: None
) -> Iterator[Line]:
    """Read a file line by line; ``progress`` is told of every line's bytes."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES):
        number += 1
        progress(len(raw))
        ended = raw.endswith(b"\n")
        if len(raw) == MAX_LINE_BYTES and not ended:
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                progress(len(rest))
            yield Line(number, None, torn=False)
            continue
        if raw.isspace():  # an empty line is nobody's loss
            continue
        event = _event(raw.removeprefix(_BOM) if number == 1 else raw)
        yield Line(number, event, torn=event is None and not ended)


def _event(raw: bytes) -> dict[str, Any] | None:
    try:
        parsed = orjson.loads(raw)
    except ValueError:
        try:  # the standard library reads what orjson refuses: a lone surrogate in a file name
            parsed = json.loads(raw)
        except (ValueError, RecursionError):
            return None
    return (
        parsed if isinstance(parsed, dict) and isinstance(parsed.get(_schema.EVENT), str) else None
    )
