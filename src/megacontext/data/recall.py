"""A synthetic data set that only far memory can solve: facts long ago, asked for at the end.

A sequence is random filler with facts ``key value`` strewn over its older part; then some of the
keys are named (the question), and the sequence ends with the same keys, each followed by its value.
Only the values are labelled. Every symbol can be a value or filler, so nothing but the fact itself
tells a key's value; and what was asked stands before the horizon, where LensNet may look.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from megacontext.data.source import Batch, Ints


@dataclass(frozen=True)
class RecallSource:
    """How sequences are made. Tokens 0 to keys - 1 are keys, the next ones symbols.

    Attributes:
        keys: How many keys there are.
        symbols: How many symbols there are.
        facts: Facts of a sequence, each of another key, in blocks of their own.
        questions: Keys that are asked for; the answer takes two tokens each.
        block_size: Tokens of a block; a fact does not straddle two.
        label_all: Let every token count in losses, not the answers alone; for an ablation.
    """

    keys: int = 16
    symbols: int = 32
    facts: int = 8
    questions: int = 3
    block_size: int = 8
    label_all: bool = False
    tokenizer: ClassVar[None] = None  # tokens stand for no text

    @property
    def vocab_size(self) -> int:
        """Number of keys and symbols."""
        return self.keys + self.symbols

    @property
    def horizon_tokens(self) -> int:
        """Tokens of the answers, at the end of every sequence."""
        return 2 * self.questions

    @property
    def description(self) -> dict[str, Any]:
        """The sizes, by name."""
        return asdict(self)

    def batch(self, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        """Draw random sequences.

        Args:
            rng: Draws them.
            batch_size: How many.
            length: Tokens of each.

        Returns:
            The sequences, and where their facts are.

        Raises:
            ValueError: A sequence of ``length`` tokens has no room for facts and questions.
        """
        asked = 3 * self.questions
        blocks = min(length * 5 // 8, length - asked) // self.block_size  # the older part
        if blocks < self.facts:
            raise ValueError(
                f"sequences of {length} tokens have no room for {self.facts} facts in blocks of "
                f"{self.block_size} and {self.questions} questions; make them longer"
            )
        tokens = rng.integers(self.keys, self.vocab_size, size=(batch_size, length))
        rows = np.arange(batch_size)[:, None]
        fact_blocks = choose(rng, batch_size, blocks, self.facts)
        keys = choose(rng, batch_size, self.keys, self.facts)
        values = rng.integers(self.keys, self.vocab_size, size=keys.shape)
        at = fact_blocks * self.block_size + rng.integers(0, self.block_size - 1, size=keys.shape)
        tokens[rows, at], tokens[rows, at + 1] = keys, values

        rounds = -(-self.questions // self.facts)
        orders = [choose(rng, batch_size, self.facts, self.facts) for _ in range(rounds)]
        which = np.concatenate(orders, axis=1)[:, : self.questions]
        answers = length - self.horizon_tokens + 2 * np.arange(self.questions)
        questions = length - asked + np.arange(self.questions)
        tokens[rows, questions] = tokens[rows, answers] = keys[rows, which]
        tokens[rows, answers + 1] = values[rows, which]
        labelled = np.zeros(tokens.shape, dtype=np.bool_)
        labelled[:, answers + 1] = True
        return Batch(
            torch.from_numpy(tokens),
            None if self.label_all else torch.from_numpy(labelled),
            fact_blocks,
            fact_blocks[rows, which],
            question_tokens=self.questions,
        )

    def lm_batch(self, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        """Draw short sequences with many questions: retrieval is learned from them soonest."""
        for_facts = (self.facts + 1) * self.block_size
        questions = max(min(3 * self.facts, (length - for_facts) // 3), 1)
        many = replace(self, questions=questions)
        return many.batch(rng, batch_size, min(length, for_facts + 3 * questions))

    def held_out_batch(self, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        """Draw random sequences, of which no two are ever the same."""
        return self.batch(rng, batch_size, length)

    def unigram_entropy(self) -> float:
        """Return the entropy of a value, which is any symbol; nats."""
        return math.log(self.symbols)


def choose(rng: np.random.Generator, rows: int, among: int, number: int) -> Ints:
    """Choose for each row different numbers below ``among``, int64 ``[rows, number]``."""
    order: Ints = rng.random((rows, among)).argsort(axis=1)
    return order[:, :number]
