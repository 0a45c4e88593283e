"""The focus allocator: it asks LensNet what to look at. In inference only."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from lensnet_guard import Guard
from megacontext.allocators.cut import Cut, Ints
from megacontext.allocators.focus import Edits, Scored, refocus_cut
from megacontext.allocators.rules import FocusRules, first_that_fits
from megacontext.allocators.view import view_of_cut
from megacontext.model.focus_view import FocusView


class FocusAllocator:
    """Asks LensNet once per iteration, and edits a working context by what it says.

    Args:
        lensnet: The guarded LensNet.
        guard: Its guard.
        rules: How scores become edits.
        horizon_tokens: By how much the LOD0 tail of the focus view is shorter than the protected
            tail, as it was in training.
        focus_window: The most entries of the focus view.

    Attributes:
        rules: The same.

    Raises:
        RuntimeError: It was made or used outside inference context.
    """

    def __init__(
        self,
        lensnet: Callable[..., Tensor],
        guard: Guard,
        rules: FocusRules,
        *,
        horizon_tokens: int,
        focus_window: int,
    ) -> None:
        self._lensnet = lensnet
        self._guard = guard
        self.rules = rules
        self._view_geometry = rules.geometry.within(focus_window)
        self._horizon_tokens = horizon_tokens
        self._require_inference("made")

    def refocus(
        self,
        cut: Cut,
        resting: Sequence[Ints],
        look: Callable[[Cut], FocusView],
        max_lod: int | None = None,
    ) -> tuple[Cut, Edits]:
        """Do one iteration: one LensNet call, then edits.

        LensNet is told no higher level than it was trained on, which is that of the rules: what is
        coarser it takes for that, and sees how coarse it is from its span.

        Args:
            cut: The working context's, up to the newest token.
            resting: Keys of the nodes that may not be edited now, some arrays of them.
            look: Makes tensors ``[1, E]`` of the focus view.
            max_lod: The highest level of detail of the tree now; that of the rules by default.

        Returns:
            The new cut, and the edits that made it.

        Raises:
            UnreachableTarget: The view does not fit ``focus_window``, or the tail ``wc_length``.
        """
        self._require_inference("used")
        known = self.rules.geometry.max_lod
        rules = self.rules.up_to(known if max_lod is None else max_lod)
        view_cut = self.focus_view(cut, max_lod)
        view = look(view_cut)
        entries = replace(view.entries, lods=view.entries.lods.clamp(max=known))
        scores = self._lensnet(*replace(view, entries=entries).lensnet_inputs())
        scored = Scored(view_cut, scores[0].float().numpy(force=True))
        barred = np.concatenate([np.empty(0, dtype=np.int64), *resting])
        return refocus_cut(cut, scored, rules, barred)

    def focus_view(self, cut: Cut, max_lod: int | None = None) -> Cut:
        """Make what LensNet is to score: all that the edited cut can cover, history as gists.

        Args:
            cut: The working context's, up to the newest token.
            max_lod: The highest level of detail of the tree now; that of the rules by default.

        Returns:
            The view: a coarse cut, as in training, where the tree has no level beyond the rules';
            else what the working context holds (see `view_of_cut`).

        Raises:
            UnreachableTarget: The view does not fit ``focus_window``, or the tail ``wc_length``.
        """
        known, end = self.rules.geometry.max_lod, int(cut.ends[-1])
        deep = known if max_lod is None else max_lod
        first = first_that_fits(int(cut.positions[0]), end, self.rules.up_to(deep))
        lod0_from = end - self._view_geometry.recent_tokens + self._horizon_tokens
        if deep == known:
            return self._view_geometry.coarse_cut(first, end, lod0_from)
        covered = cut.positions >= first
        held = Cut(cut.positions[covered], cut.lods[covered], cut.block_size)
        return view_of_cut(held, lod0_from, self._view_geometry.up_to(deep))

    def _require_inference(self, what: str) -> None:
        if (context := self._guard.current_context) != "inference":
            raise RuntimeError(
                f"a FocusAllocator was {what} in {context or 'unset'} context; it is for "
                'inference only: `with mc.context("inference"):`. In training, working contexts '
                "come from TrainingWCVariationAllocator"
            )
