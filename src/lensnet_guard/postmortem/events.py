"""The fields of a log's events, which may hold anything in a line that is foreign or damaged."""

import math
import re
from collections.abc import Mapping
from typing import Any

from lensnet_guard import _schema
from lensnet_guard._text import count
from lensnet_guard.postmortem.findings import Call, CallSite, Due

# All control characters but tab and newline, and those that turn the direction of text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_MOST = 2**63


def read_call(event: Mapping[str, Any]) -> Call:
    """Return the call that a ``call.begin`` or ``violation`` line tells of."""
    stack = event.get(_schema.STACK)
    frames = tuple(_frame(frame) for frame in stack) if isinstance(stack, list) else ()
    caller = whole(event.get(_schema.CALLER))
    seq = whole(event.get(_schema.SEQ))
    return Call(
        seq=-1 if seq is None else seq,
        module=text(event.get(_schema.MODULE)) or "?",
        kind=text(event.get(_schema.KIND)) or "?",
        reason=text(event.get(_schema.REASON)),
        context=text(event.get(_schema.CONTEXT)),
        scope=text(event.get(_schema.SCOPE)),
        step=whole(event.get(_schema.STEP)),
        micro_step=whole(event.get(_schema.MICRO_STEP)),
        thread=text(event.get(_schema.THREAD)) or "?",
        grad_enabled=event.get(_schema.GRAD_ENABLED) is True,
        inputs=texts(event.get(_schema.INPUTS)),
        stack=frames,
        caller=frames[caller] if caller is not None and 0 <= caller < len(frames) else "unknown",
        timestamp=number(event.get(_schema.TIMESTAMP)),
        message=text(event.get(_schema.MESSAGE)),
        compiled=_compiled(event.get(_schema.COMPILED)),
        method=text(event.get(_schema.METHOD)),
        mistake=text(event.get(_schema.MISTAKE)),
    )


def modules_of(event: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the modules that the header of a log of several tells of."""
    policies = event.get(_schema.POLICIES)
    return tuple(text(name) or "?" for name in policies) if isinstance(policies, dict) else ()


def call_key(event: Mapping[str, Any]) -> tuple[object, ...]:
    """Return what ``call.end`` has in common with its ``call.begin``."""
    return (
        whole(event.get(_schema.GUARD)),
        text(event.get(_schema.MODULE)),
        whole(event.get(_schema.SEQ)),
    )


def read_site(event: Mapping[str, Any]) -> CallSite:
    """Return where a call was made, without reading the rest of its line."""
    stack, caller = event.get(_schema.STACK), whole(event.get(_schema.CALLER))
    known = isinstance(stack, list) and caller is not None and 0 <= caller < len(stack)
    return CallSite(
        module=text(event.get(_schema.MODULE)) or "?",
        context=text(event.get(_schema.CONTEXT)),
        scope=text(event.get(_schema.SCOPE)),
        kind=text(event.get(_schema.KIND)) or "?",
        reason=text(event.get(_schema.REASON)),
        caller=_frame(stack[caller]) if known else "unknown",  # type: ignore[index]
        method=text(event.get(_schema.METHOD)),
    )


def text(value: object) -> str | None:
    """Return a string, without what would steer a terminal; None for anything else."""
    if not isinstance(value, str):
        return None
    return value if value.isprintable() else _CONTROL.sub(lambda c: ascii(c[0])[1:-1], value)


def texts(value: object) -> tuple[str, ...]:
    """Return a list's items as text."""
    return tuple(text(str(item)) or "" for item in value) if isinstance(value, list) else ()


def whole(value: object) -> int | None:
    """Return a whole number of 64 bits, or None."""
    # By its type: a bool is an int too.
    return value if type(value) is int and -_MOST <= value < _MOST else None


def number(value: object) -> float | None:
    """Return a finite float, or None."""
    return value if isinstance(value, float) and math.isfinite(value) else None


def counts(value: object) -> dict[str, int]:
    """Return a dict of whole numbers."""
    if not isinstance(value, dict):
        return {}
    return {text(n) or "": count for n, count in value.items() if whole(count) is not None}


def budgets(value: object) -> dict[str, Due]:
    """Return a dict of budgets: whole numbers, or pairs of which the second may be None."""
    found: dict[str, Due] = {}
    for name, due in value.items() if isinstance(value, dict) else ():
        if (exact := whole(due)) is not None:
            found[text(name) or ""] = exact
        elif isinstance(due, list) and len(due) == 2 and (least := whole(due[0])) is not None:
            most = whole(due[1])
            if most is not None or due[1] is None:
                found[text(name) or ""] = least, most
    return found


def is_met(due: Due, made: int) -> bool:
    """Return whether so many calls keep a budget."""
    if isinstance(due, int):
        return made == due
    least, most = due
    return least <= made and (most is None or made <= most)


def _frame(value: object) -> str:
    if not isinstance(value, dict):
        return "unknown"
    path, line = value.get(_schema.FILE), value.get(_schema.LINE)
    return text(f"{path}:{line} in {value.get('code.function.name')}") or ""


def _compiled(value: object) -> str | None:
    """Return what a line tells of compilation and CUDA graphs, in words."""
    if not isinstance(value, dict):
        return None
    graphs = value.get(_schema.CUDA_GRAPHS) is True
    words = ["compiled with CUDA graphs" if graphs else "compiled"]
    if value.get(_schema.CAPTURING) is True:
        words.append("captured by the caller's own CUDA graph, whose replays are not seen")
    if (generation := whole(value.get(_schema.GENERATION))) is not None:
        words.append(f"generation {generation}")
    if marks := whole(value.get(_schema.MARKS)):
        words.append(count(marks, "step mark"))
    if value.get(_schema.PENDING_BACKWARD) is True:
        words.append("a backward was pending")
    if value.get(_schema.NEW_INPUTS) is True:
        words.append("the first inputs of these shapes")
    if live := value.get(_schema.LIVE_OUTPUTS):
        words.append(f"outputs in use of call {', '.join(texts(live))}")
    return ", ".join(words)
