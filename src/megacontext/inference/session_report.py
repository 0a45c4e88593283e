"""What a session tells of itself: each refocus as an event, and a report of the whole."""

from dataclasses import dataclass

from megacontext.allocators.cut import Cut
from megacontext.allocators.focus import Edits


@dataclass(frozen=True)
class FocusEvent:
    """One iteration of a refocus.

    Attributes:
        tokens: Of the history at that moment.
        expanded: Entries that were expanded.
        collapsed: Parents that siblings were collapsed into.
        dropped: Entries that were lost at the old end.
        before: Entries of the working context before.
        after: Entries of the working context afterwards.
        first_token: The first that is covered afterwards.
    """

    tokens: int
    expanded: int
    collapsed: int
    dropped: int
    before: int
    after: int
    first_token: int

    @classmethod
    def of(cls, edits: Edits, cut: Cut, before: int, tokens: int) -> "FocusEvent":
        """Make the event of some edits.

        Args:
            edits: What the iteration did.
            cut: What they made.
            before: Entries of the working context before.
            tokens: Of the history.

        Returns:
            The event.
        """
        return cls(
            tokens=tokens,
            expanded=len(edits.expanded),
            collapsed=len(edits.collapsed),
            dropped=edits.dropped,
            before=before,
            after=len(cut),
            first_token=int(cut.positions[0]),
        )


@dataclass(frozen=True)
class InferenceReport:
    """A session as of now.

    Attributes:
        tokens: Of the history.
        first_token: The first that the working context covers; 0 while nothing was lost.
        length: Entries of the working context now.
        wc_length: The most entries after a refocus.
        entries_by_lod: How many there are of each level of detail.
        next_refocus: Tokens until then.
        refocuses: How many there were so far, before a kill included.
        lensnet_calls: How often LensNet was called for them.
        expanded: Entries that were expanded so far.
        collapsed: Parents that siblings were collapsed into so far.
        dropped: Entries that were lost at the old end so far.
        ram_bytes: Of the tree in memory.
        disk_bytes: Of the tree on disk.
        events: The newest iterations since the session began or was resumed, oldest first.
    """

    tokens: int
    first_token: int
    length: int
    wc_length: int
    entries_by_lod: tuple[int, ...]
    next_refocus: int
    refocuses: int
    lensnet_calls: int
    expanded: int
    collapsed: int
    dropped: int
    ram_bytes: int
    disk_bytes: int
    events: tuple[FocusEvent, ...]
