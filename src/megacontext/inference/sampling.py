"""From next-token logits to one token: temperature, top-k, top-p. Pure functions."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megacontext.checks import check_int


@dataclass(frozen=True)
class SamplingRules:
    """How a token is drawn.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token always.
        top_k: Only so many of the likeliest tokens; 0 for all.
        top_p: Only the fewest likeliest tokens that have this probability together; 1 for all.

    Raises:
        TypeError: A ``top_k`` that is no integer.
        ValueError: A value that cannot sample; the message names it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_int("top_k", self.top_k)
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, but is {self.top_k}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")


def token_probabilities(logits: Tensor, rules: SamplingRules) -> Tensor:
    """Compute the distribution that a token is drawn from.

    Args:
        logits: Of the next token, ``[vocab_size]``.
        rules: How it is drawn.

    Returns:
        Probabilities, float32 ``[vocab_size]``.
    """
    logits = logits.float()
    if rules.temperature == 0:
        return torch.zeros_like(logits).index_fill(0, logits.argmax(), 1.0)
    # The largest becomes 0 first, so that a small temperature makes no infinity of it.
    scaled = (logits - logits.max()) / rules.temperature
    values, order = scaled.sort(descending=True, stable=True)
    kept = torch.softmax(values, 0)
    if rules.top_k:
        kept[rules.top_k :] = 0
        kept /= kept.sum()
    before = kept.cumsum(0) - kept
    kept = kept.masked_fill(before >= rules.top_p, 0.0)
    return torch.zeros_like(logits).scatter(0, order, kept / kept.sum())


def sample_token(logits: Tensor, rules: SamplingRules, generator: torch.Generator) -> Tensor:
    """Draw one token; from the same state of the generator, the same one.

    Args:
        logits: Of the next token, ``[vocab_size]``.
        rules: How it is drawn.
        generator: Of the logits' device.

    Returns:
        The token, int64 ``[1]``.
    """
    return torch.multinomial(token_probabilities(logits, rules), 1, generator=generator)
