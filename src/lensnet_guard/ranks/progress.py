"""What one rank has done so far: counts that the ranks compare, and words for who reads of it.

The training's threads write it, and the listener's reads it. Writing is all that a guarded call
waits for: no file, no store and no device.
"""

import contextvars
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

import torch

from lensnet_guard.calls.record import Frame, frame_up, outside_frame

if TYPE_CHECKING:
    from lensnet_guard.calls.budget import MicroStep
    from lensnet_guard.calls.record import CallRecord

_KEPT_CALLS, _KEPT_CALLERS = 16, 3
_TORCH = Path(torch.__file__).parent


class Count(NamedTuple):
    """What a rank has made, in the window that ends with its next comparison or with this one.

    Attributes:
        window: The number of that comparison, from 1.
        final: Whether the rank stands at the comparison; then it makes no more in this window.
        micro_steps: Training micro-steps that it has ended.
        calls: Training calls that it has begun and that are compared, of each module.
        step: The optimizer step of the micro-step that ended last; -1 where it has no number.
        micro_step: The number of that micro-step in it, likewise.
        leaving: Whether this comparison is its last.
    """

    window: int
    final: bool
    micro_steps: int
    calls: tuple[int, ...]
    step: int
    micro_step: int
    leaving: bool

    @property
    def numbers(self) -> tuple[int, ...]:
        """What must be equal on all ranks at a comparison."""
        return (self.micro_steps, *self.calls, self.step, self.micro_step, self.leaving)


@dataclass(frozen=True)
class RankState:
    """What one rank has done so far, and where it is.

    Attributes:
        count: What it has made.
        modules: The names of the modules that the calls are of.
        callers: The newest lines that made training calls.
        doing: What it waits for or runs, in words.
    """

    count: Count
    modules: tuple[str, ...]
    callers: tuple[str, ...]
    doing: str

    def __str__(self) -> str:
        return self.in_words(range(len(self.modules)))

    def in_words(self, shown: Sequence[int]) -> str:
        """Return a line.

        Args:
            shown: The numbers of the modules whose calls it names; the others are counted.
        """
        count = self.count
        calls = str(count.calls[0])
        if len(self.modules) > 1:
            named = [f"{count.calls[module]} {self.modules[module]}" for module in shown]
            if others := len(self.modules) - len(shown):
                made = sum(count.calls) - sum(count.calls[module] for module in shown)
                named.append(f"{made} of {others} others")
            calls = ", ".join(named)
        text = f"{calls} training calls in {count.micro_steps} micro-steps"
        if count.step >= 0:
            text += f", the last one step {count.step}, micro-step {count.micro_step}"
        if count.leaving:
            text += ", and no more to come"
        return f"{text}; called from {', '.join(self.callers) or 'nowhere'}; {self.doing}"


class Progress:
    """What this rank does.

    Args:
        modules: The names of the guarded modules, alike on all ranks.

    Attributes:
        modules: The same.
        context: What is open (context variables) where the newest training call was made.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = tuple(modules)
        self.context = contextvars.copy_context()
        self._lock = threading.Lock()  # carried threads call too
        self._calls, self._ended = [0] * len(modules), [0] * len(modules)
        self._made = dict.fromkeys(self.modules, 0)  # calls, also those that are not compared
        self._last = (-1, -1)
        self._newest: deque[tuple[CallRecord, float]] = deque(maxlen=_KEPT_CALLS)
        self._stood, self._place = 0.0, ""
        self._thread = threading.get_ident()
        self._window = 1
        self._final: Count | None = None

    # Written by the training -------------------------------------------------------------------

    def begin(self, module: int, record: "CallRecord", *, compared: bool) -> None:
        """Count a training call of a module."""
        with self._lock:
            self._calls[module] += compared
            self._made[self.modules[module]] += 1
            self._newest.append((record, time.monotonic()))
            self._thread = threading.get_ident()
            self.context = contextvars.copy_context()

    def end_micro_step(self, module: int, ledger: "MicroStep") -> int | None:
        """Count a training micro-step of a module that has ended well.

        Returns:
            How many have ended, where this module is the first to have ended so many; else None.
        """
        with self._lock:
            before = max(self._ended)
            self._ended[module] += 1
            numbers = ledger.step, ledger.micro_step
            self._last = (
                -1 if numbers[0] is None else numbers[0],
                -1 if numbers[1] is None else numbers[1],
            )
            return self._ended[module] if self._ended[module] > before else None

    def stand(self, *, leaving: bool) -> Count:
        """Come to a comparison; return what is compared."""
        with self._lock:
            self._thread = threading.get_ident()
            self._stood = time.monotonic()
            self._place = _line(outside_frame(frame_up(1)))
            self._final = self._count(final=True, leaving=leaving)
            return self._final

    def go_on(self) -> None:
        """Leave the comparison: all ranks have come."""
        with self._lock:
            self._window, self._final = self._window + 1, None

    # Read by the listener ----------------------------------------------------------------------

    def count(self) -> Count:
        """Return what has been made, or what is compared now."""
        with self._lock:
            return self._final or self._count(final=False, leaving=False)

    def _count(self, *, final: bool, leaving: bool) -> Count:
        calls = tuple(self._calls)
        return Count(self._window, final, max(self._ended), calls, *self._last, leaving)

    def state(self) -> RankState:
        """Return what has been made, and where the training is now."""
        with self._lock:
            count = self._final or self._count(final=False, leaving=False)
            newest, stood, stood_at = list(self._newest), self._stood, self._place
            made = dict(self._made)
        callers: dict[str, None] = {}
        for record, _ in reversed(newest):
            callers[str(record.caller)] = None
        kept = tuple(reversed(list(callers)[:_KEPT_CALLERS]))
        doing = _running(newest, made)
        place = _line(self.frame())
        if count.final:
            where = "the end of the block" if count.leaving else "the end of a micro-step"
            doing = f"has waited for the others at {where} for {time.monotonic() - stood:.0f} s"
            place = stood_at
        return RankState(count, self.modules, kept, f"{doing}, at {place}")

    def standstill(self) -> tuple[int, int] | None:
        """Return the instruction at which a guarded call or torch is waited for; None if none is.

        A collective that never returns is such a wait. Whoever writes a checkpoint waits for torch
        too, and whoever waits for other programs or threads does not.
        """
        with self._lock:
            in_a_call = any(record.outcome is None for record, _ in self._newest)
        frame = sys._current_frames().get(self._thread)  # noqa: SLF001  # documented by this name
        if frame is None:
            return None
        file = Path(frame.f_code.co_filename)
        in_torch = _TORCH in file.parents and file.name != "serialization.py"
        return (id(frame), frame.f_lasti) if in_torch or in_a_call else None

    def frame(self) -> FrameType | None:
        """Return what the training's thread runs now, outside the guard and torch."""
        frames = sys._current_frames()  # noqa: SLF001  # documented by this name
        return outside_frame(frames.get(self._thread))


def _running(newest: "list[tuple[CallRecord, float]]", calls: dict[str, int]) -> str:
    """Return which training call has not ended yet, in words."""
    later: dict[str, int] = {}
    for record, begun in reversed(newest):
        if record.outcome is None:
            number = calls[record.module] - later.get(record.module, 0)
            seconds = time.monotonic() - begun
            return f"has been in call {number} of {record.module} for {seconds:.0f} s"
        later[record.module] = later.get(record.module, 0) + 1
    return "is in no call"


def _line(frame: FrameType | None) -> str:
    if frame is None:
        return "nowhere"
    code = frame.f_code
    return str(Frame(code.co_filename, frame.f_lineno, getattr(code, "co_qualname", code.co_name)))
