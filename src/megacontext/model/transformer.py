"""The pre-norm transformer block that the language model and LensNet share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megacontext.model.positional import rotate


class Block(nn.Module):
    """Rotary self-attention and an MLP, each on a normalised residual branch.

    Args:
        d_model: Width D.
        num_heads: Attention heads; D / num_heads must be even.
    """

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.RMSNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.attention_out = nn.Linear(d_model, d_model, bias=False)
        self.mlp_norm = nn.RMSNorm(d_model)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model)
        )

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        mask: Tensor | None,
        causal: bool,
        seen: "LayerCache | None" = None,
    ) -> Tensor:
        """Map entries ``[B, W, D]`` to entries of the same shape.

        Args:
            x: The entries.
            rope: Their rotations, of `gaussian_rope`.
            mask: Where a query may look, bool ``[B, 1, W, W]``; None for no padding.
            causal: Look back only; ``mask`` must then be None or causal itself.
            seen: Keys and values of the entries before these; it takes up those of these.

        Returns:
            The entries as they are after the block.
        """
        batch, width, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, width, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query, key = rotate(query, rope), rotate(key, rope)
        if seen is not None:
            key, value = seen.append(key, value)
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal and mask is None,
        )
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class LayerCache:
    """Keys and values of one layer for the entries so far, ``[B, H, length, D / H]`` each.

    Args:
        capacity: Entries that there is room for.

    Attributes:
        length: Entries so far.
    """

    def __init__(self, capacity: int) -> None:
        self.length = 0
        self._capacity = capacity
        self._both: Tensor | None = None  # [2, B, H, capacity, D / H]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values of new entries, and return all.

        Args:
            key: Of the new entries, ``[B, H, W, D / H]``.
            value: The same for values.

        Returns:
            Keys and values of all entries, ``[B, H, length, D / H]`` each.

        Raises:
            ValueError: There is no room for them.
        """
        if self._both is None:
            batch, heads, _, width = key.shape
            self._both = key.new_empty(2, batch, heads, self._capacity, width)
        end = self.length + key.shape[2]
        if end > self._capacity:
            raise ValueError(f"{end} entries do not fit a cache with room for {self._capacity}")
        self._both[0, :, :, self.length : end] = key
        self._both[1, :, :, self.length : end] = value
        self.length = end
        keys, values = self._both[:, :, :, :end]
        return keys, values


def attention_mask(pad_mask: Tensor | None, causal: bool) -> Tensor | None:
    """Make the mask of a padded batch.

    Pads are seen by nobody but themselves, which keeps their rows finite.

    Args:
        pad_mask: Where pads are, bool ``[B, W]``; None where there are none.
        causal: Whether entries look back only.

    Returns:
        Who may look at whom, bool ``[B, 1, W, W]``; None when nothing is padded.
    """
    if pad_mask is None:
        return None
    width = pad_mask.shape[1]
    itself = torch.eye(width, dtype=torch.bool, device=pad_mask.device)
    allowed = ~pad_mask[:, None, :] | itself
    return (allowed.tril() if causal else allowed)[:, None]
