"""The focus allocator: LensNet's scores become edits of the working context. Inference only.

An edit expands one entry into its K children or collapses K siblings into their parent, so each
changes the length by K - 1. Edits are planned on integers and scores alone (`refocus_cut`, a pure
function); embeddings are gathered afterwards, once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lensnet_guard import Guard
from megacontext.cut import Cut, Ints
from megacontext.working_context import WorkingContext

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class FocusRules:
    """How scores become edits.

    Attributes:
        wc_length: most entries that an edited working context has, W. It is a soft budget: tokens
            that are appended exceed it until the next refocus.
        block_size, max_lod, recent_tokens: of the tree, and the protected tail.
        expand_threshold: only what scores above it is expanded.
        margin: an expansion that needs room takes it from a collapse that scores less by so much.
        max_edits: of one iteration.
        cooldown: iterations for which what was expanded is not collapsed, and the reverse.
    """

    wc_length: int
    block_size: int
    max_lod: int
    recent_tokens: int
    expand_threshold: float = 0.0
    margin: float = 0.1
    max_edits: int = 64
    cooldown: int = 2


@dataclass(frozen=True, eq=False)
class Edits:
    """What one iteration did.

    Attributes:
        expanded, collapsed: keys of the nodes (see `node_keys`): the entries that were expanded,
            and the parents that siblings were collapsed into; int64 ``[edits]`` each.
        dropped: entries that left at the old end, since nothing more could be collapsed.
    """

    expanded: Ints
    collapsed: Ints
    dropped: int

    def __len__(self) -> int:
        return len(self.expanded) + len(self.collapsed)


@dataclass(frozen=True, eq=False)
class Scored:
    """A focus view and LensNet's scores of its entries, float ``[E]``."""

    view: Cut
    scores: Floats

    def of_nodes(self, starts: Ints, spans: Ints) -> Floats:
        """The highest score within each node, float ``[n]``: one worthy part is enough."""
        first = np.searchsorted(self.view.ends, starts, side="right")
        last = np.searchsorted(self.view.positions, starts + spans, side="left")
        edges = np.stack([first, np.maximum(last, first + 1)], axis=1).ravel()
        padded = np.append(self.scores, np.float32(-np.inf))
        best: Floats = np.maximum.reduceat(padded, edges)[::2] if len(edges) else padded[:0]
        return best


def node_keys(starts: Ints, lods: Ints) -> Ints:
    """One integer for each node of a tree."""
    keys: Ints = starts * 4 + lods
    return keys


def refocus_cut(
    cut: Cut, scored: Scored, rules: FocusRules, barred: Ints | None = None
) -> tuple[Cut, Edits]:
    """Edit a cut by scores: as many of the best expansions as there is room, or room can be made.

    Room comes from the free budget first, then from the collapses that score lowest, each of which
    must score ``margin`` less than the expansion it makes room for. A cut above its budget is
    collapsed where scores are lowest, whatever they are, and loses its oldest entries when that is
    not enough.

    Args:
        cut: covers the tokens up to the newest without a gap.
        scored: its view covers all that may be edited.
        barred: keys of nodes that may not be edited now.

    Returns:
        the new cut, and the edits that made it.
    """
    k, lods, spans = cut.block_size, cut.lods, cut.spans
    editable = cut.ends[-1] - rules.recent_tokens  # what ends later is protected
    barred = np.empty(0, np.int64) if barred is None else barred

    groups = np.flatnonzero(_begins_siblings(cut, rules.max_lod, editable))
    parents = node_keys(cut.positions[groups], lods[groups] + 1)
    over = len(cut) - rules.wc_length
    forced = min(max(-(-over // (k - 1)), 0), len(groups))
    low = scored.of_nodes(cut.positions[groups], spans[groups] * k)
    # Barred ones come last, and are taken only where the budget forces it.
    resting = np.isin(parents, barred)
    order = np.lexsort((low, resting))
    groups, parents, low = groups[order], parents[order], low[order]
    willing = np.append(low[forced:][~resting[order][forced:]], np.float32(np.inf))

    entries = np.flatnonzero((lods > 0) & (cut.ends <= editable))
    keys = node_keys(cut.positions[entries], lods[entries])
    high = scored.of_nodes(cut.positions[entries], spans[entries])
    wanted = (high > rules.expand_threshold) & ~np.isin(keys, barred)
    order = np.flatnonzero(wanted)[np.argsort(-high[wanted], kind="stable")]
    entries, keys, high = entries[order], keys[order], high[order]

    room = max(-over, 0) // (k - 1)
    # The i-th expansion beyond the room takes the i-th lowest collapse.
    price = np.full(len(high), -np.inf, np.float32)
    paid = np.arange(len(high) - room) if len(high) > room else np.arange(0)
    price[room:] = willing[np.minimum(paid, len(willing) - 1)]
    affordable = high - price > rules.margin
    expansions = int(np.argmin(affordable)) if not affordable.all() else len(high)
    collapses = forced + max(expansions - room, 0)
    if collapses + expansions > rules.max_edits:  # forced collapses come first
        expansions, collapses = _limit(expansions, room, forced, rules.max_edits)
    edited = _apply(cut, entries[:expansions], groups[:collapses])
    dropped = max(len(edited) - rules.wc_length, 0) if forced == len(groups) else 0
    if dropped:
        edited = Cut(edited.positions[dropped:], edited.lods[dropped:], k)
    return edited, Edits(keys[:expansions], parents[:collapses], dropped)


def _limit(expansions: int, room: int, forced: int, most: int) -> tuple[int, int]:
    """Expansions and collapses, so that both together are at most ``most``."""
    forced = min(forced, most)
    left = most - forced
    free = min(expansions, room, left)
    pairs = min(expansions - min(expansions, room), (left - free) // 2)
    return free + pairs, forced + pairs


def _begins_siblings(cut: Cut, max_lod: int, editable: int) -> NDArray[np.bool_]:
    """Which entries are the first of K siblings that all stand in the cut, bool ``[W]``."""
    k, spans = cut.block_size, cut.spans
    if len(cut) < k:
        return np.zeros(len(cut), dtype=np.bool_)
    last = np.minimum(np.arange(len(cut)) + k - 1, len(cut) - 1)
    # K aligned entries of one level take (K - 1) spans from first to last; no mixture does.
    begins: NDArray[np.bool_] = (
        (cut.lods < max_lod)
        & (cut.positions % (spans * k) == 0)
        & (cut.positions[last] == cut.positions + (k - 1) * spans)
        & (cut.lods[last] == cut.lods)
        & (cut.positions + k * spans <= editable)
    )
    return begins


def _apply(cut: Cut, entries: Ints, groups: Ints) -> Cut:
    """Expand entries and collapse the groups that begin at ``groups``; none may overlap."""
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
    return Cut(np.repeat(cut.positions, copies) + within * k**lods, lods, k)


class FocusAllocator:
    """Asks LensNet once per iteration, and edits a working context by what it says.

    Args:
        lensnet: guarded; ``guard`` is its guard.
        rules: how scores become edits.

    Raises:
        RuntimeError: made or used outside inference context.
    """

    def __init__(self, lensnet: Callable[..., Tensor], guard: Guard, rules: FocusRules) -> None:
        self._lensnet = lensnet
        self._guard = guard
        self.rules = rules
        self._recent: list[Ints] = []  # keys of the edits of the last iterations, newest last
        self._require_inference("made")

    def refocus(self, cut: Cut, view: WorkingContext, view_cut: Cut) -> tuple[Cut, Edits]:
        """One iteration: one LensNet call, then edits.

        Args:
            cut: the working context's.
            view: the focus view as tensors, ``[1, E]``. view_cut: the same as a cut.
        """
        self._require_inference("used")
        scores = self._lensnet(view.embeddings, view.starts, view.spans, view.lods, view.pad_mask)
        scored = Scored(view_cut, scores[0].float().numpy(force=True))
        barred = np.concatenate(self._recent) if self._recent else None
        edited, edits = refocus_cut(cut, scored, self.rules, barred)
        if self.rules.cooldown:
            self._recent.append(np.concatenate([edits.expanded, edits.collapsed]))
            del self._recent[: -self.rules.cooldown]
        return edited, edits

    def _require_inference(self, what: str) -> None:
        if (context := self._guard.current_context) != "inference":
            raise RuntimeError(
                f"a FocusAllocator was {what} in {context or 'unset'} context; it is for "
                'inference only: `with mc.context("inference"):`. In training, working contexts '
                "come from TrainingWCVariationAllocator"
            )
