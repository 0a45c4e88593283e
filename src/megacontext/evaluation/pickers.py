"""Ways to score blocks by what stands before the horizon: baselines for LensNet. No torch.

Each picker is a pure function that gives a score to each block of the history, the higher the
sooner it is to be held in detail. `picked_cuts` makes cuts of the scores of any of them, so that
all spend the same number of entries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megacontext.allocators.cut import Cut
from megacontext.allocators.focus import Scored, refocus_cut
from megacontext.allocators.rules import FocusRules

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Embed = Callable[[Sequence[str]], Floats]  # texts to vectors of length 1, [texts, D]

LAST = 16  # tokens before the horizon, where not all of the tail is the query
_K1 = 1.5  # how soon a token that is repeated in a block counts no more, as BM25 has it


@dataclass(frozen=True)
class Visible:
    """What a picker may look at: sequences up to the horizon, and not a token further.

    Attributes:
        tokens: The sequences without their horizons, int64 ``[S, T]``.
        blocks: How many blocks of the history there are to pick among; the tail comes after them.
        block_size: Tokens of a block, K.
        picks: How many of the blocks can be held in detail.
    """

    tokens: Ints
    blocks: int
    block_size: int
    picks: int

    @property
    def history(self) -> Ints:
        """The tokens of each block, int64 ``[S, blocks, K]``."""
        history = self.tokens[:, : self.blocks * self.block_size]
        return history.reshape(len(self.tokens), self.blocks, self.block_size)

    def query(self, last: int | None = None) -> Ints:
        """Return the tail, int64 ``[S, q]``: all of it, or its last tokens."""
        tail = self.tokens[:, self.blocks * self.block_size :]
        return tail if last is None else tail[:, -last:]


def evenly_spaced(visible: Visible) -> Floats:
    """Score blocks so that those that are picked lie evenly over the history, ``[S, blocks]``."""
    picks = min(max(visible.picks, 1), visible.blocks)  # where the tail is all there is, none
    scores = np.zeros((len(visible.tokens), visible.blocks))
    scores[:, ((np.arange(picks) + 0.5) * visible.blocks / picks).astype(np.int64)] = 1
    return scores


def at_random(visible: Visible, rng: np.random.Generator) -> Floats:
    """Score blocks at random, ``[S, blocks]``."""
    return rng.random((len(visible.tokens), visible.blocks))


def overlap(visible: Visible, last: int | None = None, *, idf: bool = False) -> Floats:
    """Score blocks by how many different tokens they share with the query, ``[S, blocks]``.

    Args:
        visible: The sequences.
        last: Tokens of the query; all of the tail by default.
        idf: Count a token for the more, the fewer blocks hold it: log(blocks / blocks with it).

    Returns:
        The scores.
    """
    frequency, first = _frequencies(visible, last)
    held = frequency > 0
    weights = np.log(max(visible.blocks, 1) / np.maximum(held.sum(axis=1), 1)) if idf else 1.0
    scores: Floats = (held * (first * weights)[:, None]).sum(axis=2)
    return scores


def bm25(visible: Visible, last: int | None = None) -> Floats:
    """Score blocks by Okapi BM25 (Robertson and Zaragoza 2009), ``[S, blocks]``.

    Blocks are the documents. They are all as long, so their lengths play no part.

    Args:
        visible: The sequences.
        last: Tokens of the query; all of the tail by default.

    Returns:
        The scores.
    """
    frequency, first = _frequencies(visible, last)
    found = (frequency > 0).sum(axis=1)
    idf = np.log(1 + (visible.blocks - found + 0.5) / (found + 0.5))
    saturated = frequency * (_K1 + 1) / (frequency + _K1)
    scores: Floats = (saturated * (first * idf)[:, None]).sum(axis=2)
    return scores


def similarity(
    visible: Visible,
    embed: Embed,
    text_of: Callable[[Ints], str],
    last: int | None = None,
) -> Floats:
    """Score blocks by the cosine of their embedding and the query's, ``[S, blocks]``.

    Args:
        visible: The sequences.
        embed: Embeds texts.
        text_of: Turns tokens ``[n]`` into text.
        last: Tokens of the query; all of the tail by default.

    Returns:
        The scores.
    """
    scores = np.empty((len(visible.tokens), visible.blocks))
    for row, blocks, query in zip(scores, visible.history, visible.query(last), strict=True):
        vectors = embed([text_of(part) for part in (*blocks, query)])
        row[:] = vectors[:-1] @ vectors[-1]
    return scores


def _frequencies(visible: Visible, last: int | None) -> tuple[Ints, NDArray[np.bool_]]:
    """Count each token of the query in each block; tell which are not repeated before in it.

    Returns:
        The counts, int64 ``[S, blocks, q]``, and what to count once, bool ``[S, q]``.
    """
    query = visible.query(last)
    same = query[:, :, None] == query[:, None]
    first: NDArray[np.bool_] = same.argmax(axis=2) == np.arange(query.shape[1])
    pairs = zip(visible.history, query, strict=True)  # one by one: all at once fills the memory
    counts: Ints = np.stack([(blocks[..., None] == of_row).sum(axis=1) for blocks, of_row in pairs])
    return counts, first


def picked_cuts(scores: Floats, start: Cut, rules: FocusRules) -> list[Cut]:
    """Hold in detail what scores highest, as much of it as there is room for.

    Among equal scores the newer block comes first.

    Args:
        scores: Of each block of the history, ``[S, blocks]``; the higher the sooner.
        start: The coarse cut of all tokens that is refined.
        rules: Say how long a cut may be.

    Returns:
        The cut of each sequence.
    """
    end, blocks = int(start.ends[-1]), scores.shape[1]
    view = rules.geometry.within(end).coarse_cut(0, end)
    # What decides is the order alone, so the order is what is told: single precision holds it, and
    # LensNet's bounds do not cut it off.
    ranks = scores.argsort(axis=1, kind="stable").argsort(axis=1)
    padded = np.zeros((len(scores), len(view)), dtype=np.float32)
    padded[:, :blocks] = 2 * ranks / max(blocks - 1, 1) - 1
    return [refocus_cut(start, Scored(view, row), rules)[0] for row in padded]
