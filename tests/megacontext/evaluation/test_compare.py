"""The evaluation: equal length, real losses, honest statistics."""

from typing import Any

import numpy as np
import pytest
import torch

from lensnet_guard import guard_of
from megacontext import LanguageModel, MCConfig, MCController
from megacontext.data.recall import RecallSource
from megacontext.evaluation.compare import (
    LENSNET,
    ORACLE,
    RANDOM,
    SALIENCE,
    SESSION,
    Evaluation,
    bootstrap_interval,
    evaluate,
    gap_closed,
)

ASKED = "the facts that are asked for"
CONFIG = MCConfig(
    vocab_size=48,
    d_model=16,
    num_heads=2,
    lm_layers=1,
    lens_layers=1,
    block_size=8,
    sequence_tokens=144,
    train_wc_length=67,
    recent_tokens=24,
    horizon_tokens=6,
)


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    mc = MCController(CONFIG)
    return evaluate(mc, RecallSource(), sequences=40, seed=3, oracle_draws=9)


class TestEvaluate:
    def test_every_way_has_the_same_number_of_entries(self, evaluation: Evaluation) -> None:
        """But for full context, and for a session, whose budget may not come out even."""
        entries = dict(evaluation.entries)
        assert entries.pop("full context") == 144
        assert 60 <= entries.pop(SESSION) <= 67
        assert set(entries.values()) == {67}
        assert {len(nll) for nll in evaluation.nll.values()} == {40}

    def test_every_cut_is_legal(self, evaluation: Evaluation) -> None:
        """It covers all tokens, but for the recency window, and holds the tail at LOD0."""
        for way, cut in evaluation.examples.items():
            first = 144 - 67 if way == "recency window" else 0
            end = 143 if way == SESSION else 144  # nothing follows the last token
            cut.check(first, end, recent_tokens=24)

    def test_the_oracle_is_the_best_of_random_cuts(self, evaluation: Evaluation) -> None:
        """By loss; more draws make it better."""
        more = evaluate(MCController(CONFIG), RecallSource(), sequences=40, seed=3, oracle_draws=40)
        assert evaluation.nll[ORACLE].mean() < evaluation.nll[RANDOM].mean()
        assert more.nll[ORACLE].mean() < evaluation.nll[ORACLE].mean()

    def test_same_seed_same_figures(self, evaluation: Evaluation) -> None:
        """And another seed, other sequences."""
        mc = MCController(CONFIG)
        again = evaluate(mc, RecallSource(), sequences=40, seed=3, oracle_draws=9)
        other = evaluate(mc, RecallSource(), sequences=40, seed=4, oracle_draws=9)
        for way, nll in evaluation.nll.items():
            assert np.array_equal(nll, again.nll[way])
            assert not np.array_equal(nll, other.nll[way])

    def test_lensnet_is_asked_in_inference_only(self) -> None:
        """Once a batch, and in each refocus of a session; nothing is trained."""
        mc = MCController(CONFIG)
        guard = guard_of(mc.lensnet)
        assert guard is not None
        evaluate(mc, RecallSource(), sequences=40, seed=3, oracle_draws=1)
        assert {call.context for call in guard.calls} == {"inference"}
        asked = guard.count("inference")
        batches = sum("inference/focus.py" not in str(call.caller) for call in guard.calls)
        assert batches <= 2 < asked
        assert all(parameter.grad is None for parameter in mc.parameters())

    def test_good_scores_pick_good_contexts(self) -> None:
        """With a reader that copies, holding the facts that are asked for is worth it."""
        mc = MCController(CONFIG)
        mc.language_model = _Copier(mc.language_model)  # type: ignore[assignment]
        found = evaluate(mc, RecallSource(), sequences=40, seed=5, oracle_draws=9)
        means = {way: nll.mean() for way, nll in found.nll.items()}
        assert means["full context"] < 0.01
        assert means[ASKED] < 0.01
        assert means[ASKED] < means[SALIENCE] < means[RANDOM]
        assert gap_closed(found, ASKED) > gap_closed(found, SALIENCE) > 0.3

    def test_nothing_to_evaluate_is_refused(self) -> None:
        """Before anything is computed."""
        with pytest.raises(ValueError) as raised:
            evaluate(MCController(CONFIG), RecallSource(), sequences=0, seed=0)
        assert str(raised.value) == (
            "an evaluation needs sequences and draws of the oracle, not 0 and 64"
        )


class _Copier(torch.nn.Module):
    """Reads what follows the same key earlier among the LOD0 entries, and says just that."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.embedding, self.embed = model.embedding, model.embed
        self.max_tokens, self.new_seen = model.max_tokens, model.new_seen

    def forward(
        self,
        embeddings: torch.Tensor,
        starts: torch.Tensor,
        spans: torch.Tensor,
        pad_mask: torch.Tensor | None = None,
        seen: Any = None,
    ) -> torch.Tensor:
        distances = torch.cdist(embeddings, self.embedding.weight.expand(len(embeddings), -1, -1))
        tokens = distances.argmin(-1).masked_fill(spans > 1, -1)
        new = tokens.shape[1]
        if seen is not None:
            tokens = torch.cat([getattr(seen, "tokens", tokens[:, :0]), tokens], dim=1)
            seen.tokens = tokens
        width = tokens.shape[1]
        same = (tokens[:, :, None] == tokens[:, None, :]) & (tokens >= 0)[:, None]
        same &= torch.ones(width, width, dtype=torch.bool).tril(-1)
        # What follows must itself be there, and be no key: questions are followed by keys.
        follows = torch.cat([tokens[:, 1:], torch.full((len(tokens), 1), -1)], dim=1)
        same &= (follows >= 16)[:, None]
        votes = torch.nn.functional.one_hot(follows.clamp(min=0), 48).float()
        return 20 * (same.float() @ votes)[:, -new:]


class TestBootstrap:
    def test_it_covers_the_mean_as_often_as_it_says(self) -> None:
        """95 % of intervals of 200 samples hold the true mean."""
        rng = np.random.default_rng(0)
        hits = 0
        for _ in range(100):
            low, high = bootstrap_interval(rng.exponential(size=200), draws=300)
            hits += low <= 1 <= high
        assert 87 <= hits <= 100

    def test_it_narrows_with_more_values(self) -> None:
        """By the root of their number."""
        rng = np.random.default_rng(0)
        widths = [np.ptp(bootstrap_interval(rng.normal(size=n), draws=500)) for n in (50, 5_000)]
        assert 7 < widths[0] / widths[1] < 14


class TestGapClosed:
    def test_from_random_to_oracle(self) -> None:
        """0 for random collapse, 1 for the oracle."""
        nll = {RANDOM: np.full(4, 3.0), ORACLE: np.full(4, 1.0), LENSNET: np.full(4, 1.5)}
        evaluation = Evaluation(nll, {}, {}, 0)
        assert gap_closed(evaluation, RANDOM) == 0
        assert gap_closed(evaluation, LENSNET) == 0.75
        assert gap_closed(evaluation, ORACLE) == 1
