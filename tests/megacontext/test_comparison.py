"""Comparisons that only ablations make, against plain loops. The recipe's is in test_controller."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext import TrainingWCVariationAllocator
from megacontext.allocators.cut import lod0_tail
from megacontext.comparison import make_plain_pairs, relative_detail
from megacontext.preference import policy_scores


class TestPlainPairs:
    def test_they_equal_the_loop(self) -> None:
        """Only the worse variant's entries are told, by the better one's detail."""
        generator = torch.Generator().manual_seed(1)
        nll = torch.rand(2, 3, generator=generator)
        finer = torch.rand(2, 3, 3, 5, generator=generator) < 0.4
        coarser = ~finer & (torch.rand(2, 3, 3, 5, generator=generator) < 0.5)
        scores = torch.rand(2, 3, 5, generator=generator) * 2 - 1
        policy, _ = policy_scores(scores.flatten(1), make_plain_pairs(nll, finer, coarser))
        for b in range(2):
            for p, (i, j) in enumerate([(0, 1), (0, 2), (1, 2)]):
                better, worse = (i, j) if nll[b, i] < nll[b, j] else (j, i)
                labels = finer[b, better, worse].float() - coarser[b, better, worse].float()
                expected = float((labels * scores[b, worse]).sum()) * (1 if better == i else -1)
                assert float(policy[b, p]) == pytest.approx(expected, abs=1e-5)


class TestRelativeDetail:
    @given(st.integers(0, 10_000))
    @settings(max_examples=50)
    def test_it_equals_the_loop_over_tokens(self, seed: int) -> None:
        """More detail or less, of every token of an entry; what is not held has least."""
        allocator = TrainingWCVariationAllocator(
            block_size=3, recent_tokens=4, lod2_probability=0.4, seed=seed
        )
        cuts = [*(allocator.sample(43, 23) for _ in range(3)), lod0_tail(43, 23, 3)]
        held = relative_detail(cuts, 43)
        lods = [np.where(cut.token_lods(43) < 0, 3, cut.token_lods(43)) for cut in cuts]
        for j, of in enumerate(cuts):
            for e, (start, end, lod) in enumerate(zip(of.positions, of.ends, of.lods, strict=True)):
                for i in range(len(cuts)):
                    assert held[0, i, j, e] == (lods[i][start:end] < lod).all()
                    assert held[1, i, j, e] == (lods[i][start:end] > lod).all()
