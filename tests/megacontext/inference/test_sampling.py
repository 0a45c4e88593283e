"""Sampling: what temperature, top-k and top-p leave of a distribution."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megacontext.inference.sampling import SamplingRules, sample_token, token_probabilities

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0])
logit_lists = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40)


class TestTokenProbabilities:
    def test_plain_sampling_is_the_softmax(self) -> None:
        """Temperature divides the logits."""
        expected = torch.softmax(LOGITS / 0.5, 0)
        torch.testing.assert_close(token_probabilities(LOGITS, SamplingRules(0.5)), expected)

    def test_temperature_0_takes_the_likeliest(self) -> None:
        """The first of several."""
        assert token_probabilities(LOGITS, SamplingRules(0)).tolist() == [0, 1, 0, 0]
        ties = token_probabilities(torch.zeros(3), SamplingRules(0))
        assert ties.tolist() == [1, 0, 0]

    def test_a_very_small_temperature_is_greedy(self) -> None:
        """And not nan."""
        assert token_probabilities(LOGITS, SamplingRules(1e-30)).tolist() == [0, 1, 0, 0]

    @given(logit_lists, st.integers(1, 50))
    def test_top_k_keeps_that_many(self, logits: list[float], k: int) -> None:
        """The likeliest, in their proportions."""
        full = token_probabilities(torch.tensor(logits), SamplingRules())
        kept = token_probabilities(torch.tensor(logits), SamplingRules(top_k=k))
        assert int((kept > 0).sum()) <= k
        assert kept.sum() == pytest.approx(1, abs=1e-5)
        assert kept.max() == kept[full == full.max()].max()  # of equals one is enough
        inside = kept > 0
        torch.testing.assert_close(kept[inside], full[inside] / full[inside].sum())
        if (~inside).any():
            assert full[~inside].max() <= full[inside].min()

    @given(logit_lists, st.floats(0.01, 1))
    def test_top_p_keeps_the_fewest_that_reach_it(self, logits: list[float], p: float) -> None:
        """Without the least of them it is not reached."""
        full = token_probabilities(torch.tensor(logits), SamplingRules()).double()
        kept = token_probabilities(torch.tensor(logits), SamplingRules(top_p=p)) > 0
        assert kept.any()
        assert full[kept].sum() >= min(p, 1) - 1e-5
        assert full[kept].sum() - full[kept].min() < p + 1e-5

    def test_top_p_is_of_what_top_k_left(self) -> None:
        """As users of other tools expect."""
        logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
        kept = token_probabilities(logits, SamplingRules(1.0, 2, 0.6))
        torch.testing.assert_close(kept, torch.tensor([4 / 7, 3 / 7, 0, 0]))
        alone = token_probabilities(logits, SamplingRules(1.0, 2, 0.5))
        assert alone.tolist() == [1, 0, 0, 0]


class TestSampleToken:
    def test_same_seed_same_tokens_in_the_right_proportions(self) -> None:
        """4,000 draws, within five standard errors."""

        def draws() -> torch.Tensor:
            generator = torch.Generator().manual_seed(1)
            rules = SamplingRules(0.7, 3)
            return torch.cat([sample_token(LOGITS, rules, generator) for _ in range(4_000)])

        first = draws()
        assert torch.equal(first, draws())
        expected = token_probabilities(LOGITS, SamplingRules(0.7, 3))
        shares = torch.bincount(first, minlength=4) / 4_000
        assert ((shares - expected).abs() <= 5 * (expected * (1 - expected) / 4_000).sqrt()).all()


class TestSamplingRules:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ((-1.0,), "temperature must be 0 or more, not -1.0"),
            ((float("nan"),), "temperature must be 0 or more, not nan"),
            ((1.0, -2), "top_k must not be negative, but is -2"),
            ((1.0, 0, 0.0), "top_p must lie in (0, 1], not 0.0"),
            ((1.0, 0, 1.1), "top_p must lie in (0, 1], not 1.1"),
        ],
    )
    def test_what_cannot_sample_is_named(self, values: tuple[float, ...], message: str) -> None:
        """With its value."""
        with pytest.raises(ValueError) as raised:
            SamplingRules(*values)
        assert str(raised.value) == message
