"""What comparing the ranks adds to a micro-step, and to a call in it.

Example: python benchmarks/rank_compare.py
         python benchmarks/rank_compare.py --ranks 4 --json

Several processes on this machine make guarded micro-steps of a module that does nothing, blocks of
them with `compare_ranks` and without in turn; then micro-steps of many calls. The figures are the
differences of the medians, in rank 0. On a network add its latency to a micro-step, and nothing to
a call; a device that works meanwhile is not waited for.
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

from lensnet_guard import CallPolicy, Guard, Scope, compare_ranks, guard_module

BLOCKS, STEPS, CALLS = 15, 200, 5_000


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


def call_us(guard: Guard) -> float:
    """Mean microseconds of the calls of a micro-step that has many: of this thread's own work."""
    x = torch.ones(1)
    dist.barrier()
    with guard.micro_step(), guard.sanctioned("scorer"):
        start = time.thread_time()  # a call waits for nothing
        for _ in range(CALLS):
            guard.module(x)
        end = time.thread_time()
    return (end - start) / CALLS * 1e6


def rank_of(rank: int, ranks: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    guard = guard_module(Bare(), policy=CallPolicy({"scorer": Scope((1, None))}))
    times: dict[tuple[str, bool], list[float]] = {}
    with guard.context("training"):
        for _ in range(BLOCKS):
            for measured in (micro_step_us, call_us):
                for compared in (False, True):
                    with compare_ranks(guard) if compared else nullcontext():
                        key = measured.__name__, compared
                        times.setdefault(key, []).append(measured(guard))
    if rank == 0:
        medians = {key: statistics.median(block) for key, block in times.items()}
        figures = {name: medians[name, False] for name, _ in medians}
        added = {f"added_{name}": medians[name, True] - figures[name] for name in figures}
        Path(out).write_text(json.dumps(figures | added))
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
        out = f"{folder}/figures.json"
        mp.spawn(rank_of, args=(arguments.ranks, port, out), nprocs=arguments.ranks)
        figures = {"ranks": arguments.ranks, **json.loads(Path(out).read_text())}
    if arguments.json:
        print(json.dumps(figures))
        return
    print(
        "{ranks} ranks: a guarded micro-step takes {micro_step_us:.0f} µs, and comparing the ranks "
        "after each adds {added_micro_step_us:.0f} µs; a guarded call takes {call_us:.1f} µs, and "
        "counting it for the others adds {added_call_us:.1f} µs".format(**figures)
    )


if __name__ == "__main__":
    main()
