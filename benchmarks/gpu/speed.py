"""How much faster a training step is with ``--bf16`` and ``--compile``.

Example: python benchmarks/gpu/speed.py --device cuda

`megacontext.train` of the demo's recipe with a larger language model, on the standard library's
text, once for each set of options; figures are the median time between logged steps, validations
left out. On a CPU the model is a small one, so that the script can be tried.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from megacontext import MCConfig, TrainConfig, train
from megacontext.training.train_result import StepReport

OPTIONS: tuple[dict[str, bool], ...] = (
    {},
    {"bf16": True},
    {"bf16": True, "compile": True},
)


def model_of(device: torch.device) -> MCConfig:
    """16 sequences of 1,024 tokens and 4 working contexts of each, where there is a GPU."""
    if device.type != "cuda":
        return MCConfig()
    return MCConfig(
        d_model=512,
        num_heads=8,
        lm_layers=8,
        lens_layers=4,
        sequence_tokens=1_024,
        train_wc_length=MCConfig(sequence_tokens=1_024, train_wc_length=1_024)
        .new_allocator()
        .reachable_length(1_024, 384),
    )


def step_ms(model: MCConfig, options: dict[str, bool], device: torch.device, steps: int) -> float:
    """Median milliseconds of an optimizer step, over the second half of a run."""
    moments: list[tuple[int, float]] = []

    def note(report: StepReport) -> None:
        moments.append((report.step, time.perf_counter()))

    settings = TrainConfig(
        steps=steps,
        batch_size=16 if device.type == "cuda" else 2,
        log_interval=max(steps // 10, 1),
        checkpoint_interval=steps,
        warmup_steps=1,
        device=device.type,
        **options,
    )
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder) / "run", model, settings, report=note)
    later = moments[len(moments) // 2 :]
    return (
        statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(later)) * 1e3
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    model, rows = model_of(device), []
    parameters = f"{model.lm_layers} layers of {model.d_model}"
    for options in OPTIONS:
        row: dict[str, Any] = {
            "model": f"a language model of {parameters} at {model.sequence_tokens} tokens",
            "options": " ".join(f"`--{name}`" for name in options),
            "step_ms": step_ms(model, options, device, 40 if device.type == "cuda" else 10),
        }
        rows.append(row)
        print(row, file=sys.stderr, flush=True)  # what there is, when the time is up
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
