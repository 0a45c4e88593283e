"""Does LensNet focus well in sessions that read a whole text, refocusing as they go?

Example: python benchmarks/session_focus.py --run-dir runs/smollm2 --files 8
         python benchmarks/session_focus.py --run-dir runs/smollm2 --text book.txt --tokens 100000

Each text is read token by token, as a model would that writes it, through a working context of few
entries. LensNet is compared with what takes its place in the same session: blocks that share words
with the last 16 tokens, the newest blocks, and random ones. All of them spend the same budget by
the same rules. A plain window of the last tokens is read beside them. The loss is that of every
token after the first 1,024, paired by text.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from lensnet_guard import CallPolicy, guard_module
from megacontext import MCController, SessionConfig, load_model
from megacontext.data.documents import read_documents
from megacontext.data.tokenizer import tokenizer_of
from megacontext.evaluation.intervals import paired_interval
from megacontext.model.matching import NO_TOKEN

SKIPPED = 1_024  # tokens, before which there is little to choose from
LAST = 16


class Scorer(nn.Module):
    """Takes LensNet's place: scores the entries of a view by a rule."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.rule = rule
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, *view: Tensor) -> Tensor:
        """Score entries, ``[1, E]``; see `LateInteractionLensNet.forward`."""
        embeddings, starts, _, _, _, tokens, _, child_tokens = view
        width, blocks = embeddings.shape[1], child_tokens.shape[1]
        if self.rule == "random":
            return torch.rand(1, width, generator=self.generator) * 2 - 1
        if self.rule == "newest":
            return (starts / starts.max().clamp(min=1)) * 2 - 1
        query = tokens[0, -LAST:].unique()
        query = query[query != NO_TOKEN]
        shared = (child_tokens[0][..., None] == query).any(1).sum(-1)  # [C]
        scores = shared / LAST + starts[0, :blocks] / starts.max().clamp(min=1) * 1e-3
        return F.pad(scores * 2 - 1, (0, width - blocks), value=-1.0)[None]


def read_in_session(mc: MCController, tokens: Tensor, settings: SessionConfig) -> np.ndarray:
    """Return the NLL of each token after the skipped ones, nats."""
    logits = mc.begin_inference_session(tokens[:SKIPPED], settings=settings)
    losses, last = [], logits[0, -1:]
    step = settings.refocus_interval
    for begin in range(SKIPPED, len(tokens), step):
        new = tokens[begin : begin + step]
        read = mc.inference_step(new)[0]
        losses.append(F.cross_entropy(torch.cat([last, read[:-1]]), new, reduction="none"))
        last = read[-1:]
    mc.end_inference_session()
    return torch.cat(losses).double().numpy()


def read_in_window(mc: MCController, tokens: Tensor, settings: SessionConfig) -> np.ndarray:
    """Return the same with nothing but the last tokens, as many as a working context has."""
    losses, step = [], settings.refocus_interval
    with torch.no_grad():
        for begin in range(SKIPPED, len(tokens), step):
            new = tokens[begin : begin + step]
            first = max(begin - (settings.wc_length or 0), 0)
            read = tokens[first : begin + len(new)][None]
            starts = torch.arange(read.shape[1])[None]
            embedded = mc.language_model.embed(read)
            logits = mc.logits(embedded, starts, torch.ones_like(starts), last=len(new) + 1)
            losses.append(F.cross_entropy(logits[0, :-1], new, reduction="none"))
    return torch.cat(losses).double().numpy()


def texts(mc: MCController, paths: list[Path], files: int, tokens: int) -> list[Tensor]:
    """Return the texts to read: held-out files, the longest first, or what is given, whole."""
    documents = read_documents(paths, tokenizer_of(mc.config.language_model))
    found = (*documents.training, *documents.held_out) if paths else documents.held_out
    if paths:
        joined = np.concatenate([part.astype(np.int64) for part in found])[:tokens]
        return [torch.from_numpy(joined)]
    long = sorted(found, key=len, reverse=True)[:files]
    return [torch.from_numpy(text[:tokens].astype(np.int64)) for text in long]


def main() -> None:
    """Read, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8_000, help="of each text, at most")
    parser.add_argument("--wc-length", type=int, default=218)
    parser.add_argument("--refocus-interval", type=int, default=96)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    mc = load_model(given.run_dir)
    settings = SessionConfig(
        wc_length=given.wc_length,
        refocus_interval=given.refocus_interval,
        iterations=2,
        expand_threshold=-2.0,
        margin=0.0,
        cooldown=0,
    )
    trained, rows = mc.lensnet, {}
    every = texts(mc, given.text, given.files, given.tokens)
    for way in ("LensNet", "lexical, last 16", "newest", "random", "window"):
        if way != "LensNet":
            mc.lensnet = guard_module(Scorer(way), policy=CallPolicy(scopes={})).module
        read = read_in_window if way == "window" else read_in_session
        rows[way] = [read(mc, text, settings) for text in track(every, way, disable=given.json)]
    mc.lensnet = trained
    result: dict[str, Any] = {"texts": len(every), "tokens": int(sum(map(len, every)))}
    pieces = [len(nll) for nll in rows["LensNet"]]
    # Of one text, stretches of it are drawn; of several, whole texts.
    clusters = np.repeat(np.arange(len(pieces)), pieces)
    if len(every) == 1:
        clusters = np.arange(pieces[0]) // 512
    lensnet = np.concatenate(rows["LensNet"])
    for way, nll in rows.items():
        joined = np.concatenate(nll)
        low, high = paired_interval(joined - lensnet, clusters)
        behind = float((joined - lensnet).mean())
        row = {"nll": float(joined.mean()), "behind_lensnet": behind, "interval": [low, high]}
        result[way] = row
    if given.json:
        print(json.dumps(result))
        return
    for way in rows:
        row = result[way]
        low, high = row["interval"]
        print(f"{way:18} {row['nll']:.3f}  {row['behind_lensnet']:+.3f} [{low:+.3f}, {high:+.3f}]")


if __name__ == "__main__":
    main()
