"""MegaContext: a language model over mixed levels of detail, and the LensNet that picks them.

The names are imported when they are first used: the command line lives in this package too, and
shows its help without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megacontext.allocators.training import (
        TrainingWCVariationAllocator as TrainingWCVariationAllocator,
    )
    from megacontext.config import MCConfig as MCConfig
    from megacontext.controller import MCController as MCController
    from megacontext.cut import Cut as Cut
    from megacontext.cut import UnreachableTarget as UnreachableTarget
    from megacontext.gistnet import GistNet as GistNet
    from megacontext.language_model import LanguageModel as LanguageModel
    from megacontext.lensnet import LensNet as LensNet
    from megacontext.micro_step import MCBatchResult as MCBatchResult
    from megacontext.micro_step import Variants as Variants
    from megacontext.session_config import SessionConfig as SessionConfig
    from megacontext.session_report import FocusEvent as FocusEvent
    from megacontext.session_report import InferenceReport as InferenceReport
    from megacontext.tree import MegaContextTree as MegaContextTree
    from megacontext.working_context import WorkingContext as WorkingContext

_HOMES = {
    "Cut": "cut",
    "FocusEvent": "session_report",
    "GistNet": "gistnet",
    "InferenceReport": "session_report",
    "LanguageModel": "language_model",
    "LensNet": "lensnet",
    "MCBatchResult": "micro_step",
    "MCConfig": "config",
    "MCController": "controller",
    "MegaContextTree": "tree",
    "SessionConfig": "session_config",
    "TrainingWCVariationAllocator": "allocators.training",
    "UnreachableTarget": "cut",
    "Variants": "micro_step",
    "WorkingContext": "working_context",
}

if not TYPE_CHECKING:  # a type checker goes by the imports above, or it would believe every name
    __all__ = sorted(_HOMES)

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
