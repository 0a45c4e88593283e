"""Blocks are held open here; as one ends, its micro-step is settled and nothing stays swallowed."""

from collections.abc import Iterator
from contextlib import contextmanager

from lensnet_guard.boundary.admission import Admission
from lensnet_guard.calls.budget import MicroStep
from lensnet_guard.calls.context import Block, Position
from lensnet_guard.calls.errors import LensNetViolation


@contextmanager
def held_open(
    admission: Admission, block: Block, ledger: MicroStep | None = None, *, settles: bool = False
) -> Iterator[None]:
    """Hold a block open; violations that its body swallowed come out again when it ends.

    Args:
        admission: Of the module whose block it is.
        block: What is open meanwhile.
        ledger: The micro-step that the block works in.
        settles: Whether that micro-step ends with the block.
    """
    enforced = ledger if admission.mode == "enforce" else None
    ending = ledger if settles else None
    here = admission.open.position()
    try:
        here = admission.open.push(block)  # kept, for the block may end in another thread
        yield
        if enforced is not None:
            enforced.raise_swallowed()
        if ending is not None:
            _settle(admission, here, ending)
    except BaseException as error:
        for earlier, last in admission.compiled.blame(error):
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
                sink.micro_step(admission.history.module, here.context, ending)
            ending.forget_tracebacks()


def _settle(admission: Admission, here: Position, ledger: MicroStep) -> None:
    """Refuse a micro-step that has left a budget unspent; tell of one that has ended well."""
    if unmet := ledger.unmet():
        made = ", ".join(f"{s} made {n} of {due} calls" for s, (n, due) in unmet.items())
        admission.violate("BudgetUnmet", here, f": {made}")
    if ledger.context == "training":
        for sink in admission.history.sinks:
            sink.settled(ledger)
