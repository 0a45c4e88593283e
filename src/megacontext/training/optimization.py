"""How weights move: gradient buffers, clipping, AdamW, learning rates."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn


def new_optimizer(groups: Sequence[tuple[Sequence[nn.Parameter], float]]) -> torch.optim.AdamW:
    """Make AdamW over groups of parameters, each with its peak learning rate; one may be empty."""
    return torch.optim.AdamW(
        [{"params": params, "lr": peak, "peak": peak} for params, peak in groups if params],
        betas=(0.9, 0.95),
        weight_decay=0.01,
        fused=True,
    )


def train_alone(parameters: Iterable[nn.Parameter], trained: Iterable[nn.Parameter]) -> None:
    """Give each parameter that is trained gradients of its own, and take away those of all others.

    Args:
        parameters: All of a model's.
        trained: Those that a phase trains.
    """
    own = set(trained)
    own_gradients(own)
    for parameter in parameters:
        if parameter not in own:
            parameter.grad = None


def own_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give each parameter that has no gradient one of zeros, which backward adds to in place.

    Where there is none, the first backward makes its own output the gradient. Under CUDA graphs
    that output is memory which the backward of the next micro-step writes over, so that what was
    accumulated is lost, with an error at best (pytorch issue 169545). AdamW leaves a parameter
    alone while it has no gradient, but decays one whose gradient is zero: give these to parameters
    only once they are trained.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def update(optimizer: torch.optim.AdamW, rate: float, clip_norm: float) -> None:
    """Clip each group's gradient norm, step, and zero the gradients.

    Args:
        optimizer: Of `new_optimizer`.
        rate: Share of the peak learning rates.
        clip_norm: The longest gradient of a group.
    """
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], clip_norm)
        group["lr"] = group["peak"] * rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)  # the buffers stay: see own_gradients


def rate_at(step: int, steps: int, warmup_steps: int) -> float:
    """Compute the share of the peak learning rate at a step.

    Args:
        step: Number of the step, from 0.
        steps: Of the run.
        warmup_steps: Of linear warm-up; a cosine then falls to a tenth.

    Returns:
        The share.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return 0.55 + 0.45 * math.cos(math.pi * progress)
