"""What LensNet reads of a session's focus view, out of the tree that is kept."""

import numpy as np
import torch

from megacontext.allocators.cut import Cut, child_nodes
from megacontext.inference.tree_store import TreeStore
from megacontext.model.focus_view import FocusView
from megacontext.model.matching import NO_TOKEN
from megacontext.model.working_context import NO_LABEL, WorkingContext


def entries_of(store: TreeStore, cut: Cut) -> WorkingContext:
    """Turn a cut into tensors ``[1, W]``, without labels; starts count from its first token."""
    host = np.stack([cut.positions - cut.positions[0], cut.spans, cut.lods])
    starts, spans, lods = torch.from_numpy(host).to(store.device)[:, None]
    unknown = torch.full_like(starts, NO_LABEL)
    return WorkingContext(store.gather(cut), starts, spans, lods, unknown, None)


def view_of_store(store: TreeStore, cut: Cut, query_tokens: int | None) -> FocusView:
    """Gather a focus view, and what stands below its entries where LensNet reads that.

    Args:
        store: The tree.
        cut: The view.
        query_tokens: Entries at the end that are LensNet's query; None if it reads entries alone.

    Returns:
        The view.
    """
    entries = entries_of(store, cut)
    if query_tokens is None:
        return FocusView(entries)
    candidates, k = slice(max(len(cut) - query_tokens, 0)), cut.block_size
    starts, below = child_nodes(cut.positions[candidates], cut.lods[candidates], k)
    children = store.gather(Cut(starts.ravel(), below.ravel(), k))
    tokens, child_tokens = np.full(len(cut), NO_TOKEN), np.full(starts.shape, NO_TOKEN)
    of_tokens, of_blocks = cut.lods == 0, cut.lods[candidates] == 1
    tokens[of_tokens] = store.tokens(cut.positions[of_tokens])
    child_tokens[of_blocks] = store.tokens(starts[of_blocks].ravel()).reshape(-1, k)
    return FocusView(
        entries,
        tokens=torch.from_numpy(tokens)[None].to(store.device),
        children=children.view(1, *starts.shape, children.shape[-1]),
        child_tokens=torch.from_numpy(child_tokens)[None].to(store.device),
    )
