"""The log: one JSON object per line, written through to the kernel before the call returns.

A process that dies by SIGKILL, SIGSEGV or a CUDA abort leaves every line that it began. A log that
cannot be written never stops enforcement: one warning, then lost lines are counted and told.

Schema 1. The first line is ``run.begin`` (host, process, rank, versions, policy); then
``call.begin`` before and ``call.end`` after each run of the module, ``violation``,
``micro_step.end``, and last ``run.end``. Field names follow OpenTelemetry where it has one.
"""

import itertools
import json
import os
import platform
import socket
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, MutableMapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import structlog
import torch

from lensnet_guard._version import __version__

if TYPE_CHECKING:
    from lensnet_guard.budget import MicroStep
    from lensnet_guard.errors import LensNetViolation
    from lensnet_guard.record import CallRecord, Context

try:
    import fcntl
except ImportError:  # Windows: two processes of one rank must then use two folders
    fcntl = None  # type: ignore[assignment]

SCHEMA_VERSION = 1


class RunLog:
    """Append-only JSONL file of one process: ``lensnet.rank<R>.jsonl`` in ``folder``.

    When another log holds that file (of a live process, or of another guard in this one), the name
    is ``lensnet.rank<R>.pid<PID>.jsonl``, then ``lensnet.rank<R>.pid<PID>.2.jsonl`` and so on: one
    file holds the run of one guard in one process. A forked process opens its own.

    Args:
        folder: created when missing.
        header: fields of the ``run.begin`` line, besides host, process, rank and versions; its
            ``module`` stands in ``run.end`` too.

    Raises:
        TypeError: ``folder`` is not a path.
    """

    def __init__(self, folder: str | os.PathLike[str], header: dict[str, Any]) -> None:
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"log must be a folder's path, not {folder!r}")
        self.folder = Path(folder)
        self.path: Path | None = None
        self._header = header
        self._fd: int | None = None
        self._torn = False
        self._warned = False
        self.closed = False
        self._writers = 0
        self._lock = threading.RLock()  # a finalizer may call the module while a line is written
        # A private logger: the user's structlog configuration is neither read nor changed.
        self._logger = structlog.wrap_logger(
            _LineSink(self._write_line),
            processors=[_render],
            wrapper_class=structlog.BoundLogger,
            context_class=dict,
        ).bind()
        self._open()

    def begin(self, record: "CallRecord") -> None:
        """Write a call down before it runs."""
        counts = record.kind == "call" and record.reason is None  # a recompute does not
        self._append("call.begin", record.to_log(), calls=int(counts))

    def end(self, record: "CallRecord") -> None:
        """Write down how a call ended."""
        self.write(
            "call.end",
            module=record.module,
            seq=record.seq,
            outcome=record.outcome,
            duration_ms=record.duration_ms,
        )

    def violation(self, error: "LensNetViolation") -> None:
        """Write a violation down before it is raised."""
        fields = error.record.to_log() if error.record is not None else {}
        self._append("violation", fields | {"message": str(error)}, violations=1)

    def micro_step(self, module: str, context: "Context | None", ledger: "MicroStep") -> None:
        """Write down what a micro-step came to."""
        self.write(
            "micro_step.end",
            module=module,
            context=context,
            step=ledger.step,
            micro_step=ledger.micro_step,
            calls=ledger.calls,
            violations=len(ledger.violations),
        )

    def write(self, event: str, **fields: Any) -> None:
        """Append one line; never raises for the file's sake."""
        self._append(event, fields)

    def _append(
        self, event: str, fields: dict[str, Any], *, calls: int = 0, violations: int = 0
    ) -> None:
        if self.closed:
            return
        if self._pid != os.getpid():  # a fork shares the parent's file: leave that alone
            self._lock = threading.RLock()
            if self._fd is not None:
                os.close(self._fd)
            self._open()
        with self._lock:
            self._calls += calls
            self._violations += violations
            self._logger.info(event, **fields)

    def add_writer(self, writer: object) -> None:
        """Keep the log open until this writer is gone too, or until the interpreter exits."""
        self._writers += 1
        weakref.finalize(writer, self._remove_writer)

    def _remove_writer(self) -> None:
        self._writers -= 1
        if not self._writers:
            self.close()

    def close(self) -> None:
        """Write ``run.end`` and close the file; say how many lines were lost, if any."""
        if self.closed:
            return
        mine = self._pid == os.getpid()
        if mine and self._fd is not None:
            self.write(
                "run.end",
                module=self._header["module"],
                verdict="violations" if self._violations else "clean",
                calls=self._calls,
                violations=self._violations,
                lost_lines=self.lost_lines,
            )
        if not mine:
            self._lock = threading.RLock()  # a fork copies the lock as another thread held it
        with self._lock:  # so that no other thread writes to a number that is a new file by then
            fd, self._fd, self.closed = self._fd, None, True
        if fd is not None:
            os.close(fd)
        if mine and self.lost_lines:
            warnings.warn(
                f"lensnet_guard: {self.lost_lines} log lines could not be written to "
                f"{self.path or self.folder}; enforcement was not affected",
                RuntimeWarning,
                stacklevel=2,
            )

    def _open(self) -> None:
        self._pid = os.getpid()
        self._fd = None
        self.lost_lines = self._calls = self._violations = 0
        rank = os.environ.get("RANK", "0")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in _file_names(rank, self._pid):
                self.path = self.folder / name
                self._fd = _open_exclusively(self.path)
                if self._fd is not None:
                    self._torn = _ends_torn(self._fd)
                    break
        except OSError as error:
            self._warn(error)
        process = {
            "host.name": socket.gethostname(),
            "process.pid": self._pid,
            "process.command_args": sys.argv,
            "rank": rank,
            "versions": {
                "python": platform.python_version(),
                "lensnet-guard": __version__,
                "torch": str(torch.__version__),
                "wrapt": version("wrapt"),
                "structlog": version("structlog"),
            },
        }
        self._logger.info("run.begin", schema_version=SCHEMA_VERSION, **self._header, **process)

    def _write_line(self, line: bytes) -> None:
        if self._fd is None:
            self.lost_lines += 1
            return
        try:
            if self._torn:  # finish the half line that an earlier failure left behind
                line = b"\n" + line
            written = os.write(self._fd, line)
            self._torn = written != len(line)
            if self._torn:
                raise OSError("the line was written in part only")
        except OSError as error:
            self.lost_lines += 1
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"lensnet_guard: cannot write the log in {self.folder}: {error}. Enforcement and "
                "the ring buffer go on; lost lines are counted.",
                RuntimeWarning,
                stacklevel=2,
            )


class _LineSink:
    """The end of the structlog chain."""

    def __init__(self, info: Any) -> None:
        self.info = info


def _file_names(rank: str, pid: int) -> Iterator[str]:
    yield f"lensnet.rank{rank}.jsonl"
    yield f"lensnet.rank{rank}.pid{pid}.jsonl"
    for number in itertools.count(2):
        yield f"lensnet.rank{rank}.pid{pid}.{number}.jsonl"


def _open_exclusively(path: Path) -> int | None:
    """Open for appending under an advisory lock; None when another live process holds it."""
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    if fcntl is not None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except OSError:  # a file system without locks: go on without one
            pass
    return fd


def _ends_torn(fd: int) -> bool:
    size = os.fstat(fd).st_size
    return size > 0 and os.pread(fd, 1, size - 1) != b"\n"


def _render(_: Any, __: str, fields: MutableMapping[str, Any]) -> bytes:
    """The one processor: structlog's own two for this would cost a quarter of a line's time."""
    fields["timestamp"] = time.time()
    try:
        return orjson.dumps(fields, default=str, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # a lone surrogate in a file name, or a number above 64 bits
        line = json.dumps(fields, default=str, ensure_ascii=False, separators=(",", ":"))
        return line.encode("utf-8", "backslashreplace") + b"\n"
