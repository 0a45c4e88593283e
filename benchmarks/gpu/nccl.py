"""Two ranks under NCCL, where it can have two on the cards at hand: are they compared all the same?

Example: python benchmarks/gpu/nccl.py

Two processes guard the same module and make one call in each training micro-step, then one of them
makes a micro-step more. With one card both ranks share it, which NCCL may refuse: then what it says
is told, the collective is left out, and the ranks are compared under the NCCL group all the same,
as the guard does that between the hosts.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lensnet_guard import CallPolicy, RankDivergence, compare_ranks, guard_module


def rank_of_two(device: torch.device) -> dict[str, Any]:
    """What one rank sees."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=20))
    rank = dist.get_rank()
    refusal = None
    try:
        total = torch.ones(1, device=device)
        dist.all_reduce(total)
        if total.item() != 2:
            refusal = f"the sum over 2 ranks is {total.item()}"
    except RuntimeError as error:
        refusal = next(s for s in (*str(error).splitlines()[::-1], repr(error)) if s.strip())
    torch.manual_seed(0)
    guard = guard_module(nn.Linear(8, 2).to(device), policy=CallPolicy({"scorer": 1}))
    equal, diverged = 0, ""
    try:
        with guard.context("training"), compare_ranks(guard):
            for step in range(3 + rank):
                with guard.micro_step(step), guard.sanctioned("scorer"):
                    guard.module(torch.ones(4, 8, device=device)).sum().backward()
                equal += 1
    except RankDivergence as error:
        diverged = type(error).__name__
    return {"refusal": refusal, "equal": equal, "diverged": diverged}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    if "RANK" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["RANK"]) % torch.cuda.device_count())
            torch.cuda.set_device(device)
        print(json.dumps(rank_of_two(device)), flush=True)
        os._exit(0)  # NCCL's watchdog may wait for the collective that it refused
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--device", device.type],
            env={**os.environ, **world, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ranks = [json.loads(process.communicate(timeout=50)[0]) for process in processes]
    refusals = [rank["refusal"] for rank in ranks if rank["refusal"]]
    cards = torch.cuda.device_count() if device.type == "cuda" else 0
    held = all(rank["equal"] >= 3 and rank["diverged"] for rank in ranks)
    group = "NCCL" if device.type == "cuda" else "gloo"
    lines = [
        {
            "name": f"a collective of two ranks under {group} on {cards} cards",
            "passed": not refusals if cards != 1 else None,
            "found": refusals[0] if refusals else "works",
            "limit": None if cards == 1 else "works",
        },
        {
            "name": f"two ranks under {group}: 3 equal micro-steps pass, one more is a divergence",
            "passed": held,
            "found": [rank["diverged"] or f"{rank['equal']} micro-steps" for rank in ranks],
            "limit": "on both ranks",
        },
    ]
    print(json.dumps({"lines": lines, "ranks": ranks}))


if __name__ == "__main__":
    main()
