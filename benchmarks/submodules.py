"""What a guard adds to a forward of a module with many submodules, each of which it watches.

Example: python benchmarks/submodules.py
         python benchmarks/submodules.py --device cuda --json

The same transformer bare and guarded, called in turn without grad in inference context; each
figure is the median over the rounds. On CUDA each forward is waited for, so that what is added is
what the host needs more than it can hide behind the device.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from lensnet_guard import guard_module

LAYERS = (3, 40)


def forward_us(module: Any, x: Tensor) -> float:
    """Microseconds of one forward."""
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    wait()
    begin = time.perf_counter()
    module(x)
    wait()
    return (time.perf_counter() - begin) * 1e6


def measure(layers: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """Bare and guarded, in turn."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    bare, other = (nn.TransformerEncoder(layer, layers).to(device) for _ in range(2))
    guard = guard_module(other)
    x = torch.randn(4, 64, 64, device=device)
    times: tuple[list[float], list[float]] = ([], [])
    with guard.context("inference"), torch.no_grad():
        for _ in range(rounds):
            times[0].append(forward_us(bare, x))
            times[1].append(forward_us(guard.module, x))
    added = statistics.median(b - a for a, b in zip(*times, strict=True))
    return {
        "modules": sum(1 for _ in bare.modules()),
        "bare_us": statistics.median(times[0]),
        "added_us": added,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    with Progress(transient=True) as progress:
        rows = [
            measure(layers, device, arguments.rounds)
            for layers in progress.track(LAYERS, description="sizes")
        ]
    if arguments.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(
            f"{row['modules']} modules: {row['bare_us']:,.0f} µs bare, {row['added_us']:.0f} µs "
            f"more guarded, {row['added_us'] / row['modules']:.2f} µs per module"
        )


if __name__ == "__main__":
    main()
