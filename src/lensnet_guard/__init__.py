"""Call contracts at run time for PyTorch modules: who may call, in which context, how often.

The names are imported when they are first used: the command line and the pytest plugin live in this
package too, and start without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lensnet_guard._version import __version__

if TYPE_CHECKING:
    from lensnet_guard.budget import MicroStep
    from lensnet_guard.errors import (
        BudgetExceeded,
        BudgetUnmet,
        BypassedGuard,
        ContextSwitchRefused,
        LensNetViolation,
        NoContext,
        ReentrantCall,
        UnsanctionedCall,
    )
    from lensnet_guard.guard import Guard
    from lensnet_guard.hazards import LensNetHazard
    from lensnet_guard.install import guard_module, lensnet_guard
    from lensnet_guard.policy import CallPolicy
    from lensnet_guard.proxy import guard_of
    from lensnet_guard.record import CallRecord

__all__ = [
    "BudgetExceeded",
    "BudgetUnmet",
    "BypassedGuard",
    "CallPolicy",
    "CallRecord",
    "ContextSwitchRefused",
    "Guard",
    "LensNetHazard",
    "LensNetViolation",
    "MicroStep",
    "NoContext",
    "ReentrantCall",
    "UnsanctionedCall",
    "__version__",
    "guard_module",
    "guard_of",
    "lensnet_guard",
]

_HOMES = {
    "BudgetExceeded": "errors",
    "BudgetUnmet": "errors",
    "BypassedGuard": "errors",
    "CallPolicy": "policy",
    "CallRecord": "record",
    "ContextSwitchRefused": "errors",
    "Guard": "guard",
    "LensNetHazard": "hazards",
    "LensNetViolation": "errors",
    "MicroStep": "budget",
    "NoContext": "errors",
    "ReentrantCall": "errors",
    "UnsanctionedCall": "errors",
    "guard_module": "install",
    "guard_of": "proxy",
    "lensnet_guard": "install",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
