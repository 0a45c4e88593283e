"""The ways of picking at work, on one batch of sequences."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from megacontext.allocators.cut import Cut, from_block_lods, lod0_tail
from megacontext.allocators.focus import Scored, refocus_cut
from megacontext.allocators.rules import FocusRules, FocusTuning
from megacontext.controller import MCController
from megacontext.data.source import Batch
from megacontext.data.tokenizer import Tokenizer
from megacontext.evaluation.attention import SINK, attended
from megacontext.evaluation.losses import keys_of, no_session, pairs_nll, session_losses
from megacontext.evaluation.memo import Memo, key_of
from megacontext.evaluation.pickers import (
    LAST,
    Floats,
    Visible,
    at_random,
    bm25,
    evenly_spaced,
    overlap,
    picked_cuts,
    similarity,
)
from megacontext.evaluation.ways import (
    ASKED,
    EVENLY,
    FULL,
    GREEDY,
    LENSNET,
    MAIN,
    ORACLE,
    RANDOM,
    RECENCY,
    ROUNDS,
    SALIENCE,
    SESSION,
    UNIFORM,
    Comparing,
    Kind,
    Picked,
    Way,
)
from megacontext.model.fingerprint import fingerprint


class Chunk:
    """A batch of sequences and what the ways of picking need of it.

    Args:
        mc: The model.
        batch: The sequences.
        tokenizer: By which they are text; None where they are none.
        what: What to compare.
        rng: Draws random collapses.
        block_rng: Draws random blocks.
        memo: Knows what was computed before.
        of_model: Fingerprint of what makes losses.
    """

    def __init__(
        self,
        mc: MCController,
        batch: Batch,
        tokenizer: Tokenizer | None,
        what: Comparing,
        rng: np.random.Generator,
        block_rng: np.random.Generator,
        memo: Memo,
        of_model: str,
    ) -> None:
        self.mc, self.batch, self.tokenizer, self.what = mc, batch, tokenizer, what
        self.rng, self.block_rng, self.memo = rng, block_rng, memo
        config = mc.config if what.gists else replace(mc.config, max_lod=1)
        with torch.no_grad():
            self.tree = mc.build_tree(batch.tokens, labelled=batch.labelled)
        self.length = self.tree.lengths[0]
        self.keys = keys_of(self.tree, of_model)
        self.horizon = self.length - config.horizon_tokens
        self.view = mc.config.geometry.focus_view(self.length, config.horizon_tokens)
        self.geometry = config.geometry.within(config.train_wc_length)
        self.start = self.geometry.coarse_cut(0, self.length)
        # At equal length: the whole budget is spent, whatever the scores are.
        tuning = FocusTuning(expand_threshold=-np.inf, margin=0.0, max_edits=self.length)
        self.rules = FocusRules(self.geometry, tuning)
        self.allocator = replace(config, seed=int(rng.integers(2**32))).new_allocator()
        blocks, picks = config.geometry.detail(self.length, config.train_wc_length)
        seen = self.tree.tokens[:, : self.horizon].numpy(force=True)
        self.visible = Visible(seen, blocks, config.block_size, picks)
        gists_left_out = 0 if what.gists else blocks - self.visible.picks
        self.entries = config.train_wc_length - gists_left_out

    # The ways ----------------------------------------------------------------------------------

    def ways(self) -> Iterator[Way]:
        """Yield the ways, in an order in which each finds the random numbers that it had before."""
        every = chain(
            self._at_fixed_places(),
            self._by_words(),
            self._by_vectors(),
            self._by_lensnet(),
            self._by_knowledge(),
        )
        return (way for way in every if self.what.all_ways or way.name in MAIN)

    def _at_fixed_places(self) -> Iterator[Way]:
        blocks = partial(self._scored, kind=Kind.PLACES)
        cut = partial(self._way, kind=Kind.PLACES)
        k = self.visible.block_size
        yield cut(RECENCY, lambda: self._each(lod0_tail(self.length, self.entries, k)))
        yield cut("recency + sink", lambda: self._each(self._with_sink()))
        yield cut(UNIFORM, lambda: self._each(self._uniform()))
        yield blocks(EVENLY, lambda: evenly_spaced(self.visible))
        yield cut(RANDOM, self._random)
        yield blocks("random blocks", lambda: at_random(self.visible, self.block_rng))

    def _by_words(self) -> Iterator[Way]:
        way = partial(self._scored, kind=Kind.WORDS)
        for last, where in ((None, "whole tail"), (LAST, f"last {LAST}")):
            yield way(f"lexical, {where}", partial(overlap, self.visible, last))
            yield way(f"lexical with IDF, {where}", partial(overlap, self.visible, last, idf=True))
            yield way(f"BM25, {where}", partial(bm25, self.visible, last))
        if question := self.batch.question_tokens:  # whoever knows the data set knows where it is
            yield way("lexical, the question alone", partial(overlap, self.visible, question))

    def _by_vectors(self) -> Iterator[Way]:
        way = partial(self._scored, kind=Kind.VECTORS)
        if self.what.embed is not None and self.tokenizer is not None:
            embed, text_of = self.what.embed, self.tokenizer.text
            for last, where in ((None, "whole tail"), (LAST, f"last {LAST}")):
                score = partial(similarity, self.visible, embed, text_of, last)
                yield way(f"MiniLM, {where}", score)
        if self.what.attention:
            yield way("attention, mean of heads", lambda: self._attention[0])
            yield way("attention, maximum of heads", lambda: self._attention[1])

    def _by_lensnet(self) -> Iterator[Way]:
        way = partial(self._way, kind=Kind.LENSNET)
        scores = self._lensnet_scores()
        yield way(LENSNET, lambda: self._focus(scores))
        rounds = f"{LENSNET}, {ROUNDS} rounds from"
        yield way(f"{rounds} a random cut", lambda: self._focus(scores, self._random(), ROUNDS))
        coarsest = self._each(self._coarsest())
        yield way(f"{rounds} the coarsest cut", lambda: self._focus(scores, coarsest, ROUNDS))
        if self.what.in_session and self.what.gists and not no_session(self.mc):
            yield Way(SESSION, Kind.LENSNET, self._in_session)

    def _by_knowledge(self) -> Iterator[Way]:
        way = partial(self._way, kind=Kind.KNOWLEDGE)
        batch = self.batch
        for name, blocks in ((SALIENCE, batch.fact_blocks), (ASKED, batch.asked_blocks)):
            if blocks is not None:
                yield way(name, partial(self._holding, blocks))
        if self.what.oracle_draws:
            yield Way(ORACLE, Kind.KNOWLEDGE, self._oracle)
        if self.what.greedy and self.visible.picks and not (self.start.lods > 1).any():
            yield Way(GREEDY, Kind.KNOWLEDGE, self._greedy)
        full = lod0_tail(self.length, self.length, self.visible.block_size)
        yield way(FULL, lambda: self._each(full))

    def _way(self, name: str, cuts: Callable[[], Sequence[Cut]], kind: Kind) -> Way:
        """Make a way of one that gives the cut of each sequence."""

        def pick() -> Picked:
            finished = [self._finished(cut) for cut in cuts()]
            return self._nll([[cut] for cut in finished])[:, 0], finished

        return Way(name, kind, pick)

    def _scored(self, name: str, score: Callable[[], Floats], kind: Kind) -> Way:
        """Make a way of one that gives scores of blocks, ``[S, blocks]``."""
        return self._way(name, lambda: picked_cuts(score(), self.start, self.rules), kind)

    def _finished(self, cut: Cut) -> Cut:
        """Leave the gists out of a cut, where they are to be."""
        if self.what.gists:
            return cut
        kept = cut.lods == 0
        return Cut(cut.positions[kept], cut.lods[kept], cut.block_size)

    def _nll(self, cuts: Sequence[Sequence[Cut]]) -> Floats:
        """Compute the mean NLL over each horizon, ``[S, V]``, where it is not known."""
        pairs = [(row, cut) for row, of_one in enumerate(cuts) for cut in of_one]
        keys = [key_of(self.keys[row], cut.positions, cut.lods) for row, cut in pairs]

        def compute(numbers: list[int]) -> Floats:
            return pairs_nll(self.mc, self.tree, [pairs[n] for n in numbers])[:, None]

        return self.memo.many(keys, compute).reshape(len(cuts), -1)

    def _in_session(self) -> Picked:
        lensnet = fingerprint(self.mc.lensnet)
        keys = [key_of("session", lensnet, key) for key in self.keys]
        return session_losses(self.mc, self.tree, keys, self.memo)

    # Their cuts --------------------------------------------------------------------------------

    def _each(self, cut: Cut) -> list[Cut]:
        return [cut] * len(self.batch.tokens)

    def _random(self) -> list[Cut]:
        wc_length = self.mc.config.train_wc_length
        return [self.allocator.sample(self.length, wc_length) for _ in self.batch.tokens]

    def _with_sink(self) -> Cut:
        """Hold the first tokens and the last ones, as StreamingLLM does (Xiao et al. 2023)."""
        last = np.arange(self.length - self.entries + SINK, self.length, dtype=np.int64)
        positions = np.concatenate([np.arange(SINK, dtype=np.int64), last])
        return Cut(positions, np.zeros_like(positions), self.visible.block_size)

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
        spans = self.visible.blocks // self.visible.block_size if self.geometry.max_lod == 2 else 0
        window = len(self.start) - (self.visible.block_size - 1) * spans
        return self.geometry.within(window).coarse_cut(0, self.length)

    def _lensnet_scores(self) -> Floats:
        """Ask LensNet once for all sequences, ``[S, E]``."""
        with torch.no_grad(), self.mc.context("inference"):
            views = [self.view] * len(self.batch.tokens)
            view = self.tree.focus_view(views, self.mc.config.query_tokens)
            scores = self.mc.lensnet(*view.lensnet_inputs())
        out: Floats = scores.double().numpy(force=True)
        return out

    @cached_property
    def _attention(self) -> tuple[Floats, Floats]:
        """Ask the language model what it attends to: the mean over heads, and the maximum."""
        return attended(self.mc, self.visible, self.keys, self.memo)

    def _holding(self, blocks: NDArray[np.int64]) -> list[Cut]:
        """Hold these blocks first, -1 for none; ties are in random order."""
        blocks = np.where(blocks < 0, blocks[:, :1], blocks)
        scores = self.rng.uniform(-0.1, 0.1, (len(blocks), len(self.view)))
        entries = np.searchsorted(self.view.ends, blocks * self.mc.config.block_size, side="right")
        scores[np.arange(len(blocks))[:, None], entries] += 0.5
        return self._focus(scores)

    def _focus(
        self, scores: Floats, start: Sequence[Cut] | None = None, rounds: int = 1
    ) -> list[Cut]:
        """Refocus each sequence by the scores of its view's entries."""
        cuts = []
        for row, cut in enumerate(start or [self.start] * len(scores)):
            scored = Scored(self.view, scores[row].astype(np.float32))
            for _ in range(rounds):
                cut, _ = refocus_cut(cut, scored, self.rules)
            cuts.append(cut)
        return cuts

    def _oracle(self) -> Picked:
        """Take the best of many random cuts, by loss."""
        best = np.full(len(self.batch.tokens), np.inf)
        cuts: list[Cut] = self._random()
        for drawn in range(0, self.what.oracle_draws, 8):
            number = min(8, self.what.oracle_draws - drawn)
            columns = [[self._finished(cut) for cut in self._random()] for _ in range(number)]
            rows = [list(row) for row in zip(*columns, strict=True)]
            nll = self._nll(rows)
            for row in np.flatnonzero(nll.min(1) < best):
                best[row], cuts[row] = nll[row].min(), rows[row][int(nll[row].argmin())]
        return best, cuts

    def _greedy(self) -> Picked:
        """Add one block after another to what is held in detail: the one that lowers the loss most.

        Where blocks help only together, the best of many random cuts can be better.
        """
        rows, blocks = np.arange(len(self.batch.tokens)), self.visible.blocks
        lods = np.ones((len(rows), blocks), dtype=np.int64)
        for _ in range(self.visible.picks):
            one_more = np.repeat(lods[:, None], blocks, axis=1)
            one_more[:, np.arange(blocks), np.arange(blocks)] = 0
            candidates = [
                [
                    self._finished(from_block_lods(of_cut, self.length, self.visible.block_size))
                    for of_cut in of_row
                ]
                for of_row in one_more
            ]
            # What is held already stays as it is, which must not be the best.
            nll = np.where(lods == 0, np.inf, self._nll(candidates))
            best = nll.argmin(axis=1)
            lods[rows, best] = 0
        return nll[rows, best], [candidates[row][b] for row, b in enumerate(best)]
