"""Peak memory of a step, beside what autograd must keep for its backward.

Example: python benchmarks/memory.py
         python benchmarks/memory.py --tokens 1024 --json

Every storage that an operator makes is watched from allocation to release, so the figures do not
depend on an allocator. ``saved`` is what the graph saves for backward without ``recompute``, each
storage once, parameters aside; ``after forward`` what is alive when forward ends; ``peak`` the most
that is alive at any time in forward and backward, gradients of parameters included, parameters not.
What an operator allocates and frees within itself is not seen. ``recompute`` are the activation
checkpoints of the language model.
"""

import argparse
import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megacontext import MCConfig, MCController

BATCH = 4


class Live(TorchDispatchMode):
    """Bytes of the storages that operators have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}  # address of a storage -> bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._known or not size:
            return
        self._known[address] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self.now -= self._known.pop(address)


@contextmanager
def kept_by_autograd(parameters: set[int]) -> Iterator[dict[int, int]]:
    """Bytes by address of the storages that autograd saves, parameters aside."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def measure(tokens: int, variants: int, recompute: bool, device: torch.device) -> dict[str, Any]:
    """One step, in MB of 1e6 bytes; ``device_peak_mb`` is what CUDA's allocator says."""
    sizes = {"block_size": 32, "sequence_tokens": tokens, "recent_tokens": 128, "d_model": 256}
    reachable = MCConfig(**sizes, train_wc_length=tokens).new_allocator().reachable_length
    config = MCConfig(
        **sizes, num_variants=variants, train_wc_length=reachable(tokens, tokens // 4)
    )
    mc = MCController(config).to(device)
    mc.language_model.recompute = recompute
    batch = torch.randint(0, config.vocab_size, (BATCH, tokens), device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    parameters = {p.untyped_storage().data_ptr() for p in mc.parameters()}
    with Live() as live, kept_by_autograd(parameters) as saved:
        result = mc.process_batch(batch)
        variants_, loss = result.variants, result.loss
        del result
        alive = live.now
        torch.autograd.backward(loss)
    embeddings = variants_.working_context.embeddings
    levels = sum(tokens // config.block_size**lod for lod in range(config.max_lod + 1))
    return {
        "tokens": tokens,
        "variants": variants,
        "recompute": recompute,
        "levels_mb": BATCH * levels * config.d_model * embeddings.element_size() / 1e6,
        "working_contexts_mb": embeddings.nbytes / 1e6,
        "saved_mb": sum(saved.values()) / 1e6,
        "alive_after_forward_mb": alive / 1e6,
        "peak_mb": live.peak / 1e6,
        "device_peak_mb": torch.cuda.max_memory_allocated() / 1e6
        if device.type == "cuda"
        else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4_096, help="of each sequence (default 4096)")
    parser.add_argument("--variants", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    cases = [(v, recompute) for v in arguments.variants for recompute in (False, True)]
    with Progress(transient=True) as progress:
        rows = [
            measure(arguments.tokens, *case, device)
            for case in progress.track(cases, description="steps")
        ]
    if arguments.json:
        print(json.dumps(rows))
        return
    print(f"{BATCH} sequences of {arguments.tokens:,} tokens, D = 256, in MB, on {device.type}\n")
    print("| V | recompute | levels | contexts | saved | after forward | peak | peak / saved |")
    print("|---:|---|---:|---:|---:|---:|---:|---:|")
    for row, plain in zip(rows, (row for row in rows[::2] for _ in range(2)), strict=True):
        print(
            f"| {row['variants']} | {'yes' if row['recompute'] else 'no'} "
            f"| {row['levels_mb']:.0f} | {row['working_contexts_mb']:.0f} "
            f"| {plain['saved_mb']:.0f} | {row['alive_after_forward_mb']:.0f} "
            f"| {row['peak_mb']:.0f} | {row['peak_mb'] / plain['saved_mb']:.2f} |"
        )


if __name__ == "__main__":
    main()
