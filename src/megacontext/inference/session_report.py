"""What a session tells of itself."""

from dataclasses import dataclass

from megacontext.allocators.cut import Cut
from megacontext.allocators.focus import Edits


@dataclass(frozen=True)
class FocusEvent:
    """One iteration of a refocus.

    Attributes:
        tokens: of the history at that moment.
        expanded, collapsed: edits.
        dropped: entries that were lost at the old end.
        before, after: entries of the working context.
        first_token: the first that is covered afterwards.
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
        """The event of some edits.

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
        tokens: of the history.
        first_token: the first that the working context covers; 0 while nothing was lost.
        length: entries of the working context now.
        wc_length: most entries after a refocus.
        entries_by_lod: how many of each level of detail.
        next_refocus: tokens until then.
        refocuses, lensnet_calls: so far, before a kill included.
        expanded, collapsed, dropped: edits, and entries lost at the old end, so far.
        ram_bytes, disk_bytes: of the tree.
        events: the newest iterations since the session began or was resumed, oldest first.
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
