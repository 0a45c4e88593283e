"""GistNet: K child embeddings become one gist, level by level."""

import torch
from torch import Tensor, nn

_WEIGH_DIM, _MLP_DIM = 32, 128
_FIRST_SCALE = 0.2  # of a gist whose features would vary as much as those of one child


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
            children = children.reshape(batch, blocks, block_size, d_model)
            levels.append(self.gist(children, of_tokens=len(levels) == 1))
        return torch.cat(levels, dim=1)

    def gist(self, children: Tensor, *, of_tokens: bool = True) -> Tensor:
        """Go one step up; this is never compiled.

        Args:
            children: Of each gist, ``[..., K, D]``.
            of_tokens: Whether they are tokens, or else gists.

        Returns:
            The gists, ``[..., D]``.
        """
        total: Tensor = children.sum(dim=-2) * children.shape[-2] ** -0.5
        residual: Tensor = self.mlp(self.norm(total))
        return total + residual


class WeightedGistNet(GistNet):
    """A weighted mean of what distinguishes the children, plus what an MLP makes of it.

    The token embeddings of a pretrained model have a mean that is most of each of them. A sum or a
    mean of many is little more than that, long and in a direction in which no token lies: in the
    place of blocks it cost SmolLM2 more than 2 nats per token, where leaving the blocks out costs
    nothing by comparison. So the mean is taken off, and the gist begins short.

    Args:
        d_model: Width D.
        centre: Mean of all token embeddings, ``[D]``.
    """

    centre: Tensor

    def __init__(self, d_model: int, centre: Tensor) -> None:
        nn.Module.__init__(self)  # none of the weights of a sum
        self.register_buffer("centre", torch.empty_like(centre).copy_(centre))
        self.weigh = nn.Sequential(
            nn.Linear(d_model, _WEIGH_DIM), nn.GELU(), nn.Linear(_WEIGH_DIM, 1)
        )
        self.scale = nn.Parameter(torch.full((d_model,), _FIRST_SCALE))
        self.norm = nn.RMSNorm(d_model)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, _MLP_DIM), nn.GELU(), nn.Linear(_MLP_DIM, d_model)
        )
        for last in (*self.weigh[-1].parameters(), *self.mlp[-1].parameters()):
            nn.init.zeros_(last)  # all weigh the same at first

    def gist(self, children: Tensor, *, of_tokens: bool = True) -> Tensor:
        """Go one step up, as `GistNet.gist` does; gists of tokens have no mean to take off."""
        if of_tokens:
            children = children - self.centre
        weights = self.weigh(children).softmax(dim=-2) * children.shape[-2] ** 0.5
        total: Tensor = (children * weights).sum(dim=-2)
        residual: Tensor = self.mlp(self.norm(total))
        return total * self.scale + residual
