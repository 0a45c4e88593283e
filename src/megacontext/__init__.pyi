"""The public names, and where each of them lives; `__init__.py` gives them out."""

from megacontext.allocators.cut import Cut as Cut
from megacontext.allocators.cut import UnreachableTarget as UnreachableTarget
from megacontext.allocators.rules import FocusTuning as FocusTuning
from megacontext.allocators.training import (
    TrainingWCVariationAllocator as TrainingWCVariationAllocator,
)
from megacontext.config import MCConfig as MCConfig
from megacontext.config import Recipe as Recipe
from megacontext.controller import MCController as MCController
from megacontext.inference.session_config import SessionConfig as SessionConfig
from megacontext.inference.session_report import FocusEvent as FocusEvent
from megacontext.inference.session_report import InferenceReport as InferenceReport
from megacontext.micro_step import MCBatchResult as MCBatchResult
from megacontext.micro_step import Variants as Variants
from megacontext.model.gistnet import GistNet as GistNet
from megacontext.model.hf_loading import language_model_sizes as language_model_sizes
from megacontext.model.language_model import LanguageModel as LanguageModel
from megacontext.model.lensnet import LensNet as LensNet
from megacontext.model.tree import MegaContextTree as MegaContextTree
from megacontext.model.working_context import WorkingContext as WorkingContext
from megacontext.training.metric_sinks import MetricSink as MetricSink
from megacontext.training.pretrained import load_model as load_model
from megacontext.training.run import train as train
from megacontext.training.train_config import TrainConfig as TrainConfig
from megacontext.training.train_result import TrainResult as TrainResult
