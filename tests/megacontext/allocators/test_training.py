"""The training allocator: exact length, legality, seeds, and the odds of its draws."""

import ast
import inspect
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megacontext import Cut, TrainingWCVariationAllocator, UnreachableTarget
from megacontext.allocators import training

pytestmark = pytest.mark.lensnet_calls(exact=0)


def one_at_a_time(
    rng: np.random.Generator,
    num_tokens: int,
    target: int,
    block_size: int,
    probability: float,
    recent: int,
) -> tuple[list[int], list[int]]:
    """The procedure word by word: draw, collapse, look again. Slow and obvious.

    Returns the LOD of every block, and for each draw where LOD2 was possible, which LOD it took.
    """
    k = block_size
    history = max(num_tokens - recent, 0)
    lods = [0] * (history // k)
    spans = range(history // k**2)
    length, draws = num_tokens, []
    while length > target:
        saved = {
            s: sum({0: k, 1: 1}[lod] for lod in lods[s * k : s * k + k]) - 1
            for s in spans
            if lods[s * k] != 2
        }
        fitting = [s for s, entries in saved.items() if length - entries >= target]
        blocks = [b for b, lod in enumerate(lods) if lod == 0]
        if fitting and (rng.random() < probability or not blocks):
            span = fitting[rng.integers(len(fitting))]
            lods[span * k : span * k + k] = [2] * k
            length -= saved[span]
            draws.append(2)
        else:
            lods[blocks[rng.integers(len(blocks))]] = 1
            length -= k - 1
            if fitting:
                draws.append(1)
    return lods, draws


def block_lods(cut: Cut, blocks: int) -> list[int]:
    return cut.token_lods(int(cut.ends[-1]))[: blocks * cut.block_size : cut.block_size].tolist()


class TestSample:
    @settings(max_examples=2_000)
    @given(
        num_tokens=st.integers(1, 3_000),
        block_size=st.integers(2, 40),
        max_lod=st.sampled_from([1, 2]),
        probability=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        recent=st.integers(0, 400),
        target=st.integers(-10, 3_200),
        seed=st.integers(0, 2**32),
    )
    @example(num_tokens=4096, block_size=2, max_lod=2, probability=1.0, recent=0, target=1, seed=0)
    def test_length_tiling_alignment_tail_and_seed(
        self,
        num_tokens: int,
        block_size: int,
        max_lod: int,
        probability: float,
        recent: int,
        target: int,
        seed: int,
    ) -> None:
        """2,000 random cases: exactly the reachable length, legal, and repeatable."""

        def allocator() -> TrainingWCVariationAllocator:
            return TrainingWCVariationAllocator(block_size, max_lod, probability, recent, seed)

        length = allocator().reachable_length(num_tokens, target)
        cut = allocator().sample(num_tokens, length)
        assert len(cut) == length
        cut.check(0, num_tokens, recent_tokens=recent)
        assert cut.lods.max() <= (max_lod if probability else 1)
        assert cut.positions.dtype == cut.lods.dtype == np.int64
        assert cut == allocator().sample(num_tokens, length)

    @given(st.integers(1, 500), st.integers(2, 9), st.integers(0, 50), st.integers(-5, 520))
    def test_reachable_length_is_the_longest_within_the_target(
        self, num_tokens: int, block_size: int, recent: int, target: int
    ) -> None:
        """Checked against the list of all lengths that collapses can make."""
        allocator = TrainingWCVariationAllocator(block_size, 2, 0.5, recent)
        history = max(num_tokens - recent, 0)
        collapses = history // block_size + history // block_size**2
        lengths = [num_tokens - i * (block_size - 1) for i in range(collapses + 1)]
        within = [length for length in lengths if length <= target]
        assert allocator.reachable_length(num_tokens, target) == max(within, default=min(lengths))

    def test_successive_cuts_differ(self) -> None:
        """A seed fixes the sequence of cuts, it does not repeat one cut."""
        allocator = TrainingWCVariationAllocator(4, recent_tokens=8)
        assert allocator.sample(200, 140) != allocator.sample(200, 140)

    def test_a_cut_depends_on_seed_and_number_alone(self) -> None:
        """So that a resumed run, or another process, goes on anywhere; whatever came before."""
        allocator = TrainingWCVariationAllocator(4, recent_tokens=8)
        cuts = [allocator.sample(200, 140) for _ in range(4)]
        assert allocator.drawn == 4
        resumed = TrainingWCVariationAllocator(4, recent_tokens=8)
        resumed.sample(90, 90)
        resumed.drawn = 2
        assert [resumed.sample(200, 140) for _ in range(2)] == cuts[2:]
        other = TrainingWCVariationAllocator(4, recent_tokens=8, seed=(0, 1))
        assert other.sample(200, 140) not in cuts


class TestOdds:
    """The clever sampler draws as the obvious one does."""

    CASE = (40, 25, 4, 0.3, 4)  # tokens, target, K, P(LOD2), recent: 9 blocks, 2 LOD2 spans

    def test_every_outcome_is_as_likely_as_under_the_procedure(self) -> None:
        """Chi-square over all outcomes, 20,000 draws each, at a level of 1 in a million."""
        tokens, target, k, probability, recent = self.CASE
        runs = 20_000
        rng = np.random.default_rng(1)
        naive = Counter(
            tuple(one_at_a_time(rng, tokens, target, k, probability, recent)[0])
            for _ in range(runs)
        )
        allocator = TrainingWCVariationAllocator(k, 2, probability, recent, seed=2)
        ours = Counter(tuple(block_lods(allocator.sample(tokens, target), 9)) for _ in range(runs))
        outcomes = [o for o in naive | ours if naive[o] + ours[o] >= 10]
        difference = np.array([naive[o] - ours[o] for o in outcomes])
        total = np.array([naive[o] + ours[o] for o in outcomes])
        chi_square = float((difference**2 / total).sum())
        # Normal approximation: mean = degrees of freedom, variance twice that.
        assert chi_square < len(outcomes) + 5 * (2 * len(outcomes)) ** 0.5
        assert len(outcomes) > 100

    def test_one_draw_in_ten_is_lod2(self) -> None:
        """DESIGN's mistake: in 200 runs a public implementation made no LOD2 collapse at all.

        Many spans and few draws, so that a LOD2 span hardly ever swallows a LOD1 gist and the
        draws can be counted in the cut. The last few draws, for which no LOD2 is left to fit,
        lower the share a little.
        """
        allocator = TrainingWCVariationAllocator(4, 2, 0.1, recent_tokens=0, seed=3)
        lods = Counter[int]()
        for _ in range(100):
            lods.update(allocator.sample(40_000, 40_000 - 3 * 200).lods.tolist())
        draws = lods[1] + lods[2]
        assert draws > 10_000
        assert 0.09 < lods[2] / draws < 0.11

    def test_lod2_collapses_happen_at_k_32(self) -> None:
        """They need no 32 adjacent LOD1 gists first."""
        allocator = TrainingWCVariationAllocator(32, 2, 0.1, recent_tokens=128, seed=3)
        cuts = [allocator.sample(8_192, 8_192 - 31 * 200) for _ in range(20)]
        assert all((cut.lods == 2).any() for cut in cuts)

    def test_probability_zero_forbids_lod2(self) -> None:
        """Also where only LOD2 could go further: the floor is then higher."""
        allocator = TrainingWCVariationAllocator(4, 2, 0.0, recent_tokens=0)
        assert allocator.reachable_length(64, 1) == 16
        assert set(allocator.sample(64, 16).lods.tolist()) == {1}

    def test_probability_one_uses_lod2_whenever_it_fits(self) -> None:
        """64 tokens at K = 4: four spans of 16, each saves 15 entries."""
        allocator = TrainingWCVariationAllocator(4, 2, 1.0, recent_tokens=0)
        lods = Counter(allocator.sample(64, 64 - 2 * 15 - 3).lods.tolist())
        assert lods == {2: 2, 1: 1, 0: 28}


class TestBadInput:
    @pytest.mark.parametrize(
        ("tokens", "target", "nearest"),
        [
            (100, 50, "lengths are 49 and 52"),
            (100, 101, "length is 100"),
            (100, 99, "lengths are 97 and 100"),
            (100, 3, "length is 16"),
            (100, 23, "lengths are 22 and 25"),
            (5, 4, "length is 5"),
        ],
    )
    def test_an_unreachable_target_names_its_neighbours(
        self, tokens: int, target: int, nearest: str
    ) -> None:
        """DESIGN's mistake: a target that (N - W) mod (K - 1) forbids was silently missed."""
        allocator = TrainingWCVariationAllocator(block_size=4, recent_tokens=8)
        with pytest.raises(UnreachableTarget) as raised:
            allocator.sample(tokens, target)
        assert str(raised.value) == (
            f"a working context of {target} entries cannot be made from {tokens} tokens with "
            "block_size 4, LODs up to 2 and the last 8 tokens at LOD0; "
            f"the nearest reachable {nearest}"
        )

    def test_neighbours_that_are_named_can_be_reached(self) -> None:
        """Every length that a message names is one that sample accepts."""
        allocator = TrainingWCVariationAllocator(block_size=5, recent_tokens=7)
        targets = [t for t in range(-3, 90) if allocator.reachable_length(83, t) != t]
        for target in targets:
            with pytest.raises(UnreachableTarget) as raised:
                allocator.sample(83, target)
            named = str(raised.value).rpartition("reachable length")[2]
            lengths = [int(word) for word in named.split() if word.isdigit()]
            assert lengths
            assert all(len(allocator.sample(83, length)) == length for length in lengths)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"block_size": 1}, ValueError, "block_size must be at least 2 tokens, not 1"),
            ({"block_size": 4.0}, TypeError, "block_size must be an int, not 4.0"),
            ({"block_size": True}, TypeError, "block_size must be an int, not True"),
            (
                {"max_lod": 3},
                ValueError,
                "max_lod must be 1 or 2 (gists, and gists of gists), not 3",
            ),
            (
                {"lod2_probability": 1.5},
                ValueError,
                "lod2_probability must be a number in [0, 1], not 1.5",
            ),
            (
                {"lod2_probability": "often"},
                TypeError,
                "lod2_probability must be a number in [0, 1], not 'often'",
            ),
            ({"recent_tokens": -1}, ValueError, "recent_tokens must not be negative, but is -1"),
            ({"recent_tokens": 1.5}, TypeError, "recent_tokens must be an int, not 1.5"),
        ],
    )
    def test_bad_arguments_are_refused_at_construction(
        self, arguments: dict[str, object], error: type[Exception], message: str
    ) -> None:
        """Each by name and value."""
        with pytest.raises(error) as raised:
            TrainingWCVariationAllocator(**arguments)  # type: ignore[arg-type]
        assert str(raised.value) == message

    @pytest.mark.parametrize("tokens", [0, -5])
    def test_no_tokens(self, tokens: int) -> None:
        """There is no cut of nothing."""
        with pytest.raises(ValueError, match=f"a cut needs at least one token, not {tokens}"):
            TrainingWCVariationAllocator().sample(tokens, 1)


class TestSeparation:
    def test_the_module_imports_neither_torch_nor_lensnet(self) -> None:
        """It could not call LensNet if it wanted to; import-linter says so for the whole chain."""
        tree = ast.parse(inspect.getsource(training))
        imported = {
            name
            for node in ast.walk(tree)
            for name in (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
        }
        assert imported == {
            "collections.abc",
            "numpy",
            "megacontext.checks",
            "megacontext.allocators.cut",
        }
