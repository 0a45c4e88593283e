"""Cuts: which (position, LOD) entries make up a working context. Integers only, no embeddings.

A cut through the tree of a history tiles its tokens in order. An entry at LOD ``l`` covers
``block_size ** l`` tokens and starts at a multiple of that, so that its embedding is the gist of
exactly the tokens it stands for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megacontext.checks import check_at_least, check_int

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
        max_lod: The highest level of detail, at least 1.
        recent_tokens: Length of the protected tail, which stays at LOD0.
        window: The most entries of a coarse cut; None for any number.

    Raises:
        TypeError: A size or level that is no integer.
        ValueError: A block size or level of which no tree can be built.
    """

    block_size: int
    max_lod: int
    recent_tokens: int
    window: int | None = None

    def __post_init__(self) -> None:
        check_int("block_size", self.block_size)
        if self.block_size < 2:
            raise ValueError(f"block_size must be at least 2 tokens, not {self.block_size}")
        check_at_least("max_lod", self.max_lod, 1)
        check_int("recent_tokens", self.recent_tokens)

    @property
    def coarsest_span(self) -> int:
        """Tokens of an entry at the highest level of detail."""
        span: int = self.block_size**self.max_lod
        return span

    def within(self, window: int) -> "Geometry":
        """Return the same shape, for coarse cuts of at most ``window`` entries."""
        return replace(self, window=window)

    def up_to(self, max_lod: int) -> "Geometry":
        """Return the same shape with another highest level of detail."""
        return replace(self, max_lod=max_lod)

    def coarse_cut(self, first: int, end: int, lod0_from: int | None = None) -> Cut:
        """Cut tokens ``[first, end)``: gists up to about ``lod0_from``, and LOD0 from there on.

        The history is LOD1; where that exceeds ``window`` entries, its oldest aligned K² spans are
        LOD2, as few as it takes; where all of them are not enough, the oldest of those are LOD3,
        and so on up to ``max_lod``.

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
        history = max(lod0_from - first, 0)
        top, spans = 1, history // k  # the coarsest level so far, and how many there are of it
        length = spans + max(end - first - spans * k, 0)
        window = length if self.window is None else self.window
        while length > window and top < self.max_lod:
            top += 1
            spans = min(-(-(length - window) // (k - 1)), history // k**top)
            length -= spans * (k - 1)
        if length > window:
            raise UnreachableTarget(
                f"the focus view of {end - first} tokens has at least {length} entries and does "
                f"not fit a focus_window of {window}; widen the window or shorten the sequence"
            )
        begin, positions, lengths = first, [], []
        for lod in range(top, -1, -1):
            until = spans * k**top if lod == top else history // k**lod * k**lod
            until = first + until if lod else max(end, begin)
            positions.append(np.arange(begin, until, k**lod, dtype=np.int64))
            lengths.append(len(positions[-1]))
            begin = until
        lods = np.repeat(np.arange(top, -1, -1), lengths)
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

    def detail(self, num_tokens: int, length: int) -> tuple[int, int]:
        """Count the blocks before the protected tail, and how many of them there is room for.

        Args:
            num_tokens: Of the sequence.
            length: Entries of a working context that holds the other blocks at LOD1.

        Returns:
            The blocks, and those that it can hold at LOD0.
        """
        blocks = max(num_tokens - self.recent_tokens, 0) // self.block_size
        room = length - (num_tokens - blocks * (self.block_size - 1))
        return blocks, min(max(room, 0) // (self.block_size - 1), blocks)

    def shortest_length(self, num_tokens: int) -> int:
        """Count the entries left when all before the protected tail is as coarse as it can be."""
        history = max(num_tokens - self.recent_tokens, 0)
        nodes: int = sum(history // self.block_size**lod for lod in range(1, self.max_lod + 1))
        return num_tokens - nodes * (self.block_size - 1)


def spans_of(lods: Ints, block_size: int) -> Ints:
    """Return the tokens that entries of these LODs cover, int64, of the same shape."""
    spans: Ints = _powers(block_size)[lods]  # looked up: integer powers are slow
    return spans


@lru_cache
def _powers(base: int) -> Ints:
    """Return the powers of a base that an int64 holds, from 1 on."""
    return np.array([power for lod in range(63) if (power := base**lod) < 2**63], dtype=np.int64)


def child_nodes(starts: Ints, lods: Ints, block_size: int) -> tuple[Ints, Ints]:
    """Find the K children of nodes; a node at LOD0 is K times itself.

    Args:
        starts: First token of each node, int64 ``[...]``.
        lods: Their levels of detail, likewise.
        block_size: Children of a node, K.

    Returns:
        First token and level of detail of each child, int64 ``[..., K]``.
    """
    below = np.repeat(np.maximum(lods - 1, 0)[..., None], block_size, axis=-1)
    steps = spans_of(below, block_size) * (lods > 0)[..., None]
    return starts[..., None] + steps * np.arange(block_size), below


def sibling_groups(cut: Cut, max_lod: int, editable_end: int) -> Ints:
    """Find where K siblings begin that all stand in a cut.

    Args:
        cut: Any.
        max_lod: The highest level that their parent may have.
        editable_end: Their parent must not end after this token.

    Returns:
        Index of the first of each K, oldest first, int64 ``[groups]``.
    """
    k, spans = cut.block_size, cut.spans
    if len(cut) < k:
        return np.empty(0, dtype=np.int64)
    last = np.minimum(np.arange(len(cut)) + k - 1, len(cut) - 1)
    # K aligned entries of one level take (K - 1) spans from first to last; no mixture does.
    begins = (
        (cut.lods < max_lod)
        & (cut.positions % (spans * k) == 0)
        & (cut.positions[last] == cut.positions + (k - 1) * spans)
        & (cut.lods[last] == cut.lods)
        & (cut.positions + k * spans <= editable_end)
    )
    return np.flatnonzero(begins)


def edited_cut(cut: Cut, entries: Ints, groups: Ints) -> Cut:
    """Expand some entries and collapse some siblings; none may overlap.

    Args:
        cut: Any.
        entries: Indices of the entries to be expanded.
        groups: Indices at which K siblings begin (see `sibling_groups`) that are to be collapsed.

    Returns:
        The new cut.
    """
    k = cut.block_size
    copies = np.ones(len(cut), dtype=np.int64)
    lods = cut.lods.copy()
    copies[entries] = k
    lods[entries] -= 1
    copies[(groups[:, None] + np.arange(1, k)).ravel()] = 0
    lods[groups] += 1
    first = np.repeat(np.cumsum(copies) - copies, copies)
    within = np.arange(len(first)) - first
    lods = np.repeat(lods, copies)
    return Cut(np.repeat(cut.positions, copies) + within * spans_of(lods, k), lods, k)


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
