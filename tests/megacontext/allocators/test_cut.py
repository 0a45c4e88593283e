"""Cuts: integer geometry of working contexts."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacontext import Cut, UnreachableTarget
from megacontext.allocators.cut import (
    Geometry,
    edited_cut,
    from_block_lods,
    held_at_lod0,
    kept_tokens,
    lod0_tail,
    sibling_groups,
    spans_of,
)
from megacontext.allocators.rules import coarsest_length


def cut(positions: list[int], lods: list[int], block_size: int = 4) -> Cut:
    return Cut(np.array(positions), np.array(lods), block_size)


class TestCut:
    def test_spans_and_ends_follow_from_the_lods(self) -> None:
        """An entry at LOD l covers K to the l tokens."""
        mixed = cut([0, 16, 20, 21], [2, 1, 0, 0])
        assert mixed.spans.tolist() == [16, 4, 1, 1]
        assert mixed.ends.tolist() == [16, 20, 21, 22]
        assert len(mixed) == 4

    def test_token_lods_tell_the_lod_of_every_token(self) -> None:
        """Each entry's, once for every token it covers."""
        mixed = cut([0, 16, 20, 21], [2, 1, 0, 0])
        assert mixed.token_lods(22).tolist() == [2] * 16 + [1] * 4 + [0, 0]

    def test_token_lods_of_a_cut_with_a_gap(self) -> None:
        """What lies in it is not held: a window with a sink holds both ends of a history."""
        assert cut([0, 1, 8, 12], [0, 0, 1, 0]).token_lods(14).tolist() == [
            *([0] * 2),
            *([-1] * 6),
            *([1] * 4),
            *(0, -1),
        ]

    def test_from_block_lods(self) -> None:
        """A LOD2 span is one entry, a LOD1 block one, a LOD0 block K; the rest is LOD0."""
        made = from_block_lods(np.array([2, 2, 2, 2, 1, 0]), 25, 4)
        assert made == cut([0, 16, 20, 21, 22, 23, 24], [2, 1, 0, 0, 0, 0, 0])
        made.check(0, 25)

    @given(st.integers(2, 5), st.lists(st.integers(0, 2), max_size=6), st.integers(0, 30))
    def test_from_block_lods_and_back(self, k: int, of_spans: list[int], rest: int) -> None:
        """Whatever the spans are, the cut is legal and holds each token at its block's LOD."""
        blocks = np.repeat(np.array(of_spans, dtype=np.int64), k)
        num_tokens = len(blocks) * k + rest
        made = from_block_lods(blocks, num_tokens, k)
        made.check(0, num_tokens)
        assert made.token_lods(num_tokens).tolist() == [*np.repeat(blocks, k)] + [0] * rest

    def test_no_blocks_at_all(self) -> None:
        """A history that is all protected tail."""
        assert from_block_lods(np.zeros(0, dtype=np.int64), 3, 4) == lod0_tail(3, 3, 4)

    def test_tokens_that_are_not_held_have_lod_minus_one(self) -> None:
        """The baseline does not hold what lies before its tail."""
        assert lod0_tail(6, 2, 4).token_lods(7).tolist() == [-1, -1, -1, -1, 0, 0, -1]

    def test_equality_is_by_value(self) -> None:
        """Same positions, LODs and block size; nothing else is equal to a cut."""
        assert cut([0, 4], [1, 1]) == cut([0, 4], [1, 1])
        assert cut([0, 4], [1, 1]) != cut([0, 4], [1, 0])
        assert cut([0, 4], [1, 1]) != cut([0, 4], [1, 1], block_size=2)
        assert cut([0], [0]) != [0]


class TestCheck:
    def test_a_legal_cut_passes(self) -> None:
        """Tiled, aligned, tail at LOD0."""
        legal = cut([0, 16, 20, 21], [2, 1, 0, 0])
        legal.check(0, 22, recent_tokens=2)
        assert legal.ends[-1] == 22

    @pytest.mark.parametrize(
        ("broken", "message"),
        [
            (cut([0, 5], [1, 0]), "the cut does not tile [0, 6): entry 1 should start at 4"),
            (cut([0, 3], [1, 0]), "the cut does not tile [0, 6): entry 1 should start at 4"),
            (cut([0, 4], [1, 0]), "the cut does not tile [0, 6): entry 2 should start at 5"),
            (
                cut([0, 1, 5], [0, 1, 0]),
                "entry 1 (LOD1) starts at 1, which is no multiple of its span 4",
            ),
            (cut([0, 4, 5], [1, 0, 0]), "the last 3 tokens are not all held at LOD0"),
        ],
        ids=["gap", "overlap", "short", "skewed", "tail"],
    )
    def test_a_broken_cut_says_where(self, broken: Cut, message: str) -> None:
        """The message names the first entry that is wrong."""
        with pytest.raises(ValueError) as raised:
            broken.check(0, 6, recent_tokens=3)
        assert str(raised.value) == message


class TestKeptTokens:
    @given(st.integers(1, 5_000), st.integers(1, 5_000), st.integers(2, 64))
    def test_what_is_kept_differs_from_the_target_by_whole_collapses(
        self, tokens: int, target: int, block_size: int
    ) -> None:
        """At most K - 2 tokens are dropped, none where nothing must be collapsed."""
        kept = kept_tokens(tokens, target, block_size)
        assert kept <= tokens < kept + block_size - 1 or kept == tokens
        assert tokens <= target or (kept - target) % (block_size - 1) == 0


class TestFocusView:
    def view(self, num_tokens: int, window: int = 1_000, max_lod: int = 2) -> Cut:
        return Geometry(4, max_lod, recent_tokens=8, window=window).focus_view(num_tokens, 3)

    def test_history_as_gists_then_the_tail_up_to_the_horizon(self) -> None:
        """Blocks that end before the recent tail are LOD1; the horizon is not in the view."""
        view = self.view(30)
        assert view.token_lods(30).tolist() == [1] * 20 + [0] * 7 + [-1] * 3

    def test_the_oldest_spans_become_lod2_when_the_window_is_short(self) -> None:
        """As few as it takes to fit."""
        assert len(self.view(80)) == 18 + 5
        assert len(self.view(80, window=22)) == 23 - 3
        assert self.view(80, window=22).lods.tolist()[:3] == [2, 1, 1]
        assert self.view(80, window=17).lods.tolist()[:3] == [2, 2, 1]

    def test_a_window_that_nothing_fits_names_the_shortest_view(self) -> None:
        """The error says how long the shortest view is."""
        with pytest.raises(UnreachableTarget) as raised:
            self.view(80, window=10)
        assert str(raised.value) == (
            "the focus view of 77 tokens has at least 11 entries and does not fit a "
            "focus_window of 10; widen the window or shorten the sequence"
        )

    def test_a_view_of_a_tree_without_lod2_was_given_lod2_entries(self) -> None:
        """With max_lod 1 a short window is refused; LOD2 gists would come from nowhere."""
        with pytest.raises(UnreachableTarget, match="at least 23 entries"):
            self.view(80, window=22, max_lod=1)

    @given(
        tokens=st.integers(1, 2_000),
        block_size=st.integers(2, 16),
        recent=st.integers(1, 64),
        data=st.data(),
    )
    def test_every_view_is_legal(
        self, tokens: int, block_size: int, recent: int, data: st.DataObject
    ) -> None:
        """It tiles everything before the horizon, and holds the tail at LOD0."""
        horizon = data.draw(st.integers(0, min(recent, tokens)))
        view = Geometry(block_size, 2, recent, window=5_000).focus_view(tokens, horizon)
        view.check(0, tokens - horizon, recent_tokens=recent - horizon)
        assert len(view) <= tokens - horizon


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Trees of any depth."""
    k, max_lod = draw(st.integers(2, 6)), draw(st.integers(1, 9))
    return Geometry(k, max_lod, draw(st.integers(1, 40)))


class TestCoarseCut:
    def test_each_level_is_taken_when_the_one_below_is_not_enough(self) -> None:
        """The oldest first, and as few spans of it as it takes."""
        geometry = Geometry(4, 3, recent_tokens=8)
        lods = {w: geometry.within(w).coarse_cut(0, 200).lods.tolist() for w in (56, 53, 20, 17)}
        tail = [0] * 8
        assert lods[56] == [1] * 48 + tail
        assert lods[53] == [2] + [1] * 44 + tail
        assert lods[20] == [2] * 12 + tail
        assert lods[17] == [3] + [2] * 8 + tail

    @given(geometries(), st.integers(0, 3), st.integers(0, 3_000), st.data())
    def test_every_cut_is_legal_within_its_window_and_no_coarser_than_it_must_be(
        self, geometry: Geometry, skipped: int, tokens: int, data: st.DataObject
    ) -> None:
        """At any depth: one level more for what is oldest, as many spans as it takes."""
        first = skipped * geometry.coarsest_span
        end = first + tokens
        shortest = coarsest_length(first, end, geometry)
        window = data.draw(st.integers(shortest, max(tokens, shortest)))
        cut = geometry.within(window).coarse_cut(first, end)
        cut.check(first, end, min(geometry.recent_tokens, tokens))
        assert len(cut) <= window
        blocks = max(tokens - geometry.recent_tokens, 0) // geometry.block_size
        finest = tokens - blocks * (geometry.block_size - 1)
        assert len(cut) == finest or len(cut) > window - (geometry.block_size - 1)
        assert (np.diff(cut.lods) <= 0).all()
        if shortest > 1:
            with pytest.raises(UnreachableTarget, match=f"has at least {shortest} entries"):
                geometry.within(shortest - 1).coarse_cut(first, end)

    @given(geometries(), st.integers(1, 3_000), st.data())
    def test_a_wider_window_is_nowhere_coarser(
        self, geometry: Geometry, tokens: int, data: st.DataObject
    ) -> None:
        """And neither is a shallower tree."""
        shortest = coarsest_length(0, tokens, geometry)
        narrow, wide = sorted(data.draw(st.tuples(*[st.integers(shortest, 3_000)] * 2)))
        coarse = geometry.within(narrow).coarse_cut(0, tokens)
        fine = geometry.within(wide).coarse_cut(0, tokens)
        assert (fine.token_lods(tokens) <= coarse.token_lods(tokens)).all()
        if coarse.lods.max() < geometry.max_lod:
            shallow = geometry.up_to(max(int(coarse.lods.max()), 1)).within(narrow)
            assert shallow.coarse_cut(0, tokens) == coarse

    def test_spans_of_high_levels_wrapped_around(self) -> None:
        """They are looked up, up to what an int64 holds."""
        assert spans_of(np.array([62, 20, 0]), 2).tolist() == [2**62, 2**20, 1]
        assert spans_of(np.array([12]), 29).tolist() == [29**12]
        with pytest.raises(ValueError, match="max_lod must be at least 1, not 0"):
            Geometry(4, 0, recent_tokens=8)


class TestEditedCut:
    @given(geometries(), st.integers(1, 600), st.data())
    def test_collapsing_siblings_and_expanding_their_parents_is_no_change(
        self, geometry: Geometry, tokens: int, data: st.DataObject
    ) -> None:
        """Every group that is found, in one edit, at whatever level."""
        shortest = coarsest_length(0, tokens, geometry)
        window = data.draw(st.integers(shortest, max(tokens, shortest)))
        cut = geometry.within(window).coarse_cut(0, tokens)
        groups = sibling_groups(cut, geometry.max_lod, tokens - geometry.recent_tokens)
        none = np.empty(0, dtype=np.int64)
        collapsed = edited_cut(cut, none, groups)
        collapsed.check(0, tokens, min(geometry.recent_tokens, tokens))
        assert len(cut) - len(collapsed) == len(groups) * (geometry.block_size - 1)
        parents = np.searchsorted(collapsed.positions, cut.positions[groups])
        assert edited_cut(collapsed, parents, none) == cut


class TestHeldAtLod0:
    def test_only_whole_spans_at_lod0_count(self) -> None:
        """A gist of the view is held where all its tokens are; LOD2 needs all of its blocks."""
        view = cut([0, 16, 20], [2, 1, 0])
        cuts = [
            lod0_tail(21, 21, 4),
            lod0_tail(21, 3, 4),
            cut([0, 4, *range(8, 21)], [1, 1] + [0] * 13),
            cut([0, 16, 20], [2, 1, 0]),
        ]
        assert held_at_lod0(cuts, view, 21).tolist() == [
            [True, True, True],
            [False, False, True],
            [False, True, True],
            [False, False, True],
        ]


class TestWhatIsNoGeometry:
    @pytest.mark.parametrize(
        ("recent_tokens", "message"),
        [
            (64.5, "recent_tokens must be an int, not 64.5"),
            (True, "recent_tokens must be an int, not True"),
        ],
    )
    def test_a_tail_is_of_whole_tokens(self, recent_tokens: Any, message: str) -> None:
        """One of half a token made cuts without a word."""
        with pytest.raises(TypeError, match=f"^{message}$"):
            Geometry(8, 2, recent_tokens)
