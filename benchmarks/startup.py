"""How long the two commands take to show their help, and what the guard adds to importing torch.

Example: python benchmarks/startup.py
         python benchmarks/startup.py --rounds 21 --json

Each row is a fresh Python process, started in turn with the others, round after round. A first
round that does not count reads the files and leaves the compiled ones (``__pycache__``), as an
installation does. Figures are medians over the rounds; what is added to ``import torch`` is the
median of the differences within each round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from rich.console import Console
from rich.progress import Progress

NO_CACHE = ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
TORCH = "import torch"
GUARD = "import torch, lensnet_guard"
NAMES = "import torch, lensnet_guard, every public name used"
MEGACONTEXT, LENSNET_GUARD = "megacontext --help", "lensnet-guard --help"
ROWS = {
    "python -c pass": ("-c", "pass"),
    TORCH: ("-c", TORCH),
    GUARD: ("-c", GUARD),
    NAMES: (
        "-c",
        f"{GUARD}\nfor name in lensnet_guard.__all__: getattr(lensnet_guard, name)",
    ),
    MEGACONTEXT: ("-m", "megacontext", "--help"),
    LENSNET_GUARD: ("-m", "lensnet_guard", "--help"),
}
ADDED = (GUARD, NAMES)
MOST_SECONDS = {MEGACONTEXT: 0.3, LENSNET_GUARD: 0.3}
MOST_ADDED_MS = 50
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in NO_CACHE}


def seconds(arguments: tuple[str, ...]) -> float:
    """From the start of a process to its end."""
    start = time.perf_counter()
    command = [sys.executable, *arguments]
    subprocess.run(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT, check=True)
    return time.perf_counter() - start


def measure(rounds: int) -> list[dict[str, float]]:
    """Seconds of each row, round by round."""
    taken = []
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        for number in progress.track(range(rounds + 1), description="rounds"):
            row = {name: seconds(arguments) for name, arguments in ROWS.items()}
            if number:
                taken.append(row)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    arguments = parser.parse_args()
    taken = measure(arguments.rounds)
    median = {name: statistics.median(row[name] for row in taken) for name in ROWS}
    added_ms = {
        name: statistics.median((row[name] - row[TORCH]) * 1e3 for row in taken) for name in ADDED
    }
    if arguments.json:
        figures = {
            "rounds": arguments.rounds,
            "seconds": median,
            "required_seconds": MOST_SECONDS,
            "added_to_torch_ms": added_ms,
            "required_added_to_torch_ms": MOST_ADDED_MS,
        }
        print(json.dumps(figures))
        return
    print(f"medians of {arguments.rounds} fresh processes each, in turn")
    for name, taking in median.items():
        line = f"  {name}: {taking:.3f} s"
        if name in MOST_SECONDS:
            line += f" (required: under {MOST_SECONDS[name]} s)"
        if name in added_ms:
            line += f", {added_ms[name]:+.0f} ms over import torch"
            line += f" (required: under {MOST_ADDED_MS} ms)"
        print(line)


if __name__ == "__main__":
    main()
