"""A small GPT that reads embeddings of any level of detail.

It takes ``inputs_embeds`` and the span of every entry instead of token ids, so that tokens and
gists can stand side by side. Entry covering [p, p + s) predicts token p + s.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megacontext.model.positional import gaussian_rope
from megacontext.model.transformer import Block, LayerCache, attention_mask


class LanguageModel(nn.Module):
    """Causal transformer with tied token embeddings.

    Args:
        vocab_size: Number of tokens.
        d_model: Width D.
        num_layers: Depth.
        num_heads: Attention heads.

    Attributes:
        max_tokens: None: positions have no end.
        recompute: Keep only what goes into each block for backward, which computes the rest again:
            a forward more for a fraction of the memory. Sessions are not affected.
    """

    def __init__(self, vocab_size: int, d_model: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.max_tokens: int | None = None
        self.recompute = False
        self.head_dim = d_model // num_heads
        self.embedding = nn.Embedding(vocab_size, d_model)
        # What came right before each entry. Looking something up needs keys that know what preceded
        # them; with this the first attention layer has them, as with the smeared keys of Olsson et
        # al. 2022 (In-context learning and induction heads).
        self.previous = nn.Linear(d_model, d_model, bias=False)
        # Standard deviation 1: gists keep the variance of what they sum, the norms do the rest.
        self.blocks = nn.ModuleList(Block(d_model, num_heads) for _ in range(num_layers))
        self.norm = nn.RMSNorm(d_model)

    @property
    def dtype(self) -> torch.dtype:
        """Of the embeddings that it gives out and reads."""
        return self.embedding.weight.dtype

    def new_seen(self, capacity: int) -> "Seen":
        """Return what has read nothing yet, with room for ``capacity`` entries."""
        return Seen(len(self.blocks), capacity)

    def embed(self, tokens: Tensor) -> Tensor:
        """Turn tokens, int64 ``[B, N]``, into LOD0 embeddings ``[B, N, D]``."""
        embeddings: Tensor = self.embedding(tokens)
        return embeddings

    def forward(
        self,
        inputs_embeds: Tensor,
        starts: Tensor,
        spans: Tensor,
        pad_mask: Tensor | None = None,
        seen: "Seen | None" = None,
        last: int | None = None,
    ) -> Tensor:
        """Predict what follows each entry.

        Args:
            inputs_embeds: Embeddings of the entries, ``[B, W, D]``.
            starts: First token of each entry, int64 ``[B, W]``.
            spans: Tokens of each entry, int64 ``[B, W]``.
            pad_mask: Where pads are, bool ``[B, W]``; None where there are none.
            seen: The entries before these, without pads; it takes up these.
            last: Predict what follows so many of them alone, the newest; all by default.

        Returns:
            Next-token logits ``[B, W or last, vocab_size]``.

        Raises:
            ValueError: Pads together with ``seen``, or more entries than it has room for.
        """
        if seen is not None and pad_mask is not None:
            raise ValueError("entries that are read one after another must not be padded")
        rope = gaussian_rope(starts, spans, self.head_dim)
        mask = attention_mask(pad_mask, causal=True) if seen is None else seen.mask(inputs_embeds)
        before = inputs_embeds[:, :-1]
        if pad_mask is not None:
            before = before.masked_fill(pad_mask[:, :-1, None], 0.0)
        if seen is None or seen.last is None:
            before = nn.functional.pad(before, (0, 0, 1, 0))
        else:
            before = torch.cat([seen.last, before], dim=1)
        x = inputs_embeds + self.previous(before)
        if seen is not None:
            for block, layer in zip(self.blocks, seen.layers, strict=True):
                x = block(x, rope, mask, True, layer)
            seen.last = inputs_embeds[:, -1:]
        else:
            for block in self.blocks:
                x = self._run(block, x, rope, mask)
        x = x if last is None else x[:, -last:]
        logits: Tensor = nn.functional.linear(
            self.norm(x) * self.embedding.embedding_dim**-0.5, self.embedding.weight
        )
        return logits

    def _run(self, block: nn.Module, x: Tensor, rope: Tensor, mask: Tensor | None) -> Tensor:
        """Run one block over ``[B, W, D]``."""
        arguments = (x, rope, mask, True)
        if self.recompute and torch.is_grad_enabled():
            # Nothing in a block is random, so there is no random state to keep.
            x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(*arguments)
        return x


class Seen:
    """The entries that a language model has read, so that it need not read them again.

    Args:
        num_layers: Depth of the model.
        capacity: Entries that there is room for.

    Attributes:
        layers: Keys and values of each layer.
        last: Embedding of the newest entry, ``[B, 1, D]``; None before the first.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.layers = [LayerCache(capacity) for _ in range(num_layers)]
        self.last: Tensor | None = None  # embedding of the newest entry, [B, 1, D]

    @property
    def length(self) -> int:
        """How many there are."""
        return self.layers[0].length

    def mask(self, new: Tensor) -> Tensor | None:
        """Tell who of the new entries ``[B, W, D]`` may look at whom; None where SDPA knows."""
        if not self.length:
            return None
        return causal_mask_after(self.length, new)


def causal_mask_after(length: int, new: Tensor) -> Tensor:
    """Make the mask of new entries, which all see those before them.

    Args:
        length: Entries before them.
        new: Embeddings of the new entries, ``[B, W, D]``.

    Returns:
        Who may look at whom, bool ``[1, 1, W, length + W]``.
    """
    width = new.shape[1]
    full = torch.ones(width, length + width, dtype=torch.bool, device=new.device)
    return full.tril(length)[None, None]
