"""Scores become edits of a cut, and the rules always hold."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext import Cut, SessionConfig, UnreachableTarget
from megacontext.allocators.cut import Geometry, lod0_tail
from megacontext.allocators.focus import Edits, Scored, node_keys, refocus_cut
from megacontext.allocators.rules import (
    FocusRules,
    FocusTuning,
    coarsest_length,
    first_that_fits,
    highest_lod,
)
from megacontext.allocators.view import view_of_cut

K = 4
FIELDS = ("positions", "lods")
RULES = FocusRules(Geometry(block_size=K, max_lod=2, recent_tokens=8, window=40))


def rules(*, wc_length: int = 40, reserve: int = 0, **tuning: Any) -> FocusRules:
    return FocusRules(RULES.geometry.within(wc_length), FocusTuning(**tuning), reserve)


def view_of(first: int, end: int, of: FocusRules) -> Cut:
    lod0_from = end - of.geometry.recent_tokens // 2
    return of.geometry.within(100_000).coarse_cut(first, end, lod0_from)


def flipped(edits: Edits, barred: np.ndarray) -> int:
    """Nodes that were barred, and collapsed by force."""
    return int(np.isin(edits.collapsed, barred).sum())


def scored(
    cut: Cut, of: FocusRules, high: dict[int, float] | None = None, low: float = -0.5
) -> Scored:
    """Scores of the view over a cut: ``low``, but for the blocks that begin at some tokens."""
    view = view_of(int(cut.positions[0]), int(cut.ends[-1]), of)
    scores = np.full(len(view), low, np.float32)
    for start, score in (high or {}).items():
        scores[np.searchsorted(view.positions, start)] = score
    return Scored(view, scores)


def gists(end: int, of: FocusRules = RULES, window: int = 1_000) -> Cut:
    """Everything that may be coarse is LOD1 (LOD2 where ``window`` is short)."""
    return of.geometry.within(window).coarse_cut(0, end)


def held_at_lod0(cut: Cut, of: FocusRules = RULES) -> list[int]:
    """Starts of the blocks before the tail that the cut holds at LOD0."""
    starts = cut.positions[(cut.lods == 0) & (cut.positions % K == 0)]
    return [int(s) for s in starts if s + K <= cut.ends[-1] - of.geometry.recent_tokens]


def lod_at(cut: Cut, token: int) -> int:
    return int(cut.lods[np.searchsorted(cut.positions, token, side="right") - 1])


class TestExpansions:
    def test_the_best_are_expanded_while_there_is_room(self) -> None:
        """26 entries and a budget of 33 leave room for two, and nothing may give way."""
        cut = gists(80)
        assert len(cut) == 18 + 8
        high = {8: 0.5, 32: 0.9, 60: 0.7}
        of = rules(wc_length=33, collapse_threshold=-1)
        edited, edits = refocus_cut(cut, scored(cut, RULES, high), of)
        assert held_at_lod0(edited) == [32, 60]
        assert edits.expanded.tolist() == [32 * 64 + 1, 60 * 64 + 1]
        assert (len(edits), len(edits.collapsed), edits.dropped, len(edited)) == (2, 0, 0, 32)

    def test_what_scores_no_more_than_the_threshold_stays(self) -> None:
        """However much room there is."""
        cut = gists(80)
        high = scored(cut, RULES, {8: 0.2, 32: 0.3})
        assert held_at_lod0(refocus_cut(cut, high, rules(expand_threshold=0.2))[0]) == [32]

    def test_room_is_made_where_scores_are_lowest(self) -> None:
        """What stood at LOD0 and scores lower is collapsed for what scores higher."""
        cut = gists(80)
        tight = rules(wc_length=29, cooldown=0)
        first, _ = refocus_cut(cut, scored(cut, RULES, {8: 0.9}), tight)
        assert held_at_lod0(first) == [8]
        then, edits = refocus_cut(first, scored(cut, RULES, {8: 0.1, 32: 0.8}), tight)
        assert 32 in held_at_lod0(then)
        assert len(edits.collapsed) == 1

    @pytest.mark.parametrize(
        ("changes", "traded"),
        [({}, True), ({"margin": 1.4}, False), ({"collapse_threshold": -0.6}, False)],
        ids=["cheap", "not worth the margin", "nothing scores low enough to give way"],
    )
    def test_a_trade_must_be_worth_it(self, changes: dict[str, float], traded: bool) -> None:
        """The expansion scores 0.8, the collapse that pays for it -0.5."""
        cut = gists(80)
        of = rules(wc_length=len(cut), **changes)
        _, edits = refocus_cut(cut, scored(cut, RULES, {32: 0.8}), of)
        assert (len(edits.expanded), len(edits.collapsed)) == ((1, 1) if traded else (0, 0))

    def test_no_more_than_the_edit_limit(self) -> None:
        """A paid expansion is two edits."""
        cut = gists(80)
        high = scored(cut, RULES, dict.fromkeys((16, 32, 48), 0.8))
        assert len(refocus_cut(cut, high, rules(max_edits=2))[1]) == 2
        full = rules(wc_length=len(cut), max_edits=3)
        assert len(refocus_cut(cut, high, full)[1]) == 2

    def test_a_lod2_gist_opens_level_by_level(self) -> None:
        """To LOD1 first, and to LOD0 in the next iteration."""
        cut = gists(80, window=23)
        assert cut.lods[0] == 2
        high = scored(cut, RULES, {4: 0.9})
        once, edits = refocus_cut(cut, high, RULES)
        assert once.lods[:4].tolist() == [1] * 4
        twice, _ = refocus_cut(once, high, RULES, np.append(edits.expanded, edits.collapsed))
        assert held_at_lod0(twice) == [4]


class TestBudget:
    def test_a_cut_far_above_it_ends_collapsed_from_the_same_token(self) -> None:
        """The draft's mistake: it dropped the oldest where LOD2 would have made room."""
        cut = lod0_tail(400, 400, K)
        edited, edits = refocus_cut(cut, scored(cut, RULES), RULES)
        edited.check(0, 400, recent_tokens=8)
        assert len(edited) <= 40
        assert edits.dropped == 0

    def test_the_budget_wins_over_the_edit_limit(self) -> None:
        """After a refocus the length is the budget's, whatever that takes."""
        cut = lod0_tail(400, 400, K)
        edited, edits = refocus_cut(cut, scored(cut, RULES, {4: 0.9}), rules(max_edits=1))
        assert len(edited) <= 40
        assert len(edits.collapsed) > 100
        assert len(edits.expanded) == 0

    def test_forced_collapses_take_the_lowest_scores(self) -> None:
        """And leave what LensNet wants to see."""
        cut = lod0_tail(80, 80, K)
        high = scored(cut, RULES, dict.fromkeys((8, 32), 0.9))
        edited, _ = refocus_cut(cut, high, rules(wc_length=32))
        assert held_at_lod0(edited) == [8, 32]

    def test_what_force_collapses_and_a_trade_expands_again_was_not_edited(self) -> None:
        """A block that is worth more than what pays for it stays at LOD0, and does not rest."""
        cut = lod0_tail(400, 400, K)
        of = rules(max_edits=1_000)
        edited, edits = refocus_cut(cut, scored(cut, of, {200: 0.9}), of)
        assert held_at_lod0(edited) == [200]
        assert len(edits.expanded) == 0
        assert 200 * 64 + 1 not in edits.collapsed
        assert len(edited) <= 40

    def test_history_beyond_the_coarsest_cut_is_lost_down_to_room_for_detail(self) -> None:
        """It begins on the coarsest grid, and half of what is beside the tail is free."""
        cut = gists(16 * 100)
        edited, edits = refocus_cut(cut, scored(cut, RULES, low=-1), RULES)
        first = int(edited.positions[0])
        assert first % 16 == 0
        assert edits.dropped == first // 4
        assert coarsest_length(first, 1_600, RULES.geometry) == 40 - (40 - 8) // 2
        edited.check(first, 1_600, recent_tokens=8)

    def test_barred_nodes_give_way_last_and_are_counted(self) -> None:
        """All else is as coarse as it can be; no history is lost for them."""
        cut = gists(80)
        opened, edits = refocus_cut(cut, scored(cut, RULES, {32: 0.9}), RULES)
        calm = scored(cut, RULES)
        kept, second = refocus_cut(opened, calm, rules(wc_length=20), edits.expanded)
        assert held_at_lod0(kept) == [32]
        assert flipped(second, edits.expanded) == 0
        tight = rules(wc_length=14)
        assert coarsest_length(0, 80, tight.geometry) == 14
        closed, third = refocus_cut(opened, calm, tight, edits.expanded)
        assert held_at_lod0(closed) == []
        assert (flipped(third, edits.expanded), third.dropped) == (1, 0)

    def test_a_budget_below_the_tail_says_what_it_takes(self) -> None:
        """No cut can be legal then."""
        cut = gists(89)
        with pytest.raises(UnreachableTarget) as raised:
            refocus_cut(cut, scored(cut, RULES), rules(wc_length=8))
        assert str(raised.value) == (
            "a working context of 8 entries cannot hold the last 8 tokens at LOD0 and what "
            "remains before them: that takes 9"
        )


class TestReserve:
    @pytest.mark.parametrize(
        ("blocks", "reserve", "expanded"),
        [((16, 32), 20, 1), ((16, 20), 17, 2), ((16, 32), 17, 1), ((16, 32), 0, 2)],
        ids=["one", "two of one parent", "one of two parents", "none is kept"],
    )
    def test_expansions_leave_it_free(
        self, blocks: tuple[int, int], reserve: int, expanded: int
    ) -> None:
        """Of 40 entries 14 are the coarsest cut; an open block keeps its parent open, once."""
        cut = gists(80)
        high = scored(cut, RULES, dict.fromkeys(blocks, 0.9))
        assert len(refocus_cut(cut, high, rules(reserve=reserve))[1].expanded) == expanded

    @pytest.mark.parametrize(("reserve", "expanded"), [(20, 1), (21, 0)])
    def test_an_open_block_keeps_all_above_it_open(self, reserve: int, expanded: int) -> None:
        """Of 40 entries 11 are the coarsest cut with LOD3; a block costs three nodes there."""
        cut, of = gists(80), rules(reserve=reserve).up_to(3)
        assert coarsest_length(0, 80, of.geometry) == 11
        _, edits = refocus_cut(cut, scored(cut, RULES, {16: 0.9}), of)
        assert len(edits.expanded) == expanded

    def test_what_rests_counts(self) -> None:
        """With its parent."""
        cut = gists(80)
        opened, edits = refocus_cut(cut, scored(cut, RULES, {16: 0.9}), RULES)
        high = scored(cut, RULES, {32: 0.9})
        for reserve, more in ((14, 1), (15, 0)):
            _, then = refocus_cut(opened, high, rules(reserve=reserve), edits.expanded)
            assert len(then.expanded) == more

    def test_a_block_that_rested_was_collapsed_as_tokens_came(self) -> None:
        """The span around it was completed and had to stay open: more entries than were kept."""
        session = SessionConfig(refocus_interval=27, cooldown=1, margin=0.0)
        geometry = Geometry(K, 2, recent_tokens=1)
        reserve = session.rules(geometry.within(100)).reserve
        of = session.rules(geometry.within(1 + 2 * (K - 1) + reserve))
        cut = of.geometry.within(7).coarse_cut(0, 37)
        opened, edits = refocus_cut(cut, scored(cut, of, {32: 1.0}, low=-1.0), of)
        assert edits.expanded.tolist() == node_keys(np.array([32]), np.array([1])).tolist()
        tail = lod0_tail(37 + 27, 27, K)
        grown = Cut(*(np.append(getattr(opened, n), getattr(tail, n)) for n in FIELDS), K)
        _, then = refocus_cut(grown, scored(grown, of, low=-1.0), of, edits.expanded)
        assert flipped(then, edits.expanded) == 0


class TestDepth:
    def test_a_token_is_found_again_level_by_level(self) -> None:
        """In a history of 20,000,000 tokens, by scores of the focus view alone; nothing is lost."""
        of = FocusRules(Geometry(8, 2, 64, 1_024), reserve=20)
        end, sought = 20_000_000, 7_654_321
        of = of.up_to(highest_lod(end, of))
        cut = of.geometry.coarse_cut(0, end)
        assert int(cut.lods.max()) == of.geometry.max_lod - 1
        for lod in range(lod_at(cut, sought), -1, -1):
            assert lod_at(cut, sought) == lod
            view = view_of_cut(cut, end - 32, of.geometry)
            scores = np.full(len(view), -0.5, np.float32)
            scores[np.searchsorted(view.positions, sought, side="right") - 1] = 0.9
            cut, edits = refocus_cut(cut, Scored(view, scores), of)
            assert len(edits.expanded) == (lod > 0)
            assert len(cut) <= 1_024
            cut.check(0, end, 64)


class TestScored:
    def test_the_score_of_a_node_is_the_highest_within_it(self) -> None:
        """Of a part, it is the score of the entry around it; beyond the view, minus infinity."""
        view = Cut(np.array([0, 16, 20, 24]), np.array([2, 1, 1, 0]), K)
        some = Scored(view, np.array([0.1, 0.2, -0.3, 0.4], np.float32))
        starts, spans = np.array([0, 4, 16, 16, 24, 32]), np.array([16, 4, 16, 4, 1, 4])
        found = some.of_nodes(starts, spans).tolist()
        assert found == pytest.approx([0.1, 0.1, 0.4, 0.2, 0.4, -np.inf])


@st.composite
def focus_cases(draw: st.DrawFn) -> tuple[FocusRules, int, int]:
    """Rules that hold the tail in a tree of any depth, tokens to begin with, and a seed."""
    k = draw(st.integers(2, 5))
    max_lod, recent = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    shortest = recent + max_lod * (k - 1)
    window = draw(st.integers(max(shortest, 1), shortest + 40))
    tuning = FocusTuning(
        max_edits=draw(st.integers(0, 20)),
        margin=draw(st.sampled_from([0.0, 0.1, 0.5])),
        cooldown=draw(st.integers(0, 3)),
        detail_share=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )
    of = FocusRules(Geometry(k, max_lod, recent, window), tuning)
    return of, draw(st.integers(1, 300)), draw(st.integers(0, 2**20))


def iterate(of: FocusRules, tokens: int, seed: int, appended: int, rounds: int = 5):
    """Cut before, cut after, edits and what was barred of iterations with random scores.

    Tokens are appended between them.
    """
    rng, k = np.random.default_rng(seed), of.geometry.block_size
    cut, resting, end = lod0_tail(tokens, tokens, k), [], tokens
    for _ in range(rounds):
        first = first_that_fits(int(cut.positions[0]), end, of)
        view = view_of(first, end, of)
        some = Scored(view, rng.choice([-1, -0.4, 0.3, 1], len(view)).astype(np.float32))
        recent = resting[-of.tuning.cooldown :] if of.tuning.cooldown else []
        barred = np.concatenate([np.empty(0, np.int64), *recent])
        edited, edits = refocus_cut(cut, some, of, barred)
        yield cut, edited, edits, barred
        resting.append(np.concatenate([edits.expanded, edits.collapsed]))
        end += appended
        tail = lod0_tail(end, appended, k)
        cut = Cut(
            np.concatenate([edited.positions, tail.positions]),
            np.concatenate([edited.lods, tail.lods]),
            k,
        )


def flips(history: list[np.ndarray], cooldown: int) -> int:
    """Tokens whose LOD turned back within so many iterations."""
    width = len(history[-1])
    rows = np.stack([np.pad(h, (0, width - len(h)), constant_values=-1) for h in history])
    steps = np.where((rows[1:] < 0) | (rows[:-1] < 0), 0, np.sign(np.diff(rows, axis=0)))
    found = 0
    for back in range(1, cooldown + 1):
        found += int((steps[back:] * steps[:-back] < 0).sum())
    return found


class TestProperties:
    @settings(max_examples=150)
    @given(focus_cases(), st.integers(0, 40))
    def test_over_iterations_every_cut_is_legal_and_within_the_budget(
        self, case: tuple[FocusRules, int, int], appended: int
    ) -> None:
        """It tiles up to the newest token, on its grid, the tail at LOD0, and keeps its first."""
        of, tokens, seed = case
        for cut, edited, edits, _ in iterate(of, tokens, seed, appended):
            first, end = int(cut.positions[0]), int(cut.ends[-1])
            edited.check(int(edited.positions[0]), end, min(of.geometry.recent_tokens, end))
            assert len(edited) <= of.wc_length
            if coarsest_length(first, end, of.geometry) <= of.wc_length:
                assert (edits.dropped, int(edited.positions[0])) == (0, first)
            else:
                assert edited.positions[0] % of.geometry.coarsest_span == 0
            saved = (len(edits.collapsed) - len(edits.expanded)) * (of.geometry.block_size - 1)
            assert len(cut) - edits.dropped - saved == len(edited)
            if len(cut) - edits.dropped <= of.wc_length:
                assert len(edits) <= of.tuning.max_edits

    @settings(max_examples=150)
    @given(focus_cases(), st.integers(0, 40), st.integers(0, 200))
    def test_no_cut_covers_more_than_the_models_positions(
        self, case: tuple[FocusRules, int, int], appended: int, more: int
    ) -> None:
        """It is legal as ever, and loses less than one span of the oldest beyond what it must."""
        of, tokens, seed = case
        most = of.fewest_max_tokens + more
        of = replace(of, max_tokens=most)
        for cut, edited, _, _ in iterate(of, tokens, seed, appended):
            first, end = int(edited.positions[0]), int(cut.ends[-1])
            edited.check(first, end, min(of.geometry.recent_tokens, end))
            assert end - first <= most
            assert len(edited) <= of.wc_length
            began = int(cut.positions[0])
            if coarsest_length(began, end, of.geometry) <= of.wc_length:
                assert first < max(began, end - most) + of.geometry.coarsest_span

    @given(focus_cases(), st.integers(0, 40))
    def test_nothing_flips_within_the_cooldown(
        self, case: tuple[FocusRules, int, int], appended: int
    ) -> None:
        """Neither itself nor through a span around it or within it; but where the edits say so."""
        of, tokens, seed = case
        rows, forced = [], 0
        for cut, edited, edits, barred in iterate(of, tokens, seed, appended):
            rows = rows or [cut.token_lods(int(cut.ends[-1]))]
            rows.append(edited.token_lods(int(edited.ends[-1])))
            forced += flipped(edits, barred)
        if not forced:
            assert flips(rows, of.tuning.cooldown) == 0

    @settings(max_examples=150)
    @given(focus_cases(), st.integers(1, 40))
    def test_with_a_sessions_reserve_the_budget_never_forces_a_flip(
        self, case: tuple[FocusRules, int, int], appended: int
    ) -> None:
        """Expansions leave room for what is appended while they rest."""
        of, tokens, seed = case
        session = SessionConfig(refocus_interval=appended, cooldown=of.tuning.cooldown)
        reserve = session.rules(of.geometry).reserve
        of = replace(of, geometry=of.geometry.within(of.wc_length + reserve), reserve=reserve)
        for _, _, edits, barred in iterate(of, tokens, seed, appended, rounds=8):
            assert flipped(edits, barred) == 0


class TestGrid:
    def test_a_view_that_would_not_begin_on_the_grid_is_refused(self) -> None:
        """Its gists would stand for other tokens than their spans say."""
        with pytest.raises(ValueError, match="must begin at a multiple of 16, not at 5"):
            RULES.geometry.coarse_cut(5, 90, 80)


class TestFocusRules:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"wc_length": 0}, "wc_length must be at least 1, not 0"),
            ({"cooldown": -1}, "cooldown must be at least 0, not -1"),
            ({"margin": -0.1}, "margin must not be negative, but is -0.1"),
            ({"expand_threshold": float("nan")}, "expand_threshold must be a number, not nan"),
            ({"detail_share": 1.5}, "detail_share must lie in [0, 1], not 1.5"),
        ],
    )
    def test_what_makes_no_rule_is_named(self, changes: dict[str, float], message: str) -> None:
        """With its value."""
        with pytest.raises(ValueError) as raised:
            rules(**changes)
        assert str(raised.value) == message

    def test_what_makes_no_tree_is_named(self) -> None:
        """By the geometry itself."""
        with pytest.raises(ValueError) as raised:
            Geometry(block_size=1, max_lod=2, recent_tokens=8, window=40)
        assert str(raised.value) == "block_size must be at least 2 tokens, not 1"

    def test_types(self) -> None:
        """True is no number, and 1.5 no length."""
        with pytest.raises(TypeError, match=r"wc_length must be an int, not 1\.5"):
            rules(wc_length=1.5)
        with pytest.raises(TypeError, match="margin must be a number, not True"):
            rules(margin=True)


def test_node_keys_are_one_to_one() -> None:
    """A node and its first child differ."""
    starts, lods = np.repeat(np.arange(64), 3), np.tile(np.arange(3), 64)
    assert len(np.unique(node_keys(starts, lods))) == 64 * 3
    assert len(Edits(np.array([1]), np.array([2, 3]))) == 3
