"""What variants cost beside the one index_select that they cannot avoid.

Example: python benchmarks/variants.py
         python benchmarks/variants.py --tokens 16384 --rounds 15 --json

For B sequences of N tokens: sample V random cuts each, add the baseline, and gather the embeddings
of all of them; then the backward of that. Set against ``index_select`` of the same rows from the
same level table, and its backward. All are measured in turn, round after round; each ratio is the
median of the rounds' ratios.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from megacontext import GistNet, MegaContextTree, TrainingWCVariationAllocator
from megacontext.allocators.cut import Cut, kept_tokens, lod0_tail

K, D, B, V = 32, 256, 4, 4
RECENT = 128
SHARE = 4  # a working context has a quarter as many entries as the history has tokens


def timed(run: Callable[[], object], device: torch.device) -> tuple[float, object]:
    """Milliseconds until the result is there, and the result."""
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3, result


def measure(num_tokens: int, rounds: int, device: torch.device) -> dict[str, float]:
    """Medians over the rounds for one length of history."""
    allocator = TrainingWCVariationAllocator(K, recent_tokens=RECENT)
    length = allocator.reachable_length(num_tokens, num_tokens // SHARE)
    kept = kept_tokens(num_tokens, length, K)
    tokens = torch.randint(0, 256, (B, kept), device=device)
    embeddings = torch.randn(B, kept, D, device=device, requires_grad=True)
    tree = MegaContextTree.build(tokens, embeddings, GistNet(D).to(device), block_size=K, max_lod=2)
    table = tree.levels.detach().flatten(0, 1).requires_grad_()
    upstream = torch.randn(B * (1 + V), length, D, device=device)

    def sample() -> list[list[Cut]]:
        return [
            [lod0_tail(kept, length, K), *(allocator.sample(kept, length) for _ in range(V))]
            for _ in range(B)
        ]

    def backward(output: Tensor, source: Tensor) -> tuple[Tensor, ...]:
        gradient = upstream.view_as(output)
        return torch.autograd.grad(output, source, gradient, retain_graph=True)

    times: list[list[float]] = []
    for _ in range(rounds + 1):
        sampling, cuts = timed(sample, device)
        gathering, context = timed(lambda c=cuts: tree.working_context(c), device)
        ours, _ = timed(lambda c=context: backward(c.embeddings, tree.levels), device)
        rows = torch.cat(
            [b * (len(table) // B) + level_rows(cut, kept) for b in range(B) for cut in cuts[b]]
        ).to(device)
        selecting, selected = timed(lambda r=rows: table.index_select(0, r), device)
        theirs, _ = timed(lambda s=selected: backward(s, table), device)
        times.append([sampling, gathering, selecting, ours, theirs])
    rounds_ = times[1:]  # the first one warms up
    sampling, gathering, selecting, ours, theirs = map(
        statistics.median, zip(*rounds_, strict=True)
    )
    return {
        "tokens": num_tokens,
        "wc_length": length,
        "output_mb": upstream.nbytes / 1e6,
        "sample_ms": sampling,
        "gather_ms": gathering,
        "index_select_ms": selecting,
        "ratio": statistics.median((s + g) / i for s, g, i, _, _ in rounds_),
        "ms_per_output_mb": (sampling + gathering) / (upstream.nbytes / 1e6),
        "backward_ms": ours,
        "index_select_backward_ms": theirs,
        "backward_ratio": statistics.median(o / t for *_, o, t in rounds_),
    }


def level_rows(cut: Cut, num_tokens: int) -> Tensor:
    """Where a cut's entries stand in one history's level table."""
    offsets = torch.tensor([0, num_tokens, num_tokens + num_tokens // K])
    lods = torch.from_numpy(cut.lods)
    return offsets[lods] + torch.from_numpy(cut.positions // cut.spans)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_024, 4_096, 16_384, 65_536])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows = [measure(tokens, arguments.rounds, device) for tokens in arguments.tokens]
    if arguments.json:
        print(json.dumps(rows))
        return
    print(f"B = {B}, V = {V}, K = {K}, D = {D}, on {device.type}\n")
    print("| N | W | sample | gather | index_select | **ratio** | ms per MB | backward | ratio |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['tokens']:,} | {row['wc_length']:,} | {row['sample_ms']:.2f} ms "
            f"| {row['gather_ms']:.2f} ms | {row['index_select_ms']:.2f} ms "
            f"| **{row['ratio']:.2f}** | {row['ms_per_output_mb']:.2f} "
            f"| {row['backward_ms']:.1f} ms | {row['backward_ratio']:.2f} |"
        )


if __name__ == "__main__":
    main()
