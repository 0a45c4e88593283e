"""A small GPT that reads embeddings of any level of detail.

It takes ``inputs_embeds`` and the span of every entry instead of token ids, so that tokens and
gists can stand side by side. Entry covering [p, p + s) predicts token p + s.
"""

from torch import Tensor, nn

from megacontext.positional import gaussian_rope
from megacontext.transformer import Block, attention_mask


class LanguageModel(nn.Module):
    """Causal transformer with tied token embeddings.

    Args:
        vocab_size: number of tokens.
        d_model: width D.
        num_layers, num_heads: of the transformer.
    """

    def __init__(self, vocab_size: int, d_model: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = d_model // num_heads
        self.embedding = nn.Embedding(vocab_size, d_model)
        # Standard deviation 1: gists keep the variance of what they sum, the norms do the rest.
        self.blocks = nn.ModuleList(Block(d_model, num_heads) for _ in range(num_layers))
        self.norm = nn.RMSNorm(d_model)

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 ``[B, N]`` to LOD0 embeddings ``[B, N, D]``."""
        embeddings: Tensor = self.embedding(tokens)
        return embeddings

    def forward(
        self, inputs_embeds: Tensor, starts: Tensor, spans: Tensor, pad_mask: Tensor | None = None
    ) -> Tensor:
        """Next-token logits ``[B, W, vocab_size]`` of entries ``[B, W, D]``.

        Args:
            starts, spans: first token and number of tokens of each entry, int64 ``[B, W]``.
            pad_mask: bool ``[B, W]``, True at pads.
        """
        rope = gaussian_rope(starts, spans, self.head_dim)
        mask = attention_mask(pad_mask, causal=True)
        x = inputs_embeds
        for block in self.blocks:
            x = block(x, rope, mask, causal=True)
        logits: Tensor = nn.functional.linear(
            self.norm(x) * self.embedding.embedding_dim**-0.5, self.embedding.weight
        )
        return logits
