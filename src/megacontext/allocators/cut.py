"""Cuts: which (position, LOD) entries make up a working context. Integers only, no embeddings.

A cut through the tree of a history tiles its tokens in order. An entry at LOD ``l`` covers
``block_size ** l`` tokens and starts at a multiple of that, so that its embedding is the gist of
exactly the tokens it stands for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megacontext.checks import check_int

Ints = NDArray[np.int64]


class UnreachableTarget(ValueError):
    """A working-context length that no sequence of collapses can produce."""


@dataclass(frozen=True, eq=False)
class Cut:
    """Entries of a working context, oldest first.

    Attributes:
        positions: First token of each entry, int64 ``[W]``.
        lods: Level of detail of each entry, int64 ``[W]``.
        block_size: Tokens of a LOD1 entry, K.
    """

    positions: Ints
    lods: Ints
    block_size: int

    @property
    def spans(self) -> Ints:
        """Tokens that each entry covers, int64 ``[W]``."""
        return spans_of(self.lods, self.block_size)

    @property
    def ends(self) -> Ints:
        """The first token after each entry, int64 ``[W]``."""
        return self.positions + self.spans

    def token_lods(self, num_tokens: int) -> Ints:
        """Return the LOD of each token, int64 ``[num_tokens]``; -1 where it is not held."""
        lods = np.full(num_tokens, -1, dtype=np.int64)
        spans = self.spans
        within = np.arange(spans.sum()) - np.repeat(spans.cumsum() - spans, spans)
        lods[np.repeat(self.positions, spans) + within] = np.repeat(self.lods, spans)
        return lods

    def check(self, first: int, end: int, recent_tokens: int = 0) -> None:
        """Check that the cut is legal and covers tokens ``[first, end)`` completely.

        Args:
            first: The first token.
            end: The token after the last.
            recent_tokens: Length of the protected tail.

        Raises:
            ValueError: A gap, an overlap, an entry off its grid, or a coarse entry in the protected
                tail.
        """
        edges = np.concatenate([[first], self.ends])
        torn = np.flatnonzero(edges != np.append(self.positions, end))
        if len(torn):
            at = int(torn[0])
            raise ValueError(
                f"the cut does not tile [{first}, {end}): entry {at} should start at {edges[at]}"
            )
        skewed = np.flatnonzero(self.positions % self.spans)
        if len(skewed):
            at = int(skewed[0])
            raise ValueError(
                f"entry {at} (LOD{self.lods[at]}) starts at {self.positions[at]}, "
                f"which is no multiple of its span {self.spans[at]}"
            )
        if ((self.ends > end - recent_tokens) & (self.lods > 0)).any():
            raise ValueError(f"the last {recent_tokens} tokens are not all held at LOD0")

    def __len__(self) -> int:
        return len(self.positions)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Cut):
            return NotImplemented
        return (
            self.block_size == other.block_size
            and np.array_equal(self.positions, other.positions)
            and np.array_equal(self.lods, other.lods)
        )

    __hash__ = None  # type: ignore[assignment]  # arrays are mutable


@dataclass(frozen=True)
class Geometry:
    """The shape of a tree and of the cuts through it.

    Attributes:
        block_size: Tokens of a LOD1 gist, K, at least 2.
        max_lod: The highest level of detail, 1 or 2.
        recent_tokens: Length of the protected tail, which stays at LOD0.
        window: The most entries of a coarse cut; None for any number.

    Raises:
        TypeError: A block size or level that is no integer.
        ValueError: A block size or level of which no tree can be built.
    """

    block_size: int
    max_lod: int
    recent_tokens: int
    window: int | None = None

    def __post_init__(self) -> None:
        check_int("block_size", self.block_size)
        check_int("max_lod", self.max_lod)
        if self.block_size < 2:
            raise ValueError(f"block_size must be at least 2 tokens, not {self.block_size}")
        if self.max_lod not in (1, 2):
            raise ValueError(
                f"max_lod must be 1 or 2 (gists, and gists of gists), not {self.max_lod}"
            )

    @property
    def coarsest_span(self) -> int:
        """Tokens of an entry at the highest level of detail."""
        span: int = self.block_size**self.max_lod
        return span

    def within(self, window: int) -> "Geometry":
        """Return the same shape, for coarse cuts of at most ``window`` entries."""
        return replace(self, window=window)

    def coarse_cut(self, first: int, end: int, lod0_from: int | None = None) -> Cut:
        """Cut tokens ``[first, end)``: gists up to about ``lod0_from``, and LOD0 from there on.

        The history is LOD1; where that exceeds ``window`` entries and ``max_lod`` is 2, its oldest
        aligned K² spans are LOD2, as few as it takes.

        Args:
            first: The first token, a multiple of the coarsest span.
            end: The token after the last.
            lod0_from: The block that holds this token is the first at LOD0; the one where the
                protected tail begins by default.

        Returns:
            The cut.

        Raises:
            ValueError: ``first`` is no such multiple.
            UnreachableTarget: As coarse as it can be, the cut is longer than ``window``.
        """
        k = self.block_size
        if first % self.coarsest_span:
            raise ValueError(
                f"a coarse cut must begin at a multiple of {self.coarsest_span}, not at {first}"
            )
        lod0_from = end - self.recent_tokens if lod0_from is None else lod0_from
        blocks = max(lod0_from - first, 0) // k
        lod0 = first + blocks * k
        length = blocks + max(end - lod0, 0)
        window = length if self.window is None else self.window
        spans = max(-(-(length - window) // (k - 1)), 0)
        most = blocks // k if self.max_lod == 2 else 0
        if spans > most:
            shortest = length - most * (k - 1)
            raise UnreachableTarget(
                f"the focus view of {end - first} tokens has at least {shortest} entries and does "
                f"not fit a focus_window of {window}; widen the window or shorten the sequence"
            )
        lod1 = first + spans * k**2
        levels = (range(first, lod1, k**2), range(lod1, lod0, k), range(lod0, max(end, lod0)))
        positions = [np.arange(r.start, r.stop, r.step, dtype=np.int64) for r in levels]
        lods = np.repeat((2, 1, 0), [len(r) for r in levels])
        return Cut(np.concatenate(positions), lods, k)

    def focus_view(self, num_tokens: int, horizon_tokens: int) -> Cut:
        """Make the coarse cut that LensNet scores: history as gists, the recent tail at LOD0.

        It ends before the horizon, on which variants are judged. See `coarse_cut`.

        Args:
            num_tokens: Tokens of the sequence.
            horizon_tokens: Length of the horizon, at its end.

        Returns:
            The view.

        Raises:
            UnreachableTarget: As coarse as it can be, the view is longer than ``window``.
        """
        end = max(num_tokens - horizon_tokens, 0)
        return self.coarse_cut(0, end, max(num_tokens - self.recent_tokens, 0))

    def shortest_length(self, num_tokens: int) -> int:
        """Count the entries left when all before the protected tail is as coarse as it can be."""
        history = max(num_tokens - self.recent_tokens, 0)
        blocks = history // self.block_size
        spans = blocks // self.block_size if self.max_lod == 2 else 0
        return num_tokens - (blocks + spans) * (self.block_size - 1)


def spans_of(lods: Ints, block_size: int) -> Ints:
    """Return the tokens that entries of these LODs cover, int64, of the same shape."""
    spans: Ints = (block_size ** np.arange(3))[lods]  # looked up: integer powers are slow
    return spans


def from_block_lods(block_lods: Ints, num_tokens: int, block_size: int) -> Cut:
    """Make the cut that holds each block at its LOD, and what follows the blocks at LOD0.

    Args:
        block_lods: The LOD of each block, int64 ``[blocks]``; the K blocks of a LOD2 span agree.
        num_tokens: Of the history.
        block_size: Tokens of a block, K.

    Returns:
        The cut.
    """
    k = block_size
    blocks = np.arange(len(block_lods), dtype=np.int64)
    entries = np.array([k, 1, 0])[block_lods]
    entries[(block_lods == 2) & (blocks % k == 0)] = 1  # the gist stands where its span begins
    lods = np.repeat(block_lods, entries)
    # Within a block at LOD0 positions go up by one; each block begins where it begins.
    positions = np.arange(len(lods)) + np.repeat(blocks * k - entries.cumsum() + entries, entries)
    rest = np.arange(len(block_lods) * k, num_tokens, dtype=np.int64)
    return Cut(np.concatenate([positions, rest]), np.concatenate([lods, np.zeros_like(rest)]), k)


def lod0_tail(num_tokens: int, length: int, block_size: int) -> Cut:
    """Cut out the last tokens, each at LOD0.

    Args:
        num_tokens: Of the history.
        length: How many to hold; all of them if there are fewer.
        block_size: Tokens of a block, K.

    Returns:
        The cut.
    """
    positions = np.arange(max(num_tokens - length, 0), num_tokens, dtype=np.int64)
    return Cut(positions, np.zeros_like(positions), block_size)


def held_at_lod0(cuts: Sequence[Cut], view: Cut, num_tokens: int) -> NDArray[np.bool_]:
    """Tell which spans of a view's entries cuts hold at LOD0, all of them.

    Args:
        cuts: Some cuts of one history.
        view: The focus view of the history.
        num_tokens: Of the history.

    Returns:
        Whether it does, bool ``[cuts, entries]``.
    """
    lod0 = np.zeros((len(cuts), num_tokens + 1), dtype=np.int64)
    for row, cut in zip(lod0, cuts, strict=True):
        row[cut.positions[cut.lods == 0] + 1] = 1
    before = lod0.cumsum(axis=1)
    held: NDArray[np.bool_] = before[:, view.ends] - before[:, view.positions] == view.spans
    return held


def kept_tokens(num_tokens: int, target_length: int, block_size: int) -> int:
    """Count the newest tokens that may stay so that ``target_length`` becomes reachable.

    Every collapse shortens a cut by a multiple of K - 1, so (N - W) mod (K - 1) tokens must go.

    Args:
        num_tokens: Of the history, N.
        target_length: Entries that are wanted, W.
        block_size: Tokens of a block, K.

    Returns:
        How many tokens may stay.
    """
    if num_tokens <= target_length:
        return num_tokens
    return num_tokens - (num_tokens - target_length) % (block_size - 1)
