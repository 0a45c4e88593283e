"""The focus allocator: LensNet is asked once an iteration, in inference only."""

import numpy as np
import pytest
import torch

from megacontext import Cut, MCConfig, MCController
from megacontext.allocators.cut import lod0_tail
from megacontext.allocators.focus import node_keys
from megacontext.allocators.rules import FocusRules
from megacontext.inference.focus import FocusAllocator
from megacontext.inference.focus_state import FocusState
from megacontext.model.focus_view import FocusView


@pytest.fixture
def allocator(mc: MCController, config: MCConfig):
    def make() -> FocusAllocator:
        of = FocusRules(config.geometry.within(config.train_wc_length))
        return FocusAllocator(mc.lensnet, mc.guard, of, horizon_tokens=8, focus_window=1_024)

    return make


class TestFocusAllocator:
    def test_it_is_refused_outside_inference(self, mc: MCController, allocator) -> None:
        """Made or used; the message says what to do instead."""
        with mc.context("training"), pytest.raises(RuntimeError) as raised:
            allocator()
        assert str(raised.value) == (
            "a FocusAllocator was made in training context; it is for inference only: "
            '`with mc.context("inference"):`. In training, working contexts come from '
            "TrainingWCVariationAllocator"
        )
        with pytest.raises(RuntimeError, match="made in unset context"):
            allocator()
        with mc.context("inference"):
            made = allocator()
        with mc.context("training"), pytest.raises(RuntimeError, match="used in training context"):
            made.refocus(lod0_tail(9, 9, 4), (), lambda cut: pytest.fail("nothing is gathered"))
        with pytest.raises(RuntimeError, match="used in unset context"):
            made.refocus(lod0_tail(9, 9, 4), (), lambda cut: pytest.fail("nothing is gathered"))

    def test_one_call_on_the_focus_view_for_each_iteration(
        self, mc: MCController, allocator, assert_lensnet_calls
    ) -> None:
        """It ends at the newest token; its LOD0 tail is shorter than the protected one."""
        tokens = torch.randint(0, 64, (1, 90))
        tree, views = mc.build_tree(tokens), []
        end = tree.lengths[0]

        def look(cut: Cut) -> FocusView:
            views.append(cut)
            return tree.focus_view([cut], None)

        with mc.context("inference"), assert_lensnet_calls(n=3) as calls:
            made, cut = allocator(), lod0_tail(end, end, 4)
            for _ in range(3):
                cut, _ = made.refocus(cut, (), look)
        view = views[0]
        view.check(0, end, recent_tokens=16 - 8)
        assert int(view.positions[view.lods > 0][-1]) + 4 > end - 8 - 4
        assert [call.inputs[0] for call in calls] == [f"float32[1, {len(view)}, 32] cpu"] * 3
        cut.check(0, end, recent_tokens=16)

    def test_it_bars_what_the_last_iterations_edited(self, mc: MCController, allocator) -> None:
        """As many as the cooldown; a state that was begun with some goes on with them."""
        tree = mc.build_tree(torch.randint(0, 64, (1, 96)))
        look = lambda cut: tree.focus_view([cut], None)  # noqa: E731
        with mc.context("inference"), torch.no_grad():
            made, state = allocator(), FocusState(lod0_tail(96, 96, 4), 96)
            edits = []
            for _ in range(4):
                cut, of_this = made.refocus(state.cut, state.resting, look)
                state = state.edited(cut, of_this, made.rules.tuning.cooldown)
                edits.append(np.concatenate([of_this.expanded, of_this.collapsed]).tolist())
                assert [keys.tolist() for keys in state.resting] == edits[-2:]
        assert state.totals.lensnet_calls == 4
        assert FocusState(cut, 96, resting=state.resting[:1]).resting == state.resting[:1]
        assert state.edited(cut, of_this, cooldown=0).resting == state.resting

    def test_what_rests_is_not_edited(self, mc: MCController, allocator) -> None:
        """Whatever LensNet says of it."""
        tree = mc.build_tree(torch.randint(0, 64, (1, 96)))
        look = lambda cut: tree.focus_view([cut], None)  # noqa: E731
        cut = mc.config.geometry.within(99).coarse_cut(0, 96, 80)
        every = node_keys(cut.positions, cut.lods)
        with mc.context("inference"), torch.no_grad():
            mc.lensnet.head.bias.fill_(5.0)  # it wants all of it
            made = allocator()
            assert len(made.refocus(cut, (), look)[1]) > 0
            assert len(made.refocus(cut, [every], look)[1]) == 0
