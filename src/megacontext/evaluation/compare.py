"""Does LensNet focus better than others? Ways to pick a working context, at equal length.

Every way makes a cut of each held-out sequence with the same number of entries; the language model
reads it, and its NLL over the labels of the horizon is compared, sequence by sequence. LensNet sees
the focus view, which ends before the horizon, as in training; other pickers see as much.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megacontext.allocators.cut import Cut, kept_tokens
from megacontext.controller import MCController
from megacontext.data.source import Source
from megacontext.evaluation.chunk import Chunk
from megacontext.evaluation.memo import Memo, key_of
from megacontext.evaluation.pickers import Floats
from megacontext.evaluation.ways import ORACLE, RANDOM, Comparing, Kind
from megacontext.model.fingerprint import fingerprint

CHUNK = 32  # sequences at a time
# What else decides a loss than weights, tokens and the cut: where the horizon begins, how large a
# block is, and what a session does.
_SIZES = (
    *("block_size", "max_lod", "horizon_tokens", "recent_tokens"),
    *("train_wc_length", "focus_window"),
)


@dataclass(frozen=True)
class Evaluation:
    """Losses of one model, by the way in which its working contexts were picked.

    Attributes:
        nll: Mean NLL per label of the horizon, nats, one per sequence, float64 ``[S]``.
        kinds: What each way goes by.
        entries: Of the working contexts.
        examples: Each way's cut of the first sequence.
        tokens: Of that sequence.
        clusters: What sequences belong together, by number, int64 ``[S]``: the files that they are
            from; None where they are not drawn by file.
    """

    nll: Mapping[str, Floats]
    kinds: Mapping[str, Kind]
    entries: Mapping[str, int]
    examples: Mapping[str, Cut]
    tokens: int
    clusters: NDArray[np.int64] | None = None


def evaluate(
    mc: MCController,
    source: Source,
    *,
    sequences: int,
    seed: int,
    what: Comparing | None = None,
    memo: Memo | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> Evaluation:
    """Compare ways to pick a working context on held-out sequences.

    Args:
        mc: The model.
        source: Gives the sequences.
        sequences: How many, S.
        seed: Of the sequences and of everything random.
        what: What to compare; all that needs nothing else by default.
        memo: Knows what was computed before, and is told what is computed now.
        progress: Called with the number of sequences that are done, and the part of the next ones.

    Returns:
        The losses.

    Raises:
        ValueError: No sequences.
        OSError: The file of ``memo`` cannot be written.
    """
    what, memo = what or Comparing(), Memo() if memo is None else memo
    _check(sequences, what)
    of_model = _of_model(mc)
    rng, block_rng = np.random.default_rng([seed, 2]), np.random.default_rng([seed, 3])
    # No token more than is kept: facts are where the source says that they are.
    config = mc.config
    length = kept_tokens(config.sequence_tokens, config.train_wc_length, config.block_size)
    device = next(mc.parameters()).device
    losses: dict[str, list[Floats]] = {}
    kinds, entries, examples, tokens = {}, {}, {}, 0
    files: list[NDArray[np.int64]] = []
    for done in range(0, sequences, CHUNK):
        batch = source.held_out_batch(rng, min(CHUNK, sequences - done), length).to(device)
        files.append(np.full(len(batch.tokens), -1) if batch.files is None else batch.files)
        chunk = Chunk(mc, batch, source.tokenizer, what, rng, block_rng, memo, of_model)
        ways = list(chunk.ways())
        for number, way in enumerate(ways):
            nll, cuts = way.pick()
            losses.setdefault(way.name, []).append(nll)
            if not done:
                kinds[way.name], entries[way.name] = way.kind, len(cuts[0])
                examples[way.name] = cuts[0]
                tokens = max(tokens, int(cuts[0].ends[-1]))
            progress(done + len(batch.tokens) * (number + 1) / len(ways))
    return Evaluation(
        nll={name: np.concatenate(parts) for name, parts in losses.items()},
        kinds=kinds,
        entries=entries,
        examples=examples,
        tokens=tokens,
        clusters=_clusters(np.concatenate(files)),
    )


def _of_model(mc: MCController) -> str:
    """Return a key of what makes losses, but for LensNet, the sequences and their cuts."""
    sizes = [getattr(mc.config, name) for name in _SIZES]
    return key_of(fingerprint(mc.language_model, mc.gistnet), np.array(sizes))


def _clusters(files: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Number what belongs together: sequences of one file, -1 for none. None where nothing does."""
    alone = files < 0
    if alone.all():
        return None
    clusters: NDArray[np.int64] = np.where(alone, files.max() + alone.cumsum(), files)
    return clusters


def _check(sequences: int, what: Comparing) -> None:
    if sequences < 1 or what.oracle_draws < 0:
        raise ValueError(
            f"an evaluation needs sequences, and no less than 0 draws of the oracle, not "
            f"{sequences} and {what.oracle_draws}"
        )


def gap_closed(evaluation: Evaluation, way: str, to: str = ORACLE) -> float:
    """Return how much of the gap from random collapse to another way a way closes, as a share.

    Args:
        evaluation: The losses.
        way: The one that is asked about.
        to: The other.

    Returns:
        The share; nan where there is no gap, or where that other way was left out.
    """
    if to not in evaluation.nll:
        return math.nan
    random, best, mean = (float(evaluation.nll[name].mean()) for name in (RANDOM, to, way))
    return (random - mean) / (random - best) if random != best else math.nan
