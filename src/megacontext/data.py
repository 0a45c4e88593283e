"""Real text as bytes: the user's files, or the sources of Python's standard library."""

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
_HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Corpus:
    """Byte-level text, a tenth of it held out for validation.

    Attributes:
        training, validation: uint8 ``[bytes]``.
        files: how many files were read.
        sha256: fingerprint of both parts; a resumed run must find the same.
    """

    training: NDArray[np.uint8]
    validation: NDArray[np.uint8]
    files: int
    sha256: str

    def batch(self, rng: np.random.Generator, batch_size: int, length: int) -> Tensor:
        """Random windows of the training part, int64 ``[batch_size, length]``."""
        return _windows(self.training, rng, batch_size, length)

    def validation_batch(self, batch_size: int, length: int) -> Tensor:
        """The same random windows of the held-out part at every call, int64 likewise."""
        return _windows(self.validation, np.random.default_rng(0), batch_size, length)

    def unigram_entropy(self) -> float:
        """Entropy of a byte of the validation part, nats: the loss of a model without context."""
        counts = np.bincount(self.validation, minlength=256)
        probabilities = counts[counts > 0] / len(self.validation)
        return float(-(probabilities * np.log(probabilities)).sum())


def load_corpus(paths: Sequence[Path], min_bytes: int) -> Corpus:
    """Read text files; every tenth is held out (of fewer than ten, the last tenth of each).

    Args:
        paths: files, or folders whose files are read but for hidden ones and Python's caches; none
            for the standard library.
        min_bytes: length of one window: both parts must be longer.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: too little text.
    """
    files = _files(paths) if paths else _standard_library()
    texts = [np.frombuffer(file.read_bytes(), dtype=np.uint8) for file in files]
    if len(texts) >= _HELD_OUT_ONE_IN:
        held_out = range(_HELD_OUT_ONE_IN - 1, len(texts), _HELD_OUT_ONE_IN)
        training = [text for i, text in enumerate(texts) if i not in held_out]
        validation = [texts[i] for i in held_out]
    else:  # of a few files, the end of each
        splits = [len(text) - len(text) // _HELD_OUT_ONE_IN for text in texts]
        training = [text[:split] for text, split in zip(texts, splits, strict=True)]
        validation = [text[split:] for text, split in zip(texts, splits, strict=True)]
    parts = [np.concatenate([np.empty(0, np.uint8), *part]) for part in (training, validation)]
    for name, part in zip(("training", "validation"), parts, strict=True):
        if len(part) <= min_bytes:
            raise ValueError(
                f"too little text: the {name} part of {len(files)} files has {len(part)} bytes, "
                f"and one sequence needs more than {min_bytes}; give more files or shorten "
                "--sequence-tokens"
            )
    digest = hashlib.sha256(parts[0].tobytes() + b"\0" + parts[1].tobytes())
    return Corpus(parts[0], parts[1], len(files), digest.hexdigest())


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(
        path
        for path in root.rglob("*.py")
        if not _NOT_LIBRARY.intersection(path.relative_to(root).parts)
    )


def _files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file())
            files += [p for p in inside if not _is_litter(p.relative_to(path))]
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"no such text file or folder: {path}")
    return list(dict.fromkeys(file.resolve() for file in files))


def _is_litter(path: Path) -> bool:
    """Hidden files and Python's caches: they are no text, and change by themselves."""
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _windows(
    text: NDArray[np.uint8], rng: np.random.Generator, batch_size: int, length: int
) -> Tensor:
    starts = rng.integers(0, len(text) - length, size=batch_size)
    return torch.from_numpy(text[starts[:, None] + np.arange(length)].astype(np.int64))
