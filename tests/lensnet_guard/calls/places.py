"""Where a thread or a task stands."""


def where(guard):
    """Context, step and scope of here and now."""
    position = guard._admission.open.position()
    ledger = position.micro_step
    return position.context, ledger and ledger.step, position.scope


UNSET = (None, None, None)
