"""What comparing the ranks adds to a micro-step.

Example: python benchmarks/rank_compare.py
         python benchmarks/rank_compare.py --ranks 4 --json

Several processes on this machine make guarded micro-steps of a module that does nothing, blocks of
them with `compare_ranks` and without in turn. The figure is the difference of the medians, in rank
0. On a network add its latency; a device that works meanwhile is not waited for.
"""

import argparse
import json
import socket
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lensnet_guard import CallPolicy, Guard, compare_ranks, guard_module

BLOCKS, STEPS = 15, 200


class Bare(nn.Module):
    """Does nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def micro_step_us(guard: Guard) -> float:
    """Mean microseconds of a block of micro-steps."""
    x = torch.ones(1)
    dist.barrier()
    start = time.perf_counter()
    for step in range(STEPS):
        with guard.micro_step(step), guard.sanctioned("scorer"):
            guard.module(x)
    return (time.perf_counter() - start) / STEPS * 1e6


def rank_of(rank: int, ranks: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    guard = guard_module(Bare(), policy=CallPolicy({"scorer": 1}))
    times: dict[bool, list[float]] = {False: [], True: []}
    with guard.context("training"):
        for _ in range(BLOCKS):
            for compared in times:
                with compare_ranks(guard) if compared else nullcontext():
                    times[compared].append(micro_step_us(guard))
    if rank == 0:
        medians = {compared: statistics.median(block) for compared, block in times.items()}
        Path(out).write_text(json.dumps([medians[False], medians[True]]))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/medians.json"
        mp.spawn(rank_of, args=(arguments.ranks, port, out), nprocs=arguments.ranks)
        without, compared = json.loads(Path(out).read_text())
    if arguments.json:
        figures = {"ranks": arguments.ranks, "micro_step_us": without}
        print(json.dumps({**figures, "added_us": compared - without}))
        return
    print(
        f"{arguments.ranks} ranks: a guarded micro-step takes {without:.0f} µs, and comparing the "
        f"ranks after each adds {compared - without:.0f} µs"
    )


if __name__ == "__main__":
    main()
