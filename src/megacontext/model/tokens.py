"""What comes in as a batch of tokens, checked."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megacontext.config import MCConfig

Ids = NDArray[np.unsignedinteger[Any]]


def check_range(tokens: NDArray[np.int64], vocab_size: int, whose: str = "tokens") -> None:
    """Refuse tokens that are not in the vocabulary.

    Args:
        tokens: Of any shape.
        vocab_size: Tokens must be below it.
        whose: What to call them.

    Raises:
        ValueError: They are not; says from where to where they run.
    """
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
        raise ValueError(
            f"{whose} must lie in [0, {vocab_size}), but run from {tokens.min()} to {tokens.max()}"
        )


def as_ids(tokens: NDArray[np.int64], vocab_size: int, whose: str = "tokens") -> Ids:
    """Put tokens in the smallest type that holds the vocabulary, in which others would wrap around.

    Args:
        tokens: Of any shape.
        vocab_size: Tokens must be below it.
        whose: What to call them.

    Returns:
        The same tokens.

    Raises:
        ValueError: They are not in the vocabulary; says from where to where they run.
    """
    check_range(tokens, vocab_size, whose)
    ids: Ids = tokens.astype(np.min_scalar_type(vocab_size - 1))
    return ids


def check_batch(tokens: Tensor, pad_mask: Tensor | None, config: MCConfig) -> list[int]:
    """Refuse what cannot be a batch.

    Tokens on a device are not looked at, for the host would have to wait for them.

    Args:
        tokens: The sequences, int64 ``[B, T]``.
        pad_mask: Where pads on the left are, bool ``[B, T]``; None where there are none.
        config: Of the model.

    Returns:
        The number of tokens of each sequence, B of them.

    Raises:
        TypeError: They are no int64 tensor.
        ValueError: Something else is wrong; says what, and in which sequence.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        found = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens must be an int64 tensor, not {found}")
    if tokens.dim() != 2 or not tokens.shape[0]:
        raise ValueError(f"tokens must be [B, T] with B ≥ 1, not {list(tokens.shape)}")
    batch, width = tokens.shape
    lengths = [width] * batch
    if pad_mask is not None:
        if pad_mask.shape != tokens.shape or pad_mask.dtype != torch.bool:
            raise ValueError(
                f"pad_mask must be bool {list(tokens.shape)}, "
                f"not {pad_mask.dtype} {list(pad_mask.shape)}"
            )
        pads = pad_mask.numpy(force=True)
        if (pads[:, 1:] > pads[:, :-1]).any():
            raise ValueError("pad_mask must be True on the left of each sequence only")
        lengths = (width - pads.sum(axis=1)).tolist()
    if width > config.sequence_tokens:
        raise ValueError(
            f"the batch is {width} tokens long, longer than sequence_tokens "
            f"{config.sequence_tokens}"
        )
    shortest = min(lengths)
    if shortest <= config.horizon_tokens:
        raise ValueError(
            f"sequence {lengths.index(shortest)} has {shortest} tokens; at least "
            f"{config.horizon_tokens + 1} are needed, one more than horizon_tokens"
        )
    if tokens.device.type == "cpu":
        check_range(tokens.numpy(), config.vocab_size)
    return lengths
