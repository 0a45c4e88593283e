"""The language model's own attention as a picker, in the manner of SnapKV.

After Li et al. 2024 (SnapKV, arXiv:2404.14469): what the last queries before the horizon attend to.
The model reads all of the history in detail for that, which no other picker needs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megacontext.controller import MCController
from megacontext.evaluation.memo import Memo, key_of
from megacontext.evaluation.pickers import LAST, Floats, Visible

SINK = 4  # first tokens, where heads that look for nothing look (Xiao et al. 2023, StreamingLLM)


class _AttentionOfLast(TorchFunctionMode):
    """Notes, of each layer that runs, how much the last queries attend to each key.

    Attributes:
        noted: Of each layer, ``[S, heads, keys]``; a sum over the queries.
    """

    def __init__(self, last: int) -> None:
        super().__init__()
        self._last = last
        self.noted: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self._note(args[0], args[1], (kwargs or {}).get("scale"))
        return func(*args, **(kwargs or {}))

    def _note(self, query: Tensor, key: Tensor, scale: float | None) -> None:
        """Compute the attention of the last queries; each may look at all keys up to itself."""
        query = query[:, :, -self._last :]
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        logits = (query @ key.transpose(-1, -2)).float() * scale
        queries, keys = logits.shape[-2:]
        causal = torch.ones(queries, keys, dtype=torch.bool, device=key.device)
        logits.masked_fill_(~causal.tril(keys - queries), -torch.inf)
        self.noted.append(logits.softmax(-1).sum(-2))


def attention(
    visible: Visible, read: Callable[[Tensor], object], last: int = LAST
) -> tuple[Floats, Floats]:
    """Score blocks by how much the last queries attend to them.

    Args:
        visible: The sequences.
        read: Lets the language model read tokens, int64 ``[S, T]``; its attention is SDPA.
        last: How many queries.

    Returns:
        The mean over all heads of all layers, and their maximum, ``[S, blocks]`` each. What goes to
        the first `SINK` tokens does not count.

    Raises:
        RuntimeError: No attention was seen, for it is computed in another way.
    """
    noted = _AttentionOfLast(last)
    with torch.no_grad(), noted:
        read(torch.from_numpy(visible.tokens))
    if not noted.noted:
        raise RuntimeError(
            "the language model computes attention otherwise than by "
            "torch.nn.functional.scaled_dot_product_attention, so what it attends to was not seen: "
            'make it with attn_implementation="sdpa"'
        )
    k = visible.block_size
    heads = torch.cat(noted.noted, dim=1)  # [S, layers · heads, T]
    heads[:, :, :SINK] = 0
    history = heads[:, :, : visible.blocks * k]
    of_blocks = history.reshape(*history.shape[:2], visible.blocks, k).sum(-1)
    mean, most = of_blocks.mean(1), of_blocks.amax(1)
    return _floats(mean), _floats(most)


def _floats(scores: Tensor) -> Floats:
    out: Floats = scores.double().numpy(force=True)
    return out


def attended(
    mc: MCController, visible: Visible, keys: Sequence[str], memo: Memo
) -> tuple[Floats, Floats]:
    """Ask a language model what it attends to, so many sequences at once as there is room for.

    Args:
        mc: Its language model reads all that is visible, in detail.
        visible: The sequences.
        keys: Of each, as `memo` is to know it.
        memo: Knows what was computed before.

    Returns:
        The mean over heads, and their maximum, ``[S, blocks]`` each.
    """

    def read(tokens: Tensor) -> None:
        tokens = tokens.to(next(mc.parameters()).device)
        starts = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        mc.logits(mc.language_model.embed(tokens), starts, torch.ones_like(starts), last=1)

    def compute(numbers: list[int]) -> Floats:
        rows = mc.at_once(visible.tokens.shape[1], 1)
        some = [numbers[first : first + rows] for first in range(0, len(numbers), rows)]
        parts = [attention(replace(visible, tokens=visible.tokens[n]), read) for n in some]
        return np.concatenate([np.concatenate(both, axis=1) for both in parts])

    both = memo.many([key_of("attention", key) for key in keys], compute)
    mean, most = np.split(both, 2, axis=1)
    return mean, most
