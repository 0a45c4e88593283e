"""The log: which events become lines, and which of them before the module runs.

A process that dies by SIGKILL, SIGSEGV or a CUDA abort leaves every line that it began. A log that
cannot be written never stops enforcement: one warning, then lost lines are counted and told.
What stands in the lines is in `_schema`.
"""

import json
import multiprocessing
import os
import platform
import socket
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, MutableMapping
from functools import lru_cache
from importlib.metadata import version
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import torch
import torch.distributed as dist

from lensnet_guard import _schema
from lensnet_guard._text import absolute
from lensnet_guard._torch_checkpoints import backward_pass
from lensnet_guard._version import __version__
from lensnet_guard.logs import optimizer_steps
from lensnet_guard.logs.log_file import LogFile, warn
from lensnet_guard.logs.sinks import Sink

if TYPE_CHECKING:
    from lensnet_guard.calls.budget import MicroStep, Window
    from lensnet_guard.calls.errors import LensNetViolation
    from lensnet_guard.calls.record import CallRecord, Context


class RunLog(Sink):
    """The log of one guard in one process. A forked process opens a file of its own.

    Args:
        folder: Created when missing; see `LogFile` for the names in it. One that is relative stays
            where it is now, whatever directory the process changes to.
        header: Fields of the ``run.begin`` line, besides host, process, rank and versions; its
            ``module`` stands in ``run.end`` too.
        parent: The process that this one is a worker of. Its file is opened for the first line, as
            in a fork: what opens one while it is unpickled does not know yet where it is.

    Raises:
        TypeError: ``folder`` is not a path.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        header: dict[str, Any],
        parent: int | None = None,
    ) -> None:
        self.folder = absolute(folder)
        import structlog  # it brings rich, which takes longer to import than the whole guard

        self.closed = False
        self._header = header
        self._writers = 0
        live = not header.get(_schema.FROM_MEMORY)
        self._observes = live and header.get(_schema.MODE) == "observe"
        self._watch_no_more = optimizer_steps.watch(self) if self._observes else lambda: None
        self._lock = threading.RLock()  # a finalizer may call the module while a line is written
        # A private logger: the user's structlog configuration is neither read nor changed.
        self._logger = structlog.wrap_logger(
            _LineSink(self._write_line),
            processors=[_render],
            wrapper_class=structlog.BoundLogger,
            context_class=dict,
        ).bind()
        self._begun_in = os.getpid()
        self._file = LogFile(self.folder, parent or self._begun_in)
        if parent is None:
            self._open()
        _logs.add(self)

    @property
    def path(self) -> Path | None:
        """The file that is being written; None when there is none."""
        return self._file.path

    @property
    def pid(self) -> int:
        """The process that has opened the file: this one, or that which it descends from."""
        return self._file.pid

    @property
    def lost_lines(self) -> int:
        """Lines that could not be written, or went with a file that somebody removed."""
        return self._file.lost_lines

    # A sink ------------------------------------------------------------------------------------

    def begin(self, record: "CallRecord") -> None:
        """Write a call down before it runs."""
        counted = None
        if record.kind == "call" and record.reason is None:  # a recompute is no call
            training = record.context == "training"
            counted = _schema.CALLS if training else _schema.INFERENCE_CALLS
        fields = record.to_log()
        if self._observes and not self.closed:
            with self._lock:
                self._keep_up()  # a worker counts from where it opens its file
            fields[_schema.OPTIMIZER_STEP] = optimizer_steps.taken() - self._steps_before
            if backward_pass() is not None:
                fields[_schema.IN_BACKWARD] = True
        self._append(_schema.CALL_BEGIN, fields, counted)

    def end(self, record: "CallRecord") -> None:
        """Write down how a call ended."""
        fields: dict[str, Any] = {
            _schema.GUARD: record.guard,
            _schema.MODULE: record.module,
            _schema.SEQ: record.seq,
            _schema.OUTCOME: record.outcome,
            _schema.DURATION_MS: record.duration_ms,
            **record.notes,
        }
        if record.compiled is not None:
            fields[_schema.COMPILED] = record.compiled.to_log()
        self._append(_schema.CALL_END, fields)

    def violation(self, error: "LensNetViolation") -> None:
        """Write a violation down before it is raised."""
        fields = error.record.to_log() if error.record is not None else {}
        fields |= {_schema.MESSAGE: str(error), _schema.MISTAKE: error.mistake}
        self._append(_schema.VIOLATION, fields, _schema.VIOLATIONS)

    def hazard(self, record: "CallRecord", earlier: "CallRecord") -> None:
        """Write down that a call is about to overwrite an output that is in use."""
        self._append(_schema.HAZARD, _pair(record, earlier))

    def overwritten(
        self, record: "CallRecord", earlier: "CallRecord", error: BaseException
    ) -> None:
        """Write down torch's error with the two calls that it is about."""
        fields = _pair(record, earlier)
        fields[_schema.EXCEPTION_TYPE] = type(error).__name__
        fields[_schema.EXCEPTION_MESSAGE] = str(error)
        self._append(_schema.OVERWRITTEN, fields)

    def micro_step(self, module: str, context: "Context | None", ledger: "MicroStep") -> None:
        """Write down what a micro-step came to."""
        fields = {
            _schema.MODULE: module,
            _schema.CONTEXT: context,
            _schema.STEP: ledger.step,
            _schema.MICRO_STEP: ledger.micro_step,
            **_sums_of(ledger),
        }
        whole = context == "training" and ledger.raised is None
        self._append(_schema.MICRO_STEP_END, fields, _schema.MICRO_STEPS if whole else None)

    def window(self, module: str, ledger: "Window") -> None:
        """Write down what another window came to."""
        fields = {
            _schema.MODULE: module,
            _schema.CONTEXT: ledger.context,
            _schema.WINDOW: ledger.name,
            **_sums_of(ledger),
        }
        self._append(_schema.WINDOW_END, fields)

    # Lines -------------------------------------------------------------------------------------

    def write(self, event: str, **fields: Any) -> None:
        """Append one line; never raises for the file's sake."""
        self._append(event, fields)

    def add_writer(self, writer: object) -> Callable[[], object]:
        """Keep the log open until this writer is gone too, or until the interpreter exits.

        What comes back says that it is gone.
        """
        self._writers += 1
        return weakref.finalize(writer, self._remove_writer)

    def _remove_writer(self) -> None:
        self._writers -= 1
        if not self._writers:
            self.close()

    def close(self) -> None:
        """Write ``run.end`` and close the file; say how many lines were lost, if any."""
        if self.closed:
            return
        mine = self._file.pid == os.getpid()
        with self._lock:  # so that no other thread writes to a number that is a new file by then
            if mine:
                self._keep_up(look=True)
            if mine and self._file.is_open:
                self._append(_schema.RUN_END, self._end_fields())
            self.closed = True
            self._watch_no_more()
            self._file.close()
        if mine and self.lost_lines:
            warn(
                f"lensnet_guard: {self.lost_lines} log lines could not be written to "
                f"{self.path or self.folder}, or are gone from it; enforcement was not affected"
            )

    def _end_fields(self) -> dict[str, Any]:
        violations = self._sums[_schema.VIOLATIONS]
        steps = {_schema.OPTIMIZER_STEP: optimizer_steps.taken() - self._steps_before}
        return {
            _schema.MODULE: self._header[_schema.MODULE],
            _schema.VERDICT: "violations" if violations else "clean",
            _schema.CALLS: self._sums[_schema.CALLS] + self._sums[_schema.INFERENCE_CALLS],
            _schema.VIOLATIONS: violations,
            _schema.LOST_LINES: self.lost_lines,
            **(steps if self._observes else {}),
        }

    def _open(self) -> None:
        self._sums = dict.fromkeys(_SUMS, 0)
        self._steps_before = optimizer_steps.taken()
        rank = _rank()
        pid, worker_of = os.getpid(), multiprocessing.parent_process()
        parent = self._file.pid if self._file.pid != pid else worker_of and worker_of.pid
        self._file = LogFile(self.folder, pid)
        self._file.open(rank)
        if worker_of is not None:  # it leaves by os._exit, which runs no finalizers but these
            Finalize(self, _close, (weakref.ref(self),), exitpriority=-100)
        process = {
            _schema.HOST: socket.gethostname(),
            _schema.PID: pid,
            _schema.PROCESS: _process_id(),
            _schema.ARGUMENTS: sys.argv,
            _schema.PARENT_PID: parent,
            _schema.FORKED: pid != self._begun_in,
            _schema.RANK: rank,
            _schema.VERSIONS: {
                "python": platform.python_version(),
                "lensnet-guard": __version__,
                "torch": str(torch.__version__),
                "wrapt": version("wrapt"),
                "structlog": version("structlog"),
            },
        }
        self._run = {_schema.SCHEMA_VERSION: _schema.VERSION, **self._header, **process}
        self._logger.info(_schema.RUN_BEGIN, **self._run)

    def _append(self, event: str, fields: dict[str, Any], counted: str | None = None) -> None:
        if self.closed:
            return
        with self._lock:
            self._keep_up()
            if counted is not None:
                self._sums[counted] += 1
            self._logger.info(event, **fields)

    def _keep_up(self, *, look: bool = False) -> None:
        """Change to another file where it is time: in a fork, after a full one, for one removed."""
        if self._file.pid != os.getpid():  # a fork shares the parent's file: leave that alone
            self._file.close()
            self._open()
        segment = None
        if (look or self._file.due) and (fate := self._file.look()) is not None:
            segment = self._file.renew(fate)
        elif self._file.full:
            segment = self._file.next_segment()
        if segment is not None:
            before = self._sums | {_schema.LOST_LINES: self.lost_lines}
            place = {_schema.SEGMENT: segment, _schema.BEFORE: before}
            self._logger.info(_schema.SEGMENT_BEGIN, **self._run, **place)

    def _write_line(self, line: bytes) -> None:
        self._file.write(line)

    def leave_parent(self) -> None:
        """Let go of what a fork has copied: a lock, and a file that looks alive while it is open.

        A lock is copied as another thread held it, and that thread is not in the child.
        """
        self._lock = threading.RLock()
        self._file.close()


def _close(log: "weakref.ref[RunLog]") -> None:
    if (open_log := log()) is not None:
        open_log.close()


def _rank() -> str:
    """Return which process of a distributed run this is.

    Torch knows best: Lightning tells its processes nothing of it, and where each process of a node
    is spawned the environment has the node's number.
    """
    if dist.is_available() and dist.is_initialized():
        return str(dist.get_rank())
    return os.environ.get("RANK", "0")


@lru_cache(maxsize=1)
def _process_id() -> str:
    """Return what tells this process from one that has its pid later, as in a new container."""
    return uuid.uuid4().hex


_SUMS = (_schema.MICRO_STEPS, _schema.CALLS, _schema.INFERENCE_CALLS, _schema.VIOLATIONS)
_logs: weakref.WeakSet[RunLog] = weakref.WeakSet()


def _after_fork() -> None:
    _process_id.cache_clear()
    for log in list(_logs):
        log.leave_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _pair(record: "CallRecord", earlier: "CallRecord") -> dict[str, Any]:
    """Return the fields for two calls, the later of which wrote over the other's output."""
    return {
        _schema.GUARD: record.guard,
        _schema.MODULE: record.module,
        _schema.SEQ: record.seq,
        _schema.AT: str(record.caller),
        _schema.EARLIER_SEQ: earlier.seq,
        _schema.EARLIER_AT: str(earlier.caller),
    }


def _sums_of(ledger: "Window") -> dict[str, Any]:
    """Return what every window came to."""
    return {
        _schema.CALLS: ledger.calls,
        _schema.DUE: dict(ledger.due),
        _schema.VIOLATIONS: len(ledger.violations),
        _schema.RAISED: ledger.raised,
    }


class _LineSink:
    """The end of the structlog chain."""

    def __init__(self, info: Any) -> None:
        self.info = info


def _render(_: Any, __: str, fields: MutableMapping[str, Any]) -> bytes:
    """Render a line. Structlog's own two processors for this would cost a quarter of its time."""
    fields[_schema.TIMESTAMP] = time.time()
    try:
        return orjson.dumps(fields, default=str, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # a lone surrogate in a file name, or a number above 64 bits
        line = json.dumps(fields, default=str, ensure_ascii=False, separators=(",", ":"))
        return line.encode("utf-8", "backslashreplace") + b"\n"
