"""Case 3, a rank that diverged: one of two processes makes a call that the other does not.

Under a collective inside the module that is a hang. Writes runs/ranks, in observe mode, so that the
run goes on to its end. Afterwards: lensnet-guard postmortem runs/ranks
"""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lensnet_guard import CallPolicy, guard_module


def score(reward: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Scores a batch, and once more where the scores look odd: on some ranks only."""
    scores = reward(batch)
    if scores.abs().max() > 2:
        scores = reward(batch.clamp(-1, 1))
    return scores


def worker(rank: int, port: int) -> None:
    """One rank of a small training."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    policy = CallPolicy({"reward": 1})
    guard = guard_module(nn.Linear(4, 1), policy=policy, mode="observe", log="runs/ranks")
    torch.manual_seed(rank)
    with guard.context("training"):
        for step in range(6):
            batch = torch.randn(8, 4)
            if rank == 1 and step >= 4:
                batch = batch * 20  # the outliers of this rank's shard
            with guard.micro_step(step), guard.sanctioned("reward"):
                mean = score(guard.module, batch).mean()
            dist.all_reduce(mean)
    guard.end_log()
    dist.destroy_process_group()


if __name__ == "__main__":
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port,), nprocs=2)
