"""Windows of files: any ones, or those that use again, at their end, what stands far back.

A window lies within one file, and no text is both trained on and held out: of ten files or more, no
file is; of fewer, the end of each is held out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megacontext.data.documents import Documents, joined
from megacontext.data.source import Batch, Ints
from megacontext.data.tokenizer import Tokenizer
from megacontext.model.tokens import Ids

TRIES = 24  # windows of a file, of which one is taken for its re-use
_RARE = 10.0  # a token is rare that is less frequent than so many times the mean over all


@dataclass(frozen=True)
class WindowSource:
    """Windows of files, each from a file that is drawn first: all files count alike.

    Attributes:
        documents: The files.
        recent_tokens: Length of the protected tail; what stands before it is far back.
        horizon_tokens: Length of the horizon, at the end of a window.
        tries: Windows of the file that are drawn; the one is taken whose horizon uses most rare
            tokens that stand in the history and not in the tail. It is chosen without a model.
    """

    documents: Documents
    recent_tokens: int
    horizon_tokens: int
    tries: int = 1

    @property
    def tokenizer(self) -> Tokenizer:
        """What made tokens of the files."""
        return self.documents.tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of tokens: all are below it."""
        return self.tokenizer.vocab_size

    @property
    def description(self) -> dict[str, Any]:
        """Fingerprint and sizes, by name."""
        return self.documents.description | {"tries": self.tries}

    def batch(self, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        """Draw windows of files to train on."""
        return self._draw(self.documents.training, rng, batch_size, length)

    def lm_batch(self, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        """Draw windows of files to train on."""
        return self.batch(rng, batch_size, length)

    def held_out_batch(self, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        """Draw windows of files that are never trained on."""
        return self._draw(self.documents.held_out, rng, batch_size, length)

    def unigram_entropy(self) -> float:
        """Return the entropy of a held-out token, nats: the loss of a model without context."""
        counts = np.bincount(joined(self.documents.held_out, self.vocab_size))
        probabilities = counts[counts > 0] / counts.sum()
        return float(-(probabilities * np.log(probabilities)).sum())

    def _draw(
        self, files: Sequence[Ids], rng: np.random.Generator, batch_size: int, length: int
    ) -> Batch:
        long_enough = [number for number, file in enumerate(files) if len(file) >= length]
        if not long_enough:
            longest = max(map(len, files), default=0)
            raise ValueError(
                f"too little text: the longest of {len(files)} files of one part has {longest} "
                f"{self.tokenizer.unit}, and one sequence needs {length}; give longer files, or "
                "more of them, or shorten --sequence-tokens"
            )
        drawn = rng.choice(long_enough, size=batch_size)
        tokens = np.stack([self._window(files[number], rng, length) for number in drawn])
        return Batch(torch.from_numpy(tokens), labelled=None, files=drawn)

    def _window(self, file: Ids, rng: np.random.Generator, length: int) -> Ints:
        """Draw the window of a file, int64 ``[length]``."""
        starts = rng.integers(0, len(file) - length, size=self.tries, endpoint=True)
        windows = file[starts[:, None] + np.arange(length)].astype(np.int64)
        if self.tries == 1:
            best = 0
        else:
            tail, horizon = length - self.recent_tokens, length - self.horizon_tokens
            best = int(self._reuse(windows, tail, horizon).argmax())
        window: Ints = windows[best]
        return window

    def _reuse(self, windows: Ints, tail: int, horizon: int) -> NDArray[np.float64]:
        """Sum the weights of what the horizon uses again from before the tail, ``[windows]``."""
        held = np.zeros((3, len(windows), self.vocab_size), dtype=np.bool_)
        parts = (windows[:, :tail], windows[:, tail:horizon], windows[:, horizon:])
        for of_part, tokens in zip(held, parts, strict=True):
            np.put_along_axis(of_part, tokens, True, axis=1)
        again = held[0] & ~held[1] & held[2]
        used: NDArray[np.float64] = again @ self._rarity
        return used

    def token_counts(self) -> Ints:
        """Count each token in the files to train on, int64 ``[vocab_size]``."""
        tokens = joined(self.documents.training, self.vocab_size)
        return np.bincount(tokens, minlength=self.vocab_size)

    @cached_property
    def _rarity(self) -> NDArray[np.float64]:
        """What using a token again counts, ``[vocab_size]``: its surprise, if it is rare."""
        counts = self.token_counts()
        surprise = np.log(counts.sum() / (counts + 1))
        rare: NDArray[np.float64] = surprise * (counts * self.vocab_size < _RARE * counts.sum())
        return rare
