"""Multi-query associative recall: a history of nothing but pairs, some of whose keys are asked for.

After Arora et al. 2023 (Zoology, arXiv:2312.04927). Every block of the history holds as many pairs
as every other, so none is salient: only the question tells which to look at. What was asked stands
before the horizon, where LensNet may look, and the horizon repeats it with the answers.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megacontext.data.documents import is_held_out
from megacontext.data.recall import choose
from megacontext.data.source import Batch, Ints
from megacontext.data.tokenizer import Tokenizer

_WORD = re.compile(r" [a-z]{3,}")


@dataclass(frozen=True)
class Symbols:
    """The tokens that a sequence is made of; no two are alike.

    Attributes:
        keys: Tokens that are keys, int64 ``[keys]``.
        values: Tokens that are values, int64 ``[values]``.
    """

    keys: Ints
    values: Ints


@dataclass(frozen=True)
class MQARSource:
    """How sequences are made.

    Attributes:
        training: What training sequences are made of.
        held_out: What held-out sequences are made of: the same, or what training never sees.
        vocab_size: All tokens are below it.
        block_size: Tokens of a block; a pair does not straddle two.
        recent_tokens: Length of the protected tail, which holds no pair but those that are asked
            for.
        horizon_tokens: Length of the horizon, at the end; what the answers leave of it is filled up
            with values.
        questions: Keys that are asked for, each of a block of its own; the answer takes two tokens.
        tokenizer: By what tokens are words; None where they stand for no text.

    Raises:
        ValueError: The tail has no room for questions and answers; says what it needs.
    """

    training: Symbols
    held_out: Symbols
    vocab_size: int
    block_size: int
    recent_tokens: int
    horizon_tokens: int
    questions: int = 3
    tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        answers = 2 * self.questions
        if self.horizon_tokens < answers or self.recent_tokens < self.horizon_tokens + answers:
            raise ValueError(
                f"{self.questions} questions of mqar need horizon_tokens of at least {answers}, "
                f"and recent_tokens of {answers} more than that, not {self.horizon_tokens} and "
                f"{self.recent_tokens}"
            )

    @property
    def description(self) -> dict[str, Any]:
        """The sizes, by name."""
        return {
            "keys": len(self.training.keys),
            "values": len(self.training.values),
            "questions": self.questions,
        }

    def batch(self, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        """Draw random sequences to train on."""
        return self._draw(self.training, rng, batch_size, length)

    def lm_batch(self, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        """Draw random sequences to train on."""
        return self.batch(rng, batch_size, length)

    def held_out_batch(self, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        """Draw random sequences of what training never sees, or of pairs that it never saw."""
        return self._draw(self.held_out, rng, batch_size, length)

    def unigram_entropy(self) -> float:
        """Return the entropy of a value, which is any of them; nats."""
        return math.log(len(self.held_out.values))

    def _draw(
        self, symbols: Symbols, rng: np.random.Generator, batch_size: int, length: int
    ) -> Batch:
        k = self.block_size
        blocks = (length - self.recent_tokens) // k
        pairs = blocks * (k // 2)
        if blocks < self.questions or pairs > len(symbols.keys):
            raise ValueError(
                f"sequences of {length} tokens have {blocks} blocks with {pairs} pairs before the "
                f"protected tail: {self.questions} questions need as many blocks, and there are "
                f"{len(symbols.keys)} keys; make them of another length"
            )
        rows = np.arange(batch_size)[:, None]
        tokens = rng.choice(symbols.values, size=(batch_size, length))
        keys = symbols.keys[choose(rng, batch_size, len(symbols.keys), pairs)]
        values = rng.choice(symbols.values, size=keys.shape)
        history = tokens[:, : blocks * k].reshape(batch_size, blocks, k)
        history[:, :, 0 : k - 1 : 2] = keys.reshape(batch_size, blocks, -1)
        history[:, :, 1:k:2] = values.reshape(batch_size, blocks, -1)

        asked = choose(rng, batch_size, blocks, self.questions)
        which = asked * (k // 2) + rng.integers(0, k // 2, size=asked.shape)
        answers = length - self.horizon_tokens + 2 * np.arange(self.questions)
        questions = length - self.horizon_tokens - self.questions + np.arange(self.questions)
        tokens[rows, questions] = tokens[rows, answers] = keys[rows, which]
        tokens[rows, answers + 1] = values[rows, which]
        labelled = np.zeros(tokens.shape, dtype=np.bool_)
        labelled[:, answers + 1] = True
        return Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(labelled),
            fact_blocks=np.broadcast_to(np.arange(blocks), (batch_size, blocks)),
            asked_blocks=asked,
            question_tokens=self.questions,
        )


def number_symbols(vocab_size: int) -> Symbols:
    """Make symbols of plain numbers: the lower half are keys, the upper half values."""
    keys, values = np.split(np.arange(vocab_size // 2 * 2), 2)
    return Symbols(keys, values)


def word_symbols(tokenizer: Tokenizer) -> tuple[Symbols, Symbols]:
    """Make symbols of words that are single tokens: those of training, and those held out.

    Args:
        tokenizer: Whose tokens.

    Returns:
        Both; no token is in two of the four lists.
    """
    words: dict[bool, list[int]] = {False: [], True: []}
    for token in range(tokenizer.vocab_size):
        text = tokenizer.text(np.array([token]))
        if _WORD.fullmatch(text):
            words[is_held_out(text)].append(token)
    training, held_out = (
        Symbols(*(np.array(part, dtype=np.int64) for part in (found[::2], found[1::2])))
        for found in words.values()
    )
    return training, held_out
