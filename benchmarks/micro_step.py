"""What a micro-step costs beside the forwards of its models, which it cannot avoid.

Example: python benchmarks/micro_step.py
         python benchmarks/micro_step.py --tokens 1024 --rounds 5 --json

``process_batch`` of 4 sequences with 4 variants each, timed in parts: the forwards of language
model, GistNet and LensNet, by hooks around them; and everything else, which is the controller's:
cuts, gather, cross-entropy, preference pairs, losses, metrics, guard. On a CUDA device each part
waits for it, so the rest is an upper bound. The preference loss with its metrics is timed on its
own too. The share is of a whole step: forward and backward.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from rich.progress import Progress

from megacontext import MCConfig, MCController, preference

BATCH, VARIANTS = 4, 4


class Clock:
    """Milliseconds by name; waits for the device before it looks."""

    def __init__(self, device: torch.device) -> None:
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.ms: Counter[str] = Counter()

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.ms[name] += (time.perf_counter() - start) * 1e3  # type: ignore[assignment]

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.time(name):
                return function(*args, **kwargs)

        return timed

    def watch(self, module: torch.nn.Module, name: str) -> ExitStack:
        """Time a module's forwards while the stack is open."""
        running: list[Any] = []

        def begin(*_: Any) -> None:
            running.append(self.time(name))
            running[-1].__enter__()

        def end(*_: Any) -> None:
            running.pop().__exit__(None, None, None)

        stack = ExitStack()
        stack.callback(module.register_forward_pre_hook(begin).remove)
        stack.callback(module.register_forward_hook(end).remove)
        return stack


def round_of(mc: MCController, batch: torch.Tensor) -> Counter[str]:
    """One step, in parts."""
    clock = Clock(batch.device)
    model = mc.language_model
    with ExitStack() as stack:
        for module in (model, model.embedding, mc.gistnet, mc.lensnet):
            stack.enter_context(clock.watch(module, "models"))
        for name in ("preference_loss", "preference_metrics"):
            timed = clock.around("preference", getattr(preference, name))
            stack.enter_context(patch.object(preference, name, timed))
        with clock.time("forward"):
            result = mc.process_batch(batch)
    with clock.time("backward"):
        torch.autograd.backward(result.loss)
    mc.zero_grad()
    return clock.ms


def measure(tokens: int, rounds: int, device: torch.device) -> dict[str, float]:
    """Medians over the rounds."""
    sizes = {"block_size": 32, "sequence_tokens": tokens, "recent_tokens": 128, "d_model": 256}
    longest = {"train_wc_length": tokens}  # no collapse at all; the wanted length is asked for
    reachable = MCConfig(**sizes, **longest).new_allocator().reachable_length
    config = MCConfig(
        **sizes, num_variants=VARIANTS, train_wc_length=reachable(tokens, tokens // 4)
    )
    mc = MCController(config).to(device)
    batch = torch.randint(0, config.vocab_size, (BATCH, tokens), device=device)
    with Progress(transient=True) as progress:
        steps = progress.track(range(rounds + 1), description="steps")
        taken = [round_of(mc, batch) for _ in steps][1:]  # the first one warms up
    figures = {
        f"{name}_ms": statistics.median(ms[name] for ms in taken)
        for name in ("models", "forward", "backward", "preference")
    }
    rest = [ms["forward"] - ms["models"] for ms in taken]
    step = [ms["forward"] + ms["backward"] for ms in taken]
    return {
        "tokens": tokens,
        "wc_length": config.train_wc_length,
        **figures,
        "controller_ms": statistics.median(rest),
        "controller_share_of_step": statistics.median(
            r / s for r, s in zip(rest, step, strict=True)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4_096, help="of each sequence (default 4096)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    arguments = parser.parse_args()
    figures = measure(arguments.tokens, arguments.rounds, torch.device(arguments.device))
    if arguments.json:
        print(json.dumps(figures))
        return
    print(
        f"{BATCH} sequences of {figures['tokens']:,} tokens, {VARIANTS} variants and the baseline "
        f"of {figures['wc_length']:,} entries each, D = 256, on {arguments.device}:\n"
        f"  models' forwards {figures['models_ms']:.1f} ms, backward "
        f"{figures['backward_ms']:.1f} ms\n"
        f"  everything else  {figures['controller_ms']:.1f} ms, "
        f"{figures['controller_share_of_step']:.1%} of the step (required: at most 5 %)\n"
        f"  of it preference loss and metrics {figures['preference_ms']:.2f} ms"
    )


if __name__ == "__main__":
    main()
