"""Needles: facts in prose, whose answers stand where and only where they are said to."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.data.documents import is_held_out, joined, split_documents
from megacontext.data.needle_facts import (
    HELD_OUT,
    KINDS,
    TRAINING,
    Needles,
    Wording,
    variable_tracking,
)
from megacontext.data.needles import NeedleSource, reference_manual
from megacontext.data.source import Batch
from megacontext.data.tokenizer import ByteTokenizer

K, TAIL, HORIZON = 64, 192, 32
PROSE = split_documents(reference_manual(), ByteTokenizer())
SOURCE = NeedleSource(PROSE, block_size=K, recent_tokens=TAIL, horizon_tokens=HORIZON)


def batch(seed: int, length: int = 1_300, held_out: bool = True) -> Batch:
    make = SOURCE.held_out_batch if held_out else SOURCE.batch
    return make(np.random.default_rng(seed), 4, length)


def answers(made: Batch, row: int) -> list[str]:
    """What is asked for: the labelled stretches."""
    assert made.labelled is not None
    labels = made.labelled[row].tolist()
    text = "".join(
        chr(token) if label else "|"
        for token, label in zip(made.tokens[row].tolist(), labels, strict=True)
    )
    return [piece.strip() for piece in text.split("|") if piece]


class TestSequences:
    @given(st.integers(0, 10**6), st.booleans(), st.integers(1_000, 1_600))
    @settings(max_examples=30)
    def test_answers_stand_in_the_asked_blocks_and_no_other(
        self, seed: int, held_out: bool, length: int
    ) -> None:
        """Each in its own, in their order; none in the rest of history or in the visible tail."""
        made = batch(seed, length, held_out)
        assert made.tokens.shape == (4, length)
        assert made.asked_blocks is not None
        for row, tokens in enumerate(made.tokens.tolist()):
            text = bytes(tokens).decode("latin-1")
            asked = [block for block in made.asked_blocks[row] if block >= 0]
            said = answers(made, row)
            assert len(asked) == len(said) in (1, 3)
            blocks = [text[at : at + K] for at in range(0, (length - TAIL) // K * K, K)]
            for block, answer in zip(asked, said, strict=True):
                assert f" {answer}" in blocks[block]
            seen = text[-TAIL:-HORIZON]
            others = [block for number, block in enumerate(blocks) if number not in asked]
            for answer in filter(str.isdigit, said):  # words may stand in the prose, too
                assert not any(f" {answer}." in block for block in [*others, seen])

    @given(st.integers(0, 10**6))
    @settings(max_examples=10)
    def test_facts_stand_in_blocks_of_their_own(self, seed: int) -> None:
        """Twelve, all before the tail; those that are asked for among them."""
        made = batch(seed)
        assert made.fact_blocks is not None
        assert made.asked_blocks is not None
        for facts, asked in zip(made.fact_blocks, made.asked_blocks, strict=True):
            assert len(set(facts)) == 12
            assert max(facts) < (1_300 - TAIL) // K
            assert set(asked) - {-1} <= set(facts)
            assert sorted(asked[asked >= 0]) == asked[asked >= 0].tolist()

    def test_only_the_answer_is_labelled_and_the_question_ends_at_the_horizon(self) -> None:
        """So what LensNet may look at ends with what is asked."""
        made = batch(0)
        assert made.labelled is not None
        assert not made.labelled[:, :-HORIZON].any()
        assert made.labelled[:, -HORIZON].all()
        for row in made.tokens.tolist():
            before = bytes(row[:-HORIZON]).decode(errors="replace")
            question = before[before.rindex("\n") + 1 :]
            assert any(word in question for word in HELD_OUT.names.split()) or "VAR" in question

    def test_seeds_reproduce(self) -> None:
        """And others make others."""
        assert batch(1).tokens.equal(batch(1).tokens)
        assert not batch(1).tokens.equal(batch(2).tokens)

    def test_unigram_entropy_is_of_answers(self) -> None:
        """Letters and digits: between those of few and of all."""
        assert 2 < SOURCE.unigram_entropy() < 5
        assert SOURCE.unigram_entropy() == SOURCE.unigram_entropy()


class TestHeldOut:
    def test_words_are_held_out(self) -> None:
        """Names, values, letters of variables and wordings of one part are in no other."""

        def words(of: Wording) -> set[str]:
            values = " ".join(attribute.values for attribute in of.attributes)
            return {*of.names.split(), *values.split(), *of.letters}

        def wordings(of: Wording) -> set[str]:
            attributes = (*of.attributes, of.several)
            texts = [text for a in attributes for text in (a.statement, a.question)]
            return {*texts, of.variable, of.variables}

        assert not words(TRAINING) & words(HELD_OUT)
        assert not wordings(TRAINING) & wordings(HELD_OUT)

    def test_sequences_are_made_of_them(self) -> None:
        """No held-out name stands in a training sequence, nor the reverse."""
        text = {
            held_out: b"".join(
                bytes(row) for s in range(6) for row in batch(s, held_out=held_out).tokens.tolist()
            ).decode(errors="replace")
            for held_out in (True, False)
        }
        names = {True: HELD_OUT.names.split(), False: TRAINING.names.split()}
        for part in (True, False):
            assert any(f" {name} " in text[part] for name in names[part])
            assert not any(f" {name} " in text[part] for name in names[not part])

    def test_prose_is_held_out(self) -> None:
        """Paragraph by paragraph; there is enough of both parts."""
        training, held_out = (
            joined(part, 256).tobytes() for part in (PROSE.training, PROSE.held_out)
        )
        assert len(training) > 80_000
        assert len(held_out) > 15_000
        for paragraph, _ in reference_manual():
            assert (paragraph.encode() in held_out) >= is_held_out(paragraph)


class TestFacts:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("words", [TRAINING, HELD_OUT], ids=["training", "held out"])
    def test_a_question_has_one_answer(self, kind: object, words: Wording) -> None:
        """All facts differ; each answer stands in its own, and no other fact ends with it."""
        for seed in range(20):
            needles: Needles = kind(words, np.random.default_rng(seed))  # type: ignore[operator]
            assert len(set(needles.facts)) == len(needles.facts) == 12
            for number, answer in zip(needles.asked, needles.answers, strict=True):
                assert answer in needles.facts[number]
            others = [fact for i, fact in enumerate(needles.facts) if i not in needles.asked]
            assert all(
                f" {answer}." not in fact
                for fact in others
                for answer in needles.answers
                if answer.isdigit()
            )

    def test_variables_hold_each_others_value(self) -> None:
        """The first of a chain a number, each next one the one before."""
        needles = variable_tracking(HELD_OUT, np.random.default_rng(0))
        first, second, third = needles.answers
        number = needles.question.split("value ")[1].split(",")[0]
        assert needles.facts[:3] == [
            f"VAR {first} = {number}.",
            f"VAR {second} = {first}.",
            f"VAR {third} = {second}.",
        ]


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "length", "message"),
        [
            (
                {"block_size": 16},
                1_300,
                r"a fact of needles takes \d+ bytes, and there is room for 16: block_size must be "
                "at least that",
            ),
            (
                {"recent_tokens": 40},
                1_300,
                r"a question of needles takes \d+ bytes, and there is room for 8: recent_tokens "
                "less horizon_tokens must be at least that",
            ),
            (
                {"horizon_tokens": 2},
                1_300,
                r"an answer of needles takes \d+ bytes, and there is room for 2: horizon_tokens "
                "must be at least that",
            ),
            (
                {},
                500,
                "sequences of 500 tokens have 4 blocks before the protected tail, and needles take "
                "12: make them longer, or blocks shorter",
            ),
        ],
    )
    def test_what_does_not_fit(self, changes: dict[str, int], length: int, message: str) -> None:
        """Says what does, and which size decides."""
        with pytest.raises(ValueError, match=f"^{message}$"):
            source = dataclasses.replace(SOURCE, **changes)  # type: ignore[arg-type]
            source.batch(np.random.default_rng(0), 1, length)

    @pytest.mark.parametrize("name", ["block_size", "recent_tokens", "horizon_tokens"])
    def test_a_size_that_is_refused_says_one_that_lasts(self, name: str) -> None:
        """Not one that holds the needles drawn first: no run ends in its midst by later ones."""
        with pytest.raises(ValueError) as refused:
            dataclasses.replace(SOURCE, **{name: 1})  # type: ignore[arg-type]
        least = int(re.findall(r"takes (\d+) bytes", str(refused.value))[0])
        least += SOURCE.horizon_tokens if name == "recent_tokens" else 0
        source = dataclasses.replace(SOURCE, **{name: least})  # type: ignore[arg-type]
        for seed in range(8):
            source.batch(np.random.default_rng(seed), 32, 1_300)
            source.held_out_batch(np.random.default_rng(seed), 32, 1_300)
