"""MegaContext: a language model over mixed levels of detail, and the LensNet that picks them."""

from megacontext.allocators.training import TrainingWCVariationAllocator
from megacontext.config import MCConfig
from megacontext.controller import MCController
from megacontext.cut import Cut, UnreachableTarget
from megacontext.gistnet import GistNet
from megacontext.language_model import LanguageModel
from megacontext.lensnet import LensNet
from megacontext.micro_step import MCBatchResult, Variants
from megacontext.session_config import SessionConfig
from megacontext.session_report import FocusEvent, InferenceReport
from megacontext.tree import MegaContextTree
from megacontext.working_context import WorkingContext

__all__ = [
    "Cut",
    "FocusEvent",
    "GistNet",
    "InferenceReport",
    "LanguageModel",
    "LensNet",
    "MCBatchResult",
    "MCConfig",
    "MCController",
    "MegaContextTree",
    "SessionConfig",
    "TrainingWCVariationAllocator",
    "UnreachableTarget",
    "Variants",
    "WorkingContext",
]
