"""Gaussian RoPE: rotary positions for entries that cover more than one token.

An entry that covers tokens [p, p + s) is taken as a position spread over them, with mean
p + (s - 1) / 2 and the variance of s consecutive integers, (s² - 1) / 12. The expectation of the
rotation e^{iωx} under a normal x of that mean and variance is e^{iωμ} · e^{-ω²σ²/2}: the usual
rotation, its fast frequencies damped where the position is vague. For s = 1 it is plain RoPE
(Su et al. 2021, arXiv:2104.09864).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BASE = 10_000.0
_STRIDE = 4_096  # tokens; an angle of many more has lost its digits in float32


def gaussian_rope(
    starts: Tensor, spans: Tensor, head_dim: int, rotated_dim: int | None = None
) -> Tensor:
    """Compute damped rotations of entries.

    Args:
        starts: First token of each entry, int64 ``[B, W]``.
        spans: Tokens of each entry, int64 ``[B, W]``.
        head_dim: Even width of an attention head.
        rotated_dim: Even number of its features that are rotated, all by default; the rest of them
            compares content wherever it stands.

    Returns:
        Cosines and sines, float32 ``[2, B, 1, W, head_dim / 2]``.
    """
    rotated_dim = head_dim if rotated_dim is None else rotated_dim
    exponents = torch.arange(0, rotated_dim, 2, device=starts.device) / rotated_dim
    frequencies = F.pad(BASE**-exponents, (0, (head_dim - rotated_dim) // 2))
    mean = starts % _STRIDE + (spans - 1) / 2
    variance = (spans.float() ** 2 - 1) / 12
    of_stride = (_STRIDE * frequencies).remainder(2 * math.pi)  # whole turns turn nothing
    angles = mean[..., None] * frequencies + (starts // _STRIDE)[..., None] * of_stride
    damping = torch.exp(-0.5 * frequencies**2 * variance[..., None])
    return torch.stack([angles.cos() * damping, angles.sin() * damping])[:, :, None]


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Apply the rotations of `gaussian_rope` to queries or keys ``[B, H, W, head_dim]``."""
    cos, sin = rope.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
