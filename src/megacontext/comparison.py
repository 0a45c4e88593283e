"""What LensNet is to score in a micro-step, and what the variants' losses say of it.

The recipe's comparison comes first; what it is compared with in ablations follows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megacontext.allocators.cut import Cut, Geometry, held_at_lod0
from megacontext.config import MCConfig
from megacontext.micro_step import Variants
from megacontext.model.focus_view import FocusView
from megacontext.model.transfer import to_device
from megacontext.model.tree import MegaContextTree
from megacontext.preference import PreferencePairs, make_pairs, paired

Judge: TypeAlias = Callable[[MegaContextTree, Variants, Tensor], Tensor]


class Comparison(Protocol):
    """Compares the variants of a micro-step."""

    def __call__(
        self, tree: MegaContextTree, variants: Variants, nll: Tensor
    ) -> tuple[FocusView, PreferencePairs]:
        """Decide what LensNet is to score, and what the variants' losses say of it.

        Args:
            tree: Of the histories.
            variants: The working contexts.
            nll: Of each entry's label, nats, ``[B · (1 + V), W]``.

        Returns:
            The entries to score, and the pairs, whose labels are of their scores.
        """


def comparison_of(config: MCConfig) -> Comparison:
    """Make the comparison that a configuration asks for."""
    judge: Judge = judge_all
    if config.recipe.judged == "horizon":
        judge = partial(judge_horizon, horizon_tokens=config.horizon_tokens)
    if config.recipe.scored == "variant":
        return VariantComparison(judge)
    geometry, horizon = config.geometry, config.horizon_tokens
    return ViewComparison(judge, geometry, horizon, config.query_tokens)


@dataclass(frozen=True)
class ViewComparison:
    """The recipe's: LensNet scores one focus view of each sequence, which ends before the horizon.

    Attributes:
        judge: Gives the loss of each variant.
        geometry: Of the focus view.
        horizon_tokens: Length of the horizon.
        query_tokens: As for `MegaContextTree.focus_view`.
    """

    judge: Judge
    geometry: Geometry
    horizon_tokens: int
    query_tokens: int | None = None

    def __call__(
        self, tree: MegaContextTree, variants: Variants, nll: Tensor
    ) -> tuple[FocusView, PreferencePairs]:
        """Pair variants by what they hold at LOD0 of the view's gists; see `Comparison`."""
        judged = self.judge(tree, variants, nll)
        focus_view, horizon = self.geometry.focus_view, self.horizon_tokens
        view_of = {length: focus_view(length, horizon) for length in set(tree.lengths)}
        views = [view_of[length] for length in tree.lengths]
        view = tree.focus_view(views, self.query_tokens)
        held = held_by_variants(tree, variants, views)
        return view, make_pairs(judged, held, gists=view.entries.lods > 0)


def judge_horizon(
    tree: MegaContextTree, variants: Variants, nll: Tensor, horizon_tokens: int
) -> Tensor:
    """Sum the NLL of each variant over the tokens of the horizon.

    Args:
        tree: Of the histories.
        variants: The working contexts.
        nll: Of each entry's label, nats, ``[B · (1 + V), W]``.
        horizon_tokens: Length of the horizon.

    Returns:
        The sums, nats, ``[B, 1 + V]``.
    """
    context, per_history = variants.working_context, len(variants.cuts[0])
    first_judged: Tensor | int = tree.lengths[0] - horizon_tokens
    if len(set(tree.lengths)) > 1:
        first = np.repeat(tree.lengths, per_history)[:, None] - horizon_tokens
        first_judged = to_device(torch.from_numpy(first), nll.device)
    in_horizon = context.starts + context.spans >= first_judged
    return (nll * in_horizon).sum(-1).view(-1, per_history)


def held_by_variants(tree: MegaContextTree, variants: Variants, views: Sequence[Cut]) -> Tensor:
    """Tell which spans of a view's entries each variant holds at LOD0.

    Args:
        tree: Of the histories.
        variants: The working contexts.
        views: The focus view of each history, B of them.

    Returns:
        Whether it does, bool ``[B, 1 + V, E]``; False at pads on the left.
    """
    width, per_history = max(map(len, views)), len(variants.cuts[0])
    held = np.zeros((len(views), per_history, width), dtype=np.bool_)
    for length in set(tree.lengths):  # those that are as long have the same view
        rows = [row for row, other in enumerate(tree.lengths) if other == length]
        view = views[rows[0]]
        cuts = [cut for row in rows for cut in variants.cuts[row]]
        of_view = held_at_lod0(cuts, view, length)
        held[rows, :, width - len(view) :] = of_view.reshape(len(rows), per_history, -1)
    return to_device(torch.from_numpy(held), tree.levels.device)


# For ablations alone -----------------------------------------------------------------------------


def judge_all(tree: MegaContextTree, variants: Variants, nll: Tensor) -> Tensor:
    """Sum the NLL of each variant over all its tokens, nats, ``[B, 1 + V]``."""
    return nll.sum(-1).view(len(tree.lengths), -1)


@dataclass(frozen=True)
class VariantComparison:
    """The plain recipe's: LensNet scores the variants themselves.

    Attributes:
        judge: Gives the loss of each variant.
    """

    judge: Judge

    def __call__(
        self, tree: MegaContextTree, variants: Variants, nll: Tensor
    ) -> tuple[FocusView, PreferencePairs]:
        """Pair variants by how much detail the better one has of the worse; see `Comparison`."""
        judged = self.judge(tree, variants, nll)
        detail = [
            relative_detail(cuts, length)
            for cuts, length in zip(variants.cuts, tree.lengths, strict=True)
        ]
        host = torch.from_numpy(np.stack(detail, axis=1))
        finer, coarser = to_device(host, nll.device)
        return FocusView(variants.working_context), make_plain_pairs(judged, finer, coarser)


def relative_detail(cuts: Sequence[Cut], num_tokens: int) -> NDArray[np.bool_]:
    """Tell where cut i holds all of entry e of cut j in more, and in less, detail than cut j does.

    Args:
        cuts: V of the same length W.
        num_tokens: Of the history that they cut.

    Returns:
        Whether it does, bool ``[2, V, V, W]`` by (more or less, i, j, e).
    """
    lods = np.stack([cut.token_lods(num_tokens) for cut in cuts])
    lods = np.where(lods < 0, 3, lods)  # what a cut does not hold is held in least detail
    levels = np.arange(3)[:, None, None]
    finer_or_coarser = np.stack([lods < levels, lods > levels]).cumsum(axis=-1)
    before = np.pad(finer_or_coarser, ((0, 0), (0, 0), (0, 0), (1, 0)))  # [2, 3, V, N + 1]
    held = np.zeros((2, len(cuts), len(cuts), len(cuts[0])), dtype=np.bool_)
    for j, cut in enumerate(cuts):
        tokens = before[:, cut.lods, :, cut.ends] - before[:, cut.lods, :, cut.positions]
        held[:, :, j] = (tokens == cut.spans[:, None, None]).transpose(1, 2, 0)
    return held


def make_plain_pairs(nll: Tensor, finer: Tensor, coarser: Tensor) -> PreferencePairs:
    """Pair up variants as the plain recipe does: LensNet scores the variants themselves.

    An entry of the pair's worse variant is told +1 where the better one holds all of its span in
    more detail, -1 where it holds it in less.

    Args:
        nll: As for `preference.make_pairs`, ``[B, V]``.
        finer: Whether variant i holds entry e of variant j in more detail than j does, bool
            ``[B, V, V, W]`` by (i, j, e).
        coarser: The same for less detail.

    Returns:
        Pairs for scores ``[B, V · W]``.
    """
    batch, variants, _, width = finer.shape
    first, second, advantages = paired(nll)
    told = finer.to(nll.dtype) - coarser.to(nll.dtype)
    first_is_better = advantages > 0
    better = torch.where(first_is_better, first, second)
    worse = torch.where(first_is_better, second, first)
    of_worse = told[torch.arange(batch, device=nll.device)[:, None], better, worse]  # [B, P, W]
    labels = torch.zeros(*worse.shape, variants, width, device=nll.device, dtype=nll.dtype)
    labels.scatter_(2, worse[..., None, None].expand(-1, -1, 1, width), of_worse[:, :, None])
    sign = torch.where(first_is_better, 1.0, -1.0)  # the policy prefers the first where positive
    return PreferencePairs(advantages, labels.flatten(2) * sign[..., None])
