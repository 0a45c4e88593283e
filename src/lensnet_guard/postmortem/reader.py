"""The lines of log files, one at a time and in bounded memory, whatever is in them."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

_BOM = b"\xef\xbb\xbf"  # what some editors put in front of a file that they save
MAX_LINE_BYTES = 16 * 2**20  # a longer line is no log line
_LOG_NAME = re.compile(r"(?P<log>lensnet\.rank.+?)(?:\.seg(?P<segment>\d+))?\.jsonl")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file.

    Attributes:
        number: from 1, in its file.
        event: the JSON object; None when the line is none, or names no event.
        torn: the file ends within it; what is whole but for its newline is not torn.
    """

    number: int
    event: dict[str, Any] | None
    torn: bool


def find_logs(targets: Iterable[str | os.PathLike[str]]) -> dict[str, list[Path]]:
    """The files of each log, full segments first, in the order in which they were written.

    Args:
        targets: run folders and log files.

    Raises:
        FileNotFoundError: a target does not exist, or a folder holds no log.
    """
    logs: dict[str, list[Path]] = {}
    seen: set[Path] = set()
    for target in map(Path, targets):
        found = sorted(target.glob("lensnet.rank*.jsonl")) if target.is_dir() else [target]
        paths = [path for path in found if path.is_file()]  # a pipe would be waited for
        if not paths and target.is_dir():
            raise FileNotFoundError(f"no lensnet.rank*.jsonl in {target}")
        if not paths:
            raise FileNotFoundError(f"no such file or folder: {target}")
        for path in paths:
            name = _LOG_NAME.fullmatch(path.name)
            log = path.parent / (name["log"] if name else path.name)
            if path.resolve() not in seen:
                logs.setdefault(str(log), []).append(path)
            seen.add(path.resolve())
    return {log: sorted(paths, key=_segment) for log, paths in sorted(logs.items())}


def _segment(path: Path) -> float:
    """The number of a full segment; the current file, without one, comes last."""
    name = _LOG_NAME.fullmatch(path.name)
    return int(name["segment"]) if name and name["segment"] else float("inf")


def read_lines(path: Path, progress: Callable[[int], object] = lambda _: None) -> Iterator[Line]:
    """Read a file line by line; ``progress`` is told of every line's bytes."""
    with path.open("rb") as file:
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
    return parsed if isinstance(parsed, dict) and isinstance(parsed.get("event"), str) else None
