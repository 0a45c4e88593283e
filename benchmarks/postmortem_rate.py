"""How fast a post-mortem reads, beside plain ``orjson.loads`` over the same lines.

Example: python benchmarks/postmortem_rate.py
         python benchmarks/postmortem_rate.py --megabytes 1000

Writes a log of real lines to a temporary folder, reads it with `analyse` in a process of its own,
and prints megabytes per second, the ratio, and the peak memory of that process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import orjson
import torch
from torch import nn

from lensnet_guard import guard_module

READ = """
import json, sys, time
from lensnet_guard.postmortem import analyse
start = time.perf_counter()
analysis = analyse([sys.argv[1]])
seconds = time.perf_counter() - start
status = open("/proc/self/status").read()  # not getrusage, which starts from the parent's peak
peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
print(json.dumps([seconds, peak, analysis.runs[0].training_calls, analysis.verdict]))
"""


def write_log(folder: Path, size: int) -> tuple[Path, int]:
    """A log of about ``size`` bytes: the lines of real steps, over and over."""
    guard = guard_module(nn.Linear(3, 2), log=folder)
    with guard.context("training"):
        for step in range(500):
            with guard.micro_step(step), guard.sanctioned("preference_scorer"):
                guard.module(torch.ones(1, 3))
    guard.end_log()
    path = folder / "lensnet.rank0.jsonl"
    begin, *steps, end = path.read_bytes().splitlines(keepends=True)
    block = b"".join(steps)
    times = max(1, size // len(block))
    with path.open("wb") as file:
        file.write(begin)
        for _ in range(times):
            file.write(block)
        file.write(end)
    return path, 500 * times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, calls = write_log(Path(folder), arguments.megabytes * 10**6)
        megabytes = path.stat().st_size / 1e6
        start = time.perf_counter()
        with path.open("rb") as file:
            for line in file:
                orjson.loads(line)
        plain = time.perf_counter() - start
        command = [sys.executable, "-c", READ, str(path)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds, peak, found, verdict = json.loads(printed)
    assert (found, verdict) == (calls, "clean")
    figures = {
        "log_mb": megabytes,
        "postmortem_mb_per_s": megabytes / seconds,
        "orjson_mb_per_s": megabytes / plain,
        "times_orjson": seconds / plain,
        "peak_memory_mb": peak,
    }
    if arguments.json:
        print(json.dumps(figures))
        return
    print(
        f"{megabytes:.0f} MB, {calls} calls: post-mortem {megabytes / seconds:.0f} MB/s, "
        f"orjson.loads alone {megabytes / plain:.0f} MB/s, {seconds / plain:.1f} times as long; "
        f"peak memory {peak:.0f} MB"
    )


if __name__ == "__main__":
    main()
