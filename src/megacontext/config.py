"""Sizes and probabilities of a MegaContext model, checked before anything is built."""

from dataclasses import dataclass, fields

from megacontext.allocators.training import TrainingWCVariationAllocator
from megacontext.cut import UnreachableTarget, focus_view, kept_tokens, shortest_length


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
    temperature: float = 0.5
    advantage_scale: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, field.type)):  # type: ignore[arg-type]
                raise TypeError(f"{field.name} must be {field.type.__name__}, not {value!r}")  # type: ignore[union-attr]
            if field.name not in ("lod2_probability", "seed") and not value > 0:
                raise ValueError(f"{field.name} must be positive, not {value}")
        if self.d_model % (2 * self.num_heads):
            raise ValueError(
                f"d_model {self.d_model} must be a multiple of 2 · num_heads = "
                f"{2 * self.num_heads}: rotary positions turn pairs of features"
            )
        if self.horizon_tokens > self.recent_tokens:
            raise ValueError(
                f"horizon_tokens {self.horizon_tokens} must not exceed recent_tokens "
                f"{self.recent_tokens}: variants are compared on tokens that all hold at LOD0"
            )
        self.new_allocator()  # checks block_size, max_lod, probability and seed
        self._check_target()
        focus_view(
            self.sequence_tokens,
            block_size=self.block_size,
            recent_tokens=self.recent_tokens,
            horizon_tokens=self.horizon_tokens,
            window=self.focus_window,
        )

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
        longest = kept_tokens(self.sequence_tokens, self.train_wc_length, self.block_size)
        lengths = range(self.train_wc_length, longest + 1, self.block_size - 1)
        shortest = max(
            shortest_length(
                length,
                block_size=self.block_size,
                max_lod=self.max_lod if self.lod2_probability > 0 else 1,
                recent_tokens=self.recent_tokens,
            )
            for length in lengths
        )
        if shortest > self.train_wc_length:
            raise UnreachableTarget(
                f"train_wc_length {self.train_wc_length} cannot be reached from every sequence of "
                f"up to {self.sequence_tokens} tokens with block_size {self.block_size}, LODs up "
                f"to {self.max_lod} and {self.recent_tokens} recent tokens at LOD0; "
                f"use at least {shortest}"
            )
