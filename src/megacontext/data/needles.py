"""Needles in prose: facts strewn over real text, some of them asked for at its end.

A sequence is a window of prose. Each fact stands in a block of its own; the question ends where the
horizon begins, which is where the answer begins. The answer alone is labelled; what it leaves of
the horizon is prose. What is held out has other prose, names, words as values and wordings than
training; numbers are any, drawn anew each time.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from megacontext.data.documents import Documents, joined
from megacontext.data.needle_facts import HELD_OUT, KINDS, OF_GROUP, TRAINING, Needles, Wording
from megacontext.data.source import Batch, Ints, encoded
from megacontext.data.tokenizer import Tokenizer
from megacontext.model.tokens import Ids

_ENTROPY_SEQUENCES = 256
_SIZED = 128  # sequences of each wording, of which the longest needles must fit
_SHORTEST = 80  # characters of a paragraph of prose


@dataclass(frozen=True)
class NeedleSource:
    """How sequences are made.

    Attributes:
        prose: What needles are hidden in.
        block_size: Tokens of a block; a fact does not straddle two.
        recent_tokens: Length of the protected tail, which holds no fact.
        horizon_tokens: Length of the horizon, at the end.

    Raises:
        ValueError: Some needles do not fit, whichever are drawn first; says what the longest take.
    """

    prose: Documents
    block_size: int
    recent_tokens: int
    horizon_tokens: int

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        drawn = [_needles(words, rng) for words in (TRAINING, HELD_OUT) for _ in range(_SIZED)]
        facts = [self._fact(fact) for needles in drawn for fact in needles.facts]
        self._check_fact(max(facts, key=len))
        self._check_question(max((self._question(needles) for needles in drawn), key=len))
        answers = [np.concatenate(self._answer(needles)) for needles in drawn]
        self._check_answer(max(answers, key=len))

    @property
    def tokenizer(self) -> Tokenizer:
        """What made tokens of the prose, and makes those of facts."""
        return self.prose.tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of tokens: all are below it."""
        return self.tokenizer.vocab_size

    @property
    def description(self) -> dict[str, Any]:
        """Fingerprint and sizes of the prose, by name."""
        return self.prose.description

    def batch(self, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        """Draw sequences to train on."""
        return self._draw(self._training, TRAINING, rng, batch_size, length)

    def lm_batch(self, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        """Draw sequences to train on."""
        return self.batch(rng, batch_size, length)

    def held_out_batch(self, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        """Draw sequences of prose, names, words and wordings that training never sees."""
        return self._draw(self._held_out, HELD_OUT, rng, batch_size, length)

    def unigram_entropy(self) -> float:
        """Return the entropy of a token of an answer, nats."""
        rng = np.random.default_rng(0)
        answers = [
            token
            for _ in range(_ENTROPY_SEQUENCES)
            for token in np.concatenate(self._answer(_needles(HELD_OUT, rng))[::2])
        ]
        counts = np.bincount(answers)
        probabilities = counts[counts > 0] / len(answers)
        return float(-(probabilities * np.log(probabilities)).sum())

    @cached_property
    def _training(self) -> Ids:
        """The prose to train on, joined once and not for every batch, ``[tokens]``."""
        return joined(self.prose.training, self.vocab_size)

    @cached_property
    def _held_out(self) -> Ids:
        """The prose that is held out, likewise."""
        return joined(self.prose.held_out, self.vocab_size)

    def _draw(
        self,
        text: Ids,
        words: Wording,
        rng: np.random.Generator,
        batch_size: int,
        length: int,
    ) -> Batch:
        if not len(text):
            raise ValueError("there is no prose to hide needles in; give other files by --text")
        starts = rng.integers(0, len(text), size=batch_size)
        tokens = text.take(starts[:, None] + np.arange(length), mode="wrap").astype(np.int64)
        labelled = np.zeros(tokens.shape, dtype=np.bool_)
        places = []
        for row, labels in zip(tokens, labelled, strict=True):
            places.append(self._hide(_needles(words, rng), row, labels, rng))
        facts, asked = (np.stack(blocks) for blocks in zip(*places, strict=True))
        return Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(labelled),
            fact_blocks=facts,
            asked_blocks=asked,
        )

    def _hide(
        self, needles: Needles, row: Ints, labels: Ints, rng: np.random.Generator
    ) -> tuple[Ints, Ints]:
        """Write all over a sequence; return the blocks of facts, and those that are asked for."""
        k, horizon = self.block_size, len(row) - self.horizon_tokens
        blocks = max(len(row) - self.recent_tokens, 0) // k
        if blocks < len(needles.facts):
            raise ValueError(
                f"sequences of {len(row)} tokens have {blocks} blocks before the protected tail, "
                f"and needles take {len(needles.facts)}: make them longer, or blocks shorter"
            )
        of_facts = rng.permutation(blocks)[: len(needles.facts)]
        of_facts[needles.asked] = np.sort(of_facts[needles.asked])  # the order of the answer
        for block, fact in zip(of_facts, needles.facts, strict=True):
            text = self._fact(fact)
            self._check_fact(text)
            at = block * k + rng.integers(0, k - len(text), endpoint=True)
            row[at : at + len(text)] = text
        question = self._question(needles)
        self._check_question(question)
        row[horizon - len(question) : horizon] = question
        answer = self._answer(needles)
        self._check_answer(np.concatenate(answer))
        at = horizon
        for number, piece in enumerate(answer):  # the odd ones stand between what is asked for
            row[at : at + len(piece)] = piece
            labels[at : at + len(piece)] = number % 2 == 0
            at += len(piece)
        asked = np.full(OF_GROUP, -1)
        asked[: len(needles.asked)] = of_facts[needles.asked]
        return of_facts, asked

    def _fact(self, fact: str) -> Ids:
        return self._tokens(f"\n{fact}\n")

    def _question(self, needles: Needles) -> Ids:
        return self._tokens(f"\n\n{needles.question}")

    def _answer(self, needles: Needles) -> list[Ids]:
        """Return the tokens of what is asked for, and of what stands between, in turn."""
        pieces = [p for answer in needles.answers for p in (f" {answer}", ",")]
        return [self._tokens(piece) for piece in [*pieces[:-1], ".\n"]]

    def _tokens(self, text: str) -> Ids:
        return encoded(text.encode(), self.tokenizer)

    def _check_fact(self, text: Ids) -> None:
        self._check_fits("a fact", text, self.block_size, "block_size")

    def _check_question(self, text: Ids) -> None:
        tail = self.recent_tokens - self.horizon_tokens
        self._check_fits("a question", text, tail, "recent_tokens less horizon_tokens")

    def _check_answer(self, text: Ids) -> None:
        self._check_fits("an answer", text, self.horizon_tokens, "horizon_tokens")

    def _check_fits(self, what: str, text: Ids, room: int, name: str) -> None:
        if len(text) > room:
            raise ValueError(
                f"{what} of needles takes {len(text)} {self.tokenizer.unit}, and there is room for "
                f"{room}: {name} must be at least that"
            )


def _needles(words: Wording, rng: np.random.Generator) -> Needles:
    return KINDS[rng.integers(len(KINDS))](words, rng)


def reference_manual() -> Iterator[tuple[str, bytes]]:
    """Yield the prose of Python's reference manual, which is part of every Python.

    Yields:
        Paragraphs, each after itself as its name: no code, no grammar, none twice.
    """
    from pydoc_data.topics import topics  # half a megabyte, only where it is asked for

    texts = (text for _, text in sorted(topics.items()))
    paragraphs = dict.fromkeys(p for text in texts for p in re.split(r"\n\s*\n", text))
    for paragraph in filter(_is_prose, paragraphs):
        yield paragraph, f"{paragraph}\n\n".encode()


def _is_prose(paragraph: str) -> bool:
    plain = sum(c.isalpha() or c.isspace() for c in paragraph)
    return (
        len(paragraph) >= _SHORTEST
        and paragraph[0].isalpha()
        and plain >= 0.85 * len(paragraph)
        and "::=" not in paragraph
        and "***" not in paragraph
    )
