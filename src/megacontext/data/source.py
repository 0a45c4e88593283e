"""A source gives batches of tokens to train on. Text is one, as bytes; `recall` is another."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megacontext.data.text_files import text_files
from megacontext.data.tokenizer import ByteTokenizer, Tokenizer
from megacontext.model.tokens import Ids, as_ids
from megacontext.model.transfer import to_device

Ints = NDArray[np.int64]

_HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Batch:
    """Sequences of equal length, and what is known of them.

    Attributes:
        tokens: The sequences, int64 ``[B, T]``.
        labelled: The tokens that count in losses, bool ``[B, T]``; None for all.
        fact_blocks: The blocks that hold facts, int64 ``[B, facts]``; None where there are none.
        asked_blocks: Those of the facts that are asked for, int64 ``[B, asked]``; -1 fills up the
            rows of sequences that ask for fewer.
        question_tokens: Of the question that ends where the horizon begins, where all are as long.
        files: The file that each sequence is from, by number, int64 ``[B]``, -1 for none; None
            where they are not drawn by file.
    """

    tokens: Tensor
    labelled: Tensor | None
    fact_blocks: Ints | None = None
    asked_blocks: Ints | None = None
    question_tokens: int | None = None
    files: Ints | None = None

    def share(self, rank: int, size: int) -> "Batch":
        """Return the sequences of one of ``size`` parts that are as long, one after another."""
        own = len(self.tokens) // size
        part = slice(rank * own, (rank + 1) * own)
        parts: dict[str, Any] = {
            name: value[part]
            for name, value in vars(self).items()
            if isinstance(value, Tensor | np.ndarray)
        }
        return replace(self, **parts)

    def to(self, device: torch.device) -> "Batch":
        """Return the same on a device."""
        labelled = None if self.labelled is None else to_device(self.labelled, device)
        return replace(self, tokens=to_device(self.tokens, device), labelled=labelled)


class Source(Protocol):
    """Where a trainer's sequences come from."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens: all are below it."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """What text became tokens by; None where tokens stand for no text."""

    @property
    def description(self) -> dict[str, Any]:
        """What a run's ``config.json`` says; ``sha256`` is that of what is read, if anything is."""

    def batch(self, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        """Draw random sequences to train on.

        Args:
            rng: Draws them.
            batch_size: How many.
            length: Tokens of each.

        Returns:
            The sequences.
        """

    def lm_batch(self, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        """Draw random sequences for the language model alone.

        Args:
            rng: Draws them.
            batch_size: How many.
            length: Tokens of each, at most.

        Returns:
            The sequences.
        """

    def held_out_batch(self, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        """Draw random sequences that are never trained on.

        Args:
            rng: Draws them.
            batch_size: How many.
            length: Tokens of each.

        Returns:
            The sequences.
        """

    def unigram_entropy(self) -> float:
        """Return the entropy of a label without its context, nats: the loss to beat."""


@dataclass(frozen=True)
class Corpus:
    """Text as tokens, a tenth of it held out for validation.

    Attributes:
        training: Tokens to train on, in the smallest type that holds them, ``[tokens]``.
        validation: Tokens that are held out, likewise.
        files: How many files were read.
        sha256: Fingerprint of both parts; a resumed run must find the same.
        tokenizer: Made them.
    """

    training: Ids
    validation: Ids
    files: int
    sha256: str
    tokenizer: Tokenizer = field(default_factory=ByteTokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of tokens; 256 for bytes."""
        return self.tokenizer.vocab_size

    @property
    def description(self) -> dict[str, Any]:
        """Fingerprint and sizes, by name."""
        unit = self.tokenizer.unit
        return {
            "sha256": self.sha256,
            "files": self.files,
            f"training_{unit}": len(self.training),
            f"validation_{unit}": len(self.validation),
        }

    def batch(self, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        """Draw random windows of the training part."""
        return _windows(self.training, rng, batch_size, length)

    def lm_batch(self, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        """Draw random windows of the training part."""
        return self.batch(rng, batch_size, length)

    def held_out_batch(self, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
        """Draw random windows of the held-out part."""
        return _windows(self.validation, rng, batch_size, length)

    def unigram_entropy(self) -> float:
        """Return the entropy of a held-out token, nats: the loss of a model without context."""
        counts = np.bincount(self.validation)
        probabilities = counts[counts > 0] / len(self.validation)
        return float(-(probabilities * np.log(probabilities)).sum())


def load_corpus(
    paths: Sequence[Path], min_tokens: int, tokenizer: Tokenizer | None = None
) -> Corpus:
    """Read text files; every tenth is held out (of fewer than ten, the last tenth of each).

    Args:
        paths: Files, or folders whose files are read but for hidden ones and Python's caches; none
            for the standard library.
        min_tokens: Length of one window: both parts must be longer.
        tokenizer: Makes tokens of each file; of bytes by default.

    Returns:
        The text.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: Too little text; or a path that is a pipe or a device.
    """
    files = text_files(paths)
    tokenizer = tokenizer or ByteTokenizer()
    empty = as_ids(np.empty(0, np.int64), tokenizer.vocab_size)
    texts = [encoded(file.read_bytes(), tokenizer) for file in files]
    if len(texts) >= _HELD_OUT_ONE_IN:
        held_out = range(_HELD_OUT_ONE_IN - 1, len(texts), _HELD_OUT_ONE_IN)
        training = [text for i, text in enumerate(texts) if i not in held_out]
        validation = [texts[i] for i in held_out]
    else:  # of a few files, the end of each
        splits = [len(text) - len(text) // _HELD_OUT_ONE_IN for text in texts]
        training = [text[:split] for text, split in zip(texts, splits, strict=True)]
        validation = [text[split:] for text, split in zip(texts, splits, strict=True)]
    parts = [np.concatenate([empty, *part]) for part in (training, validation)]
    for name, part in zip(("training", "validation"), parts, strict=True):
        if len(part) <= min_tokens:
            raise ValueError(
                f"too little text: the {name} part of {len(files)} files has {len(part)} "
                f"{tokenizer.unit}, and one sequence needs more than {min_tokens}; give more files "
                "or shorten --sequence-tokens"
            )
    digest = hashlib.sha256(parts[0].tobytes() + b"\0" + parts[1].tobytes())
    return Corpus(
        training=parts[0],
        validation=parts[1],
        files=len(files),
        sha256=digest.hexdigest(),
        tokenizer=tokenizer,
    )


def encoded(text: bytes, tokenizer: Tokenizer) -> Ids:
    """Turn a text into tokens ``[tokens]``, in the smallest type that holds them."""
    size, whose = tokenizer.vocab_size, f"tokens of {type(tokenizer).__name__}"
    empty = as_ids(np.empty(0, np.int64), size)
    return np.concatenate([empty, *(as_ids(p, size, whose) for p in tokenizer.encode([text]))])


def _windows(text: Ids, rng: np.random.Generator, batch_size: int, length: int) -> Batch:
    starts = rng.integers(0, len(text) - length, size=batch_size)
    tokens = text[starts[:, None] + np.arange(length)].astype(np.int64)
    return Batch(torch.from_numpy(tokens), labelled=None)
