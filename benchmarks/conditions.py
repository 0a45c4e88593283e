"""What each stock condition adds to a guarded call of a module of 400 parameters.

Example: python benchmarks/conditions.py
         python benchmarks/conditions.py --json > conditions.json

The module has 222 submodules and does nothing; its calls are made in training, in turn with those
of the same module under a guard that asks nothing. Each figure is the median over rounds of the
mean time per call, less that of the guard that asks nothing in the same round. `finite` and
`detached` are asked of a result of three tensors. With `same_inputs` the other model is called
before, and what its hook adds is counted too.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from guard_overhead import machine
from rich.progress import Progress
from torch import nn

from lensnet_guard import (
    CallPolicy,
    Condition,
    adapters_off,
    autocast,
    detached,
    eval_mode,
    finite,
    frozen,
    guard_module,
    inference_too,
    no_grad,
    same_inputs,
)

CALLS = 200
NOTHING, NOTHING_BUT_OTHER = "a guard that asks nothing", "the same, and the other model"
X = torch.ones(4, 3)
RESULT = [torch.ones(4, 1_000) for _ in range(3)]


class Wide(nn.Module):
    """400 parameters in 200 layers; gives back what is at hand, so that the call is measured."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(*(nn.Linear(8, 8) for _ in range(10))) for _ in range(20)
        )

    def forward(self, input_ids: torch.Tensor) -> Any:
        return RESULT


class Other(nn.Module):
    """The model that `same_inputs` watches."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids


@dataclass(frozen=True)
class Row:
    """A guard, and how it is called.

    Attributes:
        call: one call.
        guard: what the calls are made under.
        calls: of a round; fewer where one takes long.
        against: the row that it is compared with.
    """

    call: Callable[[], object]
    guard: Any
    calls: int = CALLS
    against: str = NOTHING

    def run(self) -> float:
        """Microseconds per call of one round."""
        call, guard = self.call, self.guard
        with guard.context("training"), guard.micro_step(), guard.sanctioned("kl"), torch.no_grad():
            call()
            start = time.perf_counter()
            for _ in range(self.calls):
                call()
            return (time.perf_counter() - start) / self.calls * 1e6


def row(*requires: Condition, ensures: tuple[Condition, ...] = (), calls: int = CALLS) -> Row:
    policy = CallPolicy({"kl": (0, None)}, requires=requires, ensures=ensures)
    guard = guard_module(Wide().eval(), policy=policy)
    return Row(lambda: guard.module(X), guard, calls)


def row_with_other(other: nn.Module, *requires: Condition) -> Row:
    alone = row(*requires)
    return Row(lambda: (other(X), alone.call()), alone.guard, against=NOTHING_BUT_OTHER)


def all_rows() -> dict[str, Row]:
    import peft  # noqa: F401  # or no module has adapters that could be looked for

    one, two = Other(), Other()
    return {
        NOTHING: row(),
        NOTHING_BUT_OTHER: row_with_other(Other()),
        "`no_grad`": row(no_grad),
        "`eval_mode`": row(eval_mode),
        "`frozen`": row(frozen),
        "`frozen(fingerprint=True)`": row(frozen(fingerprint=True), calls=5),
        "`autocast(None)`": row(autocast(None)),
        "`adapters_off`, PEFT being loaded": row(adapters_off),
        "`same_inputs(other, ...)`": row_with_other(one, same_inputs(one, "input_ids")),
        "`same_inputs(other, ..., values=True)`": row_with_other(
            two, same_inputs(two, "input_ids", values=True)
        ),
        "`finite`": row(ensures=(finite,)),
        "`detached`": row(ensures=(detached,)),
        "`inference_too(no_grad)`": row(*inference_too(no_grad)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25, help="of every row (default 25)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = all_rows()
    times: dict[str, list[float]] = {name: [] for name in rows}
    with Progress(transient=True) as progress:
        for _ in progress.track(range(arguments.rounds), description="rounds"):
            for name, one in rows.items():
                times[name].append(one.run())
    added = {
        name: statistics.median(a - b for a, b in zip(times[name], times[one.against], strict=True))
        for name, one in rows.items()
        if one.against != name and name != NOTHING_BUT_OTHER
    }
    bare = statistics.median(times[NOTHING])
    if arguments.json:
        print(json.dumps({"machine": machine(), "nothing_us": bare, "added_us": added}))
        return
    print(f"{machine()}; a call under {NOTHING} takes {bare:.1f} µs\n")
    print("| | added per call (µs) |\n|---|---:|")
    for name, microseconds in added.items():
        print(f"| {name} | {microseconds:,.1f} |")


if __name__ == "__main__":
    main()
