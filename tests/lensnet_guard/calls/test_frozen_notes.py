"""Buffers that a state dict leaves out: a module's own notes, which may change between calls."""

import pytest
import torch
from torch import nn

from lensnet_guard import CallPolicy, ConditionUnmet, Scope, frozen, guard_module


class Rotary(nn.Module):
    """As transformers' rotary positions do where they scale: notes anew for a longer sequence."""

    def __init__(self):
        super().__init__()
        self.register_buffer("angles", torch.zeros(1), persistent=False)
        self.register_buffer("base", torch.ones(1))

    def forward(self, x):
        if x.shape[0] > self.angles.shape[0]:
            self.register_buffer("angles", torch.zeros(x.shape[0]), persistent=False)
        self.angles += 1
        return x * self.angles[: x.shape[0]] * self.base


BESIDE = {
    "a buffer in place": (
        lambda net: net.base.mul_(2),
        "the buffer base was written in place 1 time",
    ),
    "a buffer beside": (
        lambda net: net.register_buffer("more", torch.ones(1)),
        "the buffer more was added",
    ),
    "a note that becomes state": (
        lambda net: net.register_buffer("angles", net.angles),
        "the buffer angles was added",
    ),
    "a parameter that is a note, too": (
        lambda net: net.tied.weight.mul_(2),
        "the parameter tied.weight was written in place 1 time",
    ),
}


class TestNotes:
    @pytest.mark.parametrize("condition", [frozen, frozen(fingerprint=True)])
    @pytest.mark.parametrize("change", BESIDE)
    def test_buffers_of_no_state_are_not_compared(self, condition, change):
        """Written or replaced; all that is beside them is, and what they are besides."""
        net = Rotary()
        net.tied = nn.Linear(1, 1)
        net.register_buffer("same", net.tied.weight, persistent=False)
        policy = CallPolicy({"kl": Scope((0, 9))}, requires=(condition,))
        guard = guard_module(net, policy=policy, name="net")
        act, told = BESIDE[change]
        refused = pytest.raises(ConditionUnmet, match=told)
        with refused, guard.context("training"), guard.sanctioned("kl"), torch.no_grad():
            for length in (1, 3, 2):
                guard.module(torch.ones(length))
            act(net)
            assert guard.count("training") == 3
            guard.module(torch.ones(2))
