"""The public names, and where each of them lives; `__init__.py` gives them out."""

from lensnet_guard._version import __version__ as __version__
from lensnet_guard.boundary.hazards import LensNetHazard as LensNetHazard
from lensnet_guard.calls.budget import MicroStep as MicroStep
from lensnet_guard.calls.errors import BudgetExceeded as BudgetExceeded
from lensnet_guard.calls.errors import BudgetUnmet as BudgetUnmet
from lensnet_guard.calls.errors import BypassedGuard as BypassedGuard
from lensnet_guard.calls.errors import ContextSwitchRefused as ContextSwitchRefused
from lensnet_guard.calls.errors import LensNetViolation as LensNetViolation
from lensnet_guard.calls.errors import NoContext as NoContext
from lensnet_guard.calls.errors import RankDivergence as RankDivergence
from lensnet_guard.calls.errors import RankStopped as RankStopped
from lensnet_guard.calls.errors import ReentrantCall as ReentrantCall
from lensnet_guard.calls.errors import UnsanctionedCall as UnsanctionedCall
from lensnet_guard.calls.policy import CallPolicy as CallPolicy
from lensnet_guard.calls.policy import Mode as Mode
from lensnet_guard.calls.record import CallRecord as CallRecord
from lensnet_guard.guard import Guard as Guard
from lensnet_guard.guard import guard_of as guard_of
from lensnet_guard.install import guard_module as guard_module
from lensnet_guard.install import lensnet_guard as lensnet_guard
from lensnet_guard.logs.sinks import Sink as Sink
from lensnet_guard.ranks import compare_ranks as compare_ranks
from lensnet_guard.untested import UntestedTorch as UntestedTorch
