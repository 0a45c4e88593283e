"""The tree over a history (tokens, gists, gists of gists, ...) and the one gather out of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megacontext.allocators.cut import Cut, Ints, child_nodes, spans_of
from megacontext.model.focus_view import FocusView
from megacontext.model.gistnet import GistNet
from megacontext.model.matching import NO_TOKEN
from megacontext.model.transfer import new_host, to_device
from megacontext.model.working_context import NO_LABEL, WorkingContext


@dataclass(frozen=True)
class MegaContextTree:
    """The levels of B histories.

    Attributes:
        tokens: The histories, int64 ``[B, N]``; shorter ones are filled up at the end, and no cut
            of theirs reaches that far.
        labels: What entries are to predict: the tokens, or `NO_LABEL`; int64 ``[B, N]``.
        lengths: Tokens of each history, B host integers.
        levels: LOD0, LOD1, LOD2, ... embeddings, ``[B, N + N//K + N//K² + ..., D]``.
        block_size: Tokens of a LOD1 gist, K.
        max_lod: The highest level built.
    """

    tokens: Tensor
    labels: Tensor
    lengths: tuple[int, ...]
    levels: Tensor
    block_size: int
    max_lod: int

    @classmethod
    def build(
        cls,
        tokens: Tensor,
        embeddings: Tensor,
        gistnet: GistNet,
        *,
        block_size: int,
        max_lod: int,
        lengths: Sequence[int] | None = None,
        labels: Tensor | None = None,
    ) -> "MegaContextTree":
        """Build all levels; GistNet makes each of them once, for the whole batch.

        Args:
            tokens: The histories, int64 ``[B, N]``.
            embeddings: Of the tokens, ``[B, N, D]``.
            gistnet: Makes the gists.
            block_size: Tokens of a LOD1 gist, K.
            max_lod: The highest level to build.
            lengths: Tokens of each history; N for all by default.
            labels: What entries are to predict, int64 ``[B, N]``; the tokens by default.

        Returns:
            The tree.
        """
        batch, num_tokens, _ = embeddings.shape
        return cls(
            tokens=tokens,
            labels=tokens if labels is None else labels,
            lengths=tuple(lengths) if lengths is not None else (num_tokens,) * batch,
            levels=gistnet(embeddings, block_size, max_lod),
            block_size=block_size,
            max_lod=max_lod,
        )

    def working_context(self, cuts: Sequence[Sequence[Cut]]) -> WorkingContext:
        """Gather the embeddings of all cuts at once.

        Args:
            cuts: Per history, its cuts; the same number V for each.

        Returns:
            R = B·V working contexts, those of the first history first.
        """
        history = np.repeat(np.arange(len(cuts)), [len(of_history) for of_history in cuts])[:, None]
        rows = [cut for of_history in cuts for cut in of_history]
        positions, lods, pads = _left_padded(rows)
        num_tokens, spans = self.tokens.shape[1], spans_of(lods, self.block_size)
        in_levels = self._in_levels(history, positions, lods)
        following = positions + spans
        labelled = ~pads & (following < np.array(self.lengths)[history])
        following = np.where(labelled, history * num_tokens + following, -1)
        host = new_host((6, *positions.shape), self.levels.device)
        for plane, of_entries in zip(
            host.numpy(), (in_levels, positions, spans, lods, following, pads), strict=True
        ):
            plane[:] = of_entries
        index, starts, spans_, lods_, label_index, padded = to_device(host, self.levels.device)
        embeddings = self.levels.flatten(0, 1).index_select(0, index.flatten())
        labels = self.labels.take(label_index.clamp(min=0))
        return WorkingContext(
            embeddings=embeddings.view(*index.shape, -1),
            starts=starts,
            spans=spans_,
            lods=lods_,
            labels=labels.masked_fill(label_index < 0, NO_LABEL),
            pad_mask=padded.bool() if pads.any() else None,
        )

    def focus_view(self, cuts: Sequence[Cut], query_tokens: int | None) -> FocusView:
        """Gather what LensNet reads.

        Args:
            cuts: The focus view of each history.
            query_tokens: Entries at the end of each that are LensNet's query: what stands below
                the others is gathered too. None for nothing but the entries.

        Returns:
            The views.
        """
        entries = self.working_context([[cut] for cut in cuts])
        if query_tokens is None:
            return FocusView(entries)
        positions, lods, pads = _left_padded(cuts)
        history = np.arange(len(cuts))[:, None]
        candidates = slice(max(positions.shape[1] - query_tokens, 0))
        starts, below = child_nodes(positions[:, candidates], lods[:, candidates], self.block_size)
        of_blocks = ((lods == 1) & ~pads)[:, candidates, None]
        of_tokens = np.where((lods == 0) & ~pads, positions, NO_TOKEN)
        return FocusView(
            entries,
            tokens=self._tokens_at(history, of_tokens),
            children=self._gathered(self._in_levels(history[..., None], starts, below)),
            child_tokens=self._tokens_at(history[..., None], np.where(of_blocks, starts, NO_TOKEN)),
        )

    def _in_levels(self, history: Ints, starts: Ints, lods: Ints) -> Ints:
        """Number nodes as they stand in the flattened levels of all histories."""
        num_tokens, k = self.tokens.shape[1], self.block_size
        offsets = np.cumsum([0, *(num_tokens // k**lod for lod in range(self.max_lod + 1))])
        numbers: Ints = history * offsets[-1] + offsets[lods] + starts // spans_of(lods, k)
        return numbers

    def _gathered(self, numbers: Ints) -> Tensor:
        """Gather embeddings of numbered nodes, ``[..., D]``."""
        index = to_device(torch.from_numpy(numbers), self.levels.device)
        embeddings = self.levels.flatten(0, 1).index_select(0, index.flatten())
        return embeddings.view(*index.shape, embeddings.shape[-1])

    def _tokens_at(self, history: Ints, positions: Ints) -> Tensor:
        """Gather tokens at positions of histories, int64; `NO_TOKEN` where a position is that."""
        none = positions == NO_TOKEN
        numbers = np.where(none, NO_TOKEN, history * self.tokens.shape[1] + positions)
        index = to_device(torch.from_numpy(numbers), self.tokens.device)
        return self.tokens.take(index.clamp(min=0)).masked_fill(index == NO_TOKEN, NO_TOKEN)


def _left_padded(cuts: Sequence[Cut]) -> tuple[Ints, Ints, NDArray[np.bool_]]:
    """Lay cuts out as rows of one width.

    Returns:
        Positions and LODs of R cuts, 0 at pads, int64 ``[R, W]``; and where the pads are, bool.
    """
    width = max(map(len, cuts))
    positions, lods = np.zeros((2, len(cuts), width), dtype=np.int64)
    for row, cut in enumerate(cuts):
        positions[row, width - len(cut) :] = cut.positions
        lods[row, width - len(cut) :] = cut.lods
    lengths = np.array([len(cut) for cut in cuts])
    return positions, lods, np.arange(width) < width - lengths[:, None]
