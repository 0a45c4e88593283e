"""A critic in two Ray actors: one value estimate per micro-step, contexts opened in their methods.

Each actor owns a copy of the guarded critic, sent to it with its contract, and logs to runs/ray.
Run me, or with --break-it, where one of them asks again for a report. Afterwards:
lensnet-guard postmortem runs/ray
"""

import argparse
from pathlib import Path

import ray
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lensnet_guard import CallPolicy, LensNetViolation, finite, guard_module, guard_of

LOG = Path("runs/ray").absolute()  # an actor runs in a directory of its own


def four_rows(call) -> str | None:
    """A condition of our own, which goes to the actors with the contract."""
    rows = len(call.argument("input"))
    return None if rows == 4 else f"{rows} rows instead of 4"


@ray.remote
class Worker:
    """The owner of a critic: nobody else calls it."""

    def __init__(self, critic: nn.Module, break_it: bool) -> None:
        self.critic, self.break_it = critic, break_it
        self.guard = guard_of(critic)
        self.guard.start_log(LOG)
        self.optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)

    def train(self, step: int, states: Tensor, returns: Tensor) -> float:
        """One step on states ``[B, 4]`` and their returns ``[B]``; gives back the loss."""
        with self.guard.context("training"), self.guard.micro_step(step):
            with self.guard.sanctioned("values"):
                values = self.critic(states).squeeze(-1)  # the one legal call
            loss = F.mse_loss(values, returns)
            if self.break_it and step == 2:
                print(f"mean value {self.critic(states).mean():.2f}")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def close(self) -> int:
        """End the log, since Ray ends actors without a word; gives back the number of calls."""
        self.guard.end_log()
        return self.guard.count("training", "values")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--break-it", action="store_true")
    break_it = parser.parse_args().break_it

    ray.init(num_cpus=2, include_dashboard=False, ignore_reinit_error=True)
    policy = CallPolicy({"values": 1}, requires=(four_rows,), ensures=(finite,))
    critic = guard_module(nn.Linear(4, 1), policy=policy, name="critic").module
    workers = [Worker.remote(critic, break_it and number == 1) for number in range(2)]
    try:
        for step in range(3):
            batches = [(torch.randn(4, 4), torch.randn(4)) for _ in workers]
            jobs = [w.train.remote(step, *batch) for w, batch in zip(workers, batches, strict=True)]
            print(f"step {step}: losses {', '.join(f'{loss:.2f}' for loss in ray.get(jobs))}")
    except LensNetViolation as violation:  # Ray's error of a task is one of this kind, too
        print(violation.cause)
    print(f"calls: {ray.get([worker.close.remote() for worker in workers])}")
