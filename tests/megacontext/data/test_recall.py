"""Recall: facts far back, asked for at the end; nothing else tells a value."""

import math

import numpy as np
import pytest

from megacontext.data.recall import RecallSource
from megacontext.data.source import Batch


def batch(source: RecallSource, length: int = 256, seed: int = 0) -> Batch:
    return source.batch(np.random.default_rng(seed), 16, length)


class TestBatch:
    def test_the_answers_are_the_facts_values(self) -> None:
        """Key by key: asked for before the horizon, answered in it, told far before."""
        source = RecallSource()
        made = batch(source)
        for row, blocks in zip(made.tokens.tolist(), made.asked_blocks, strict=True):
            questions, answers = row[-9:-6], row[-6:]
            assert answers[0::2] == questions
            assert len(set(questions)) == 3
            for block, key, value in zip(blocks, questions, answers[1::2], strict=True):
                told = row[block * 8 : block * 8 + 8]
                assert told[told.index(key) + 1] == value

    def test_only_values_are_labelled(self) -> None:
        """The last token and every second one before it."""
        made = batch(RecallSource())
        assert made.labelled is not None
        assert made.labelled.nonzero()[:3].tolist() == [[0, 251], [0, 253], [0, 255]]
        assert made.labelled.sum() == 16 * 3

    def test_every_key_is_told_once_and_in_a_block_of_its_own(self) -> None:
        """So a key's value is not to be had elsewhere, and every block tells one fact."""
        made = batch(RecallSource())
        for row, blocks in zip(made.tokens.tolist(), made.fact_blocks, strict=True):
            keys = [token for token in row[:-9] if token < 16]
            assert len(keys) == len(set(keys)) == 8
            assert len(set(blocks)) == 8
            assert max(blocks) < 20

    def test_values_cannot_be_guessed(self) -> None:
        """They are as frequent as any symbol, also in the filler."""
        made = [batch(RecallSource(), seed=s).tokens for s in range(60)]
        values = np.concatenate([tokens[:, -5::2].flatten() for tokens in made])
        counts = np.bincount(values, minlength=48)[16:]
        assert counts.min() > 0.6 * counts.mean()
        assert counts.max() < 1.5 * counts.mean()
        assert RecallSource().unigram_entropy() == math.log(32)

    def test_too_short_a_sequence_is_refused(self) -> None:
        """Before anything is made."""
        with pytest.raises(ValueError) as raised:
            batch(RecallSource(), length=72)
        assert str(raised.value) == (
            "sequences of 72 tokens have no room for 8 facts in blocks of 8 and 3 questions; "
            "make them longer"
        )

    def test_the_language_model_alone_is_asked_often(self) -> None:
        """More questions than facts: every fact three times."""
        made = RecallSource().lm_batch(np.random.default_rng(0), 4, 256)
        assert made.tokens.shape == (4, 144)
        assert made.labelled is not None
        assert made.labelled.sum() == 4 * 24
