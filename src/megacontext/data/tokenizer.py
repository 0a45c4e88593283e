"""Text becomes tokens, and tokens text: bytes for our own model, or as a given model reads it."""

import codecs
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megacontext.model.hf_loading import folder_of, import_transformers

Tokens = NDArray[np.int64]
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


class Tokenizer(Protocol):
    """What text is made of.

    Attributes:
        vocab_size: Number of tokens: all are below it.
        unit: What to call them, in the plural.
    """

    vocab_size: int
    unit: str

    def encode(self, pieces: Iterable[bytes]) -> Iterator[Tokens]:
        """Yield the tokens ``[n]`` of a text in pieces, which may be more or fewer."""

    def decoder(self) -> Callable[[int], bytes]:
        """Make what turns each token of a text in turn into the bytes that are certain then."""

    def text(self, tokens: Tokens) -> str:
        """Return what tokens ``[n]`` say, with replacement characters where they are torn."""


class ByteTokenizer:
    """Each byte is a token."""

    vocab_size = 256
    unit = "bytes"

    def encode(self, pieces: Iterable[bytes]) -> Iterator[Tokens]:
        """Yield tokens ``[n]`` of the pieces of a text."""
        for piece in pieces:
            yield np.frombuffer(piece, dtype=np.uint8).astype(np.int64)

    def decoder(self) -> Callable[[int], bytes]:
        """Make what turns each token of a text in turn into the bytes that are certain then."""
        return lambda token: bytes([token])

    def text(self, tokens: Tokens) -> str:
        """Return what tokens ``[n]`` say, with replacement characters where they are torn."""
        return tokens.astype(np.uint8).tobytes().decode(errors="replace")


class PretrainedTokenizer:
    """A tokenizer of transformers. Special tokens are neither added nor shown.

    Args:
        folder: A folder that ``save_pretrained`` made.

    Attributes:
        vocab_size: Number of tokens: all are below it.
        unit: What to call them, in the plural.

    Raises:
        ImportError: transformers is not installed.
        ValueError: It cannot be loaded.
    """

    unit = "tokens"

    def __init__(self, folder: Path) -> None:
        auto = import_transformers(str(folder)).AutoTokenizer
        try:
            self._tokenizer: Any = auto.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the library lets through whatever goes wrong within it
            raise ValueError(
                f"the tokenizer in {folder} cannot be loaded ({error}); put its files right, or "
                "take them away to read text as bytes"
            ) from error
        # Ids may have gaps: there are vocabularies of four words whose last has id 300.
        ids = self._tokenizer.get_vocab().values()
        self.vocab_size = max(len(self._tokenizer), 1 + max(ids, default=0))

    def encode(self, pieces: Iterable[bytes]) -> Iterator[Tokens]:
        # A word on the seam of two pieces becomes other tokens; pieces are long, so few are.
        """Yield tokens ``[n]`` of the pieces of a text."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for piece in chain(pieces, [None]):
            text = decoder.decode(piece or b"", final=piece is None)
            encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
            if encoded["input_ids"]:
                yield np.array(encoded["input_ids"], dtype=np.int64)

    def decoder(self) -> Callable[[int], bytes]:
        # How a token reads depends on those before it, and characters may take several. So what
        # is new is what comes to the text of some tokens that are known, once it ends in no torn
        # character.
        """Make what turns each token of a text in turn into the bytes that are certain then."""
        tokens: list[int] = []
        known = 0

        def feed(token: int) -> bytes:
            nonlocal known, tokens
            tokens.append(token)
            before, now = self._text(tokens[:known]), self._text(tokens)
            if now.endswith("\ufffd") and len(tokens) - known < 8:  # more is no character
                return b""
            tokens, known = tokens[known:], len(tokens) - known
            return now[len(before) :].encode()

        return feed

    def text(self, tokens: Tokens) -> str:
        """Return what tokens ``[n]`` say, with replacement characters where they are torn."""
        return self._text(tokens.tolist())

    def _text(self, tokens: list[int]) -> str:
        decoded: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return decoded


def has_tokenizer(language_model: str) -> bool:
    """Tell whether a model that was given brings a tokenizer.

    Args:
        language_model: Of `MCConfig`; "" for our own model.

    Returns:
        Whether it does.
    """
    return bool(language_model) and any(
        (folder_of(language_model) / name).exists() for name in _FILES
    )


def tokenizer_of(language_model: str) -> Tokenizer:
    """Load the tokenizer that a model was given with; bytes where there is none.

    Args:
        language_model: Of `MCConfig`; "" for our own model, which reads bytes.

    Returns:
        The tokenizer.

    Raises:
        ImportError: It needs transformers, which is not installed.
        ValueError: It cannot be loaded.
    """
    if has_tokenizer(language_model):
        return PretrainedTokenizer(folder_of(language_model))
    return ByteTokenizer()
