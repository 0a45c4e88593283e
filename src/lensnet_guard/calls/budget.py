"""The ledger of one window: which calls spent which budget in it, and what went wrong meanwhile."""

import copy
from collections.abc import Mapping
from types import MappingProxyType

from lensnet_guard._text import add_note
from lensnet_guard.calls.errors import LensNetViolation
from lensnet_guard.calls.record import CallRecord, Context
from lensnet_guard.calls.scope import MICRO_STEP, Calls


class Window:
    """A stretch of a training in which budgets count, as the guard keeps book of it.

    A window may be shared by several threads (``guard.carry``); the guard holds its lock from
    reading a budget to spending it, so that no two calls can spend the same unit.

    Args:
        name: ``"micro_step"``, ``"step"``, or that which the trainer opens it by.
        due: Calls per scope or caller: so many, or from least to most, must have been made when the
            window ends.
        context: That it was opened in; None when none was declared.

    Attributes:
        name: The same.
        due: The same.
        context: The same.
        opened: How often each scope was opened in it.
        ran_before: How often each caller had run before it, where that is known.
        violations: What went wrong in it.
        raised: The type of what broke it off; None as long as nothing has.
    """

    ran_before: Mapping[str, int] = MappingProxyType({})

    def __init__(self, name: str, due: Mapping[str, Calls], context: Context | None) -> None:
        self.name = name
        self.due = due
        self.context = context
        self.opened: dict[str, int] = {}
        self.violations: list[LensNetViolation] = []
        self.raised: str | None = None
        self._spent: dict[str, list[CallRecord]] = {}

    def spent(self, scope: str) -> list[CallRecord]:
        """Return the calls that spent the budget of ``scope``, oldest first."""
        return self._spent.get(scope, [])

    def spend(self, scope: str, record: CallRecord) -> None:
        """Book one call on the budget of ``scope``."""
        self._spent.setdefault(scope, []).append(record)

    @property
    def calls(self) -> dict[str, int]:
        """Calls made so far, by scope; due scopes without a call are listed with 0."""
        spent = self._spent.copy()  # in one go: another thread may be spending
        return {**dict.fromkeys(self.due, 0), **{s: len(calls) for s, calls in spent.items()}}

    def unmet(self) -> dict[str, tuple[int, Calls]]:
        """Return ``{scope: (made, due)}`` of every scope that has made too few calls."""
        spent, unmet = self._spent, {}
        for scope, due in self.due.items():
            made = len(spent[scope]) if scope in spent else 0
            if made < (due if isinstance(due, int) else due[0]):
                unmet[scope] = made, due
        return unmet

    def raise_swallowed(self) -> None:
        """Raise the first violation of this window again: the body must have swallowed it."""
        if self.violations:
            raise self.violations[0]

    def forget_tracebacks(self) -> None:
        """Keep copies of the violations that hold no frame: the window is at its end.

        Those frames hold the window in turn. The circle would keep what they hold, and torch's
        checkpoints take the saved-tensor hooks of the thread down only when they are freed.
        """
        self.violations = [copy.copy(violation) for violation in self.violations]

    def note_swallowed(self, error: BaseException) -> None:
        """Tell of swallowed violations on an unrelated exception that is on its way out."""
        if not self.violations:
            return
        headline = str(self.violations[0]).partition("\n")[0]
        note = f"Before this, a LensNetViolation was swallowed: {headline}"
        if not any(shown in self.violations for shown in _traceback_of(error)):
            add_note(error, note)  # once: a block inside this one may have told


class MicroStep(Window):
    """One forward/backward of one micro-batch.

    Args:
        step: Optimizer step, or None for a sanctioned scope that stands alone.
        micro_step: Number of the micro-batch inside the step, or None likewise.
        due: Calls per scope or caller that must have been made when the micro-step ends.
        context: That it was opened in, and the only one in which it counts.

    Attributes:
        step: The same.
        micro_step: The same.
        ended: The names of the other windows that have ended well in it.
    """

    def __init__(
        self,
        step: int | None,
        micro_step: int | None,
        due: Mapping[str, Calls],
        context: Context | None = "training",
    ) -> None:
        super().__init__(MICRO_STEP, due, context)
        self.step = step
        self.micro_step = micro_step
        self.ended: set[str] = set()


def _traceback_of(error: BaseException) -> list[BaseException]:
    """Return the error and every other that its traceback shows; causes may go in a circle."""
    shown: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in shown:
        shown.append(link)
        link = link.__cause__ if link.__suppress_context__ else link.__context__
    return shown
