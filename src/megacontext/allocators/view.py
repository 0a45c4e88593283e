"""The focus view of a history that is too long for its blocks to be shown. Integers only.

LensNet scores what the working context holds, not one level of all that there is: so an entry that
was expanded is told apart from its siblings, and a session finds its way down level by level.
"""

import numpy as np

from megacontext.allocators.cut import (
    Cut,
    Geometry,
    UnreachableTarget,
    edited_cut,
    sibling_groups,
)


def view_of_cut(cut: Cut, lod0_from: int, geometry: Geometry) -> Cut:
    """Make the focus view of a working context: its own entries, and the newest history at LOD1.

    What the cut holds at LOD0 is LOD1 in the view, up to about ``lod0_from``. The newest of the
    history is LOD1 as far back as the window has room for. A view that is too long is collapsed,
    the oldest siblings first.

    Args:
        cut: The working context's; begins at a multiple of K.
        lod0_from: The block that holds this token is the first at LOD0.
        geometry: Of the tree; its window is that of the view.

    Returns:
        The view, of the same tokens.

    Raises:
        UnreachableTarget: As coarse as it can be, the view is longer than the window.
    """
    k = cut.block_size
    lod0 = lod0_from // k * k
    of_blocks = (cut.lods == 0) & (cut.positions < lod0)
    stands = ~of_blocks | (cut.positions % k == 0)
    view = Cut(cut.positions[stands], np.where(of_blocks, 1, cut.lods)[stands], k)
    window = len(view) if geometry.window is None else geometry.window
    none = np.empty(0, dtype=np.int64)
    while (over := len(view) - window) > 0:
        groups = sibling_groups(view, geometry.max_lod, lod0)
        if not len(groups):
            raise UnreachableTarget(
                f"the focus view of {view.ends[-1] - view.positions[0]} tokens has at least "
                f"{len(view)} entries and does not fit a focus_window of {window}; widen the window"
            )
        view = edited_cut(view, none, groups[: -(-over // (k - 1))])
    return _with_newest_blocks(view, lod0, window)


def _with_newest_blocks(view: Cut, lod0: int, window: int) -> Cut:
    """Replace the newest entries before ``lod0`` by LOD1, as many as the window has room for."""
    k, tail = view.block_size, int(np.searchsorted(view.positions, lod0))
    # The length if LOD1 begins where an entry does, by entry; the last is where none is replaced.
    begins = np.append(view.positions[:tail], lod0)
    lengths = np.arange(tail + 1) + (begins[-1] - begins) // k + len(view) - tail
    kept = int(np.argmax(lengths <= window))
    blocks = np.arange(begins[kept], begins[-1], k, dtype=np.int64)
    return Cut(
        np.concatenate([view.positions[:kept], blocks, view.positions[tail:]]),
        np.concatenate([view.lods[:kept], np.ones_like(blocks), view.lods[tail:]]),
        k,
    )
