"""Outputs of CUDA graphs that are written over: torch's error, the guard's blame, silent cases.

Example: python benchmarks/gpu/overwritten.py --device cuda

A module compiled with ``mode="reduce-overhead"`` is called twice in a step while the first output
is still wanted: while torch records, it raises, and in steady execution the numbers change. Says
for each what torch does and what the guard says of it, and that correct use is left alone. On a
CPU nothing is overwritten, and the lines that only a GPU can tell have ``passed`` null.
"""

import argparse
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lensnet_guard import CallPolicy, Guard, LensNetHazard, guard_module
from lensnet_guard.postmortem import analyse

FIRST, SECOND = "kept = guard.module(x)", "guard.module(2 * x)"


def new_guard(device: torch.device, log: Path | None = None) -> Guard:
    """A guarded module that is compiled anew, with CUDA graphs where there is CUDA."""
    torch.compiler.reset()
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).to(device)
    module.compile(mode="reduce-overhead")
    return guard_module(module, policy=CallPolicy({"scorer": 1}), name="scorer", log=log)


def while_recording(device: torch.device, folder: Path) -> dict[str, Any]:
    """Two calls in a step from the first one on, and what comes of reading the first output."""
    guard = new_guard(device, log=folder)
    x = torch.randn(4, 64, device=device)
    error = None
    with hazards_told() as hazards, guard.context("inference"), torch.no_grad():
        try:
            with guard.context("inference"):
                for _ in range(4):
                    kept = guard.module(x)
                    guard.module(2 * x)
                    kept.sum().item()
        except RuntimeError as raised:
            error = raised
    notes = getattr(error, "__notes__", [])
    return {
        "raised": "has been overwritten by a subsequent run" in str(error),
        "error": first_sentence(error),
        "blame": notes,
        "blamed_lines": blamed_lines(notes),
        "hazards": hazards,
        "verdict": analyse([folder]).verdict,
    }


def in_steady_execution(device: torch.device) -> dict[str, Any]:
    """The graph is recorded and replayed; then two calls in a step."""
    guard = new_guard(device)
    x = torch.randn(4, 64, device=device)
    with guard.context("inference"), torch.no_grad():
        for _ in range(6):
            guard.module(x).sum().item()
        with hazards_told() as hazards:
            kept = guard.module(x)
            before = kept.clone()
            guard.module(2 * x)
            try:
                changed: bool | str = not torch.equal(before, kept)
            except RuntimeError as error:
                changed = str(error).splitlines()[0]
    return {"changed": changed, "hazards": hazards, "phase": phase(guard)}


def correct_use(device: torch.device) -> dict[str, Any]:
    """One call in a training step, validations without grad in between, outputs copied."""
    guard = new_guard(device)
    with hazards_told() as hazards:
        for step in range(8):
            x = torch.randn(4, 64, device=device)
            with guard.context("training"), guard.micro_step(step), guard.sanctioned("scorer"):
                loss = guard.module(x).square().mean()
                loss.backward()
            guard.module.zero_grad()
            with guard.context("inference"), torch.no_grad():
                kept = guard.module(x).clone()
                guard.module(2 * x)
                kept.sum().item()
    return {"hazards": hazards, "violations": guard.violation_count, "phase": phase(guard)}


def while_accumulating(device: torch.device) -> dict[str, Any]:
    """Gradients that torch left in a graph's memory, and that the next backward adds to."""
    guard = new_guard(device)
    error = None
    with hazards_told(), guard.context("training"):
        try:
            for step in range(8):
                with guard.micro_step(step), guard.sanctioned("scorer"):
                    guard.module(torch.randn(4, 64, device=device)).square().mean().backward()
        except RuntimeError as raised:
            error = raised
    return {"error": first_sentence(error), "blame": getattr(error, "__notes__", [])}


@contextmanager
def hazards_told() -> Iterator[list[str]]:
    """Collects the texts of hazards that are warned of, complete as the block ends."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            yield told
        finally:
            told += [str(w.message) for w in warned if w.category is LensNetHazard]


def first_sentence(error: BaseException | None) -> str | None:
    """What torch says, without the stack that it says it with."""
    return None if error is None else str(error).partition(" Stack trace")[0].splitlines()[0]


def phase(guard: Guard) -> str | None:
    state = guard.calls[-1].compiled
    return state.phase if state is not None else None


def blamed_lines(notes: list[str]) -> list[str]:
    """The lines of this file that the first note names, producer first."""
    source = Path(__file__).read_text().splitlines()
    numbers = re.findall(rf"{re.escape(Path(__file__).name)}:(\d+)", " ".join(notes[:1]))
    return [source[int(number) - 1].strip() for number in numbers]


def line(name: str, passed: bool | None, found: Any, limit: Any = None) -> dict[str, Any]:
    return {"name": name, "passed": passed, "found": found, "limit": limit}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda":
        device = torch.device("cuda", 0)
    cuda = device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        recording = while_recording(device, Path(folder))
    steady, correct = in_steady_execution(device), correct_use(device)
    accumulating = while_accumulating(device)

    def only_on_cuda(passed: bool) -> bool | None:
        return passed if cuda else None

    blame = recording["blamed_lines"] == [FIRST, SECOND]
    told = "overwritten by call" in recording["verdict"]
    lines = [
        line(
            "two calls in a step, while torch records: it raises its own error",
            only_on_cuda(recording["raised"]),
            recording["error"],
            "has been overwritten by a subsequent run",
        ),
        line(
            "the guard warned before, and its note names both lines",
            only_on_cuda(len(recording["hazards"]) >= 1 and blame),
            [note.splitlines()[0] for note in recording["blame"][:1]],
            "producer and overwriter",
        ),
        line("the log's verdict names them too", only_on_cuda(told), recording["verdict"], "both"),
        line(
            "two calls in a step, in steady execution: torch says",
            None,
            {True: "nothing, and the numbers change", False: "nothing"}.get(
                steady["changed"], steady["changed"]
            ),
        ),
        line(
            "the guard warns of it",
            only_on_cuda(len(steady["hazards"]) == 1),
            f"{len(steady['hazards'])} hazard, phase {steady['phase']}",
            "1 hazard",
        ),
        line(
            "correct use, training and validation without grad: hazards, violations",
            not correct["hazards"] and not correct["violations"],
            [len(correct["hazards"]), correct["violations"]],
            [0, 0],
        ),
        line(
            "gradients accumulated in a graph's memory: torch says",
            None,
            accumulating["error"] or "nothing",
        ),
        line(
            "the guard blames no call for it, for it is none's output",
            only_on_cuda(not accumulating["blame"]),
            accumulating["blame"],
            "none",
        ),
    ]
    cases = {"recording": recording, "steady": steady, "correct": correct}
    print(json.dumps({"lines": lines, **cases, "accumulating": accumulating}, indent=1))
    sys.exit(1 if any(entry["passed"] is False for entry in lines) else 0)


if __name__ == "__main__":
    main()
