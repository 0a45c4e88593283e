"""The public names, and where each of them lives; `__init__.py` gives them out."""

from megacontext.allocators.rules import FocusTuning as FocusTuning
from megacontext.allocators.training import (
    TrainingWCVariationAllocator as TrainingWCVariationAllocator,
)
from megacontext.config import MCConfig as MCConfig
from megacontext.config import Recipe as Recipe
from megacontext.controller import MCController as MCController
from megacontext.cut import Cut as Cut
from megacontext.cut import UnreachableTarget as UnreachableTarget
from megacontext.gistnet import GistNet as GistNet
from megacontext.hf_loading import language_model_sizes as language_model_sizes
from megacontext.language_model import LanguageModel as LanguageModel
from megacontext.lensnet import LensNet as LensNet
from megacontext.metric_sinks import MetricSink as MetricSink
from megacontext.micro_step import MCBatchResult as MCBatchResult
from megacontext.micro_step import Variants as Variants
from megacontext.pretrained import load_model as load_model
from megacontext.run import train as train
from megacontext.session_config import SessionConfig as SessionConfig
from megacontext.session_report import FocusEvent as FocusEvent
from megacontext.session_report import InferenceReport as InferenceReport
from megacontext.train_config import TrainConfig as TrainConfig
from megacontext.train_result import TrainResult as TrainResult
from megacontext.tree import MegaContextTree as MegaContextTree
from megacontext.working_context import WorkingContext as WorkingContext
