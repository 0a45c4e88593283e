"""Does LensNet focus better than chance? Ways to pick a working context, at equal length.

Every way makes a cut of each held-out sequence with the same number of entries; the language model
reads it, and its NLL over the labels of the horizon is compared, sequence by sequence. LensNet sees
the focus view, which ends before the horizon, as in training.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from megacontext.allocators.cut import Cut, lod0_tail
from megacontext.allocators.focus import Scored, refocus_cut
from megacontext.allocators.rules import FocusRules, FocusTuning
from megacontext.controller import MCController
from megacontext.data.recall import RecallBatch
from megacontext.data.source import Batch, Source
from megacontext.inference.session_config import SessionConfig
from megacontext.model.tree import MegaContextTree
from megacontext.model.working_context import NO_LABEL

Floats = NDArray[np.float64]

CHUNK = 32  # sequences at a time
ROUNDS = 4  # of refocusing, where one is not enough: LOD2 to LOD0 takes two

LENSNET = "LensNet focus"
RANDOM = "random collapse"
ORACLE = "oracle"
SALIENCE = "salience"
FULL = "full context"
SESSION = f"{LENSNET}, in a session"


@dataclass(frozen=True)
class Evaluation:
    """Losses of one model, by the way in which its working contexts were picked.

    Attributes:
        nll: Mean NLL per label of the horizon, nats, one per sequence, float64 ``[S]``.
        entries: Of the working contexts.
        examples: Each way's cut of the first sequence.
        tokens: Of that sequence.
    """

    nll: Mapping[str, Floats]
    entries: Mapping[str, int]
    examples: Mapping[str, Cut]
    tokens: int


def evaluate(
    mc: MCController,
    source: Source,
    *,
    sequences: int,
    seed: int,
    oracle_draws: int = 64,
    in_session: bool = True,
    progress: Callable[[int], None] = lambda _: None,
) -> Evaluation:
    """Compare ways to pick a working context on held-out sequences.

    Args:
        mc: The model.
        source: Gives the sequences.
        sequences: How many, S.
        seed: Of the sequences and of everything random.
        oracle_draws: Random cuts of which the oracle takes the best.
        in_session: Also let each history come bit by bit, which takes the longest.
        progress: Called with the number of sequences that are done.

    Returns:
        The losses.

    Raises:
        ValueError: No sequences, or no draws.
    """
    if sequences < 1 or oracle_draws < 1:
        raise ValueError(
            f"an evaluation needs sequences and draws of the oracle, not {sequences} and "
            f"{oracle_draws}"
        )
    rng = np.random.default_rng([seed, 2])
    losses: dict[str, list[Floats]] = {}
    entries, examples, tokens = {}, {}, 0
    for done in range(0, sequences, CHUNK):
        batch = source.held_out_batch(
            rng, min(CHUNK, sequences - done), mc.config.sequence_tokens
        ).to(next(mc.parameters()).device)
        chunk = _Chunk(mc, batch, rng)
        picked = chunk.losses(oracle_draws)
        if in_session:
            picked[SESSION] = chunk.session()
        for name, (nll, cuts) in picked.items():
            losses.setdefault(name, []).append(nll)
            if not done and cuts:
                entries[name], examples[name] = len(cuts[0]), cuts[0]
                tokens = max(tokens, int(cuts[0].ends[-1]))
        progress(done + len(batch.tokens))
    return Evaluation(
        {name: np.concatenate(parts) for name, parts in losses.items()}, entries, examples, tokens
    )


class _Chunk:
    """A batch of sequences and what the ways of picking need of it."""

    def __init__(self, mc: MCController, batch: Batch, rng: np.random.Generator) -> None:
        self.mc, self.batch, self.rng = mc, batch, rng
        config = mc.config
        with torch.no_grad():
            self.tree: MegaContextTree = mc.build_tree(batch.tokens, labelled=batch.labelled)
        self.length = self.tree.lengths[0]
        self.view = config.geometry.focus_view(self.length, config.horizon_tokens)
        self.geometry = config.geometry.within(config.train_wc_length)
        self.start = self.geometry.coarse_cut(0, self.length)
        # At equal length: the whole budget is spent, whatever the scores are.
        tuning = FocusTuning(expand_threshold=-np.inf, margin=0.0, max_edits=self.length)
        self.rules = FocusRules(self.geometry, tuning)
        self.allocator = replace(config, seed=int(rng.integers(2**32))).new_allocator()

    def losses(self, oracle_draws: int) -> dict[str, tuple[Floats, list[Cut]]]:
        """Compute NLL and cuts by the name of the way."""
        rows, wc_length = len(self.batch.tokens), self.mc.config.train_wc_length
        k = self.mc.config.block_size
        scores = self._lensnet_scores()
        ways = {
            "recency window": [lod0_tail(self.length, wc_length, k)] * rows,
            "uniform LOD": [self._uniform()] * rows,
            RANDOM: self._random(),
            LENSNET: self._focus(scores),
            f"{LENSNET}, {ROUNDS} rounds from a random cut": self._focus(
                scores, self._random(), ROUNDS
            ),
            f"{LENSNET}, {ROUNDS} rounds from the coarsest cut": self._focus(
                scores, [self._coarsest()] * rows, ROUNDS
            ),
        }
        if isinstance(self.batch, RecallBatch):
            ways[SALIENCE] = self._focus(self._block_scores(self.batch.fact_blocks))
            ways["the facts that are asked for"] = self._focus(
                self._block_scores(self.batch.asked_blocks)
            )
        ways[FULL] = [lod0_tail(self.length, self.length, k)] * rows
        picked = {
            name: (self._nll([[cut] for cut in cuts])[:, 0], cuts) for name, cuts in ways.items()
        }
        picked[ORACLE] = self._oracle(oracle_draws)
        return picked

    def _nll(self, cuts: Sequence[Sequence[Cut]]) -> Floats:
        """Compute the mean NLL over the labels of the horizon, nats, ``[B, V]``."""
        with torch.no_grad():
            context = self.tree.working_context(cuts)
            nll = self.mc.token_nll(context)
        first = self.length - self.mc.config.horizon_tokens
        counted = (context.starts + context.spans >= first) & (context.labels != NO_LABEL)
        mean = (nll * counted).sum(-1) / counted.sum(-1)
        out: Floats = mean.view(len(cuts), -1).double().numpy(force=True)
        return out

    def session(self) -> tuple[Floats, list[Cut]]:
        """Let each history come bit by bit, refocused again and again, up to the horizon.

        The session's budget leaves room for the horizon, so that the length is equal at its end.
        """
        config = self.mc.config
        nll: list[float] = []
        cuts: list[Cut] = []
        settings = SessionConfig(
            wc_length=config.train_wc_length - config.horizon_tokens,
            refocus_interval=config.recent_tokens,
            iterations=ROUNDS,
            expand_threshold=-np.inf,
            margin=0.0,
            max_edits=self.length,
        )
        horizon = self.length - config.horizon_tokens
        interval = settings.refocus_interval
        first = horizon % interval + interval
        labels = self.tree.labels[:, horizon:]
        for history in self.tree.tokens:
            logits = self.mc.begin_inference_session(history[:first], settings=settings)
            for begin in range(first, horizon, interval):
                logits = self.mc.inference_step(history[begin : begin + interval])
            rest = self.mc.inference_step(history[horizon:-1])
            read = torch.cat([logits[0, -1:], rest[0]])
            loss = F.cross_entropy(read, labels[len(nll)], ignore_index=NO_LABEL)
            nll.append(float(loss))
            cuts.append(self.mc.inference_cut)
            self.mc.end_inference_session()
        return np.array(nll), cuts

    def _random(self) -> list[Cut]:
        wc_length = self.mc.config.train_wc_length
        return [self.allocator.sample(self.length, wc_length) for _ in self.batch.tokens]

    def _oracle(self, draws: int) -> tuple[Floats, list[Cut]]:
        """Take the best of many random cuts, by loss."""
        best = np.full(len(self.batch.tokens), np.inf)
        cuts: list[Cut] = self._random()
        for drawn in range(0, draws, 8):
            columns = [self._random() for _ in range(min(8, draws - drawn))]
            rows = [list(row) for row in zip(*columns, strict=True)]
            nll = self._nll(rows)
            for row in np.flatnonzero(nll.min(1) < best):
                best[row], cuts[row] = nll[row].min(), rows[row][int(nll[row].argmin())]
        return best, cuts

    def _uniform(self) -> Cut:
        """Hold history at LOD1 from its beginning on, as much of it as makes the length right.

        Where LOD1 is not enough, the oldest is at LOD2.
        """
        config = self.mc.config
        k = config.block_size
        blocks = (self.length - config.train_wc_length) // (k - 1)
        lod0_from = min(blocks * k, self.length - config.recent_tokens)
        return self.geometry.coarse_cut(0, self.length, lod0_from)

    def _coarsest(self) -> Cut:
        """Hold every aligned K² span at LOD2, if there is LOD2."""
        config = self.mc.config
        spans = (self.length - config.recent_tokens) // config.block_size**2
        window = len(self.start) - (config.block_size - 1) * (spans if config.max_lod == 2 else 0)
        return self.geometry.within(window).coarse_cut(0, self.length)

    def _lensnet_scores(self) -> Floats:
        """Ask LensNet once for all sequences, ``[B, E]``."""
        with torch.no_grad(), self.mc.context("inference"):
            view = self.tree.working_context([[self.view]] * len(self.batch.tokens))
            scores = self.mc.lensnet(
                view.embeddings, view.starts, view.spans, view.lods, view.pad_mask
            )
        out: Floats = scores.double().numpy(force=True)
        return out

    def _block_scores(self, blocks: NDArray[np.int64]) -> Floats:
        """Score high where a view entry holds one of the blocks; ties are in random order."""
        scores = self.rng.uniform(-0.1, 0.1, (len(blocks), len(self.view)))
        entries = np.searchsorted(self.view.ends, blocks * self.mc.config.block_size, side="right")
        scores[np.arange(len(blocks))[:, None], entries] += 0.5
        return scores

    def _focus(
        self, scores: Floats, start: Sequence[Cut] | None = None, rounds: int = 1
    ) -> list[Cut]:
        """Refocus each sequence by its scores."""
        cuts = []
        for row, cut in enumerate(start or [self.start] * len(scores)):
            scored = Scored(self.view, scores[row].astype(np.float32))
            for _ in range(rounds):
                cut, _ = refocus_cut(cut, scored, self.rules)
            cuts.append(cut)
        return cuts


def gap_closed(evaluation: Evaluation, way: str) -> float:
    """Return how much of the gap from random collapse to the oracle a way closes, as a share."""
    random, oracle, mean = (evaluation.nll[name].mean() for name in (RANDOM, ORACLE, way))
    return float((random - mean) / (random - oracle))


def bootstrap_interval(
    values: Floats, seed: int = 0, draws: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Compute a percentile bootstrap interval of the mean (Efron 1979).

    Args:
        values: One per sequence, ``[S]``; for a paired comparison, the differences.
        seed: Of the draws.
        draws: How many.
        level: Of confidence.

    Returns:
        Its ends.
    """
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [
            values[rng.integers(0, len(values), (min(100, draws - done), len(values)))].mean(axis=1)
            for done in range(0, draws, 100)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
