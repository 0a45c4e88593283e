"""The working context: what the language model and LensNet read."""

from dataclasses import dataclass

from torch import Tensor

NO_LABEL = -100  # what cross_entropy ignores


@dataclass(frozen=True)
class WorkingContext:
    """A batch of working contexts as tensors, left-padded where they differ in length.

    Attributes:
        embeddings: Of the entries, float ``[R, W, D]``.
        starts: First token of each entry, int64 ``[R, W]``.
        spans: Tokens of each entry, int64 ``[R, W]``.
        lods: Level of detail of each entry, int64 ``[R, W]``.
        labels: The token right after each entry, int64 ``[R, W]``; `NO_LABEL` at pads and where the
            sequence ends.
        pad_mask: Where pads are, bool ``[R, W]``; None when nothing is padded.
    """

    embeddings: Tensor
    starts: Tensor
    spans: Tensor
    lods: Tensor
    labels: Tensor
    pad_mask: Tensor | None
