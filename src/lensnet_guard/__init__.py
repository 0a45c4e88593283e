"""Call contracts at run time for PyTorch modules: who may call, in which context, how often."""

from lensnet_guard._version import __version__
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
