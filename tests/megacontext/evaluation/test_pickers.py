"""Pickers: their formulas, what they may see, and cuts of the same length."""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.allocators.cut import Geometry
from megacontext.allocators.focus import FocusRules
from megacontext.allocators.rules import FocusTuning
from megacontext.evaluation.pickers import (
    Floats,
    Visible,
    at_random,
    bm25,
    evenly_spaced,
    overlap,
    picked_cuts,
    similarity,
)

K, BLOCKS = 4, 6


@pytest.fixture
def visible() -> Visible:
    tokens = np.random.default_rng(0).integers(0, 12, (5, BLOCKS * K + 7))
    return Visible(tokens, BLOCKS, K, picks=2)


def naive(visible: Visible, last: int | None, kind: str) -> list[list[float]]:
    """The formulas as they stand in books, a loop each."""
    scores = []
    for row in visible.tokens.tolist():
        blocks = [row[i * K : i * K + K] for i in range(BLOCKS)]
        query = set(row[BLOCKS * K :] if last is None else row[-last:])
        of_row = []
        for block in blocks:
            score = 0.0
            for token, count in Counter(block).items():
                if token in query:
                    held = sum(token in other for other in blocks)
                    if kind == "bm25":
                        idf = math.log(1 + (BLOCKS - held + 0.5) / (held + 0.5))
                        score += idf * count * 2.5 / (count + 1.5)
                    else:
                        score += math.log(BLOCKS / held) if kind == "idf" else 1
            of_row.append(score)
        scores.append(of_row)
    return scores


class TestWords:
    @pytest.mark.parametrize("last", [None, 3])
    def test_formulas(self, visible: Visible, last: int | None) -> None:
        """Overlap, overlap with IDF and BM25, of the whole tail and of its last tokens."""
        for kind, scores in (
            ("overlap", overlap(visible, last)),
            ("idf", overlap(visible, last, idf=True)),
            ("bm25", bm25(visible, last)),
        ):
            np.testing.assert_allclose(scores, naive(visible, last, kind), atol=1e-12)

    def test_a_token_that_all_blocks_hold_tells_nothing(self) -> None:
        """With IDF; without, it counts as any other."""
        tokens = np.array([[1, 2, 1, 3, 1, 2]])
        visible = Visible(tokens, 2, 2, picks=1)
        assert overlap(visible).tolist() == [[2, 1]]
        assert overlap(visible, idf=True).tolist() == [[math.log(2), 0]]


class TestPlaces:
    @given(st.integers(1, 40), st.integers(0, 40))
    def test_evenly_spaced_blocks(self, blocks: int, picks: int) -> None:
        """As many as there is room for, no two gaps that differ by more than one."""
        picks = min(picks, blocks)
        scores = evenly_spaced(Visible(np.zeros((1, blocks), dtype=np.int64), blocks, 1, picks))
        chosen = np.flatnonzero(scores[0])
        assert len(chosen) == max(picks, 1)
        if len(chosen) > 1:
            assert np.ptp(np.diff(chosen)) <= 1

    def test_random_blocks(self, visible: Visible) -> None:
        """Seeds reproduce."""
        a, b, c = (at_random(visible, np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert a.tolist() == b.tolist() != c.tolist()
        assert a.shape == (5, BLOCKS)


class TestSimilarity:
    def test_the_cosine_of_texts(self, visible: Visible) -> None:
        """Of each block's text with the query's; equal texts come first."""

        def embed(texts: Sequence[str]) -> Floats:
            seeds = [
                int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") for text in texts
            ]
            vectors = np.stack([np.random.default_rng(seed).normal(size=8) for seed in seeds])
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

        tokens = visible.tokens.copy()
        tokens[:, 2 * K : 3 * K] = tokens[:, -K:]
        seen = Visible(tokens, BLOCKS, K, picks=2)
        scores = similarity(seen, embed, lambda part: str(part.tolist()), last=K)
        assert scores.argmax(axis=1).tolist() == [2] * 5
        np.testing.assert_allclose(scores[:, 2], 1)
        whole = similarity(seen, embed, lambda part: str(part.tolist()))
        assert whole.max() < 1


class TestPickedCuts:
    @given(st.integers(0, 10**6), st.integers(0, 6), st.sampled_from([1, 2]))
    @settings(max_examples=40)
    def test_all_spend_the_same(self, seed: int, picks: int, max_lod: int) -> None:
        """Whatever the scores, the cut is legal and exactly as long as it may be."""
        rng = np.random.default_rng(seed)
        length = 20 * 4 + 9
        geometry = Geometry(4, max_lod, recent_tokens=9).within(20 + 9 + 3 * picks)
        tuning = FocusTuning(expand_threshold=-np.inf, margin=0.0, max_edits=length)
        scores = rng.integers(0, 3, (4, 20)) * 10.0 ** rng.integers(-9, 9)
        start = geometry.coarse_cut(0, length)
        for cut in picked_cuts(scores, start, FocusRules(geometry, tuning)):
            cut.check(0, length, recent_tokens=9)
            assert len(cut) == geometry.window

    def test_the_best_are_held_in_detail(self) -> None:
        """Among equals the newer; however small the differences are."""
        geometry = Geometry(4, 1, recent_tokens=9).within(20 + 9 + 3 * 2)
        tuning = FocusTuning(expand_threshold=-np.inf, margin=0.0, max_edits=89)
        scores = np.zeros((3, 20))
        scores[0, [3, 7]] = 1e-12
        scores[1, 5] = 1
        scores[2] = 1e9 + np.arange(20) * 1e-6
        start = geometry.coarse_cut(0, 89)
        cuts = picked_cuts(scores, start, FocusRules(geometry, tuning))
        lods = np.stack([cut.token_lods(89)[: 20 * 4 : 4] for cut in cuts])
        assert [np.flatnonzero(row == 0).tolist() for row in lods] == [[3, 7], [5, 19], [18, 19]]
