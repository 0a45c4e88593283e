"""Training compiled and eager, side by side: equal losses, no recompile, CUDA graphs, how fast.

Example: python benchmarks/gpu_smoke.py
         python benchmarks/gpu_smoke.py --steps 200 --out smoke.json

Two trainings with the same seeds, one of them with ``--compile``, take turns: a block of steps
each, then a validation each. On CUDA, where LensNet and GistNet get CUDA graphs, the model is the
demo's, without CUDA a small one. The verdict goes to a JSON file, a line for each thing that must
hold, and the loss of every step; the exit code is 0 when all of them hold.

Rounding differs, and training amplifies it, so that the two drift apart however right both are.
They are compared over the first steps, before that; and all along from the same weights on the
same sequences: at the end of every block an eager model takes the compiled one's weights, and both
accumulate the gradients of the same micro-steps.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch._dynamo.utils import counters

from lensnet_guard import LensNetHazard, lensnet_guard
from lensnet_guard.postmortem import read_verdict
from megacontext import MCConfig, MCController
from megacontext.training.distributed import World
from megacontext.training.optimization import own_gradients
from megacontext.training.run_folder import RunFolder
from megacontext.training.sources import load_source
from megacontext.training.train_config import TrainConfig
from megacontext.training.trainer import Trainer

FIRST = 10  # steps in which both still have almost the same weights
FIRST_TOLERANCE = 1e-3  # relative, of each step's loss
LOSS_TOLERANCE = 1e-4  # relative, from the same weights
GRADIENT_TOLERANCE = 1e-2  # of the gradient's norm, from the same weights
END_TOLERANCE = 0.05  # relative, of the mean loss over the last tenth of the steps

SMALL = MCConfig(
    d_model=32,
    num_heads=2,
    lm_layers=1,
    lens_layers=1,
    block_size=4,
    sequence_tokens=64,
    train_wc_length=34,
    recent_tokens=16,
    horizon_tokens=8,
    num_variants=2,
)


class Run:
    """One of the two trainings, and what was measured of it."""

    def __init__(self, model: MCConfig, settings: TrainConfig, folder: Path) -> None:
        self.folder = RunFolder(folder)
        device = torch.device(settings.device)
        source = load_source(settings, model)
        self.trainer = Trainer(model, settings, source, self.folder, device, World())
        own_gradients(self.trainer.mc.parameters())
        self.rows: list[dict[str, float]] = []
        self.validations: list[tuple[float, float]] = []
        self.step_ms: list[float] = []
        self.peak_bytes = 0

    def steps(self, number: int, done: Callable[[], None]) -> None:
        """A block of optimizer steps, and a validation."""
        trainer, cuda = self.trainer, self.trainer.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with trainer.mc.context("training"):
            for _ in range(number):
                begin = time.perf_counter()
                trainer.make_step()
                if cuda:
                    torch.cuda.synchronize()
                self.step_ms.append((time.perf_counter() - begin) * 1e3)
                self.rows.append(trainer.means.take())
                done()
            self.validations.append((trainer.validation_loss(), trainer.validation_agreement()))
        if cuda:
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated())

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows]


class Probe:
    """An eager model that takes the weights of a compiled run, to do what it does."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.mc = MCController(run.trainer.mc.config).to(run.trainer.device)
        own_gradients(self.mc.parameters())
        self.differences: list[dict[str, float]] = []

    def compare(self) -> None:
        """One optimizer step's micro-steps, from the same weights on the same sequences."""
        trainer = self.run.trainer
        self.mc.load_state_dict(trainer.mc.state_dict())
        drawn = trainer.mc.allocator.drawn  # the training goes on as if nothing had been drawn
        results = []
        for mc in (self.mc, trainer.mc):
            mc.allocator.drawn = drawn
            results.append(self._micro_steps(mc))
        trainer.mc.allocator.drawn = drawn
        (eager, expected), (compiled, found) = results
        self.differences.append(
            {
                "loss": max(map(relative, compiled, eager)),
                **{
                    name: float((found[name] - gradient).norm() / gradient.norm())
                    for name, gradient in expected.items()
                },
            }
        )

    def _micro_steps(self, mc: MCController) -> tuple[list[float], dict[str, torch.Tensor]]:
        """Losses, and the accumulated gradients of LensNet and of the rest."""
        trainer, losses = self.run.trainer, []
        settings = trainer.settings
        rng = np.random.default_rng([trainer.step, 3])
        with mc.context("training"):
            for micro_step in range(settings.accumulation):
                batch = trainer.source.batch(
                    rng, settings.batch_size, mc.config.sequence_tokens
                ).to(trainer.device)
                result = mc.process_batch(
                    batch.tokens, step=trainer.step, micro_step=settings.accumulation + micro_step
                )
                torch.autograd.backward(result.loss / settings.accumulation)
                losses += [result.lm_loss.item(), result.lens_loss.item()]
        gradients: dict[str, list[torch.Tensor]] = {"gradient": [], "lens_gradient": []}
        for name, parameter in mc.named_parameters():
            assert parameter.grad is not None
            part = "lens_gradient" if name.startswith("lensnet.") else "gradient"
            gradients[part].append(parameter.grad.flatten().cpu().clone())
            parameter.grad.zero_()
        return losses, {name: torch.cat(parts) for name, parts in gradients.items()}


def relative(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), 1e-6)


def compiled_so_far() -> int:
    """Code objects that torch has compiled in this process."""
    return int(counters["frames"]["total"])


def waits_for_nothing(run: Run) -> str | None:
    """Whether a micro-step's forward never waits for the GPU: None, or what did."""
    trainer = run.trainer
    batch = trainer.source.batch(
        np.random.default_rng(4), trainer.settings.batch_size, trainer.mc.config.sequence_tokens
    ).to(trainer.device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with trainer.mc.context("training"):
            result = trainer.mc.process_batch(batch.tokens, step=trainer.step, micro_step=99)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.autograd.backward(result.loss)
    return None


@contextmanager
def progress_bar(console: Console, total: int) -> Iterator[Callable[[], None]]:
    """Says how far it is; advances with every call."""
    columns = (
        TextColumn("[bold]steps, eager and compiled"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


def smoke(steps: int, interval: int, folder: Path, console: Console) -> dict[str, Any]:
    """Both trainings, and the verdict as a JSON-ready object."""
    cuda = torch.cuda.is_available()
    model = MCConfig() if cuda else SMALL
    settings = {
        name: TrainConfig(
            steps=steps,
            batch_size=8 if cuda else 4,
            accumulation=2,
            device="cuda" if cuda else "cpu",
            compile=name == "compiled",
        )
        for name in ("eager", "compiled")
    }
    runs = {name: Run(model, settings[name], folder / name) for name in settings}
    probe = Probe(runs["compiled"])
    failure, warm_up_s, recompiles, phases, waited = None, None, None, [], None
    with warnings.catch_warnings(record=True) as warned, ExitStack() as guards:
        warnings.simplefilter("default")
        warnings.simplefilter("always", LensNetHazard)
        for run in runs.values():
            guards.enter_context(lensnet_guard(run.trainer.mc, log=run.folder.path))
        try:
            with progress_bar(console, 2 * steps) as done:
                begin = time.perf_counter()
                for run in runs.values():  # warm-up: whatever is compiled, is compiled here
                    run.steps(1, done)
                probe.compare()
                warm_up_s = time.perf_counter() - begin
                compiled = compiled_so_far()
                with torch.compiler.set_stance("fail_on_recompile"):
                    for block in range(1, steps, interval):
                        for run in runs.values():
                            run.steps(min(interval, steps - block), done)
                        probe.compare()
                    waited = waits_for_nothing(runs["compiled"]) if cuda else None
                recompiles = compiled_so_far() - compiled
            calls = runs["compiled"].trainer.mc.guard.calls[-20:]
            phases = sorted({str(c.compiled.phase) for c in calls if c.compiled is not None})
        except Exception as error:  # the verdict says so
            failure = f"{type(error).__name__}: {error}"
    hazards = [str(w.message) for w in warned if issubclass(w.category, LensNetHazard)]
    others = sorted({str(w.message) for w in warned if not issubclass(w.category, LensNetHazard)})
    lines = [line("every step was run", failure is None, failure or steps)]
    if failure is None:
        lines += compared(runs, probe)
    lines += [
        line("recompiles after warm-up", recompiles == 0, recompiles, 0),
        line("graph breaks", not counters["graph_break"], sum(counters["graph_break"].values()), 0),
        *guarded(runs),
        line("outputs overwritten in use", not hazards, hazards or 0, 0),
        line(
            "CUDA graphs skipped",
            counters["inductor"]["cudagraph_skips"] == 0 if cuda else None,
            counters["inductor"]["cudagraph_skips"],
            0,
        ),
        line("the last LensNet calls", phases == ["replay"] if cuda else None, phases, ["replay"]),
        line("a forward waits for the GPU", waited is None if cuda else None, waited),
    ]
    times = {name: median(run.step_ms[1:]) for name, run in runs.items()}
    losses = {name: run.losses() for name, run in runs.items()}
    apart = list(map(relative, losses["compiled"], losses["eager"]))
    return {
        "passed": all(entry["passed"] is not False for entry in lines),
        "device": torch.cuda.get_device_name()
        if cuda
        else f"cpu, {torch.get_num_threads()} thread",
        "torch": torch.__version__,
        "steps": steps,
        "validation_interval": interval,
        "accumulation": settings["eager"].accumulation,
        "lines": lines,
        "warm_up_s": warm_up_s,
        "graphs_compiled": counters["stats"]["unique_graphs"],
        "step_ms_median": times,
        "speedup": times["eager"] / times["compiled"] if all(times.values()) else None,
        "peak_memory_mb": {n: r.peak_bytes / 2**20 if cuda else None for n, r in runs.items()},
        "final_validation": {n: r.validations[-1:] for n, r in runs.items()},
        "other_warnings": others,
        "loss_apart_worst": max(apart, default=None),
        "losses": losses,
    }


def median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def line(name: str, passed: bool | None, found: Any, limit: Any = None) -> dict[str, Any]:
    """One thing that must hold; ``passed`` is None where this machine cannot tell."""
    return {"name": name, "passed": passed, "found": found, "limit": limit}


def compared(runs: dict[str, Run], probe: Probe) -> Iterator[dict[str, Any]]:
    """Whether both compute the same."""
    eager, compiled = (runs[name].losses() for name in ("eager", "compiled"))
    apart = list(map(relative, compiled, eager))
    first = max(apart[:FIRST])
    yield line(f"loss of the first {FIRST} steps", first <= FIRST_TOLERANCE, first, FIRST_TOLERANCE)
    for name, limit in (
        ("loss", LOSS_TOLERANCE),
        ("gradient", GRADIENT_TOLERANCE),
        ("lens_gradient", GRADIENT_TOLERANCE),
    ):
        worst = max(d[name] for d in probe.differences)
        found = {
            "worst": worst,
            "median": median([d[name] for d in probe.differences]),
            "times": len(probe.differences),
        }
        yield line(f"{name}, from the same weights", worst <= limit, found, limit)
    last = max(len(eager) // 10, 1)
    end = relative(statistics.mean(compiled[-last:]), statistics.mean(eager[-last:]))
    yield line(f"mean loss of the last {last} steps", end <= END_TOLERANCE, end, END_TOLERANCE)
    finite = all(map(math.isfinite, eager + compiled))
    yield line("every loss is finite", finite, {"first": compiled[0], "last": compiled[-1]})


def guarded(runs: dict[str, Run]) -> Iterator[dict[str, Any]]:
    """What the guard's logs say."""
    for name, run in runs.items():
        verdict = read_verdict(run.folder.path)
        held = verdict.clean and set(verdict.calls_per_micro_step) == {1}
        yield line(f"one LensNet call per micro-step, {name}", held, str(verdict))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2_000, help="optimizer steps (default 2,000)")
    parser.add_argument(
        "--validate-every", type=int, default=50, metavar="STEPS", help="default 50"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("gpu_smoke.json"), help="default gpu_smoke.json"
    )
    parser.add_argument("--json", action="store_true", help="print the verdict on stdout too")
    arguments = parser.parse_args()
    if arguments.steps < 2 * FIRST or arguments.validate_every < 1:
        parser.error(f"there must be at least {2 * FIRST} steps, and 1 between validations")
    torch.set_num_threads(1)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        verdict = smoke(arguments.steps, arguments.validate_every, Path(folder), console)
    arguments.out.write_text(json.dumps(verdict, indent=2) + "\n")
    print(json.dumps({k: v for k, v in verdict.items() if k != "losses"}, indent=2))
    marks = {True: "pass", False: "FAIL", None: "-"}
    for entry in verdict["lines"]:
        console.print(f"{marks[entry['passed']]:4}  {entry['name']}", markup=False)
    console.print(f"verdict in {arguments.out}", markup=False)
    sys.exit(0 if verdict["passed"] else 1)


if __name__ == "__main__":
    main()
