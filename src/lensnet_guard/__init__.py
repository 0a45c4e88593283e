"""Call contracts at run time for PyTorch modules: who may call, in which context, how often.

The names are imported when they are first used: the command line and the pytest plugin live in this
package too, and start without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lensnet_guard._version import __version__ as __version__

if TYPE_CHECKING:
    from lensnet_guard.budget import MicroStep as MicroStep
    from lensnet_guard.errors import BudgetExceeded as BudgetExceeded
    from lensnet_guard.errors import BudgetUnmet as BudgetUnmet
    from lensnet_guard.errors import BypassedGuard as BypassedGuard
    from lensnet_guard.errors import ContextSwitchRefused as ContextSwitchRefused
    from lensnet_guard.errors import LensNetViolation as LensNetViolation
    from lensnet_guard.errors import NoContext as NoContext
    from lensnet_guard.errors import RankDivergence as RankDivergence
    from lensnet_guard.errors import RankStopped as RankStopped
    from lensnet_guard.errors import ReentrantCall as ReentrantCall
    from lensnet_guard.errors import UnsanctionedCall as UnsanctionedCall
    from lensnet_guard.guard import Guard as Guard
    from lensnet_guard.hazards import LensNetHazard as LensNetHazard
    from lensnet_guard.install import guard_module as guard_module
    from lensnet_guard.install import lensnet_guard as lensnet_guard
    from lensnet_guard.policy import CallPolicy as CallPolicy
    from lensnet_guard.proxy import guard_of as guard_of
    from lensnet_guard.ranks import compare_ranks as compare_ranks
    from lensnet_guard.record import CallRecord as CallRecord
    from lensnet_guard.untested import UntestedTorch as UntestedTorch

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
    "RankDivergence": "errors",
    "RankStopped": "errors",
    "ReentrantCall": "errors",
    "UnsanctionedCall": "errors",
    "UntestedTorch": "untested",
    "compare_ranks": "ranks",
    "guard_module": "install",
    "guard_of": "proxy",
    "lensnet_guard": "install",
}

if not TYPE_CHECKING:  # a type checker goes by the imports above, or it would believe every name
    __all__ = sorted([*_HOMES, "__version__"])

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
