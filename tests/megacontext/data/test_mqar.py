"""MQAR: nothing but pairs, of which the question alone tells which to look at."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.data.mqar import MQARSource, number_symbols, word_symbols
from megacontext.data.tokenizer import ByteTokenizer, Tokens

SYMBOLS = number_symbols(256)
SOURCE = MQARSource(SYMBOLS, SYMBOLS, 256, block_size=8, recent_tokens=32, horizon_tokens=12)


class _Words(ByteTokenizer):
    """Three letters a token: more words than bytes, and some tokens that are none."""

    vocab_size = 5_000
    unit = "tokens"

    def text(self, tokens: Tokens) -> str:
        return "".join(
            " " + "".join(chr(97 + token // 26**i % 26) for i in range(4 if token % 3 else 2))
            for token in tokens.tolist()
        )


class TestSequences:
    @given(st.integers(0, 10**6), st.integers(96, 260))
    @settings(max_examples=30)
    def test_an_answer_is_in_the_asked_block_and_no_other(self, seed: int, length: int) -> None:
        """Every key stands once in the history; the question names it before the horizon."""
        made = SOURCE.batch(np.random.default_rng(seed), 4, length)
        assert made.tokens.shape == (4, length)
        assert made.asked_blocks is not None
        for row, asked in zip(made.tokens.tolist(), made.asked_blocks, strict=True):
            questions, horizon = row[-15:-12], row[-12:]
            assert horizon[0:6:2] == questions
            history = row[: (length - 32) // 8 * 8]
            keys = [token for token in history if token < 128]
            assert len(keys) == len(set(keys)) == len(history) // 2
            for block, key, value in zip(asked, questions, horizon[1:6:2], strict=True):
                assert history.index(key) // 8 == block
                assert history[history.index(key) + 1] == value
            assert not set(keys) & set(row[len(history) : -15])  # nor in the tail before them

    def test_only_answers_are_labelled(self) -> None:
        """Their values; what they leave of the horizon is filled up and not labelled."""
        made = SOURCE.batch(np.random.default_rng(0), 2, 200)
        assert made.labelled is not None
        assert made.labelled.nonzero()[:, 1].tolist() == [189, 191, 193] * 2

    def test_no_block_is_salient(self) -> None:
        """All of them hold facts, and as many keys."""
        made = SOURCE.batch(np.random.default_rng(0), 2, 200)
        assert made.fact_blocks is not None
        assert made.fact_blocks.tolist() == [list(range(21))] * 2
        blocks = made.tokens[:, : 21 * 8].reshape(2, 21, 8) < 128
        assert (blocks.sum(-1) == 4).all()

    def test_an_odd_block_size(self) -> None:
        """No pair straddles two blocks: the last place of each is a value."""
        odd = dataclasses.replace(SOURCE, block_size=7)
        made = odd.batch(np.random.default_rng(0), 3, 200)
        is_key = made.tokens[:, : 24 * 7].reshape(3, 24, 7) < 128
        assert is_key[:, :, [0, 2, 4]].all()
        assert not is_key[:, :, [1, 3, 5, 6]].any()

    def test_seeds_reproduce(self) -> None:
        """Training and held-out sequences alike."""
        for make in (SOURCE.batch, SOURCE.lm_batch, SOURCE.held_out_batch):
            a, b, c = (make(np.random.default_rng(seed), 2, 200).tokens for seed in (1, 1, 2))
            assert a.equal(b)
            assert not a.equal(c)
        assert SOURCE.unigram_entropy() == pytest.approx(np.log(128))

    def test_what_does_not_fit_is_refused(self) -> None:
        """More pairs than keys; a tail without room."""
        with pytest.raises(ValueError) as raised:
            SOURCE.batch(np.random.default_rng(0), 1, 400)
        assert str(raised.value) == (
            "sequences of 400 tokens have 46 blocks with 184 pairs before the protected tail: 3 "
            "questions need as many blocks, and there are 128 keys; make them of another length"
        )
        with pytest.raises(ValueError) as raised:
            dataclasses.replace(SOURCE, recent_tokens=17)
        assert str(raised.value) == (
            "3 questions of mqar need horizon_tokens of at least 6, and recent_tokens of 6 more "
            "than that, not 12 and 17"
        )


class TestSymbols:
    def test_words_are_held_out(self) -> None:
        """No token is in two of the four lists, and all are words."""
        training, held_out = word_symbols(_Words())
        lists = [training.keys, training.values, held_out.keys, held_out.values]
        tokens = np.concatenate(lists)
        assert len(set(tokens.tolist())) == len(tokens) > 3_000
        assert not (tokens % 3 == 0).any()
        assert len(held_out.keys) * 3 < len(training.keys) < len(held_out.keys) * 6

    def test_held_out_sequences_are_made_of_held_out_words(self) -> None:
        """And training ones of the others."""
        training, held_out = word_symbols(_Words())
        source = dataclasses.replace(SOURCE, training=training, held_out=held_out, vocab_size=5_000)
        for make, symbols in ((source.batch, training), (source.held_out_batch, held_out)):
            made = make(np.random.default_rng(0), 4, 200).tokens
            assert np.isin(made, np.concatenate([symbols.keys, symbols.values])).all()
