"""Sizes and probabilities of a MegaContext model, checked before anything is built."""

from dataclasses import dataclass

import numpy as np

from megacontext.allocators.training import TrainingWCVariationAllocator
from megacontext.checks import check_choice, check_numbers
from megacontext.cut import Geometry, UnreachableTarget, kept_tokens


@dataclass(frozen=True)
class MCConfig:
    """Everything that defines a model and its training working contexts.

    Attributes:
        vocab_size: tokens; 256 for bytes.
        d_model, num_heads: width D and attention heads of language model and LensNet.
        lm_layers, lens_layers: their depths.
        block_size: tokens of a LOD1 gist, K.
        max_lod: 1 or 2.
        sequence_tokens: longest training sequence, N.
        train_wc_length: entries of every training working context, W.
        recent_tokens: protected tail that stays at LOD0.
        horizon_tokens: the last tokens, on which variants are compared; part of the tail.
        focus_window: most entries of the focus view that LensNet scores.
        num_variants: random variants per sequence, beside the baseline.
        lod2_probability: of a LOD2 collapse, where the target permits.
        temperature, advantage_scale: of the preference loss.
        seed: of the initial weights and of the training allocator.
        scored, judged, causal_lens, rank_weight, budget_weight, standardize: what the recipe does
            otherwise, for ablations: LensNet scores each ``"variant"`` instead of one ``"view"``;
            variants are judged by ``"all"`` their tokens instead of the ``"horizon"``; LensNet
            looks back only; weights of the auxiliary losses; advantages are divided by their
            standard deviation over the batch.
        language_model: a folder that ``save_pretrained`` of Hugging Face transformers made, or the
            ``config.json`` of one for random weights; "" for our own model. ``vocab_size`` and
            ``d_model`` must be the model's (`hf_loading.language_model_sizes`), and
            ``lm_layers`` says nothing.

    Raises:
        TypeError, ValueError: a value that makes no model, named.
        UnreachableTarget: no collapses make ``train_wc_length`` entries of a full sequence; the
            message names the nearest lengths.
    """

    vocab_size: int = 256
    d_model: int = 96
    num_heads: int = 4
    lm_layers: int = 3
    lens_layers: int = 2
    block_size: int = 8
    max_lod: int = 2
    sequence_tokens: int = 384
    train_wc_length: int = 160
    recent_tokens: int = 64
    horizon_tokens: int = 32
    focus_window: int = 1_024
    num_variants: int = 3
    lod2_probability: float = 0.1
    temperature: float = 0.3
    advantage_scale: float = 0.5
    seed: int = 0
    scored: str = "view"
    judged: str = "horizon"
    causal_lens: bool = False
    rank_weight: float = 0.0
    budget_weight: float = 0.0
    standardize: bool = False
    language_model: str = ""

    def __post_init__(self) -> None:
        weights = ("rank_weight", "budget_weight")
        check_numbers(self, may_be_zero=("lod2_probability", "seed", *weights))
        check_choice("scored", self.scored, ("view", "variant"))
        check_choice("judged", self.judged, ("horizon", "all"))
        if self.d_model % (2 * self.num_heads):
            raise ValueError(
                f"d_model {self.d_model} must be a multiple of 2 · num_heads = "
                f"{2 * self.num_heads}: rotary positions turn pairs of features"
            )
        if self.horizon_tokens >= self.recent_tokens:
            raise ValueError(
                f"horizon_tokens {self.horizon_tokens} must be fewer than recent_tokens "
                f"{self.recent_tokens}: LensNet needs recent tokens before the horizon to look at"
            )
        if self.horizon_tokens >= self.sequence_tokens:
            raise ValueError(
                f"horizon_tokens {self.horizon_tokens} must be fewer than sequence_tokens "
                f"{self.sequence_tokens}"
            )
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, not {self.seed}")
        self.new_allocator()  # checks block_size, max_lod and probability
        self._check_target()
        self.geometry.focus_view(self.sequence_tokens, self.horizon_tokens)

    @property
    def geometry(self) -> Geometry:
        """The shape of trees and working contexts; its window is that of the focus view."""
        return Geometry(self.block_size, self.max_lod, self.recent_tokens, self.focus_window)

    def new_allocator(self) -> TrainingWCVariationAllocator:
        """The training allocator of this configuration, at the start of its random sequence."""
        return TrainingWCVariationAllocator(
            block_size=self.block_size,
            max_lod=self.max_lod,
            lod2_probability=self.lod2_probability,
            recent_tokens=self.recent_tokens,
            seed=self.seed,
        )

    def _check_target(self) -> None:
        """Any sequence length up to the longest must collapse to the target, after trimming."""
        if self.train_wc_length > self.sequence_tokens:
            raise UnreachableTarget(
                f"train_wc_length {self.train_wc_length} exceeds sequence_tokens "
                f"{self.sequence_tokens}; the longest possible is {self.sequence_tokens}"
            )
        lengths = range(1, self.sequence_tokens + 1)
        allocator = self.new_allocator()
        shortest = np.array([allocator.reachable_length(length, 0) for length in lengths])

        def reachable_from_all(target: int) -> bool:
            longest = kept_tokens(self.sequence_tokens, target, self.block_size)
            return bool((shortest[target - 1 : longest : self.block_size - 1] <= target).all())

        if not reachable_from_all(self.train_wc_length):
            longer = range(self.train_wc_length + 1, self.sequence_tokens + 1)
            nearest = next(length for length in longer if reachable_from_all(length))
            raise UnreachableTarget(
                f"train_wc_length {self.train_wc_length} cannot be reached from every sequence of "
                f"up to {self.sequence_tokens} tokens with block_size {self.block_size}, LODs up "
                f"to {allocator.max_lod} and {self.recent_tokens} recent tokens at LOD0; "
                f"the nearest length that can is {nearest}"
            )
