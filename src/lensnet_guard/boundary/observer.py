"""What a log in observe mode notes of calls besides: who makes them, in what windows and state.

``lensnet-guard suggest`` reads it. Nothing of it is taken in enforce mode, or without a log.
"""

from collections.abc import Iterable
from types import FrameType
from typing import Any

import torch

from lensnet_guard import _schema
from lensnet_guard.boundary.claims import finding
from lensnet_guard.calls.adapters import adapters_off, adapters_on, has_adapters
from lensnet_guard.calls.call import Call
from lensnet_guard.calls.callers import names_on
from lensnet_guard.calls.conditions import autocast, detached, eval_mode, no_grad
from lensnet_guard.calls.context import Position
from lensnet_guard.calls.frozen import frozen
from lensnet_guard.calls.record import CallRecord, Context
from lensnet_guard.calls.scope import Condition, name_of
from lensnet_guard.calls.tensors import tensors_in

# Of the stock conditions those that read no values, and compare a call with no other module's.
_OF_CALLS: tuple[Condition, ...] = (
    *(no_grad, eval_mode, frozen),
    *(autocast(torch.bfloat16), autocast(torch.float16)),
)
_OF_ADAPTERS: tuple[Condition, ...] = (adapters_on, adapters_off)
_OF_RESULTS: tuple[Condition, ...] = (detached,)


class Observer:
    """Looks at the calls of one module, and asks for nothing of them.

    What conditions remember of the module is remembered here once more, so that the policy's own
    are not disturbed; and in each context apart, as a policy asks for conditions in training alone.
    """

    def __init__(self) -> None:
        self._memory: dict[Context | None, dict[Any, Any]] = {}

    def begin(
        self, record: CallRecord, call: Call, frame: FrameType | None, here: Position
    ) -> None:
        """Note what there is to say of a call before it runs.

        Args:
            record: Of the call; it takes the notes to the log.
            call: As conditions see it.
            frame: The innermost frame of who calls.
            here: The blocks that are open.
        """
        call.memory = self._memory.setdefault(here.context, {})
        notes: dict[str, Any] = {
            _schema.CALLERS: names_on(frame, record.depth),
            _schema.HELD: _held(_asked(call.module), call),
        }
        if windows := [window.name for window in here.windows]:
            notes[_schema.WINDOWS] = windows
        record.notes = notes

    def end(self, record: CallRecord, call: Call, result: Any) -> None:
        """Note what there is to say of what a call has returned."""
        call.result = result
        asked = _OF_RESULTS if _has_tensors(result) else ()  # of nothing anything holds
        record.notes = {_schema.HELD: _held(asked, call)}


def _has_tensors(result: Any) -> bool:
    """Return whether there is a tensor in what a call has returned."""
    try:
        return any(True for _ in tensors_in(result))
    except Exception:  # in a container that does not let itself be read; observing never raises
        return False


def _asked(module: torch.nn.Module) -> tuple[Condition, ...]:
    """Return the conditions that a call of a module is asked about."""
    try:
        return _OF_CALLS + _OF_ADAPTERS if has_adapters(module) else _OF_CALLS
    except Exception:  # in a PEFT that has them elsewhere; observing never raises
        return _OF_CALLS


def _held(conditions: Iterable[Condition], call: Call) -> list[str]:
    """Return the names of the conditions that hold of a call."""
    return [name_of(asked) for asked in conditions if finding(asked, call) is None]
