"""Evidence after the fact: records that were kept in memory, written as a log is.

A guard without a log still holds its newest records. When a training ends in an exception they go
to a file that ``lensnet-guard postmortem`` reads, with the micro-steps worked out from them.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lensnet_guard import _schema
from lensnet_guard.calls.budget import MicroStep
from lensnet_guard.calls.errors import build_violation
from lensnet_guard.calls.policy import CallPolicy
from lensnet_guard.calls.record import CallRecord
from lensnet_guard.calls.scope import MICRO_STEP
from lensnet_guard.logs.run_log import RunLog


def write_evidence(
    folder: str | os.PathLike[str],
    header: dict[str, Any],
    records: Iterable[CallRecord],
    policy: CallPolicy,
) -> Path | None:
    """Write records to a log of their own; every line bears the time of this writing.

    Args:
        folder: As for a guard's log.
        header: Fields of the ``run.begin`` line.
        records: Calls and violations, in order.
        policy: The contract that they were judged by.

    Returns:
        The file; None when it could not be written.

    Raises:
        TypeError: ``folder`` is not a path.
    """
    log = RunLog(folder, {**header, _schema.FROM_MEMORY: True})
    ledger: MicroStep | None = None
    for record in records:
        if ledger is not None and (ledger.step, ledger.micro_step) != _step_of(record):
            log.micro_step(record.module, ledger.context, ledger)
            ledger = None
        if ledger is None and record.step is not None:
            due = policy.due(MICRO_STEP) if record.context == "training" else {}
            ledger = MicroStep(*_step_of(record), due, record.context)
        _write(log, record, ledger, policy)
    if ledger is not None:
        log.micro_step(header[_schema.MODULE], ledger.context, ledger)
    path = log.path
    log.close()
    return path


def _step_of(record: CallRecord) -> tuple[int | None, int | None]:
    return record.step, record.micro_step


def _write(log: RunLog, record: CallRecord, ledger: MicroStep | None, policy: CallPolicy) -> None:
    if record.reason is not None:
        made = ledger.calls if ledger else {}
        earlier = ledger.spent(record.scope) if ledger and record.scope else ()
        violation = build_violation(record, policy, made=made, earlier=earlier)
        log.violation(violation)
        if ledger is not None:
            ledger.violations.append(violation)
    if record.kind in ("micro_step", "context") or record.outcome == "refused":
        return  # nothing ran
    log.begin(record)
    if record.outcome is not None:
        log.end(record)
    scope = record.scope if record.kind == "call" and record.reason is None else None
    if ledger is not None and scope and policy.in_full[scope].per == MICRO_STEP:
        ledger.spend(scope, record)
