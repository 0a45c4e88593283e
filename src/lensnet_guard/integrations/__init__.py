"""Guards in other people's training loops; docs/integrations.md has the recipes.

Each of ``lensnet_guard.integrations.lightning``, ``.transformers`` and ``.accelerate`` needs its
library; what is here needs none.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from lensnet_guard import Guard, Verdict, Verdicts, guard_of
from lensnet_guard.integrations._place import GuardLost
from lensnet_guard.integrations._preset import NoContract
from lensnet_guard.integrations._watches import NothingChecked

__all__ = ["GuardLost", "NoContract", "NothingChecked", "Verdict", "Verdicts", "sanctioned"]

# Where wrappers hold what they wrap: DDP and FSDP, torch.compile, accelerate and Fabric.
_WRAPPED = ("module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module")


def sanctioned(module: object, scope: str) -> AbstractContextManager[Any]:
    """Return the scope of a module's guard, for a model that also works where nobody guards it.

    ``with sanctioned(self.reference, "kl"):`` is ``guard.sanctioned("kl")`` while the module is
    guarded. It does nothing while it is not: without an integration, and with the mode ``"off"``.

    Args:
        module: The guarded module, or any other; or what wraps it (DDP, FSDP, ``torch.compile``).
        scope: The name of a scope of its policy.

    Returns:
        The block to open.

    Raises:
        ValueError: The policy has no such scope; or the module is not guarded, and a part of it is.
        NoContext: As ``guard.sanctioned``.
        BudgetUnmet: As ``guard.sanctioned``.
        LensNetViolation: As ``guard.sanctioned``.
    """
    guard = _guard_in(module)
    if guard is not None:
        return guard.sanctioned(scope)
    for name, part in module.named_modules() if isinstance(module, nn.Module) else ():
        if name and (inner := guard_of(part)) is not None:
            raise ValueError(
                f"sanctioned({type(module).__name__}, {scope!r}) opens nothing: not this module is "
                f"guarded, but its part {name!r} ({inner.name}). Give that one to sanctioned"
            )
    return nullcontext()


def _guard_in(module: object) -> Guard | None:
    """Return the guard of a module, or of what it wraps."""
    while (guard := guard_of(module)) is None:
        held = (getattr(module, "_modules", {}).get(name) for name in _WRAPPED)
        module = next((one for one in held if one is not None), None)
        if module is None:
            return None
    return guard
