"""What goes into a micro-step, its variants, and what comes out of it, as values."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megacontext.allocators.cut import Cut
from megacontext.model.working_context import NO_LABEL, WorkingContext

Cuts = tuple[tuple[Cut, ...], ...]


@dataclass(frozen=True)
class Variants:
    """The working contexts that are compared: per history the LOD0 baseline, then random cuts.

    Attributes:
        cuts: The cut of each, ``[B][1 + V]``, the baseline first.
        working_context: All of them, ``[B · (1 + V), W]``.
    """

    cuts: Cuts
    working_context: WorkingContext


@dataclass(frozen=True)
class MCBatchResult:
    """What a micro-step produced.

    Attributes:
        loss: What the trainer calls backward on, ``lm_loss + lens_loss``; scalar.
        lm_loss: Mean NLL of every labelled entry of every variant, nats; scalar.
        lens_loss: The preference loss, which trains LensNet alone; scalar.
        variants: The working contexts that were compared, without their part of the graph.
        metrics: Scalars by name, left on the device; nan where undefined (an LOD that no entry
            has), except ``lensnet_calls``, an int.
    """

    loss: Tensor
    lm_loss: Tensor
    lens_loss: Tensor
    variants: Variants
    metrics: dict[str, Tensor | int]


@dataclass(frozen=True)
class LensResult:
    """What a micro-step of LensNet alone produced.

    Attributes:
        loss: The preference loss; scalar.
        metrics: As in `MCBatchResult`, but for those of the language model.
    """

    loss: Tensor
    metrics: dict[str, Tensor | int]


def without_graph(variants: Variants) -> Variants:
    """Return the variants for whoever looks at them later: nothing is kept for a backward."""
    context = variants.working_context
    return Variants(variants.cuts, replace(context, embeddings=context.embeddings.detach()))


def scores_by_sequence(
    scores: Tensor, view: WorkingContext, sequences: int
) -> tuple[Tensor, Tensor]:
    """Return LensNet's scores in the dtype of what it read, and which of them are gists'.

    There is one row for each sequence, also where its variants were scored one by one.

    Args:
        scores: As LensNet gave them out, of the view's shape.
        view: What LensNet read.
        sequences: Number of sequences, B.

    Returns:
        The scores, and whether each is a gist's, bool; ``[B, E]`` each.
    """
    scores = scores.to(view.embeddings.dtype).view(sequences, -1)
    return scores, (view.lods > 0).view_as(scores)


def lod_losses(nll: Tensor, context: WorkingContext) -> dict[str, Tensor]:
    """Return the mean NLL after entries of each LOD, nats; nan where no such entry has a label."""
    labelled = context.labels != NO_LABEL
    of_lod = context.lods == torch.arange(3, device=nll.device)[:, None, None]
    of_lod &= labelled
    means = (nll.detach() * of_lod).sum((1, 2)) / of_lod.sum((1, 2))
    return {f"lod_loss/{lod}": mean for lod, mean in enumerate(means)}
