"""Blocks are held open here; as one ends, its window is settled and nothing stays swallowed."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType

from lensnet_guard._text import budget_text, count
from lensnet_guard.boundary.admission import Admission
from lensnet_guard.boundary.blocks import window_block
from lensnet_guard.calls.budget import MicroStep, Window
from lensnet_guard.calls.context import Block, Position
from lensnet_guard.calls.errors import LensNetViolation, mistake_for
from lensnet_guard.calls.scope import MICRO_STEP, name_of


@contextmanager
def opened(admission: Admission, block: Block) -> Iterator[None]:
    """Hold a block open; violations that its body swallowed come out again when it ends.

    Args:
        admission: Of the module whose block it is.
        block: What is open meanwhile. A window that it opens is settled as it ends.
    """
    here = admission.open.position()
    ledger = None if block.context is not None else block.window or here.ledger
    enforced = ledger if admission.mode == "enforce" else None
    ending = block.window
    if ending is not None and admission.runs:
        ending.ran_before = admission.runs.counts()
    try:
        here = admission.open.push(block)  # kept, for the block may end in another thread
        yield
        if enforced is not None:
            enforced.raise_swallowed()
        if ending is not None:
            _settle(admission, here, ending)
            if here.micro_step not in {None, ending}:
                here.micro_step.ended.add(ending.name)
    except BaseException as error:
        for earlier, last in admission.execution.compiled.blame(error):
            for sink in admission.history.sinks:
                sink.overwritten(last, earlier, error)
        if enforced is not None:
            enforced.note_swallowed(error)
        if ending is not None and not isinstance(error, LensNetViolation):
            ending.raised = type(error).__name__
        raise
    finally:
        admission.open.remove(block)
        if ending is not None:
            for sink in admission.history.sinks:
                if isinstance(ending, MicroStep):
                    sink.micro_step(admission.history.module, here.context, ending)
                else:
                    sink.window(admission.history.module, ending)
            ending.forget_tracebacks()


class WindowBlock(AbstractContextManager[Window]):
    """A block that is a window. A trainer may close it in another hook than it opened it in.

    Args:
        admission: Of the module whose window it is.
        name: The window's name.

    Raises:
        RuntimeError: It is opened or closed for a second time, or closed before it was opened.
    """

    def __init__(self, admission: Admission, name: str) -> None:
        self._admission = admission
        self._name = name
        self._block: AbstractContextManager[None] | None = None
        self._closed = False

    def __enter__(self) -> Window:
        if self._block is not None:
            raise self._wrong("opened already; open another, guard.window(...)")
        block, ledger = window_block(self._admission, self._name)
        held = opened(self._admission, block)
        held.__enter__()
        self._block = held
        return ledger

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        if self._block is None or self._closed:
            raise self._wrong(
                "closed already" if self._closed else "not open, and was to be closed"
            )
        self._closed = True
        return self._block.__exit__(kind, error, traceback)

    def _wrong(self, what: str) -> RuntimeError:
        module = self._admission.history.module
        return RuntimeError(f"this window {self._name!r} of {module} is {what}")


def _settle(admission: Admission, here: Position, ending: Window) -> None:
    """Refuse a window that has left a budget unspent; tell of a micro-step that ended well."""
    is_micro_step = isinstance(ending, MicroStep)
    if is_micro_step and admission.violations.unseen:
        admission.violations.raise_unseen()
    if unmet := ending.unmet():
        made = [f"{s} made {n} of {budget_text(due)} calls" for s, (n, due) in unmet.items()]
        admission.violations.violate(
            "BudgetUnmet",
            here,
            f": {'' if is_micro_step else f'in {ending.name!r} '}{', '.join(made)}",
            kind="micro_step" if is_micro_step else "window",
            due_from=[_due_from(admission, name, ending) for name in unmet],
            mistake=mistake_for("BudgetUnmet", MICRO_STEP if is_micro_step else ending.name),
        )
    if isinstance(ending, MicroStep) and ending.context == "training":
        for sink in admission.history.sinks:
            sink.settled(ending)


def _due_from(admission: Admission, name: str, window: Window) -> str:
    """Return who should have made the calls of a scope, and whether it ran."""
    scope, runs = admission.policy.in_full[name], admission.runs
    if scope.is_opened:
        times = window.opened.get(name, 0)
        opened = f"was opened {count(times, 'time')}" if times else "was not opened"
        return f'`with guard.sanctioned("{name}"):`, which {opened}'
    state = f"calls with {name_of(scope.when)}" if scope.when is not None else ""
    if scope.caller is None:
        return state
    place = runs.place(scope.caller) if runs is not None else ""
    who = f"{scope.caller}{place}{state and ', ' + state}"
    before = window.ran_before.get(scope.caller)
    if before is None or runs is None:
        return who
    times = runs.counts()[scope.caller] - before
    ran = f"ran {count(times, 'time')}" if times else "did not run"
    return f"{who}, which {ran}"
