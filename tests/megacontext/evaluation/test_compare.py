"""The evaluation: equal length, real losses, honest statistics."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lensnet_guard import guard_of
from megacontext import LanguageModel, MCConfig, MCController
from megacontext.data.documents import split_documents
from megacontext.data.mixture import MixedSource
from megacontext.data.recall import RecallSource
from megacontext.data.source import Batch
from megacontext.data.tokenizer import ByteTokenizer
from megacontext.data.windows import WindowSource
from megacontext.evaluation.compare import Evaluation, evaluate, gap_closed
from megacontext.evaluation.memo import Memo
from megacontext.evaluation.pickers import Floats
from megacontext.evaluation.ways import (
    ASKED,
    FULL,
    GREEDY,
    LENSNET,
    ORACLE,
    RANDOM,
    RECENCY,
    SALIENCE,
    SESSION,
    Comparing,
    Kind,
)

WINDOWS = {RECENCY, "recency + sink"}  # these do not hold all tokens
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
    return evaluate(mc, RecallSource(), sequences=40, seed=3, what=Comparing(oracle_draws=9))


class TestEvaluate:
    def test_every_way_has_the_same_number_of_entries(self, evaluation: Evaluation) -> None:
        """But for full context, and for a session, whose budget may not come out even."""
        entries = dict(evaluation.entries)
        assert entries.pop(FULL) == 144
        assert 60 <= entries.pop(SESSION) <= 67
        assert set(entries.values()) == {67}
        assert {len(nll) for nll in evaluation.nll.values()} == {40}

    def test_every_cut_is_legal(self, evaluation: Evaluation) -> None:
        """It covers all tokens, but for windows, and holds the tail at LOD0."""
        for way, cut in evaluation.examples.items():
            if way in WINDOWS:
                continue
            end = 143 if way == SESSION else 144  # nothing follows the last token
            cut.check(0, end, recent_tokens=24)

    def test_windows_hold_the_last_tokens(self, evaluation: Evaluation) -> None:
        """And, with a sink, the first four; each token in detail."""
        window, sink = (evaluation.examples[way] for way in (RECENCY, "recency + sink"))
        assert window.positions.tolist() == [*range(144 - 67, 144)]
        assert sink.positions.tolist() == [*range(4), *range(144 - 63, 144)]
        assert not window.lods.any()
        assert not sink.lods.any()

    def test_the_oracle_is_the_best_of_random_cuts(self, evaluation: Evaluation) -> None:
        """By loss; more draws make it better."""
        more = evaluate(
            MCController(CONFIG),
            RecallSource(),
            sequences=40,
            seed=3,
            what=Comparing(oracle_draws=40),
        )
        assert evaluation.nll[ORACLE].mean() < evaluation.nll[RANDOM].mean()
        assert more.nll[ORACLE].mean() < evaluation.nll[ORACLE].mean()

    def test_same_seed_same_figures(self, evaluation: Evaluation) -> None:
        """And another seed, other sequences."""
        mc = MCController(CONFIG)
        again = evaluate(mc, RecallSource(), sequences=40, seed=3, what=Comparing(oracle_draws=9))
        other = evaluate(mc, RecallSource(), sequences=40, seed=4, what=Comparing(oracle_draws=9))
        for way, nll in evaluation.nll.items():
            assert np.array_equal(nll, again.nll[way])
            assert not np.array_equal(nll, other.nll[way])

    def test_lensnet_is_asked_in_inference_only(self) -> None:
        """Once a batch, and in each refocus of a session; nothing is trained."""
        mc = MCController(CONFIG)
        guard = guard_of(mc.lensnet)
        assert guard is not None
        evaluate(mc, RecallSource(), sequences=40, seed=3, what=Comparing(oracle_draws=1))
        assert {call.context for call in guard.calls} == {"inference"}
        asked = guard.count("inference")
        batches = sum("inference/focus.py" not in str(call.caller) for call in guard.calls)
        assert batches <= 2 < asked
        assert all(parameter.grad is None for parameter in mc.parameters())

    def test_good_scores_pick_good_contexts(self) -> None:
        """With a reader that copies, holding the facts that are asked for is worth it."""
        mc = MCController(CONFIG)
        mc.language_model = _Copier(mc.language_model)  # type: ignore[assignment]
        found = evaluate(mc, RecallSource(), sequences=40, seed=5, what=Comparing(oracle_draws=9))
        means = {way: nll.mean() for way, nll in found.nll.items()}
        assert means["full context"] < 0.01
        assert means[ASKED] < 0.01
        assert means[ASKED] < means[SALIENCE] < means[RANDOM]
        assert gap_closed(found, ASKED) > gap_closed(found, SALIENCE) > 0.3

        assert means[GREEDY] < means[ORACLE]
        assert means["lexical, the question alone"] < 0.01
        assert means["lexical, whole tail"] > means[ASKED] + 0.1

    def test_facts_are_where_they_are_said_to_be(self) -> None:
        """Also where the oldest tokens go: sequences are made as long as they are kept."""
        mc = MCController(dataclasses.replace(CONFIG, sequence_tokens=147))
        mc.language_model = _Copier(mc.language_model)  # type: ignore[assignment]
        what = Comparing(oracle_draws=1, greedy=False, in_session=False)
        found = evaluate(mc, RecallSource(), sequences=20, seed=5, what=what)
        assert found.tokens == 144
        assert found.nll[ASKED].mean() < 0.01

    def test_a_session_is_the_last_of_lensnets_ways(self, evaluation: Evaluation) -> None:
        """Kinds stand one after another, as in the table; each knows whether it is a baseline."""
        kinds = list(evaluation.kinds.values())
        assert kinds == sorted(kinds, key=list(Kind).index)
        assert evaluation.kinds[SESSION] is Kind.LENSNET
        baselines = {way for way, kind in evaluation.kinds.items() if kind.is_baseline}
        assert not baselines & {LENSNET, SESSION, SALIENCE, ASKED, ORACLE, GREEDY, FULL}

    def test_pickers_do_not_see_the_horizon(self) -> None:
        """Other answers, same cuts: of all but those that know more."""
        mc = MCController(CONFIG)
        found = [
            evaluate(
                mc,
                _OtherAnswers(change),
                sequences=4,
                seed=3,
                what=Comparing(oracle_draws=1, in_session=False),
            )
            for change in (0, 1)
        ]
        for way, kind in found[0].kinds.items():
            if kind is not Kind.KNOWLEDGE:
                assert found[0].examples[way] == found[1].examples[way]
        assert found[0].nll[LENSNET].tolist() != found[1].nll[LENSNET].tolist()

    def test_without_gists_all_hold_the_same_number_of_tokens(self) -> None:
        """What is not held in detail is left out, of every way alike."""
        mc = MCController(CONFIG)
        what = Comparing(oracle_draws=2, gists=False)
        found = evaluate(mc, RecallSource(), sequences=4, seed=3, what=what)
        entries = dict(found.entries)
        assert SESSION not in entries
        assert entries.pop(FULL) == 144
        assert set(entries.values()) == {67 - 11}  # 15 blocks, of which 4 are in detail
        assert all((cut.lods == 0).all() for cut in found.examples.values())

    def test_losses_of_another_horizon_are_not_taken_for_those_of_this_one(self) -> None:
        """With the same weights, sequences and cuts, in one memo; and again they are all known."""
        memo = Memo()
        what = Comparing(oracle_draws=0, greedy=False, in_session=False)
        shorter = dataclasses.replace(CONFIG, horizon_tokens=CONFIG.horizon_tokens - 2)
        found = [
            evaluate(
                MCController(config), RecallSource(), sequences=2, seed=3, what=what, memo=memo
            )
            for config in (CONFIG, shorter, CONFIG)
        ]
        first, other, again = (f.nll[RECENCY].tolist() for f in found)
        assert first == again != other
        alone = evaluate(MCController(shorter), RecallSource(), sequences=2, seed=3, what=what)
        assert alone.nll[RECENCY].tolist() == other

    def test_clusters_are_files(self) -> None:
        """Of windows of files, and of nothing else."""
        mc = MCController(dataclasses.replace(CONFIG, vocab_size=256))
        texts = [(f"{i}", bytes([i, *range(256)])) for i in range(12)]
        source = WindowSource(split_documents(texts, ByteTokenizer()), 24, 6)
        what = Comparing(oracle_draws=1, greedy=False, in_session=False)
        found = evaluate(mc, source, sequences=40, seed=3, what=what)
        assert found.clusters is not None
        assert len(found.clusters) == 40
        assert set(found.clusters.tolist()) <= set(range(len(source.documents.held_out)))

    def test_what_is_of_no_file_is_a_cluster_of_its_own(self) -> None:
        """Beside windows of files, in a mixture, over several batches."""
        mc = MCController(dataclasses.replace(CONFIG, vocab_size=256))
        texts = [(f"{i}", bytes([i, *range(256)])) for i in range(12)]
        windows = WindowSource(split_documents(texts, ByteTokenizer()), 24, 6)
        source = MixedSource(
            {"files": windows, "recall": RecallSource()}, {"files": 0.5, "recall": 0.5}
        )
        what = Comparing(oracle_draws=0, greedy=False, in_session=False)
        found = evaluate(mc, source, sequences=40, seed=3, what=what)
        assert found.clusters is not None
        rng = np.random.default_rng([3, 2])
        files = source.held_out_batch(rng, 32, 144).files
        assert files is not None
        first = found.clusters[:32]
        assert (first[files >= 0] == files[files >= 0]).all()
        alone = np.concatenate([first[files < 0], found.clusters[32:][found.clusters[32:] > 11]])
        assert len(set(alone.tolist())) == len(alone)

    def test_similarity_is_among_the_ways_where_tokens_are_text(self) -> None:
        """Given what embeds texts; of numbers there is nothing to embed."""
        texts: list[str] = []

        def embed(given: Sequence[str]) -> Floats:
            texts.extend(given)
            return np.ones((len(given), 1))

        mc = MCController(dataclasses.replace(CONFIG, vocab_size=256))
        source = WindowSource(split_documents([("", b"abcdefgh" * 400)], ByteTokenizer()), 24, 6)
        what = Comparing(oracle_draws=1, greedy=False, in_session=False, embed=embed)
        found = evaluate(mc, source, sequences=2, seed=3, what=what)
        assert "MiniLM, whole tail" in found.nll
        assert {len(text) for text in texts} == {8, 16, 18}  # blocks, and both queries
        numbers = evaluate(MCController(CONFIG), RecallSource(), sequences=2, seed=3, what=what)
        assert not any("MiniLM" in way for way in numbers.nll)

    def test_nothing_to_evaluate_is_refused(self) -> None:
        """Before anything is computed."""
        with pytest.raises(ValueError) as raised:
            evaluate(MCController(CONFIG), RecallSource(), sequences=0, seed=0)
        assert str(raised.value) == (
            "an evaluation needs sequences, and no less than 0 draws of the oracle, not 0 and 64"
        )


class _OtherAnswers(RecallSource):
    """The same sequences, whose horizons hold other tokens."""

    def __init__(self, change: int) -> None:
        super().__init__()
        object.__setattr__(self, "change", change)

    def held_out_batch(self, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        made = super().held_out_batch(rng, batch_size, length)
        made.tokens[:, -6:] = 16 + (made.tokens[:, -6:] + self.change) % 32  # type: ignore[attr-defined]
        return made


class _Copier(torch.nn.Module):
    """Reads what follows the same key earlier among the LOD0 entries, and says just that."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.embedding, self.embed = model.embedding, model.embed
        self.max_tokens, self.new_seen, self.dtype = model.max_tokens, model.new_seen, model.dtype

    def forward(
        self,
        embeddings: torch.Tensor,
        starts: torch.Tensor,
        spans: torch.Tensor,
        pad_mask: torch.Tensor | None = None,
        seen: Any = None,
        last: int | None = None,
    ) -> torch.Tensor:
        distances = torch.cdist(embeddings, self.embedding.weight.expand(len(embeddings), -1, -1))
        tokens = distances.argmin(-1).masked_fill(spans > 1, -1)
        new = tokens.shape[1]
        if seen is not None:
            tokens = torch.cat([getattr(seen, "tokens", tokens[:, :0]), tokens], dim=1)
            seen.tokens = tokens
        width = tokens.shape[1]
        heads = embeddings[:, None]  # something to look at for those who ask what it attends to
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        same = (tokens[:, :, None] == tokens[:, None, :]) & (tokens >= 0)[:, None]
        same &= torch.ones(width, width, dtype=torch.bool).tril(-1)
        # What follows must itself be there, and be no key: questions are followed by keys.
        follows = torch.cat([tokens[:, 1:], torch.full((len(tokens), 1), -1)], dim=1)
        same &= (follows >= 16)[:, None]
        votes = torch.nn.functional.one_hot(follows.clamp(min=0), 48).float()
        logits = 20 * (same.float() @ votes)[:, -new:]
        return logits if last is None else logits[:, -last:]


class TestGapClosed:
    def test_from_random_to_oracle(self) -> None:
        """0 for random collapse, 1 for the oracle."""
        nll = {RANDOM: np.full(4, 3.0), ORACLE: np.full(4, 1.0), LENSNET: np.full(4, 1.5)}
        evaluation = Evaluation(nll | {FULL: np.full(4, 0.0)}, {}, {}, {}, 0)
        assert gap_closed(evaluation, RANDOM) == 0
        assert gap_closed(evaluation, LENSNET) == 0.75
        assert gap_closed(evaluation, ORACLE) == 1
        assert gap_closed(evaluation, LENSNET, FULL) == 0.5

    @pytest.mark.filterwarnings("error")
    def test_where_there_is_no_gap(self) -> None:
        """No share is told of it, nor a warning of a division by zero."""
        nll = {RANDOM: np.full(4, 2.0), ORACLE: np.full(4, 2.0), LENSNET: np.full(4, 1.5)}
        evaluation = Evaluation(nll | {FULL: np.full(4, 2.0)}, {}, {}, {}, 0)
        assert math.isnan(gap_closed(evaluation, RANDOM))
        assert math.isnan(gap_closed(evaluation, LENSNET, FULL))
