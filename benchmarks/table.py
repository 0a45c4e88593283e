"""Runs every benchmark and prints one table: what is claimed, what was required, what was measured.

Example: python benchmarks/table.py
         python benchmarks/table.py --only startup variants --json

Each benchmark is a script of its own beside this one, and runs alone, in a fresh process. Timings
belong to the machine they were taken on: run this on a quiet one. Exit code 1 when a requirement
is not met.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@dataclass(frozen=True)
class Row:
    """One claim.

    Attributes:
        claim: what was measured, and against what.
        required: in words; empty where nothing is.
        measured: in words.
        met: whether the requirement is; None where there is none.
    """

    claim: str
    required: str
    measured: str
    met: bool | None


def at_most(claim: str, value: float, most: float, unit: str = "") -> Row:
    return Row(claim, f"≤ {most:g}{unit}", f"{value:.3g}{unit}", value <= most)


def figure(claim: str, measured: str) -> Row:
    return Row(claim, "", measured, None)


def of_variants(rows: list[dict[str, float]]) -> Iterator[Row]:
    by_tokens = {row["tokens"]: row for row in rows}
    for tokens, most in ((16_384, 2.0), (4_096, 5.0)):
        of = f"of 4 sequences of {tokens:,} tokens, 5 contexts each"
        row = by_tokens[tokens]
        yield at_most(f"cuts and gather {of}, against one index_select", row["ratio"], most, " x")
        yield at_most(
            f"backward {of}, against that of index_select", row["backward_ratio"], most, " x"
        )
    growth = by_tokens[65_536]["ms_per_output_mb"] / by_tokens[4_096]["ms_per_output_mb"]
    yield at_most("time per byte of output at 65,536 tokens, against 4,096", growth, 1.25, " x")


def of_micro_step(figures: dict[str, float]) -> Iterator[Row]:
    yield at_most(
        "process_batch without its models' forwards, share of a step at 4,096 tokens",
        figures["controller_share_of_step"] * 100,
        5,
        " %",
    )
    yield figure("the same in time", f"{figures['controller_ms']:.1f} ms")
    yield figure("of it preference loss and metrics", f"{figures['preference_ms']:.2f} ms")


def of_memory(rows: list[dict[str, float]]) -> Iterator[Row]:
    plain, recompute = rows[-2:]
    saved = plain["saved_mb"]
    yield figure(
        f"peak memory of a step with {plain['variants']} variants, against what autograd saves",
        f"{plain['peak_mb'] / saved:.2f} x of {saved:.0f} MB",
    )
    yield figure(
        "peak memory of the same step with --recompute, against without",
        f"{recompute['peak_mb'] / plain['peak_mb']:.2f} x",
    )


def of_startup(figures: dict[str, Any]) -> Iterator[Row]:
    for name, most in figures["required_seconds"].items():
        yield at_most(name, figures["seconds"][name], most, " s")
    most = figures["required_added_to_torch_ms"]
    for name, added in figures["added_to_torch_ms"].items():
        yield at_most(f"{name}, over import torch", added, most, " ms")


def of_guard(figures: dict[str, Any]) -> Iterator[Row]:
    step = "a whole guarded micro-step with log"
    for name in ("guard, enforce + record, 16 frames (the default)", step):
        yield figure(f"{name}, over the bare module", f"{figures['added_us'][name]:.1f} µs")
    yield figure("the latter, share of a step of the demo", f"{figures['share_of_demo_step']:.3%}")


def of_conditions(figures: dict[str, Any]) -> Iterator[Row]:
    for name in ("`eval_mode`", "`frozen`"):
        yield figure(
            f"{name} asked of 400 parameters in 222 submodules, over a guard that asks nothing",
            f"{figures['added_us'][name]:.0f} µs",
        )


def of_ranks(figures: dict[str, float]) -> Iterator[Row]:
    yield figure(
        f"comparing {figures['ranks']} ranks after a micro-step, over that micro-step",
        f"{figures['added_micro_step_us']:.0f} µs over {figures['micro_step_us']:.0f} µs",
    )
    yield at_most(
        f"a call of {figures['ranks']} ranks that are compared, over one that is not",
        figures["added_call_us"],
        15,
        " µs",
    )


def of_postmortem(figures: dict[str, float]) -> Iterator[Row]:
    yield figure(
        "post-mortem of a log, against orjson.loads of its lines",
        f"{figures['times_orjson']:.1f} x, {figures['postmortem_mb_per_s']:.0f} MB/s",
    )


def of_session(figures: dict[str, list[dict[str, float]]]) -> Iterator[Row]:
    for store, (short, *_, long) in figures.items():
        yield figure(
            f"a token appended to {long['tokens']:,} tokens in {store}, "
            f"against {short['tokens']:,}",
            f"{long['mean_ms'] / short['mean_ms']:.2f} x of {short['mean_ms']:.1f} ms",
        )


def of_compiled(verdict: dict[str, Any]) -> Iterator[Row]:
    lines = {line["name"]: line for line in verdict["lines"]}
    failed = [name for name, line in lines.items() if line["passed"] is False]
    run = f"{verdict['steps']:,} steps and validations on {verdict['device']}, compiled and eager"
    yield Row(f"{run}: what must hold", "all of it", ", ".join(failed) or "all of it", not failed)
    yield at_most("recompiles after warm-up", lines["recompiles after warm-up"]["found"], 0)
    same = lines["loss, from the same weights"]
    yield at_most(
        "loss against eager, from the same weights", same["found"]["worst"], same["limit"]
    )
    yield figure(
        "a compiled step of a small model, against eager", f"{verdict['speedup']:.2f} x as fast"
    )


@dataclass(frozen=True)
class Benchmark:
    """A script, its arguments, and how its figures become rows."""

    script: str
    rows: Callable[[Any], Iterator[Row]]
    arguments: tuple[str, ...] = ()


BENCHMARKS = (
    Benchmark("startup", of_startup),
    Benchmark("guard_overhead", of_guard),
    Benchmark("conditions", of_conditions),
    Benchmark("rank_compare", of_ranks),
    Benchmark("postmortem_rate", of_postmortem),
    Benchmark("variants", of_variants),
    Benchmark("micro_step", of_micro_step),
    Benchmark("memory", of_memory),
    Benchmark("gpu_smoke", of_compiled, ("--out", os.devnull)),
    Benchmark("session_cost", of_session),
)


def run(benchmark: Benchmark) -> list[Row]:
    """The rows of one script, which runs in a process of its own."""
    path = Path(__file__).with_name(f"{benchmark.script}.py")
    command = [sys.executable, str(path), "--json", *benchmark.arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        raise SystemExit(f"{path.name} failed with exit code {done.returncode}")
    return list(benchmark.rows(json.loads(done.stdout)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [benchmark.script for benchmark in BENCHMARKS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("")
        rows = []
        for benchmark in BENCHMARKS:
            if benchmark.script in arguments.only:
                progress.update(task, description=f"{benchmark.script}.py")
                rows += run(benchmark)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        print("| what | measured | required | |\n|---|---:|---:|---|")
        for row in rows:
            met = {True: "yes", False: "**no**", None: ""}[row.met]
            print(f"| {row.claim} | {row.measured} | {row.required} | {met} |")
    sys.exit(1 if any(row.met is False for row in rows) else 0)


if __name__ == "__main__":
    main()
