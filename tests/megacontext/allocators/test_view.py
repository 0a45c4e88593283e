"""The focus view of a working context: never coarser than what it holds, never too long."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacontext import Cut, UnreachableTarget
from megacontext.allocators.cut import Geometry
from megacontext.allocators.rules import coarsest_length
from megacontext.allocators.view import view_of_cut

GEOMETRY = Geometry(block_size=4, max_lod=3, recent_tokens=8)


def held(lods: dict[int, int], end: int = 88) -> Cut:
    """The coarsest cut, but for the spans that begin at some tokens and stand at some level."""
    positions = []
    at = 0
    while at < end:
        lod = 0
        while (
            lod < lods.get(at // 64 * 64, 3)
            and at % 4 ** (lod + 1) == 0
            and at + 4 ** (lod + 1) <= end - 8
        ):
            lod += 1
        positions.append((at, lod))
        at += 4**lod
    return Cut(*(np.array(of) for of in zip(*positions, strict=True)), 4)


class TestViewOfCut:
    def test_the_newest_is_lod1_as_far_as_there_is_room(self) -> None:
        """And what the cut holds before that; its LOD0 is LOD1, and its tail is shorter."""
        cut = held({})
        assert cut.lods.tolist() == [3, 2] + [0] * 8
        views = {w: view_of_cut(cut, 84, GEOMETRY.within(w)) for w in (7, 9, 10, 24, 25, 99)}
        assert {w: view.lods.tolist() for w, view in views.items()} == {
            7: [3, 2, 1] + [0] * 4,
            9: [3, 2, 1] + [0] * 4,
            10: [3] + [1] * 5 + [0] * 4,
            24: [3] + [1] * 5 + [0] * 4,
            25: [1] * 21 + [0] * 4,
            99: [1] * 21 + [0] * 4,
        }

    def test_what_is_open_is_shown_open(self) -> None:
        """Or its children had one score, and could not be told apart."""
        view = view_of_cut(held({0: 2}), 84, GEOMETRY.within(10))
        assert view.lods.tolist() == [2, 2, 2, 2, 2, 1] + [0] * 4

    def test_one_that_is_too_long_is_collapsed(self) -> None:
        """The oldest first."""
        view = view_of_cut(held({0: 1}), 84, GEOMETRY.within(19))
        assert view.lods.tolist() == [2] + [1] * 12 + [2, 1] + [0] * 4
        assert view_of_cut(held({0: 1}), 84, GEOMETRY.within(7)).lods.tolist()[:3] == [3, 2, 1]

    def test_a_window_that_nothing_fits_names_the_shortest_view(self) -> None:
        """As a coarse cut does."""
        with pytest.raises(UnreachableTarget) as raised:
            view_of_cut(held({}), 84, GEOMETRY.within(6))
        assert str(raised.value) == (
            "the focus view of 88 tokens has at least 7 entries and does not fit a focus_window "
            "of 6; widen the window"
        )

    @given(
        k=st.integers(2, 5),
        max_lod=st.integers(1, 7),
        recent=st.integers(1, 20),
        tokens=st.integers(1, 900),
        data=st.data(),
    )
    def test_every_view_is_legal_and_as_fine_as_it_can_be(
        self, k: int, max_lod: int, recent: int, tokens: int, data: st.DataObject
    ) -> None:
        """It tiles what the cut tiles, within the window, with its shorter tail at LOD0."""
        geometry = Geometry(k, max_lod, recent)
        shortest = coarsest_length(0, tokens, geometry)
        length = data.draw(st.integers(shortest, max(shortest, tokens)))
        cut = geometry.within(length).coarse_cut(0, tokens)
        horizon = data.draw(st.integers(0, recent - 1))
        window = data.draw(st.integers(shortest, 1_000))
        view = view_of_cut(cut, max(tokens - recent + horizon, 0), geometry.within(window))
        view.check(0, tokens, min(recent - horizon, tokens))
        assert len(view) <= window
        if len(cut) <= window:
            of_view, of_cut = (of.token_lods(tokens) for of in (view, cut))
            assert (of_view <= np.maximum(of_cut, 1)).all()
