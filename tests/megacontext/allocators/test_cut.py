"""Cuts: integer geometry of working contexts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacontext import Cut, UnreachableTarget
from megacontext.allocators.cut import (
    Geometry,
    from_block_lods,
    held_at_lod0,
    kept_tokens,
    lod0_tail,
)


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
