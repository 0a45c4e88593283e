"""Training on variants whose losses do not depend on LensNet, because the language model is frozen.

What such a model says of variants is known before LensNet is: so GistNet learns from it first, and
then LensNet alone, with one call in each micro-step as ever, and none of the language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from megacontext.controller import MCController
from megacontext.micro_step import LensResult
from megacontext.model.focus_view import FocusView
from megacontext.model.transfer import to_device
from megacontext.model.working_context import NO_LABEL
from megacontext.preference import PreferencePairs, make_pairs


@dataclass(frozen=True)
class Judged:
    """Sequences with variants whose losses are known, or guessed.

    Attributes:
        tokens: The sequences, all of the length that training keeps, int64 ``[B, T]``.
        nll: Of each variant, summed over the horizon, nats, ``[B, V]``.
        held: Which blocks of the history each variant holds at LOD0, bool ``[B, V, blocks]``.
    """

    tokens: Tensor
    nll: Tensor
    held: Tensor

    def to(self, device: torch.device) -> "Judged":
        """Return the same on a device."""
        return Judged(*(to_device(t, device) for t in (self.tokens, self.nll, self.held)))


def joined(parts: Sequence[Judged]) -> Judged:
    """Join sequences that have as many tokens and variants."""
    names = [field.name for field in fields(Judged)]
    return Judged(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def gist_loss(
    mc: MCController, tokens: Tensor, labelled: Tensor | None = None, step: int = 0
) -> Tensor:
    """Compute what random variants lose beside a frozen language model: GistNet learns by it.

    It is a micro-step of the language model alone; LensNet may not be called.

    Args:
        mc: The model.
        tokens: The sequences, int64 ``[B, T]``.
        labelled: The tokens that count, bool ``[B, T]``; all by default.
        step: Number of the optimizer step, for the records.

    Returns:
        The mean NLL of the labels of all variants but the baseline, nats; scalar.

    Raises:
        RuntimeError: It was called in inference context, or the language model is not frozen.
        TypeError: Tokens of another type.
        ValueError: Tokens that cannot be a batch.
    """
    with mc.training_context(), mc.language_model_step(step):
        tree = mc.build_tree(tokens, labelled=labelled)
        variants = tree.working_context([of_one[1:] for of_one in mc.build_variants(tree).cuts])
        with mc.reading_variants():
            nll = mc.token_nll(variants)
        return nll.sum() / (variants.labels != NO_LABEL).sum()


def process_judged(
    mc: MCController, judged: Judged, step: int = 0, micro_step: int = 0
) -> LensResult:
    """Run one training micro-step of LensNet alone, on variants whose losses are known.

    It differs from `process_batch` in that the language model is not called: one that is frozen
    may not be.

    Args:
        mc: The model.
        judged: Sequences, and what is known of their variants.
        step: Number of the optimizer step, for the records.
        micro_step: Number of the micro-batch within it, for the records.

    Returns:
        LensNet's loss and metrics.

    Raises:
        RuntimeError: It was called in inference context.
        TypeError: Tokens of another type.
        ValueError: Tokens that cannot be a batch; or a view without a gist for each block.
        LensNetViolation: Something else called LensNet.
    """
    with (
        mc.training_context(),
        mc.micro_step(step, micro_step, reads_variants=False) as ledger,
    ):
        lens_loss, metrics = mc.learn_preferences(*_judged_view(mc, judged))
        calls = sum(ledger.calls.values())
    return LensResult(lens_loss, metrics | {"lensnet_calls": calls})


def judged_agreement(mc: MCController, judged: Judged) -> Tensor:
    """Compute ``preference_agreement`` on variants whose losses are known.

    Args:
        mc: The model.
        judged: Sequences that are not trained on.

    Returns:
        The agreement, scalar on the device; nan where no pair tells anything.

    Raises:
        ContextSwitchRefused: A micro-step is open.
    """
    with mc.context("inference"), torch.no_grad():
        return mc.agreement(*_judged_view(mc, judged))


def _judged_view(mc: MCController, judged: Judged) -> tuple[FocusView, PreferencePairs]:
    """Make what LensNet is to score of sequences, and pairs of what is known of variants."""
    with torch.no_grad():
        tree = mc.build_tree(judged.tokens)
        cut = mc.config.geometry.focus_view(tree.lengths[0], mc.config.horizon_tokens)
        view = tree.focus_view([cut] * len(tree.lengths), mc.config.query_tokens)
    blocks = judged.held.shape[-1]
    if (found := int((cut.lods == 1).sum())) != blocks:
        raise ValueError(
            f"variants are judged by which of {blocks} blocks they hold, and the focus view "
            f"has {found} at LOD1; widen focus_window, or make sequences of another length"
        )
    held = F.pad(judged.held, (0, len(cut) - blocks))
    return view, make_pairs(judged.nll, held, gists=view.entries.lods > 0)
