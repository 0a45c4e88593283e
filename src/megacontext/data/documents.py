"""Texts as tokens, each of them either to train on or held out, as the hash of its name says.

So a text stays in its part when others come or go, on whatever machine it is read.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megacontext.data.source import encoded
from megacontext.data.text_files import text_files
from megacontext.data.tokenizer import Tokenizer
from megacontext.model.tokens import Ids, as_ids

HELD_OUT_ONE_IN = 5
_FEW = 10  # texts, of which the end of each is held out


@dataclass(frozen=True)
class Documents:
    """Texts as tokens, in two parts.

    Attributes:
        training: Those to train on, ``[tokens]`` each.
        held_out: Those that are never trained on, likewise.
        sha256: Fingerprint of all; a resumed run must find the same.
        tokenizer: Made the tokens.
    """

    training: tuple[Ids, ...]
    held_out: tuple[Ids, ...]
    sha256: str
    tokenizer: Tokenizer

    @property
    def description(self) -> dict[str, Any]:
        """Fingerprint and sizes, by name."""
        unit = self.tokenizer.unit
        return {
            "sha256": self.sha256,
            "files": len(self.training),
            "held_out_files": len(self.held_out),
            f"training_{unit}": sum(map(len, self.training)),
            f"held_out_{unit}": sum(map(len, self.held_out)),
        }


def read_documents(paths: Sequence[Path], tokenizer: Tokenizer) -> Documents:
    """Read text files, each a document; by default the standard library's sources.

    Args:
        paths: As for `text_files`.
        tokenizer: Makes their tokens.

    Returns:
        The documents.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: There are no files; or a path is a pipe or a device.
    """
    files = text_files(paths)
    return split_documents(((name, path.read_bytes()) for path, name in files.items()), tokenizer)


def split_documents(texts: Iterable[tuple[str, bytes]], tokenizer: Tokenizer) -> Documents:
    """Make documents of texts; one in five is held out (of fewer than ten, the end of each).

    Args:
        texts: Names, which decide, and what is in them. Of those that say the same the first
            counts: a copy by another name may be in the other part.
        tokenizer: Makes their tokens.

    Returns:
        The documents.
    """
    tokens, known = [], set()
    for name, text in texts:  # one by one: not all that is read need fit into memory
        content = hashlib.sha256(text).digest()
        if content not in known:
            known.add(content)
            tokens.append((name, encoded(text, tokenizer)))
    if len(tokens) < _FEW:
        splits = [len(text) - len(text) // HELD_OUT_ONE_IN for _, text in tokens]
        training = [text[:split] for (_, text), split in zip(tokens, splits, strict=True)]
        held_out = [text[split:] for (_, text), split in zip(tokens, splits, strict=True)]
    else:
        training = [text for name, text in tokens if not is_held_out(name)]
        held_out = [text for name, text in tokens if is_held_out(name)]
    digest = hashlib.sha256()
    for part in (*training, None, *held_out):
        digest.update(b"\0" if part is None else part.tobytes() + b"\0")
    return Documents(tuple(training), tuple(held_out), digest.hexdigest(), tokenizer)


def is_held_out(name: str) -> bool:
    """Tell whether what is called so is held out, whatever else there is."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def joined(texts: Sequence[Ids], vocab_size: int) -> Ids:
    """Join texts, one after another, ``[tokens]``."""
    return np.concatenate([as_ids(np.empty(0, np.int64), vocab_size), *texts])
