"""The rules of the focus allocator, and what they make of lengths. Integers only."""

from dataclasses import dataclass, replace

from megacontext.allocators.cut import Geometry, UnreachableTarget
from megacontext.checks import check_at_least, check_int, check_number


@dataclass(frozen=True)
class FocusTuning:
    """What a score must be for an edit, and how many edits there may be.

    Attributes:
        expand_threshold: Only what scores above it is expanded.
        collapse_threshold: Only what scores no more is collapsed to make room for an expansion.
        margin: An expansion that needs room takes it from a collapse that scores less by so much.
        max_edits: Of one iteration; only what the budget forces may exceed it.
        cooldown: Iterations for which what was expanded is not collapsed, and the reverse.
        detail_share: Of the entries beside the tail, those that are freed for detail when the
            history must be given more levels of gists, or lose its oldest entries.

    Raises:
        TypeError: A value that is no number; the message names it.
        ValueError: A value out of bounds; the message names it.
    """

    expand_threshold: float = 0.0
    collapse_threshold: float = 1.0
    margin: float = 0.1
    max_edits: int = 64
    cooldown: int = 2
    detail_share: float = 0.5

    def __post_init__(self) -> None:
        check_at_least("max_edits", self.max_edits, 0)
        check_at_least("cooldown", self.cooldown, 0)
        for name in ("expand_threshold", "collapse_threshold", "margin", "detail_share"):
            check_number(name, getattr(self, name))
        if self.margin < 0:
            raise ValueError(f"margin must not be negative, but is {self.margin}")
        if not 0 <= self.detail_share <= 1:
            raise ValueError(f"detail_share must lie in [0, 1], not {self.detail_share}")


@dataclass(frozen=True)
class FocusRules:
    """How scores become edits.

    Attributes:
        geometry: Of the tree; its window is ``wc_length``.
        tuning: What a score must be for an edit.
        reserve: Entries that expansions leave free as long as they rest. Where it is as much as
            the coarsest cut grows in ``cooldown`` iterations, the budget never has to collapse
            what was just expanded.
        max_tokens: The most tokens that a working context may cover, however coarsely; None for
            any number.

    Raises:
        TypeError: A length that is no integer; the message names it.
        ValueError: A length out of bounds; the message names it.
    """

    geometry: Geometry
    tuning: FocusTuning = FocusTuning()
    reserve: int = 0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        check_at_least("wc_length", self.geometry.window, 1)
        check_at_least("recent_tokens", self.geometry.recent_tokens, 1)
        check_at_least("reserve", self.reserve, 0)
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens)

    @property
    def wc_length(self) -> int:
        """The most entries of an edited working context, W.

        It is a soft budget: tokens that are appended exceed it until the next iteration, which
        brings it back, whatever it takes.
        """
        length = self.geometry.window
        assert length is not None  # refused when it was made
        return length

    @property
    def coarse_entries(self) -> int:
        """The entries that a coarsest cut may have, so that the rest is free for detail."""
        beside_tail = self.wc_length - self.geometry.recent_tokens
        return self.wc_length - self.reserve - int(beside_tail * self.tuning.detail_share)

    def up_to(self, max_lod: int) -> "FocusRules":
        """Return the same rules for a tree with another highest level of detail."""
        return replace(self, geometry=self.geometry.up_to(max_lod))

    @property
    def shortest_wc_length(self) -> int:
        """The least ``wc_length`` that holds the protected tail wherever the history ends."""
        geometry = self.geometry
        return geometry.recent_tokens + geometry.max_lod * (geometry.block_size - 1)

    @property
    def fewest_max_tokens(self) -> int:
        """The least ``max_tokens`` that holds the protected tail wherever the history ends."""
        return self.geometry.recent_tokens + self.geometry.coarsest_span - 1


def coarsest_length(first: int, end: int, geometry: Geometry) -> int:
    """Count the entries of a cut of ``[first, end)`` that is as coarse as it can be."""
    editable, nodes = end - geometry.recent_tokens, 0
    for lod in range(1, geometry.max_lod + 1):
        span = geometry.block_size**lod
        nodes += max(editable // span - -(-first // span), 0)
    return end - first - (geometry.block_size - 1) * nodes


def longest_cover(tokens: int, geometry: Geometry) -> int:
    """Count the most entries that a stretch of tokens takes, as coarse as it can be.

    That is by how much a coarsest cut grows at most when they are appended, whatever is kept open
    in it: up to K - 1 siblings of each level on either side of the stretch, and as many of the
    highest level as there is room for between them.

    Args:
        tokens: Of the stretch, which may begin anywhere.
        geometry: Of the tree.

    Returns:
        The number of entries.
    """
    k: int = geometry.block_size
    entries = 0
    for lod in range(geometry.max_lod):
        siblings = min(2 * (k - 1), tokens // k**lod)
        entries += siblings
        tokens -= siblings * k**lod
    return entries + tokens // geometry.coarsest_span


def highest_lod(tokens: int, rules: FocusRules) -> int:
    """Say how many levels of gists a history needs, so that working contexts cover all of it.

    Those of the rules' own geometry, which the networks were trained on, as long as a coarsest cut
    fits; then so many that it leaves room for detail (`FocusTuning.detail_share`). The number never
    falls as the history grows. There are no more levels than there are nodes of, nor than a working
    context holds K - 1 of each beside its tail. Where positions reach ``max_tokens`` only, the
    oldest goes in spans of the highest level, so there is none of which they reach fewer than K.

    Args:
        tokens: Of the history.
        rules: Of its working contexts.

    Returns:
        The highest level of detail.
    """
    k, recent = rules.geometry.block_size, rules.geometry.recent_tokens
    covered = tokens if rules.max_tokens is None else min(tokens, rules.max_tokens)
    editable, fewest = max(covered - recent, 0), 1 if rules.max_tokens is None else k

    def longest(lod: int) -> int:
        """The longest that a coarsest cut was so far: with K - 1 siblings below the top."""
        length: int = recent + lod * (k - 1) + editable // k**lod
        return length

    lod = rules.geometry.max_lod
    if longest(lod) <= rules.wc_length:
        return lod
    while (
        longest(lod) > rules.coarse_entries
        and editable // k ** (lod + 1) >= fewest
        and recent + (lod + 1) * (k - 1) + k <= rules.wc_length
    ):
        lod += 1
    return lod


def first_that_fits(first: int, end: int, rules: FocusRules) -> int:
    """Find where a cut must begin so that it fits: ``max_tokens``, and, as coarse as it can be, W.

    That is ``first`` if it can be; else a multiple of the coarsest span that leaves room for
    detail, so that the history is not cut off again after every few tokens.

    Args:
        first: Where the cut begins now.
        end: The token after the newest.
        rules: Say what fits.

    Returns:
        The first token that the cut may cover.

    Raises:
        UnreachableTarget: ``wc_length`` does not even hold the protected tail.
    """
    geometry, wc_length = rules.geometry, rules.wc_length
    recent, span = geometry.recent_tokens, geometry.coarsest_span
    if rules.max_tokens is not None and end - first > rules.max_tokens:
        first = -(-(end - rules.max_tokens) // span) * span
    if coarsest_length(first, end, geometry) <= wc_length:
        return first
    newest = (end - recent) // span * span
    shortest = coarsest_length(max(newest, first), end, geometry)
    if newest < first or shortest > wc_length:
        raise UnreachableTarget(
            f"a working context of {wc_length} entries cannot hold the last "
            f"{recent} tokens at LOD0 and what remains before them: "
            f"that takes {shortest}"
        )
    target = max(rules.coarse_entries, shortest)
    first = -(-first // span) * span
    over = coarsest_length(first, end, geometry) - target
    fits: int = min(first + max(over, 0) * span, newest)
    return fits
