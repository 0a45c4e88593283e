"""What a session has in focus: one value that is made, written, and then put in place."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from megacontext.allocators.cut import Cut, Ints
from megacontext.allocators.focus import Edits, node_keys, nodes_of
from megacontext.allocators.rules import FocusRules, highest_lod


@dataclass(frozen=True)
class FocusTotals:
    """What all refocuses of a session have done so far.

    Attributes:
        refocuses: How many there were.
        lensnet_calls: How often LensNet was called for them.
        expanded: Entries that were expanded.
        collapsed: Parents that siblings were collapsed into.
        dropped: Entries that were lost at the old end.
    """

    refocuses: int = 0
    lensnet_calls: int = 0
    expanded: int = 0
    collapsed: int = 0
    dropped: int = 0


@dataclass(frozen=True, eq=False)
class FocusState:
    """The focus of a session as of its last refocus.

    Attributes:
        cut: The working context's, then.
        tokens: Of the history then; those since are at LOD0.
        totals: Of all refocuses.
        resting: Keys of the nodes that the last iterations edited, one array each, newest last.
            They are not edited while they are here.
    """

    cut: Cut
    tokens: int
    totals: FocusTotals = FocusTotals()
    resting: tuple[Ints, ...] = ()

    def cut_at(self, tokens: int) -> Cut:
        """Return the cut when the history has so many tokens: those since are at LOD0."""
        tail = np.arange(self.tokens, tokens, dtype=np.int64)
        return Cut(
            np.concatenate([self.cut.positions, tail]),
            np.concatenate([self.cut.lods, np.zeros_like(tail)]),
            self.cut.block_size,
        )

    def refocused(self, tokens: int) -> "FocusState":
        """Begin a refocus, when the history has so many tokens."""
        totals = replace(self.totals, refocuses=self.totals.refocuses + 1)
        return replace(self, cut=self.cut_at(tokens), tokens=tokens, totals=totals)

    def edited(self, cut: Cut, edits: Edits, cooldown: int) -> "FocusState":
        """Add an iteration.

        Args:
            cut: As it is now.
            edits: What the iteration did.
            cooldown: Iterations for which its nodes rest.

        Returns:
            The new state.
        """
        totals = replace(
            self.totals,
            lensnet_calls=self.totals.lensnet_calls + 1,
            expanded=self.totals.expanded + len(edits.expanded),
            collapsed=self.totals.collapsed + len(edits.collapsed),
            dropped=self.totals.dropped + edits.dropped,
        )
        resting = self.resting
        if cooldown:
            newest = np.concatenate([edits.expanded, edits.collapsed])
            resting = (*resting, newest)[-cooldown:]
        return replace(self, cut=cut, totals=totals, resting=resting)

    def to_json(self) -> dict[str, Any]:
        """Return what ``focus.json`` is to hold."""
        return {
            "tokens": self.tokens,
            "positions": self.cut.positions,
            "lods": self.cut.lods,
            "resting": [_nodes_json(keys) for keys in self.resting],
            "totals": asdict(self.totals),
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any], rules: FocusRules) -> "FocusState":
        """Make the state that was saved.

        Args:
            saved: What ``focus.json`` holds.
            rules: Of the session.

        Returns:
            The state.

        Raises:
            KeyError: Something is missing.
            TypeError: Something is of another type.
            ValueError: Its cut is none of such a tree.
        """
        tokens, geometry = int(saved["tokens"]), rules.geometry
        positions, lods = (np.array(saved[n], dtype=np.int64) for n in ("positions", "lods"))
        cut = Cut(positions, lods, geometry.block_size)
        if not len(cut) or lods.min() < 0 or lods.max() > highest_lod(tokens, rules):
            raise ValueError("no such level of detail")
        cut.check(int(positions[0]), tokens, min(geometry.recent_tokens, tokens))
        resting = tuple(_keys_of(nodes) for nodes in saved["resting"])
        totals = {name: int(saved["totals"][name]) for name in asdict(FocusTotals())}
        return cls(cut, tokens, FocusTotals(**totals), resting)


def _nodes_json(keys: Ints) -> dict[str, Ints]:
    starts, lods = nodes_of(keys)
    return {"starts": starts, "lods": lods}


def _keys_of(saved: Any) -> Ints:
    """Return the keys of nodes that were saved.

    Format 1 has them as integers, four for each token that a node could begin at.
    """
    if isinstance(saved, dict):
        starts, lods = (np.array(saved[name], dtype=np.int64) for name in ("starts", "lods"))
    else:
        starts, lods = np.divmod(np.array(saved, dtype=np.int64), 4)
    return node_keys(starts, lods)
