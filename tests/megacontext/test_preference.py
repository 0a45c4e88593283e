"""Preference learning against a plain loop over pairs and entries."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megacontext.preference import (
    _quantile,
    make_pairs,
    policy_scores,
    preference_loss,
    preference_metrics,
)

B, V, E = 3, 4, 9


@pytest.fixture
def case() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "nll": torch.randn(B, V, generator=generator) * 2 + 20,
        "held": torch.rand(B, V, E, generator=generator) < 0.5,
        "gists": torch.arange(E).expand(B, E) < 7,
        "scores": torch.rand(B, E, generator=generator) * 2 - 1,
    }


def by_hand(case: dict[str, Tensor]) -> list[tuple[float, float]]:
    """(sum of label · score, advantage of the better one) of every pair that says anything."""
    out = []
    for b in range(B):
        for i in range(V):
            for j in range(i + 1, V):
                better, worse = (i, j) if case["nll"][b, i] < case["nll"][b, j] else (j, i)
                labelled = []
                for e in range(E):
                    if not case["gists"][b, e]:
                        continue
                    holds = bool(case["held"][b, better, e]), bool(case["held"][b, worse, e])
                    if holds[0] != holds[1]:
                        label = 1 if holds[0] else -1
                        labelled.append(label * float(case["scores"][b, e]))
                if labelled:
                    gap = float(case["nll"][b, worse] - case["nll"][b, better])
                    out.append((sum(labelled), gap))
    return out


class TestPairs:
    def test_all_pairs_of_variants(self, case: dict[str, Tensor]) -> None:
        """P = V (V - 1) / 2, for every sequence; entries that are no gists are masked."""
        pairs = make_pairs(case["nll"], case["held"], case["gists"])
        assert pairs.advantages.shape == (B, 6)
        assert pairs.labels.shape == (B, 6, E)
        assert pairs.labels[..., 7:].eq(0).all()
        assert set(pairs.labels.unique().tolist()) == {-1.0, 0.0, 1.0}

    def test_the_losses_of_the_variants_get_no_gradient(self, case: dict[str, Tensor]) -> None:
        """Preference learning must not train the language model to make variants differ."""
        nll = case["nll"].requires_grad_()
        pairs = make_pairs(nll, case["held"], case["gists"])
        assert not pairs.advantages.requires_grad


class TestLoss:
    def test_it_equals_the_loop(self, case: dict[str, Tensor]) -> None:
        """Weighted mean of log(1 + exp(-policy / temperature))."""
        pairs = make_pairs(case["nll"], case["held"], case["gists"])
        loss = preference_loss(case["scores"], pairs, temperature=0.5, advantage_scale=0.3)
        terms = [
            (math.tanh(0.3 * gap), math.log1p(math.exp(-policy / 0.5)))
            for policy, gap in by_hand(case)
        ]
        expected = sum(w * t for w, t in terms) / sum(w for w, _ in terms)
        assert float(loss) == pytest.approx(expected, rel=1e-5)

    def test_descent_raises_what_the_better_variant_held(self) -> None:
        """And lowers what the worse one held; what both or neither hold is left alone."""
        scores = torch.zeros(1, 4, requires_grad=True)
        held = torch.tensor([[[True, False, True, False], [False, True, True, False]]])
        pairs = make_pairs(torch.tensor([[1.0, 3.0]]), held, torch.ones(1, 4, dtype=torch.bool))
        preference_loss(scores, pairs, temperature=0.5, advantage_scale=0.5).backward()
        assert scores.grad is not None
        assert scores.grad.sign().tolist() == [[-1.0, 1.0, 0.0, 0.0]]

    def test_the_order_of_the_variants_does_not_matter(self, case: dict[str, Tensor]) -> None:
        """A pair is the same pair from either side."""
        order = torch.tensor([2, 0, 3, 1])
        pairs = make_pairs(case["nll"], case["held"], case["gists"])
        turned = make_pairs(case["nll"][:, order], case["held"][:, order], case["gists"])
        losses = [
            float(preference_loss(case["scores"], p, temperature=0.5, advantage_scale=0.5))
            for p in (pairs, turned)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    def test_variants_that_hold_the_same_say_nothing(self) -> None:
        """Zero loss with a gradient of zero, no nan."""
        scores = torch.zeros(1, 4, requires_grad=True)
        held = torch.ones(1, 2, 4, dtype=torch.bool)
        pairs = make_pairs(torch.tensor([[1.0, 3.0]]), held, torch.ones(1, 4, dtype=torch.bool))
        loss = preference_loss(scores, pairs, temperature=0.5, advantage_scale=0.5)
        loss.backward()
        assert float(loss.detach()) == 0
        assert scores.grad is not None
        assert scores.grad.tolist() == [[0.0] * 4]


class TestMetrics:
    def test_they_equal_the_loop(self, case: dict[str, Tensor]) -> None:
        """Gaps over all pairs; agreement and correlation over the pairs that say something."""
        pairs = make_pairs(case["nll"], case["held"], case["gists"])
        metrics = preference_metrics(case["scores"], pairs, case["gists"])
        values = {name: float(value) for name, value in metrics.items()}
        gaps = pairs.advantages.abs().flatten().numpy()
        assert values["adv_delta_mean"] == pytest.approx(gaps.mean(), rel=1e-5)
        assert values["adv_delta_std"] == pytest.approx(gaps.std(), rel=1e-5)
        assert values["adv_delta_p95"] == pytest.approx(np.quantile(gaps, 0.95), rel=1e-5)
        hand = by_hand(case)
        agreement = np.mean([policy > 0 for policy, _ in hand])
        assert values["preference_agreement"] == pytest.approx(agreement, rel=1e-5)
        policy, informative = policy_scores(case["scores"], pairs)
        r = np.corrcoef(policy[informative], pairs.advantages[informative])[0, 1]
        assert values["preference_corr"] == pytest.approx(r, rel=1e-4)
        gist_scores = case["scores"][:, :7].numpy()
        assert values["policy_score_abs_mean"] == pytest.approx(
            np.abs(gist_scores).mean(), rel=1e-5
        )
        assert values["policy_score_std_mean"] == pytest.approx(
            gist_scores.std(axis=1).mean(), rel=1e-5
        )

    def test_perfect_scores_agree_with_every_pair(self) -> None:
        """Scores equal to each gist's worth order all pairs as the losses do."""
        worth = torch.tensor([[0.9, -0.2, 0.5, 0.1]])
        held = torch.tensor([[[1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1]]]).bool()
        nll = 10 - (held.float() @ worth[0])
        pairs = make_pairs(nll, held, torch.ones(1, 4, dtype=torch.bool))
        metrics = preference_metrics(worth, pairs, torch.ones(1, 4, dtype=torch.bool))
        assert float(metrics["preference_agreement"]) == 1
        assert float(metrics["preference_corr"]) > 0.9


class TestQuantile:
    @pytest.mark.parametrize("number", [1, 2, 20, 21])
    def test_is_torchs(self, number: int) -> None:
        """Of any number of values; torch's own made the host wait for the device on 2.7."""
        values = torch.randn(number, generator=torch.Generator().manual_seed(number))
        torch.testing.assert_close(_quantile(values, 0.95), torch.quantile(values, 0.95))
