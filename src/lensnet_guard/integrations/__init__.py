"""Guards in other people's training loops; docs/integrations.md has the recipes.

Each of ``lensnet_guard.integrations.lightning``, ``.transformers`` and ``.accelerate`` needs its
library; what is here needs none.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lensnet_guard import guard_of
from lensnet_guard.integrations._place import GuardLost
from lensnet_guard.integrations._watch import Verdict

__all__ = ["GuardLost", "Verdict", "sanctioned"]


def sanctioned(module: object, scope: str) -> AbstractContextManager[Any]:
    """Return the scope of a module's guard, for a model that also works where nobody guards it.

    ``with sanctioned(self.reference, "kl"):`` is ``guard.sanctioned("kl")`` while the module is
    guarded. It does nothing while it is not: without an integration, and with the mode ``"off"``.

    Args:
        module: The guarded module, or any other.
        scope: The name of a scope of its policy.

    Returns:
        The block to open.

    Raises:
        ValueError: The policy has no such scope.
        NoContext: As ``guard.sanctioned``.
        BudgetUnmet: As ``guard.sanctioned``.
        LensNetViolation: As ``guard.sanctioned``.
    """
    guard = guard_of(module)
    return guard.sanctioned(scope) if guard is not None else nullcontext()
