"""What a guard's blocks open, each checked against what is open already."""

from lensnet_guard.boundary.admission import Admission
from lensnet_guard.calls.budget import MicroStep, Window
from lensnet_guard.calls.context import Block, Position
from lensnet_guard.calls.record import Context
from lensnet_guard.calls.scope import MICRO_STEP, STEP


def context_block(admission: Admission, context: Context) -> Block:
    """Return a block that declares a context.

    Raises:
        ContextSwitchRefused: To inference inside an open training micro-step.
    """
    here = admission.open.position()
    if context == "inference" and here.inside_training_step:
        _refuse_switch(admission, here, "inference")
    return Block(context=context)


def micro_step_block(admission: Admission, step: int, micro_step: int) -> tuple[Block, MicroStep]:
    """Return a block that opens a micro-step, and the micro-step.

    Raises:
        NoContext: Neither training nor inference is declared.
        ContextSwitchRefused: A micro-step is open already.
        ValueError: A caller of the policy does not exist.
    """
    here = admission.violations.require_context("a micro-step was opened")
    if here.micro_step is not None:
        _refuse_switch(admission, here, "another micro-step")
    due = {}
    if here.context == "training":
        if admission.runs is None:
            admission.begin_training()
        due = admission.due_in_micro_step
    ledger = MicroStep(step, micro_step, due, here.context)
    return Block(window=ledger), ledger


def window_block(admission: Admission, name: str) -> tuple[Block, Window]:
    """Return a block that opens another window, and the window.

    Raises:
        ValueError: No scope of the policy counts in such a window, and calls are not observed.
        ContextSwitchRefused: A window of that name is open already.
    """
    policy = admission.policy
    can_be_one = isinstance(name, str) and name not in {"", MICRO_STEP}
    if name not in {STEP, *policy.windows} and not (can_be_one and admission.mode == "observe"):
        raise ValueError(
            f"{name!r} is not a window of {admission.history.module}'s policy, whose scopes count "
            f"per {sorted({MICRO_STEP, *policy.windows})}"
        )
    here = admission.open.position()
    if here.window(name) is not None:
        _refuse_switch(admission, here, f"another window {name!r}")
    due = {}
    if here.context != "inference":
        if admission.runs is None:
            admission.begin_training()
        due = policy.due(name)
    ledger = Window(name, due, here.context)
    return Block(window=ledger), ledger


def scope_block(admission: Admission, scope: str) -> tuple[Block, Window]:
    """Return a block that opens a scope, and the window that its calls are booked in.

    Raises:
        ValueError: The policy has no such scope, or one that is not opened in code.
        NoContext: Neither training nor inference is declared.
        UnsanctionedCall: The window that the scope counts in is not open.
    """
    policy, module = admission.policy, admission.history.module
    if scope not in policy.scopes:
        raise ValueError(
            f"{scope!r} is not a scope of {module}'s policy, which has {sorted(policy.scopes)}"
        )
    full = policy.in_full[scope]
    if not full.is_opened:
        raise ValueError(
            f"the scope {scope!r} of {module}'s policy is not opened in code: its calls are known "
            "by their caller or their state"
        )
    here = admission.violations.require_context(f"the scope {scope!r} was opened")
    window = here.window(full.per)
    block = Block(scope=scope, within=here.context, ledger=here.micro_step)
    if window is None and full.per == MICRO_STEP:
        due = {scope: full.calls} if here.context == "training" else {}
        window = block.window = block.ledger = MicroStep(None, None, due, here.context)
    elif window is None:
        if here.context == "training":
            detail = f": the scope {scope!r} was opened, and no window {full.per!r} is open"
            admission.violations.violate("UnsanctionedCall", here, detail)
        window = Window(full.per, {}, here.context)
    window.opened[scope] = window.opened.get(scope, 0) + 1
    return block, window


def _refuse_switch(admission: Admission, here: Position, what: str) -> None:
    admission.violations.violate("ContextSwitchRefused", here, f": {what} was asked for")
