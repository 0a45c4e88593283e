"""Sequences of several sources, each drawn from one of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megacontext.data.source import Batch, Ints, Source
from megacontext.data.tokenizer import Tokenizer
from megacontext.data.windows import WindowSource

_Draw = Callable[[Source, np.random.Generator, int, int], Batch]


@dataclass(frozen=True)
class MixedSource:
    """Sequences of several sources.

    Attributes:
        sources: By name; all with the same tokens.
        shares: How often each is drawn from, likewise; they sum to 1.
    """

    sources: dict[str, Source]
    shares: dict[str, float]

    @property
    def tokenizer(self) -> Tokenizer | None:
        """What text became tokens by."""
        return next(iter(self.sources.values())).tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of tokens: all are below it."""
        return max(source.vocab_size for source in self.sources.values())

    @property
    def description(self) -> dict[str, Any]:
        """What each source says, by its name; ``sha256`` is that of the first that reads files."""
        each = {name: source.description for name, source in self.sources.items()}
        digests = [said["sha256"] for said in each.values() if "sha256" in said]
        return {**({"sha256": digests[0]} if digests else {}), "shares": self.shares, **each}

    def batch(self, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        """Draw sequences to train on."""
        return self._draw(lambda s, *how: s.batch(*how), rng, batch_size, length)

    def lm_batch(self, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        """Draw sequences to train on."""
        return self._draw(lambda s, *how: s.lm_batch(*how), rng, batch_size, length)

    def held_out_batch(self, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        """Draw sequences that training never sees."""
        return self._draw(lambda s, *how: s.held_out_batch(*how), rng, batch_size, length)

    def unigram_entropy(self) -> float:
        """Return the entropy of a label without its context, nats, as the sources mix."""
        return sum(self.shares[name] * s.unigram_entropy() for name, s in self.sources.items())

    def _draw(self, draw: _Draw, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        names = list(self.sources)
        drawn = rng.choice(len(names), size=batch_size, p=[self.shares[n] for n in names])
        parts = [
            (number, draw(self.sources[name], rng, int(count), length))
            for number, name in enumerate(names)
            if (count := (drawn == number).sum())
        ]
        order = np.argsort(drawn, kind="stable").argsort()  # parts come one after another
        return _joined([batch for _, batch in parts], order)


def token_counts(source: Source) -> Ints | None:
    """Count the tokens of the files that a source trains on, ``[vocab_size]``; None without any."""
    if isinstance(source, MixedSource):
        counts = (token_counts(part) for part in source.sources.values())
        return next((of_one for of_one in counts if of_one is not None), None)
    return source.token_counts() if isinstance(source, WindowSource) else None


def _joined(parts: Sequence[Batch], order: Ints) -> Batch:
    """Join batches of sequences that are as long, and put the sequences in an order."""
    tokens = torch.cat([part.tokens for part in parts])
    labelled = torch.cat(
        [
            torch.ones_like(p.tokens, dtype=torch.bool) if p.labelled is None else p.labelled
            for p in parts
        ]
    )
    asked = [_or_none(part.asked_blocks, part) for part in parts]
    width = max(blocks.shape[1] for blocks in asked)
    blocks = np.concatenate(
        [np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=-1) for a in asked]
    )
    files = np.concatenate(
        [np.full(len(p.tokens), -1) if p.files is None else p.files for p in parts]
    )
    index = torch.from_numpy(order)
    return Batch(
        tokens[index],
        labelled[index],
        asked_blocks=blocks[order] if width else None,
        files=files[order] if (files >= 0).any() else None,
    )


def _or_none(asked: Ints | None, part: Batch) -> Ints:
    """Return the blocks that are asked for, none of them where nothing is, ``[B, asked]``."""
    return np.full((len(part.tokens), 0), -1) if asked is None else asked
