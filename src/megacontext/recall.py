"""A synthetic data set that only far memory can solve: facts long ago, asked for at the end.

A sequence is random filler with facts ``key value`` strewn over its older part; then some of the
keys are named (the question), and the sequence ends with the same keys, each followed by its value.
Only the values are labelled. Every symbol can be a value or filler, so nothing but the fact itself
tells a key's value; and what was asked stands before the horizon, where LensNet may look.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class RecallTask:
    """How sequences are made. Tokens 0 to keys - 1 are keys, the next ones symbols.

    Attributes:
        keys, symbols: how many there are.
        facts: per sequence, each of another key, in blocks of their own.
        questions: keys that are asked for; the answer takes two tokens each.
        block_size: tokens of a block; a fact does not straddle two.
    """

    keys: int = 16
    symbols: int = 32
    facts: int = 8
    questions: int = 3
    block_size: int = 8

    @property
    def vocab_size(self) -> int:
        """Keys and symbols."""
        return self.keys + self.symbols

    @property
    def horizon_tokens(self) -> int:
        """The answers, at the end of every sequence."""
        return 2 * self.questions

    def batch(
        self, rng: np.random.Generator, batch_size: int, length: int, old_tokens: int
    ) -> "RecallBatch":
        """Random sequences.

        Args:
            length: tokens of each.
            old_tokens: facts stand in the whole blocks among the first so many tokens.
        """
        tokens = rng.integers(self.keys, self.vocab_size, size=(batch_size, length))
        rows = np.arange(batch_size)[:, None]
        blocks = _choose(rng, batch_size, old_tokens // self.block_size, self.facts)
        keys = _choose(rng, batch_size, self.keys, self.facts)
        values = rng.integers(self.keys, self.vocab_size, size=keys.shape)
        at = blocks * self.block_size + rng.integers(0, self.block_size - 1, size=keys.shape)
        tokens[rows, at], tokens[rows, at + 1] = keys, values

        rounds = -(-self.questions // self.facts)
        orders = [_choose(rng, batch_size, self.facts, self.facts) for _ in range(rounds)]
        asked = np.concatenate(orders, axis=1)[:, : self.questions]
        answers = length - self.horizon_tokens + 2 * np.arange(self.questions)
        questions = length - self.horizon_tokens - self.questions + np.arange(self.questions)
        tokens[rows, questions] = tokens[rows, answers] = keys[rows, asked]
        tokens[rows, answers + 1] = values[rows, asked]
        labelled = np.zeros(tokens.shape, dtype=np.bool_)
        labelled[:, answers + 1] = True
        return RecallBatch(
            torch.from_numpy(tokens), torch.from_numpy(labelled), blocks, blocks[rows, asked]
        )


@dataclass(frozen=True)
class RecallBatch:
    """Sequences and where their facts are.

    Attributes:
        tokens: int64 ``[B, N]``.
        labelled: the values that are asked for, bool ``[B, N]``.
        fact_blocks: the blocks that hold facts, int64 ``[B, facts]``.
        asked_blocks: those of the facts that are asked for, int64 ``[B, questions]``.
    """

    tokens: Tensor
    labelled: Tensor
    fact_blocks: Ints
    asked_blocks: Ints


def _choose(rng: np.random.Generator, rows: int, among: int, number: int) -> Ints:
    """For each row, different numbers below ``among``, int64 ``[rows, number]``."""
    order: Ints = rng.random((rows, among)).argsort(axis=1)
    return order[:, :number]
