"""Scores become edits of a working context: what is expanded, what collapsed, what must go.

An edit expands one entry into its K children or collapses K siblings into their parent, so each
changes the length by K - 1. Edits are planned on integers and scores alone, whoever gave the
scores.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megacontext.allocators.cut import Cut, Ints, edited_cut, sibling_groups, spans_of
from megacontext.allocators.rules import FocusRules, coarsest_length, first_that_fits

Floats = NDArray[np.float32]
_NONE: Ints = np.empty(0, dtype=np.int64)
_LEVELS = 64  # that a key has room for; no int64 position has more


@dataclass(frozen=True, eq=False)
class Edits:
    """What one iteration did.

    Attributes:
        expanded: Keys (see `node_keys`) of the entries that were expanded, int64 ``[edits]``.
        collapsed: Keys of the parents that siblings were collapsed into, int64 ``[edits]``.
        dropped: Entries that left at the old end, since even the coarsest cut did not fit.
    """

    expanded: Ints
    collapsed: Ints
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.expanded) + len(self.collapsed)


@dataclass(frozen=True, eq=False)
class Scored:
    """A focus view and LensNet's scores of its entries.

    Attributes:
        view: The entries that were scored, E of them.
        scores: Of each, float32 ``[E]``.
    """

    view: Cut
    scores: Floats

    def of_nodes(self, starts: Ints, spans: Ints) -> Floats:
        """Return the highest score within each node: one worthy part is enough.

        Args:
            starts: First token of each node, int64 ``[n]``.
            spans: Tokens of each node, int64 ``[n]``.

        Returns:
            The scores, float32 ``[n]``; -inf for nodes that the view does not reach.
        """
        first = np.searchsorted(self.view.ends, starts, side="right")
        last = np.searchsorted(self.view.positions, starts + spans, side="left")
        edges = np.stack([first, np.maximum(last, first + 1)], axis=1).ravel()
        padded = np.append(self.scores, np.full(2, -np.inf, np.float32))
        best: Floats = np.maximum.reduceat(padded, edges)[::2] if len(edges) else padded[:0]
        return best


def node_keys(starts: Ints, lods: Ints) -> Ints:
    """Return one integer for each node of a tree, by its first token and its LOD."""
    keys: Ints = starts * _LEVELS + lods
    return keys


def nodes_of(keys: Ints) -> tuple[Ints, Ints]:
    """Return first token and LOD of the nodes that keys stand for."""
    return keys // _LEVELS, keys % _LEVELS


def refocus_cut(
    cut: Cut, scored: Scored, rules: FocusRules, barred: Ints | None = None
) -> tuple[Cut, Edits]:
    """Edit a cut by scores: the best expansions that there is room for, or room can be made.

    The budget comes first. A cut of more than ``wc_length`` entries is collapsed where scores are
    lowest, whatever they are and however many edits it takes; what is barred comes last, and only
    when all else is as coarse as it can be. A history that not even the coarsest cut covers loses
    its oldest entries, so many that there is room for detail again. The new cut is never longer
    than ``wc_length``, and begins where the old one did whenever that is possible.

    Then the best expansions: room comes from the free budget first, then from the collapses that
    score lowest, each of which must score ``margin`` less than the expansion it makes room for.

    Args:
        cut: At least one entry; covers the tokens up to the newest without a gap.
        scored: The scores, whose view covers all that may be edited.
        rules: How scores become edits.
        barred: Keys of nodes that may not be edited now, int64 ``[n]``; none by default.

    Returns:
        The new cut, and the edits that made it.

    Raises:
        UnreachableTarget: ``wc_length`` does not even hold the protected tail.
    """
    barred = _NONE if barred is None else barred
    first = first_that_fits(int(cut.positions[0]), int(cut.ends[-1]), rules)
    dropped = int(np.searchsorted(cut.positions, first))
    cut = Cut(cut.positions[dropped:], cut.lods[dropped:], cut.block_size)
    cut, forced = _collapse_to_fit(cut, scored, rules, barred)
    cut, expanded, collapsed = _trade(cut, scored, rules, barred, len(forced))
    # What was collapsed by force and expanded again, since it paid, was not edited.
    edited, undone = ~np.isin(forced, expanded), np.isin(expanded, forced)
    collapsed = np.concatenate([forced[edited], collapsed])
    return cut, Edits(expanded[~undone], collapsed, dropped)


def _collapse_to_fit(cut: Cut, scored: Scored, rules: FocusRules, barred: Ints) -> tuple[Cut, Ints]:
    """Collapse what scores lowest until the cut fits: a round for each LOD, then the barred ones.

    Returns:
        The cut, and the keys of the parents.
    """
    made = [_NONE]
    for spared in (barred, _NONE):
        while (over := len(cut) - rules.wc_length) > 0:
            groups, parents, low = _collapsible(cut, scored, rules, spared)
            if not len(groups):
                break
            taken = np.argsort(low, kind="stable")[: -(-over // (cut.block_size - 1))]
            cut = edited_cut(cut, _NONE, groups[taken])
            made.append(parents[taken])
    return cut, np.concatenate(made)


def _trade(
    cut: Cut, scored: Scored, rules: FocusRules, barred: Ints, forced: int
) -> tuple[Cut, Ints, Ints]:
    """Make the expansions that are worth their room, and the collapses that pay for them.

    An expansion never meets a collapse around it: the group's score is the highest within it, so it
    would have to be lower than itself.

    Args:
        cut: It fits.
        scored: The scores.
        rules: How scores become edits.
        barred: Keys of nodes that may not be edited now, int64 ``[n]``.
        forced: How many edits the budget has taken.

    Returns:
        The cut, and the keys of what was expanded and of what was collapsed.
    """
    k, lods, tuning = cut.block_size, cut.lods, rules.tuning
    groups, parents, low = _collapsible(cut, scored, rules, barred)
    order = np.argsort(low, kind="stable")
    order = order[: np.count_nonzero(low <= tuning.collapse_threshold)]
    groups, parents, low = groups[order], parents[order], low[order]

    entries = np.flatnonzero(lods > 0)
    keys = node_keys(cut.positions[entries], lods[entries])
    high = scored.of_nodes(cut.positions[entries], cut.spans[entries])
    wanted = (high > tuning.expand_threshold) & ~np.isin(keys, barred)
    order = np.flatnonzero(wanted)[np.argsort(-high[wanted], kind="stable")]
    entries, keys, high = entries[order], keys[order], high[order]

    room = max(rules.wc_length - len(cut), 0) // (k - 1)
    # The i-th expansion beyond the room takes the i-th lowest collapse, while there is one.
    price = np.full(len(high), np.inf, np.float32)
    price[:room] = -np.inf
    price[room : room + len(low)] = low[: max(len(high) - room, 0)]
    worth = high - price > tuning.margin
    worth &= _leaves_reserve(cut, keys, rules, barred)
    expansions = len(high) if worth.all() else int(np.argmin(worth))
    edits_left = max(tuning.max_edits - forced, 0)
    free = min(expansions, room, edits_left)
    paid = min(expansions - min(expansions, room), (edits_left - free) // 2)
    edited = edited_cut(cut, entries[: free + paid], groups[:paid])
    return edited, keys[: free + paid], parents[:paid]


def _leaves_reserve(cut: Cut, keys: Ints, rules: FocusRules, barred: Ints) -> NDArray[np.bool_]:
    """Tell whether, after each expansion in turn, the reserve is free.

    Free is what would be, were all collapsed but what was expanded and is barred, or now will be.

    Args:
        cut: Before the expansions.
        keys: Of the entries to be expanded, in order, int64 ``[n]``.
        rules: Say how much the reserve is.
        barred: Keys of nodes that may not be edited now, int64.

    Returns:
        Whether it is, bool ``[n]``.
    """
    if not rules.reserve:
        return np.ones(len(keys), dtype=np.bool_)
    k, first, end = cut.block_size, int(cut.positions[0]), int(cut.ends[-1])
    starts, levels = nodes_of(barred)
    at = np.searchsorted(cut.positions, starts, side="right") - 1
    stands_open = (starts >= first) & (cut.lods[at] < levels)
    kept = np.unique(_opened(barred[stands_open], first, end, rules))
    kept = kept[kept >= 0]
    floor = coarsest_length(first, end, rules.geometry) + (k - 1) * len(kept)
    # A node that is kept open keeps those above it open, each of which counts once.
    opened = _opened(keys, first, end, rules)
    unseen = np.zeros(opened.size, dtype=np.bool_)
    unseen[np.unique(opened, return_index=True)[1]] = True
    unseen = unseen.reshape(opened.shape) & (opened >= 0) & ~np.isin(opened, kept)
    cost = (k - 1) * unseen.sum(axis=1).cumsum()
    leaves: NDArray[np.bool_] = floor + cost <= rules.wc_length - rules.reserve
    return leaves


def _opened(keys: Ints, first: int, end: int, rules: FocusRules) -> Ints:
    """Return which nodes are open when others are: those, and all above that a cut could hold.

    Args:
        keys: Of the others, int64 ``[n]``.
        first: The first token of the cut.
        end: The token after its last.
        rules: Say how many levels there are.

    Returns:
        Their keys, a column for each level, int64 ``[n, max_lod]``; -1 where there is none.
    """
    starts, levels = (a[:, None] for a in nodes_of(keys))
    lods = np.arange(1, rules.geometry.max_lod + 1)
    spans = spans_of(lods, rules.geometry.block_size)
    begins = starts // spans * spans
    above = (lods > levels) & (begins >= first)
    above &= begins + spans <= end - rules.geometry.recent_tokens
    opened: Ints = np.where(above | (lods == levels), node_keys(begins, lods), -1)
    return opened


def _collapsible(
    cut: Cut, scored: Scored, rules: FocusRules, barred: Ints
) -> tuple[Ints, Ints, Floats]:
    """Find where K siblings begin that all stand in the cut; their parents' keys and scores too."""
    editable = int(cut.ends[-1]) - rules.geometry.recent_tokens  # what ends later is protected
    groups = sibling_groups(cut, rules.geometry.max_lod, editable)
    parents = node_keys(cut.positions[groups], cut.lods[groups] + 1)
    groups, parents = (a[~np.isin(parents, barred)] for a in (groups, parents))
    spans = spans_of(cut.lods[groups] + 1, cut.block_size)
    return groups, parents, scored.of_nodes(cut.positions[groups], spans)
