"""Where tokens of a tail stand in blocks of a history, on tensors and without a loop over tokens.

All of it costs as much as tail times history, whatever the vocabulary is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NO_TOKEN = -1  # stands for no token, and is equal to none


def matches(tail: Tensor, blocks: Tensor, longest: int) -> Tensor:
    """Tell where each token of a tail stands in blocks, with how many of the tokens before it.

    Args:
        tail: Tokens, int64 ``[B, T]``; `NO_TOKEN` for none.
        blocks: Tokens of consecutive blocks, int64 ``[B, C, K]``; `NO_TOKEN` for none.
        longest: Lengths up to which matches are told apart, n-grams from 1 on.

    Returns:
        Whether the token, and the n - 1 before it, stand there, bool ``[B, longest, T, C, K]``.
    """
    history = blocks.flatten(1)
    same = (tail[:, :, None] == history[:, None]) & (tail != NO_TOKEN)[:, :, None]
    runs = [same]
    for _ in range(longest - 1):
        before = F.pad(runs[-1], (1, 0, 1, 0))[:, :-1, :-1]
        runs.append(same & before)
    stacked = torch.stack(runs, dim=1)
    return stacked.view(*stacked.shape[:-1], *blocks.shape[1:])


def blocks_holding(blocks: Tensor) -> Tensor:
    """Count the blocks that hold each token of each block.

    Args:
        blocks: Tokens, int64 ``[B, C, K]``.

    Returns:
        The counts, from 1 on, int64 ``[B, C, K]``; 1 for `NO_TOKEN`.
    """
    number = blocks.shape[1]
    of_block = torch.arange(number, device=blocks.device)[:, None]
    # A token in a block is one key; the blocks of a token are its keys that differ.
    keys, order = (blocks * number + of_block).flatten(1).sort(dim=1)
    tokens = torch.div(keys, number, rounding_mode="floor")
    differs = F.pad(keys[:, 1:] != keys[:, :-1], (1, 0), value=True).cumsum(1)
    first = differs.gather(1, torch.searchsorted(tokens, tokens))
    last = differs.gather(1, torch.searchsorted(tokens, tokens, right=True) - 1)
    counts = torch.empty_like(keys).scatter(1, order, last - first + 1)
    return counts.view_as(blocks).masked_fill(blocks == NO_TOKEN, 1)
