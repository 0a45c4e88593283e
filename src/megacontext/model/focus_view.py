"""The focus view as tensors: what LensNet reads."""

from dataclasses import dataclass

from torch import Tensor

from megacontext.model.working_context import WorkingContext


@dataclass(frozen=True)
class FocusView:
    """A batch of focus views, and what stands below their entries where LensNet reads that.

    Attributes:
        entries: The views' entries, E of each.
        tokens: Of the entries at LOD0, int64 ``[B, E]``; `NO_TOKEN` for the others. None, as what
            follows, where LensNet reads entries alone.
        children: Embeddings of the children of the first C entries, ``[B, C, K, D]``; the others
            are LensNet's query.
        child_tokens: Their tokens, int64 ``[B, C, K]``; `NO_TOKEN` for gists and below LOD0.
    """

    entries: WorkingContext
    tokens: Tensor | None = None
    children: Tensor | None = None
    child_tokens: Tensor | None = None

    def lensnet_inputs(self) -> tuple[Tensor | None, ...]:
        """Return LensNet's arguments, detached: its loss trains it, not what it looks at."""
        view = self.entries
        inputs = (view.embeddings.detach(), view.starts, view.spans, view.lods, view.pad_mask)
        if self.children is None:
            return inputs
        return *inputs, self.tokens, self.children.detach(), self.child_tokens
