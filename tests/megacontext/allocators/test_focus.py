"""The focus allocator: what scores make of a cut, and that the rules always hold."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext import Cut, MCConfig, MCController, UnreachableTarget
from megacontext.allocators.focus import (
    Edits,
    FocusAllocator,
    FocusRules,
    Scored,
    node_keys,
    refocus_cut,
)
from megacontext.allocators.rules import coarsest_length, first_that_fits
from megacontext.cut import coarse_cut, lod0_tail
from megacontext.session_config import SessionConfig
from megacontext.working_context import WorkingContext

K = 4
RULES = FocusRules(wc_length=40, block_size=K, max_lod=2, recent_tokens=8)


def rules(**changes: object) -> FocusRules:
    return FocusRules(**{**vars(RULES), **changes})


def view_of(first: int, end: int, of: FocusRules) -> Cut:
    return coarse_cut(
        first,
        end,
        lod0_from=end - of.recent_tokens // 2,
        block_size=of.block_size,
        max_lod=of.max_lod,
        window=100_000,
    )


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
    lod0_from = end - of.recent_tokens
    return coarse_cut(0, end, lod0_from=lod0_from, block_size=K, max_lod=of.max_lod, window=window)


def held_at_lod0(cut: Cut, of: FocusRules = RULES) -> list[int]:
    """Starts of the blocks before the tail that the cut holds at LOD0."""
    starts = cut.positions[(cut.lods == 0) & (cut.positions % K == 0)]
    return [int(s) for s in starts if s + K <= cut.ends[-1] - of.recent_tokens]


class TestExpansions:
    def test_the_best_are_expanded_while_there_is_room(self) -> None:
        """26 entries and a budget of 33 leave room for two, and nothing may give way."""
        cut = gists(80)
        assert len(cut) == 18 + 8
        high = {8: 0.5, 32: 0.9, 60: 0.7}
        of = rules(wc_length=33, collapse_threshold=-1)
        edited, edits = refocus_cut(cut, scored(cut, RULES, high), of)
        assert held_at_lod0(edited) == [32, 60]
        assert edits.expanded.tolist() == [32 * 4 + 1, 60 * 4 + 1]
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
        assert 200 * 4 + 1 not in edits.collapsed
        assert len(edited) <= 40

    def test_history_beyond_the_coarsest_cut_is_lost_down_to_room_for_detail(self) -> None:
        """It begins on the coarsest grid, and half of what is beside the tail is free."""
        cut = gists(16 * 100)
        edited, edits = refocus_cut(cut, scored(cut, RULES, low=-1), RULES)
        first = int(edited.positions[0])
        assert first % 16 == 0
        assert edits.dropped == first // 4
        assert coarsest_length(first, 1_600, RULES) == 40 - (40 - 8) // 2
        edited.check(first, 1_600, recent_tokens=8)

    def test_barred_nodes_give_way_last_and_are_counted(self) -> None:
        """All else is as coarse as it can be; no history is lost for them."""
        cut = gists(80)
        opened, edits = refocus_cut(cut, scored(cut, RULES, {32: 0.9}), RULES)
        calm = scored(cut, RULES)
        kept, second = refocus_cut(opened, calm, rules(wc_length=20), edits.expanded)
        assert held_at_lod0(kept) == [32]
        assert second.flipped == 0
        tight = rules(wc_length=14)
        assert coarsest_length(0, 80, tight) == 14
        flipped, third = refocus_cut(opened, calm, tight, edits.expanded)
        assert held_at_lod0(flipped) == []
        assert (third.flipped, third.dropped) == (1, 0)

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

    def test_what_rests_counts(self) -> None:
        """With its parent."""
        cut = gists(80)
        opened, edits = refocus_cut(cut, scored(cut, RULES, {16: 0.9}), RULES)
        high = scored(cut, RULES, {32: 0.9})
        for reserve, more in ((14, 1), (15, 0)):
            _, then = refocus_cut(opened, high, rules(reserve=reserve), edits.expanded)
            assert len(then.expanded) == more


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
    """Rules that hold the tail, tokens to begin with, and a seed."""
    k = draw(st.integers(2, 5))
    max_lod, recent = draw(st.integers(1, 2)), draw(st.integers(1, 12))
    shortest = recent + max_lod * (k - 1)
    of = FocusRules(
        wc_length=draw(st.integers(max(shortest, 1), shortest + 40)),
        block_size=k,
        max_lod=max_lod,
        recent_tokens=recent,
        max_edits=draw(st.integers(0, 20)),
        margin=draw(st.sampled_from([0.0, 0.1, 0.5])),
        cooldown=draw(st.integers(0, 3)),
        detail_share=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )
    return of, draw(st.integers(1, 300)), draw(st.integers(0, 2**20))


def iterate(of: FocusRules, tokens: int, seed: int, appended: int, rounds: int = 5):
    """Cut before, cut after and edits of iterations with random scores, as tokens are appended."""
    rng = np.random.default_rng(seed)
    cut, resting, end = lod0_tail(tokens, tokens, of.block_size), [], tokens
    for _ in range(rounds):
        first = first_that_fits(int(cut.positions[0]), end, of)
        view = view_of(first, end, of)
        some = Scored(view, rng.choice([-1, -0.4, 0.3, 1], len(view)).astype(np.float32))
        recent = resting[-of.cooldown :] if of.cooldown else []
        barred = np.concatenate([np.empty(0, np.int64), *recent])
        edited, edits = refocus_cut(cut, some, of, barred)
        yield cut, edited, edits
        resting.append(np.concatenate([edits.expanded, edits.collapsed]))
        end += appended
        tail = lod0_tail(end, appended, of.block_size)
        cut = Cut(
            np.concatenate([edited.positions, tail.positions]),
            np.concatenate([edited.lods, tail.lods]),
            of.block_size,
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
        for cut, edited, edits in iterate(of, tokens, seed, appended):
            first, end = int(cut.positions[0]), int(cut.ends[-1])
            edited.check(int(edited.positions[0]), end, min(of.recent_tokens, end))
            assert len(edited) <= of.wc_length
            if coarsest_length(first, end, of) <= of.wc_length:
                assert (edits.dropped, int(edited.positions[0])) == (0, first)
            else:
                assert edited.positions[0] % of.block_size**of.max_lod == 0
            saved = (len(edits.collapsed) - len(edits.expanded)) * (of.block_size - 1)
            assert len(cut) - edits.dropped - saved == len(edited)
            if len(cut) - edits.dropped <= of.wc_length:
                assert len(edits) <= of.max_edits

    @settings(max_examples=150)
    @given(focus_cases(), st.integers(0, 40), st.integers(0, 200))
    def test_no_cut_covers_more_than_the_models_positions(
        self, case: tuple[FocusRules, int, int], appended: int, more: int
    ) -> None:
        """It is legal as ever, and loses less than one span of the oldest beyond what it must."""
        of, tokens, seed = case
        most = of.fewest_max_tokens + more
        of = FocusRules(**{**vars(of), "max_tokens": most})
        for cut, edited, _ in iterate(of, tokens, seed, appended):
            first, end = int(edited.positions[0]), int(cut.ends[-1])
            edited.check(first, end, min(of.recent_tokens, end))
            assert end - first <= most
            assert len(edited) <= of.wc_length
            began = int(cut.positions[0])
            if coarsest_length(began, end, of) <= of.wc_length:
                assert first < max(began, end - most) + of.block_size**of.max_lod

    @given(focus_cases(), st.integers(0, 40))
    def test_nothing_flips_within_the_cooldown(
        self, case: tuple[FocusRules, int, int], appended: int
    ) -> None:
        """Neither itself nor through a span around it or within it; but where the edits say so."""
        of, tokens, seed = case
        rows, forced = [], 0
        for cut, edited, edits in iterate(of, tokens, seed, appended):
            rows = rows or [cut.token_lods(int(cut.ends[-1]))]
            rows.append(edited.token_lods(int(edited.ends[-1])))
            forced += edits.flipped
        if not forced:
            assert flips(rows, of.cooldown) == 0

    @settings(max_examples=150)
    @given(focus_cases(), st.integers(1, 40))
    def test_with_a_sessions_reserve_the_budget_never_forces_a_flip(
        self, case: tuple[FocusRules, int, int], appended: int
    ) -> None:
        """Expansions leave room for what is appended while they rest."""
        of, tokens, seed = case
        session = SessionConfig(refocus_interval=appended, cooldown=of.cooldown)
        shape = (of.block_size, of.max_lod, of.recent_tokens)
        reserve = session.rules(of.wc_length, *shape).reserve
        of = FocusRules(**{**vars(of), "reserve": reserve, "wc_length": of.wc_length + reserve})
        assert all(e.flipped == 0 for _, _, e in iterate(of, tokens, seed, appended, rounds=8))


@pytest.fixture
def allocator(mc: MCController, config: MCConfig):
    def make() -> FocusAllocator:
        of = FocusRules(config.train_wc_length, config.block_size, 2, config.recent_tokens)
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
            made.refocus(lod0_tail(9, 9, 4), lambda cut: pytest.fail("nothing is gathered"))
        with pytest.raises(RuntimeError, match="used in unset context"):
            made.refocus(lod0_tail(9, 9, 4), lambda cut: pytest.fail("nothing is gathered"))

    def test_one_call_on_the_focus_view_for_each_iteration(
        self, mc: MCController, allocator, assert_lensnet_calls
    ) -> None:
        """It ends at the newest token; its LOD0 tail is shorter than the protected one."""
        tokens = torch.randint(0, 64, (1, 90))
        tree, views = mc.build_tree(tokens), []
        end = tree.lengths[0]

        def gather(cut: Cut) -> WorkingContext:
            views.append(cut)
            return tree.working_context([[cut]])

        with mc.context("inference"), assert_lensnet_calls(n=3) as calls:
            made, cut = allocator(), lod0_tail(end, end, 4)
            for _ in range(3):
                cut, _ = made.refocus(cut, gather)
        view = views[0]
        view.check(0, end, recent_tokens=16 - 8)
        assert int(view.positions[view.lods > 0][-1]) + 4 > end - 8 - 4
        assert [call.inputs[0] for call in calls] == [f"float32[1, {len(view)}, 32] cpu"] * 3
        cut.check(0, end, recent_tokens=16)

    def test_it_bars_what_the_last_iterations_edited(self, mc: MCController, allocator) -> None:
        """As many as the cooldown; what was saved can be put back."""
        tree = mc.build_tree(torch.randint(0, 64, (1, 96)))
        with mc.context("inference"), torch.no_grad():
            made, cut = allocator(), lod0_tail(96, 96, 4)
            cut, edits = made.refocus(cut, lambda c: tree.working_context([[c]]))
            assert made.resting[0].tolist() == [*edits.expanded, *edits.collapsed]
            for _ in range(3):
                cut, _ = made.refocus(cut, lambda c: tree.working_context([[c]]))
        assert len(made.resting) == 2
        made.resting = [edits.collapsed]
        assert made.resting == (edits.collapsed,)

    def test_what_rests_is_not_edited(self, mc: MCController, allocator) -> None:
        """Whatever LensNet says of it."""
        tree = mc.build_tree(torch.randint(0, 64, (1, 96)))
        cut = coarse_cut(0, 96, lod0_from=80, block_size=4, max_lod=2, window=99)
        every = node_keys(cut.positions, cut.lods)
        with mc.context("inference"), torch.no_grad():
            mc.lensnet.head.bias.fill_(5.0)  # it wants all of it
            made = allocator()
            assert len(made.refocus(cut, lambda c: tree.working_context([[c]]))[1]) > 0
            made.resting = [every]
            assert len(made.refocus(cut, lambda c: tree.working_context([[c]]))[1]) == 0

    def test_a_view_that_would_not_begin_on_the_grid_is_refused(self) -> None:
        """Its gists would stand for other tokens than their spans say."""
        with pytest.raises(ValueError, match="must begin at a multiple of 16, not at 5"):
            coarse_cut(5, 90, lod0_from=80, block_size=4, max_lod=2, window=99)


class TestFocusRules:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"wc_length": 0}, "wc_length must be at least 1, not 0"),
            ({"cooldown": -1}, "cooldown must be at least 0, not -1"),
            ({"margin": -0.1}, "margin must not be negative, but is -0.1"),
            ({"expand_threshold": float("nan")}, "expand_threshold must be a number, not nan"),
            ({"detail_share": 1.5}, "detail_share must lie in [0, 1], not 1.5"),
            ({"block_size": 1}, "block_size must be at least 2 tokens, not 1"),
        ],
    )
    def test_what_makes_no_rule_is_named(self, changes: dict[str, float], message: str) -> None:
        """With its value."""
        with pytest.raises(ValueError) as raised:
            rules(**changes)
        assert str(raised.value) == message

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
