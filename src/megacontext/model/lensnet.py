"""LensNet: reads a focus view and gives each entry a signed score."""

import torch
from torch import Tensor, nn

from megacontext.model.positional import gaussian_rope
from megacontext.model.transformer import Block, attention_mask


class LensNet(nn.Module):
    """A small bidirectional transformer over the entries of a view.

    Bidirectional, because the query that makes an old gist worth expanding comes after it. It
    begins by comparing content: its queries and keys start with equal weights, so an entry attends
    to what resembles it (mimetic initialization, Trockman and Kolter 2023, arXiv:2305.09828), and
    only a part of each head's features knows where an entry stands.

    Args:
        d_model: Width D.
        num_layers: Depth.
        num_heads: Attention heads.
        max_lod: The highest level of detail of an entry.
        causal: Let entries look back only; for an ablation.
    """

    def __init__(
        self, d_model: int, num_layers: int, num_heads: int, max_lod: int, causal: bool = False
    ) -> None:
        super().__init__()
        self.causal = causal
        self.head_dim = d_model // num_heads
        self.rotated_dim = max(2, self.head_dim // 8 * 2)  # a quarter, as in GPT-NeoX
        self.lod_embedding = nn.Embedding(max_lod + 1, d_model)
        nn.init.normal_(self.lod_embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(d_model, num_heads) for _ in range(num_layers))
        with torch.no_grad():
            for qkv in (m for name, m in self.named_modules() if name.endswith(".qkv")):
                query, key, _ = qkv.get_parameter("weight").chunk(3)
                key.copy_(query)
        self.norm = nn.RMSNorm(d_model)
        self.head = nn.Linear(d_model, 1)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        embeddings: Tensor,
        starts: Tensor,
        spans: Tensor,
        lods: Tensor,
        pad_mask: Tensor | None = None,
    ) -> Tensor:
        """Score entries: above 0 "expand me", below 0 "collapse me".

        Args:
            embeddings: Of the view's entries, ``[B, E, D]``.
            starts: First token of each entry, int64 ``[B, E]``.
            spans: Tokens of each entry, int64 ``[B, E]``.
            lods: Level of detail of each entry, int64 ``[B, E]``.
            pad_mask: Where pads are, bool ``[B, E]``; None where there are none.

        Returns:
            Scores in [-1, 1], ``[B, E]``; 0 at pads.
        """
        rope = gaussian_rope(starts, spans, self.head_dim, self.rotated_dim)
        mask = attention_mask(pad_mask, causal=self.causal)
        x = embeddings + self.lod_embedding(lods)
        for block in self.blocks:
            x = block(x, rope, mask, causal=self.causal)
        scores = torch.tanh(self.head(self.norm(x)).squeeze(-1))
        return scores if pad_mask is None else scores.masked_fill(pad_mask, 0.0)
