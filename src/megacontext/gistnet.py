"""GistNet: K child embeddings become one gist."""

from torch import Tensor, nn


class GistNet(nn.Module):
    """Sum over the children, scaled to keep their variance, plus what an MLP makes of it.

    It is free of the children's order on purpose: in a first study a gist that concatenates them
    learned the values themselves, and then expanding an entry no longer matters.

    Args:
        d_model: width D.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model)
        out = nn.Linear(2 * d_model, d_model)
        nn.init.zeros_(out.weight)  # a gist starts as the plain scaled sum
        nn.init.zeros_(out.bias)
        self.mlp = nn.Sequential(nn.Linear(d_model, 2 * d_model), nn.GELU(), out)

    def forward(self, children: Tensor) -> Tensor:
        """``[..., K, D]`` to ``[..., D]``."""
        total: Tensor = children.sum(dim=-2) * children.shape[-2] ** -0.5
        residual: Tensor = self.mlp(self.norm(total))
        return total + residual
