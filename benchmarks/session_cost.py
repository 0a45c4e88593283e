"""What an appended token costs as the history grows, in memory and on disk.

Example: python benchmarks/session_cost.py
         python benchmarks/session_cost.py --tokens 1000000 --store disk --json
         python benchmarks/session_cost.py --tokens 100000 20000000 --wc-length 1024

For each length of history a fresh process begins a session, of an untrained model of the default
size, with so many random tokens, and appends more, one by one. The language model reads the working
context, and each token that is appended; the tree is made of all tokens. Costs are set against
those of the shortest history.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from megacontext import MCConfig, MCController, SessionConfig

PIECE = 65_536  # tokens of the history that are in memory at once


def resident_mb(field: str) -> float:
    """Of this process, from the kernel: ``RssAnon`` is its own, ``VmHWM`` the most ever."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def measure(
    tokens: int, store: str, appended: int, wc_length: int | None, cpu: bool
) -> dict[str, Any]:
    """One session in this process."""
    now = time.process_time if cpu else time.perf_counter
    torch.set_num_threads(1)
    settings = SessionConfig(wc_length=wc_length)
    mc = MCController(MCConfig())
    generator = torch.Generator().manual_seed(0)
    sizes = (min(PIECE, tokens - begin) for begin in range(0, tokens, PIECE))
    history = (torch.randint(0, 256, (size,), generator=generator) for size in sizes)
    own = resident_mb("RssAnon")
    with tempfile.TemporaryDirectory() as folder:
        where = {"tree_store": store} | ({"path": f"{folder}/session"} if store == "disk" else {})
        start = now()
        mc.begin_inference_session(history, settings=settings, **where)
        begin = now() - start
        plain, refocusing = [], []
        for token in torch.randint(0, 256, (appended, 1), generator=generator):
            start = now()
            mc.inference_step(token)
            seconds = now() - start
            report = mc.inference_report()
            refocused = report.next_refocus == settings.refocus_interval
            (refocusing if refocused else plain).append(seconds)
        figures = {
            "tokens": tokens,
            "begin_s": begin,
            "token_ms": statistics.median(plain) * 1e3,
            "refocus_ms": statistics.median(refocusing) * 1e3,
            "mean_ms": (sum(plain) + sum(refocusing)) / appended * 1e3,
            "tree_ram_mb": report.ram_bytes / 1e6,
            "tree_disk_mb": report.disk_bytes / 1e6,
            "own_memory_growth_mb": resident_mb("RssAnon") - own,
            "peak_memory_mb": resident_mb("VmHWM"),
            "first_token": report.first_token,
            "entries_by_lod": report.entries_by_lod,
        }
        mc.end_inference_session()
        return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="of history"
    )
    parser.add_argument(
        "--store", choices=["memory", "disk"], nargs="+", default=["memory", "disk"]
    )
    parser.add_argument("--wc-length", type=int, help="of the working context; the model's if none")
    parser.add_argument("--appended", type=int, default=1_280, help="tokens, one by one")
    parser.add_argument(
        "--cpu", action="store_true", help="CPU time, not the clock's: for a machine that is busy"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        where = arguments.tokens[0], arguments.store[0]
        how = arguments.appended, arguments.wc_length, arguments.cpu
        print(json.dumps(measure(*where, *how)))
        return
    results: dict[str, list[dict[str, Any]]] = {}
    for store in arguments.store:
        for tokens in arguments.tokens:
            command = [sys.executable, __file__, "--one", "--tokens", str(tokens)]
            command += ["--store", store, "--appended", str(arguments.appended)]
            command += ["--cpu"] if arguments.cpu else []
            if arguments.wc_length is not None:
                command += ["--wc-length", str(arguments.wc_length)]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            results.setdefault(store, []).append(json.loads(printed))
    if arguments.json:
        print(json.dumps(results))
        return
    for store, rows in results.items():
        print(f"{store}: per appended token, against a history of {rows[0]['tokens']:,} tokens")
        for row in rows:
            ratio = {n: row[n] / rows[0][n] for n in ("token_ms", "refocus_ms", "mean_ms")}
            print(
                f"  {row['tokens']:>9,} tokens: {row['token_ms']:.2f} ms ({ratio['token_ms']:.2f}x)"
                f", with a refocus {row['refocus_ms']:.1f} ms ({ratio['refocus_ms']:.2f}x), mean "
                f"{row['mean_ms']:.2f} ms ({ratio['mean_ms']:.2f}x); begun in "
                f"{row['begin_s']:.2f} s; tree {row['tree_ram_mb']:.1f} MB in memory, "
                f"{row['tree_disk_mb']:.1f} MB on disk; own memory "
                f"+{row['own_memory_growth_mb']:.0f} MB, process peak "
                f"{row['peak_memory_mb']:.0f} MB; covered from token {row['first_token']:,} on, "
                f"entries by LOD {row['entries_by_lod']}"
            )


if __name__ == "__main__":
    main()
