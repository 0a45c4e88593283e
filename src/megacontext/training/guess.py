"""What holding blocks in detail would save, guessed without a language model: for pre-training.

A token of the horizon is easier to predict when a block that holds it, best with the tokens before
it, is there to be read. What that saves was measured once, on SmolLM2-135M: by regression of the
NLL of 5,184 tokens, each under nine choices of three blocks, on how surprising the token is and on
how long a match the blocks have. Where facts are asked for, their blocks are what saves.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from megacontext.data.source import Batch, Ints
from megacontext.judged import Judged
from megacontext.model.matching import matches

Floats = NDArray[np.float64]

_SURPRISE = (4.0, 6.0, 8.0, 9.5, 11.0)  # nats, log(all tokens / those like it): between classes
# Nats saved by a match of 1, 2, and 3 or more tokens, by class of surprise.
_SAVED = np.array(
    [
        [0.02, 0.05, 0.27],
        [0.15, 0.30, 0.58],
        [0.10, 0.45, 1.65],
        [0.71, 1.16, 3.01],
        [0.94, 1.96, 3.04],
        [1.19, 2.04, 2.86],
    ]
)
_SEEN_SHARE = (1.0, 1 / 3, 0.0, 0.0)  # of that, where the tail has a match of so many tokens
_ASKED = 4.0  # nats that the block of a fact saves, where the fact is asked for
_LONGEST = _SAVED.shape[1]
_TOWARDS_GOOD = 0.3  # of the variants lean to blocks that save more


def guessed(
    batch: Batch,
    counts: Ints | None,
    rng: np.random.Generator,
    *,
    block_size: int,
    recent_tokens: int,
    horizon_tokens: int,
    picks: int,
    variants: int,
) -> Judged:
    """Draw variants that hold some of the blocks, and guess what they lose.

    Args:
        batch: Sequences.
        counts: How often each token occurs in what is trained on, ``[vocab_size]``; None where
            nothing but facts is asked for.
        rng: Draws the variants.
        block_size: Tokens of a block, K.
        recent_tokens: Length of the protected tail, behind the blocks.
        horizon_tokens: Length of the horizon, at its end.
        picks: Blocks that a variant holds.
        variants: Of each sequence.

    Returns:
        The variants, their losses up to a constant for each sequence.
    """
    tokens = batch.tokens.numpy(force=True)
    blocks = (tokens.shape[1] - recent_tokens) // block_size
    saved = _saved_by_asked(batch, blocks, len(tokens))
    if counts is not None:
        history, tail = blocks * block_size, tokens.shape[1] - recent_tokens
        by_words = _saved_by_words(tokens, history, tail, horizon_tokens, counts, block_size)
        asks = (saved > 0).any(axis=(1, 2))
        by_words[asks] = 0
        saved = np.concatenate([saved, by_words], axis=2)
    lean = rng.random((len(tokens), variants, 1)) < _TOWARDS_GOOD
    order = rng.random((len(tokens), variants, blocks)) + 0.1 * lean * saved.sum(2)[:, None]
    held = np.zeros(order.shape, dtype=np.bool_)
    np.put_along_axis(held, np.argpartition(-order, picks - 1, axis=2)[..., :picks], True, axis=2)
    best = np.where(held[..., None], saved[:, None], 0).max(axis=2)
    nll: Floats = -best.sum(axis=-1)
    return Judged(batch.tokens, torch.from_numpy(nll).float(), torch.from_numpy(held))


def _saved_by_asked(batch: Batch, blocks: int, sequences: int) -> Floats:
    """Say what blocks save of facts that are asked for, nats ``[B, blocks, asked]``."""
    asked = np.full((sequences, 0), -1) if batch.asked_blocks is None else batch.asked_blocks
    saved: Floats = _ASKED * (np.arange(blocks)[None, :, None] == asked[:, None])
    return saved


def _saved_by_words(
    tokens: Ints, history: int, tail: int, horizon: int, counts: Ints, block_size: int
) -> Floats:
    """Say what blocks save of each token of the horizon, nats ``[B, blocks, horizon]``."""
    begin = tokens.shape[1] - horizon
    lengths = _match_lengths(tokens, begin)
    in_blocks = lengths[..., :history].reshape(len(tokens), horizon, -1, block_size).max(axis=3)
    in_tail = lengths[..., tail:].max(axis=2)
    surprise = np.log(counts.sum() / (counts + 1))[tokens[:, begin:]]
    saved = _SAVED[np.digitize(surprise, _SURPRISE)]  # [B, horizon, lengths]
    saved = np.concatenate([np.zeros_like(saved[..., :1]), saved], axis=-1)
    gained = (
        np.take_along_axis(saved, in_blocks, axis=2) * np.array(_SEEN_SHARE)[in_tail][..., None]
    )
    gained *= in_blocks > in_tail[..., None]
    out: Floats = gained.transpose(0, 2, 1)
    return out


def _match_lengths(tokens: Ints, begin: int) -> Ints:
    """Find how many tokens up to each of the horizon stand as well at each earlier place.

    Returns:
        The lengths of the matches, up to `_LONGEST`, int64 ``[B, horizon, T]``; 0 from the token
        itself on.
    """
    whole = torch.from_numpy(tokens)
    first = max(begin - _LONGEST + 1, 0)  # what stands before the horizon is part of a match
    runs = matches(whole[:, first:], whole[:, None], _LONGEST)[:, :, begin - first :, 0]
    earlier = np.arange(tokens.shape[1]) < np.arange(begin, tokens.shape[1])[:, None]
    lengths: Ints = runs.sum(dim=1).numpy() * earlier
    return lengths
