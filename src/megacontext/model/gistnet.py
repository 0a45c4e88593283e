"""GistNet: K child embeddings become one gist, level by level."""

import torch
from torch import Tensor, nn


class GistNet(nn.Module):
    """Sum over the children, scaled to keep their variance, plus what an MLP makes of it.

    The same weights make every level: a gist of gists, and one of those, is made as a gist is.

    It is free of the children's order on purpose: in a first study a gist that concatenates them
    learned the values themselves, and then expanding an entry no longer matters.

    Args:
        d_model: Width D.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model)
        out = nn.Linear(2 * d_model, d_model)
        nn.init.zeros_(out.weight)  # a gist starts as the plain scaled sum
        nn.init.zeros_(out.bias)
        self.mlp = nn.Sequential(nn.Linear(d_model, 2 * d_model), nn.GELU(), out)

    def forward(self, embeddings: Tensor, block_size: int, max_lod: int) -> Tensor:
        """Make all levels of a tree.

        Blocks at the end of a level that are not full have no gist.

        Args:
            embeddings: Of LOD0, ``[B, N, D]``.
            block_size: Children of a gist, K.
            max_lod: The highest level.

        Returns:
            The levels one after another, ``[B, N + N//K + N//K² + ..., D]``.
        """
        # All levels come out of one call: under CUDA graphs a second call without gradients would
        # write over what the first one gave out, and LOD1 is still needed once LOD2 is made.
        batch, _, d_model = embeddings.shape
        levels = [embeddings]
        for _ in range(max_lod):
            below = levels[-1]
            blocks = below.shape[1] // block_size
            children = below[:, : blocks * block_size]
            levels.append(self.gist(children.reshape(batch, blocks, block_size, d_model)))
        return torch.cat(levels, dim=1)

    def gist(self, children: Tensor) -> Tensor:
        """Go one step up, from ``[..., K, D]`` to ``[..., D]``; this is never compiled."""
        total: Tensor = children.sum(dim=-2) * children.shape[-2] ** -0.5
        residual: Tensor = self.mlp(self.norm(total))
        return total + residual
