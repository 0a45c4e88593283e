"""A critic in a policy-gradient loop with accelerate: one value estimate per micro-batch.

The critic is trained on the returns and is the baseline of the actor's loss: both need the same
one call. Run me, and then with --break-it, where the values come from a cache that outlives the
batch it was made for: the critic's loss then has no gradient, and nothing says so.
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lensnet_guard import CallPolicy, LensNetViolation
from lensnet_guard.integrations.accelerate import GuardedAccelerator

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--break-it", action="store_true")
break_it = parser.parse_args().break_it

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
guarded = GuardedAccelerator(accelerator, policy=CallPolicy(scopes={"values": 1}), name="critic")
actor = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
critic = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=1e-2)
loader = DataLoader(TensorDataset(torch.randn(32, 4)), batch_size=4)
# The critic first: it comes back guarded, whatever accelerate has made of it.
critic, actor, optimizer, loader = guarded.prepare(critic, actor, optimizer, loader)

cache: dict[int, Tensor] = {}


def estimate(states: Tensor) -> Tensor:
    """The critic's value ``[B]`` of each state ``[B, 4]``."""
    if break_it and len(states) in cache:
        return cache[len(states)]
    with guarded.guard.sanctioned("values"):
        values = critic(states).squeeze(-1)  # the one legal call
    cache[len(states)] = values.detach()
    return values


try:
    with guarded:
        for _ in range(3):
            for (states,) in loader:
                with guarded.accumulate(actor, critic):
                    choice = torch.distributions.Categorical(logits=actor(states))
                    action = choice.sample()
                    reward = (action == (states[:, 0] > 0).long()).float()
                    value = estimate(states)
                    advantage = reward - value.detach()
                    loss = F.mse_loss(value, reward) - (advantage * choice.log_prob(action)).mean()
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
            with torch.no_grad():
                mean = critic(torch.randn(64, 4)).mean()  # between micro-steps calls are free
            accelerator.print(f"mean value {mean:.2f}")
except LensNetViolation as violation:
    print(f"{type(violation).__name__}: {violation}")
else:
    accelerator.print(f"verdict: {guarded.verdict}")
