"""How many levels of gists a history needs, and what a stretch of tokens takes at most."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacontext.allocators.cut import Geometry
from megacontext.allocators.rules import (
    FocusRules,
    FocusTuning,
    coarsest_length,
    first_that_fits,
    highest_lod,
    longest_cover,
)

RULES = FocusRules(Geometry(block_size=8, max_lod=2, recent_tokens=64, window=1_024), reserve=20)


@st.composite
def rules(draw: st.DrawFn) -> FocusRules:
    """Rules that hold the tail, with room for a level beyond their own or not."""
    k, own, recent = draw(st.integers(2, 8)), draw(st.integers(1, 2)), draw(st.integers(1, 70))
    window = recent + own * (k - 1) + draw(st.integers(0, 200))
    tuning = FocusTuning(detail_share=draw(st.sampled_from([0.0, 0.5, 1.0])))
    return FocusRules(Geometry(k, own, recent, window), tuning, draw(st.integers(0, 20)))


class TestHighestLod:
    @pytest.mark.parametrize(
        ("tokens", "lod"),
        [(1, 2), (60_600, 2), (61_000, 3), (1_000_000, 4), (20_000_000, 6), (10**12, 11)],
    )
    def test_a_working_context_of_1024_entries(self, tokens: int, lod: int) -> None:
        """It keeps what was trained while that fits; then half beside the tail is for detail."""
        assert highest_lod(tokens, RULES) == lod
        deep = RULES.up_to(lod)
        assert first_that_fits(0, tokens, deep) == 0
        assert coarsest_length(0, tokens, deep.geometry) <= (1_024 if lod == 2 else 524)

    @given(rules(), st.integers(1, 10**12), st.integers(0, 10**12))
    def test_it_never_falls(self, of: FocusRules, tokens: int, more: int) -> None:
        """Or an entry would stand at a level that there is no more."""
        assert highest_lod(tokens, of) <= highest_lod(tokens + more, of)

    @given(rules(), st.integers(1, 10**12))
    def test_nothing_is_lost_while_a_level_more_would_do(self, of: FocusRules, tokens: int) -> None:
        """With room for K - 1 entries of each level and K of the highest all is covered."""
        k, lod = of.geometry.block_size, highest_lod(tokens, of)
        kept = first_that_fits(0, tokens, of.up_to(lod)) == 0
        room = of.geometry.recent_tokens + (lod + 1) * (k - 1) + k
        assert kept or of.wc_length < room

    @given(rules(), st.integers(1, 10**7), st.integers(0, 10**6))
    def test_what_positions_reach_bounds_it(self, of: FocusRules, tokens: int, more: int) -> None:
        """The oldest goes in spans of the highest level, and no more than it must."""
        of = replace(of, max_tokens=of.fewest_max_tokens + more)
        deep = of.up_to(highest_lod(tokens, of))
        own, found, k = of.geometry.max_lod, deep.geometry.max_lod, of.geometry.block_size
        assert found == own or k ** (found + 1) <= of.max_tokens
        span, first = deep.geometry.coarsest_span, first_that_fits(0, tokens, deep)
        assert tokens - first <= of.max_tokens
        reached = -(-max(tokens - of.max_tokens, 0) // span) * span
        if coarsest_length(reached, tokens, deep.geometry) <= of.wc_length:
            assert first == reached


class TestLongestCover:
    @given(st.integers(2, 4), st.integers(1, 3), st.integers(0, 40))
    def test_it_is_the_most_of_any_stretch(self, k: int, max_lod: int, tokens: int) -> None:
        """No stretch takes more, and some of no more than a highest span come close."""
        geometry = Geometry(k, max_lod, recent_tokens=0)
        most = longest_cover(tokens, geometry)
        starts = range(geometry.coarsest_span)
        found = [coarsest_length(s, s + n, geometry) for s in starts for n in range(tokens + 1)]
        assert max(found) <= most
        if tokens <= k**max_lod:
            assert max(found) >= most - max_lod

    def test_levels_beyond_the_rules_make_it_no_longer(self) -> None:
        """What is reserved for appended tokens is enough however deep the tree becomes."""
        lengths = [longest_cover(500, Geometry(4, lod, 0)) for lod in range(1, 9)]
        assert lengths == sorted(lengths, reverse=True)
        assert np.unique(lengths[5:]).size == 1
