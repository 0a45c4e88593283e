"""LensNet on real text, beside SmolLM2: trains it on several seeds and compares ways to pick.

Example: python benchmarks/eval_text.py --out runs/eval-text
         python benchmarks/eval_text.py --out runs/eval-text --seeds 0 --sequences 24
         python benchmarks/eval_text.py --out runs/eval-text --device cuda --all-ways

The first seed makes gists and losses, which the others take. Whoever stops it may start it again:
it goes on where it was. What is found goes to reach.json, and is printed as tables.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacontext.evaluation.ways import ASKED, FULL, LENSNET, MAIN, RANDOM

DATA = ("files", "reuse", "needles", "mqar")
# Tokens that are read, about: of training's stages, and of one sequence in an evaluation, to which
# another seed adds no more than what its LensNet picks.
TRAINED, GUESSED, JUDGED, JUDGED_AGAIN = 1_400_000, 300_000, 4_000, 500


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: What it does.
        arguments: Of ``megacontext``.
        done: Whether it was done before.
        tokens: That it reads, about.
    """

    name: str
    arguments: list[str]
    done: bool
    tokens: int


def steps(given: argparse.Namespace) -> Iterator[Step]:
    """Yield the steps, in their order."""
    first = given.out / f"seed{given.seeds[0]}"
    on = ["--device", given.device]
    for seed in given.seeds:
        run = given.out / f"seed{seed}"
        begun = (run / "config.json").exists()
        arguments = ["train", "--run-dir", str(run)]
        if begun:
            arguments += ["--resume"]
        else:
            arguments += ["--setting", "smollm2", "--seed", str(seed), *on]
            arguments += [] if run == first else ["--gists-of", str(first)]
        finished = (run / "overview.png").exists()
        yield Step(f"train seed {seed}", arguments, finished, TRAINED if run == first else GUESSED)
    for data in DATA:
        for seed in given.seeds:
            run = given.out / f"seed{seed}"
            arguments = ["eval", "--run-dir", str(run), "--data", data, *on]
            arguments += ["--sequences", str(given.sequences)]
            arguments += ["--losses", str(given.out / "losses.jsonl")]
            if not given.all_ways:
                arguments += ["--main-ways", "--no-session", "--oracle-draws", "0"]
            done = found(run, data, given) is not None
            tokens = given.sequences * (JUDGED if run == first else JUDGED_AGAIN)
            yield Step(f"compare on {data}, seed {seed}", arguments, done, tokens)


def found(run: Path, data: str, given: argparse.Namespace) -> dict[str, Any] | None:
    """Return what an evaluation found; None where it was not made, or was another."""
    path = run / f"eval-{data}.json"
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    every = any(row["way"] not in MAIN for row in result["ways"])
    fits = result["sequences"] == given.sequences and (every or not given.all_ways)
    return result if fits else None


def table(data: str, results: dict[int, dict[str, Any]]) -> list[str]:
    """Write what was found on one data set, a row for each way, as Markdown."""
    of_seed = {s: {row["way"]: row for row in r["ways"]} for s, r in results.items()}
    first = next(iter(of_seed.values()))
    seeds = " | ".join(f"above LensNet, seed {seed}" for seed in of_seed)
    lines = [f"| {data} | NLL, nats | {seeds} |", "|---" * (2 + len(of_seed)) + "|"]
    for way, row in first.items():
        if way == LENSNET:
            each = [of_seed[seed][way] for seed in of_seed]
            nll = ", ".join(f"{r['nll']:.3f}" for r in each)
            closed = " | ".join(f"{r['gap_to_full_closed']:.2f} closed" for r in each)
            lines.append(f"| **{way}** | {nll} | {closed} |")
            continue
        behind = " | ".join(_behind(of_seed[seed][way]) for seed in of_seed)
        lines.append(f"| {way} | {row['nll']:.3f} | {behind} |")
    return lines


def _behind(row: dict[str, Any]) -> str:
    low, high = row["behind_lensnet_interval"]
    return f"{row['behind_lensnet']:+.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    """Make the steps that are left, and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/eval-text"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sequences", type=int, default=200, help="of each data set")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--all-ways", action="store_true", help="not the main ones alone")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    read, seconds = 0, 0.0
    names = [step.name for step in steps(given)]
    for number, name in enumerate(names):
        every = list(steps(given))  # what is done changes as it goes
        step = every[number]
        if step.done:
            continue
        left = sum(s.tokens for s in every[number:] if not s.done)
        estimate = f", about {left * seconds / read / 60:.0f} minutes left" if read else ""
        print(f"\n[{number + 1}/{len(names)}] {name}{estimate}", flush=True)
        begin = time.monotonic()
        command = [sys.executable, "-m", "megacontext", *step.arguments]
        if code := subprocess.run(command, check=False).returncode:
            sys.exit(code)
        read += step.tokens
        seconds += time.monotonic() - begin
    reach: dict[str, Any] = {}
    for data in DATA:
        results = {s: found(given.out / f"seed{s}", data, given) for s in given.seeds}
        reach[data] = {str(seed): result for seed, result in results.items()}
        print("\n" + "\n".join(table(data, {s: r for s, r in results.items() if r})))
    print(f"\nclosed: of the gap from {RANDOM} to {FULL}; {ASKED}: what a picker that knows holds")
    (given.out / "reach.json").write_text(json.dumps(reach, indent=1) + "\n")


if __name__ == "__main__":
    main()
