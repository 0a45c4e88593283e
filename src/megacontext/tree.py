"""The tree over a history (tokens, gists, gists of gists) and the one gather out of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megacontext.cut import Cut
from megacontext.gistnet import GistNet
from megacontext.working_context import NO_LABEL, WorkingContext


@dataclass(frozen=True)
class MegaContextTree:
    """The levels of B histories.

    Attributes:
        tokens: int64 ``[B, N]``; shorter histories are filled up at the end, and no cut of theirs
            reaches that far.
        lengths: tokens of each history, B host integers.
        labels: int64 ``[B, N]``, what entries are to predict: the tokens, or `NO_LABEL`.
        levels: LOD0, LOD1, LOD2 embeddings one after another, ``[B, N + N//K + N//K², D]``.
        block_size: tokens of a LOD1 gist, K.
        max_lod: highest level built.
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
            tokens, embeddings: int64 ``[B, N]`` and their embeddings ``[B, N, D]``.
            lengths: tokens of each history; N for all by default.
            labels: int64 ``[B, N]``; the tokens by default.
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
            cuts: per history, its cuts; the same number V for each.

        Returns:
            R = B·V working contexts, those of the first history first.
        """
        rows = [(b, cut) for b, of_history in enumerate(cuts) for cut in of_history]
        width = max(len(cut) for _, cut in rows)
        num_tokens = self.tokens.shape[1]
        sizes = [num_tokens // self.block_size**lod for lod in range(self.max_lod + 1)]
        offsets = np.cumsum([0, *sizes])

        # Host planes of one transfer: index into levels, start, LOD, index of the label, pad.
        planes = np.zeros((5, len(rows), width), dtype=np.int64)
        planes[3], planes[4] = -1, 1
        for row, (b, cut) in enumerate(rows):
            entries = slice(width - len(cut), width)
            in_level = cut.positions // cut.spans
            planes[0, row, entries] = b * offsets[-1] + offsets[cut.lods] + in_level
            planes[1, row, entries] = cut.positions
            planes[2, row, entries] = cut.lods
            labelled = cut.ends < self.lengths[b]
            planes[3, row, entries] = np.where(labelled, b * num_tokens + cut.ends, -1)
            planes[4, row, entries] = 0
        padded = bool(planes[4].any())
        index, starts, lods, label_index, pads = _to_device(planes, self.levels.device)

        gathered = self.levels.flatten(0, 1).index_select(0, index.flatten())
        labels = self.labels.flatten()[label_index.clamp(min=0)]
        return WorkingContext(
            embeddings=gathered.view(*index.shape, -1),
            starts=starts,
            spans=self.block_size**lods,
            lods=lods,
            labels=labels.masked_fill(label_index < 0, NO_LABEL),
            pad_mask=pads.bool() if padded else None,
        )


def _to_device(
    planes: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]", device: torch.device
) -> Tensor:
    host = torch.from_numpy(planes)
    if device.type == "cuda":  # from pinned memory the copy does not wait for the device
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)
