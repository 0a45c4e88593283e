"""A LensNet that compares tokens: those of the tail with those that each gist stands for.

What makes an old block worth expanding is mostly that it holds what the tail is about to use again:
names, keys, the beginning of a line that was written before. A mean over a block does not tell. So
instead of each gist its children are read, one level below it, and every token of the tail is
looked for in them (late interaction, Khattab and Zaharia 2020, arXiv:2004.12832): exactly, with the
tokens before it, and by a learned likeness. What a found token counts is learned from its
embedding, from how many blocks hold it, and from how long ago the tail had it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megacontext.model.matching import NO_TOKEN, blocks_holding, matches
from megacontext.model.positional import gaussian_rope
from megacontext.model.transformer import Block, attention_mask

_LONGEST = 3  # tokens of an exact match that are told apart
_WEIGHTINGS = 4  # of exact matches of each length
_LIKENESSES, _LIKENESS_DIM = 2, 32  # learned, beside the exact matches
_EXACT = _WEIGHTINGS * _LONGEST
_SALIENCE = 8  # values of a block's token that do not depend on the tail
_HIDDEN, _MIXER_DIM, _GIST_DIM, _HEADS = 48, 96, 32, 4


class LateInteractionLensNet(nn.Module):
    """Scores gists by what the tail has in common with their children.

    It costs as much as tail times children, and children are K for each gist of the view.

    Args:
        d_model: Width D.
        query_tokens: Entries at the end of a view that are the query, Q, all of them at LOD0.
        centre: Mean of all token embeddings, ``[D]``: what a pretrained model's have in common
            tells nothing.
    """

    centre: Tensor

    def __init__(self, d_model: int, query_tokens: int, centre: Tensor) -> None:
        super().__init__()
        self.query_tokens = query_tokens
        self.register_buffer("centre", torch.empty_like(centre).copy_(centre))
        self.weight_in = nn.Linear(d_model, _HIDDEN)
        self.weight_counts = nn.Linear(3, _HIDDEN, bias=False)
        self.weight_out = nn.Linear(_HIDDEN, _EXACT + _LIKENESSES)
        ago = torch.arange(query_tokens - 1, -1, -1) / query_tokens
        slopes = torch.cat([torch.arange(_EXACT) // _LONGEST, torch.ones(_LIKENESSES)])
        self.age = nn.Parameter(-2 * slopes[:, None] * ago)  # some weightings begin with the newest
        self.likeness = nn.Linear(d_model, _LIKENESSES * _LIKENESS_DIM, bias=False)
        nn.init.normal_(self.likeness.weight, std=d_model**-0.5)
        self.threshold = nn.Parameter(torch.full((_LIKENESSES, 1, 1), 0.6))
        self.steepness = nn.Parameter(torch.full((_LIKENESSES, 1, 1), 10.0))
        self.salience_in = nn.Linear(d_model, _HIDDEN)
        self.salience_counts = nn.Linear(2, _HIDDEN, bias=False)
        self.salience_out = nn.Linear(_HIDDEN, _SALIENCE)
        self.gist = nn.Linear(d_model, _GIST_DIM, bias=False)
        features = 4 * _EXACT + 2 * _LIKENESSES + 2 * _SALIENCE + 3
        self.norm = nn.LayerNorm(features)
        self.mixer_in = nn.Linear(features + 2 * _GIST_DIM, _MIXER_DIM)
        self.mixer = Block(_MIXER_DIM, _HEADS)
        self.mixer_norm = nn.RMSNorm(_MIXER_DIM)
        self.linear, self.head = nn.Linear(features, 1), nn.Linear(_MIXER_DIM, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        embeddings: Tensor,
        starts: Tensor,
        spans: Tensor,
        lods: Tensor,
        pad_mask: Tensor | None,
        tokens: Tensor,
        children: Tensor,
        child_tokens: Tensor,
    ) -> Tensor:
        """Score gists: above 0 "expand me", below 0 "collapse me".

        Args:
            embeddings: Of the view's entries, ``[B, E, D]``.
            starts: First token of each entry, int64 ``[B, E]``.
            spans: Tokens of each entry, int64 ``[B, E]``.
            lods: Level of detail of each entry, int64 ``[B, E]``.
            pad_mask: Where pads are, bool ``[B, E]``; None where there are none.
            tokens: Of the entries at LOD0, int64 ``[B, E]``; `NO_TOKEN` for the others.
            children: Embeddings of the children of the first C = E - Q entries, ``[B, C, K, D]``.
            child_tokens: Their tokens, int64 ``[B, C, K]``; `NO_TOKEN` for gists.

        Returns:
            Scores in [-1, 1], ``[B, E]``; 0 where there is no gist.
        """
        candidates = children.shape[1]
        if not candidates:  # all of the view is the query
            return torch.zeros_like(embeddings[..., 0])
        are_gists = lods[:, :candidates] > 0
        if pad_mask is not None:
            are_gists = are_gists & ~pad_mask[:, :candidates]
        of_tokens = (child_tokens != NO_TOKEN)[..., None]  # gists are centred already
        children = children - self.centre * of_tokens.to(children.dtype)
        query, tail = embeddings[:, candidates:] - self.centre, tokens[:, candidates:]
        found = matches(tail, child_tokens, _LONGEST)
        weights = self._weights(query, tail, found)
        parts = [
            *_weighed(
                weights[:, :_EXACT].view(len(weights), -1, _LONGEST, self.query_tokens),
                _in_blocks(found),
            ),
            *_weighed(weights[:, None, _EXACT:], self._alike(query, children, are_gists)),
            *self._salience(children, child_tokens, found),
            _places(starts[:, :candidates]),
        ]
        features = self.norm(torch.cat([part.float() for part in parts], dim=-1))
        gists, about = self.gist(children.mean(2)), self.gist(query.mean(1, keepdim=True))
        read = torch.cat([features.to(gists.dtype), gists, about.expand_as(gists)], dim=-1)
        mixed = self._mixed(read, are_gists)
        scores = torch.tanh((self.linear(features) + self.head(mixed)).squeeze(-1))
        return F.pad(scores.masked_fill(~are_gists, 0.0), (0, self.query_tokens))

    def _weights(self, query: Tensor, tail: Tensor, found: Tensor) -> Tensor:
        """Say what each token of the tail counts when it is found, ``[B, weightings, Q]``."""
        same = tail[:, :, None] == tail[:, None]
        counts = [
            found[:, 0].any(-1).sum(-1).log1p(),  # blocks that hold it
            same.sum(-1).log(),
            ~same.triu(1).any(-1),  # the last time that the tail has it
        ]
        about = self.weight_counts(torch.stack([c.to(query.dtype) for c in counts], dim=-1))
        weights = self.weight_out(F.gelu(self.weight_in(query) + about))
        weights = weights.transpose(1, 2).contiguous()  # or torch may trace other strides than run
        return F.softplus(weights + self.age - 1)

    def _alike(self, query: Tensor, children: Tensor, are_gists: Tensor) -> Tensor:
        """Say how like each token of the tail the likest child is, ``[B, h, 1, Q, C]``."""
        batch, blocks, size, _ = children.shape
        heads = (_LIKENESSES, _LIKENESS_DIM)
        keys = F.normalize(self.likeness(children.flatten(1, 2)).unflatten(-1, heads), dim=-1)
        queries = F.normalize(self.likeness(query).unflatten(-1, heads), dim=-1)
        alike = torch.einsum("bqhd,bkhd->bhqk", queries, keys)
        alike = alike.view(batch, _LIKENESSES, -1, blocks, size).amax(-1)
        alike = torch.sigmoid((alike - self.threshold) * self.steepness)
        alike = alike.masked_fill(~are_gists[:, None, None], 0.0)  # what is shared is among these
        return alike[:, :, None]

    def _salience(self, children: Tensor, child_tokens: Tensor, found: Tensor) -> list[Tensor]:
        """Say what is in a block whatever the tail is about: two times ``[B, C, values]``."""
        held, seen = blocks_holding(child_tokens).log(), found[:, 0].any(1)
        counts = torch.stack([held.to(children.dtype), seen.to(children.dtype)], dim=-1)
        hidden = self.salience_in(children) + self.salience_counts(counts)
        values = self.salience_out(F.gelu(hidden))
        return [values.amax(2), F.softplus(values).mean(2)]

    def _mixed(self, x: Tensor, are_gists: Tensor) -> Tensor:
        """Let gists know of each other: the second of two that hold the same is worth less."""
        places = torch.zeros_like(are_gists, dtype=torch.int64)  # are features, and turn nothing
        rope = gaussian_rope(places, torch.ones_like(places), _MIXER_DIM // _HEADS, 2)
        mask = attention_mask(~are_gists, causal=False)
        x = self.mixer(self.mixer_in(x), rope, mask, causal=False)
        return F.gelu(self.mixer_norm(x))


def _in_blocks(found: Tensor) -> Tensor:
    """Tell what each block holds, and what the end of the one before it holds.

    What follows a match is what the tail may be about to repeat, and it may be in the next block.

    Args:
        found: Matches, bool ``[B, n, Q, C, K]``.

    Returns:
        Whether they are, bool ``[B, n, 2, Q, C]``.
    """
    late = found[..., found.shape[-1] // 2 :].any(-1)
    before = F.pad(late, (1, 0))[..., :-1]
    return torch.stack([found.any(-1), before], dim=2)


def _weighed(weights: Tensor, found: Tensor) -> list[Tensor]:
    """Add up what was found in each block: as it is, and shared among all that have it.

    Args:
        weights: Of the tail's tokens, ``[B, w, n, Q]``.
        found: How much of each is in each block, ``[B, n, x, Q, C]``.

    Returns:
        Both sums, ``[B, C, w · n · x]`` each.
    """
    found = found.to(weights.dtype)
    shared = found / (found.sum(-1, keepdim=True) + 0.5)
    return [torch.einsum("bwnq,bnxqc->bcwnx", weights, part).flatten(2) for part in (found, shared)]


def _places(starts: Tensor) -> Tensor:
    """Say where each entry begins, from 0 to 1, bent so that the newest differ; ``[B, C, 3]``."""
    place = starts / starts[:, -1:].clamp(min=1)
    return torch.stack([place, place**4, place**16], dim=-1)
