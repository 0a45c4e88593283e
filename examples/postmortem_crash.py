"""Case 2, a crash in flight: the process dies inside the module, as it does in a bad CUDA kernel.

Writes runs/crash and is killed by a segmentation fault. Afterwards:
lensnet-guard postmortem runs/crash
"""

import ctypes

import torch
from torch import nn

from lensnet_guard import CallPolicy, guard_module


class Critic(nn.Module):
    """Reads through a null pointer when a batch is larger than its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, 8]`` to ``[B, 1]``."""
        if len(x) > 16:
            ctypes.string_at(0)
        return self.linear(x)


def evaluate(critic: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """The line that the log will name."""
    return critic(batch).mean()


guard = guard_module(Critic(), policy=CallPolicy({"value": 1}), log="runs/crash")
with guard.context("training"):
    for step, size in enumerate((4, 8, 16, 32)):
        with guard.micro_step(step), guard.sanctioned("value"):
            evaluate(guard.module, torch.randn(size, 8))
