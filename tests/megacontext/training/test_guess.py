"""Guessed losses: against plain loops, and what they say of blocks that matter."""

from typing import Any

import numpy as np
import pytest
import torch

from megacontext.data.source import Batch
from megacontext.training.guess import guessed

K, TAIL, HORIZON, LENGTH = 4, 12, 6, 44
BLOCKS = (LENGTH - TAIL) // K
RARE = np.array([1_000_000] * 4 + [1] * 60)  # tokens from 4 on are rare
SURPRISE = (4.0, 6.0, 8.0, 9.5, 11.0)
SAVED = (
    (0.02, 0.05, 0.27),
    (0.15, 0.30, 0.58),
    (0.10, 0.45, 1.65),
    (0.71, 1.16, 3.01),
    (0.94, 1.96, 3.04),
    (1.19, 2.04, 2.86),
)


def guess(batch: Batch, counts: Any = RARE, seed: int = 0, **changes: Any) -> Any:
    how = {"picks": 2, "variants": 40, "block_size": K, "recent_tokens": TAIL}
    how |= {"horizon_tokens": HORIZON} | changes
    return guessed(batch, counts, np.random.default_rng(seed), **how)


def plain(tokens: list[int]) -> np.ndarray[Any, Any]:
    """What a block saves of each token of the horizon, ``[blocks, horizon]``, by loops."""

    def longest(end: int, places: range) -> int:
        best = 0
        for place in places:
            length = 0
            while (
                length < 3
                and place < end
                and place >= length
                and tokens[place - length] == tokens[end - length]
            ):
                length += 1
            best = max(best, length)
        return best

    saved = np.zeros((BLOCKS, HORIZON))
    for n, end in enumerate(range(LENGTH - HORIZON, LENGTH)):
        surprise = np.log(RARE.sum() / (RARE[tokens[end]] + 1))
        of_class = SAVED[sum(surprise >= s for s in SURPRISE)]
        in_tail = longest(end, range(LENGTH - TAIL, LENGTH))
        for block in range(BLOCKS):
            match = longest(end, range(K * block, K * block + K))
            if match > in_tail:
                saved[block, n] = of_class[match - 1] * (1, 1 / 3, 0, 0)[in_tail]
    return saved


def quiet(rows: int = 1) -> Any:
    """Sequences in which no token of the horizon stands anywhere else, int64 ``[rows, LENGTH]``."""
    return np.broadcast_to(np.arange(LENGTH) + 10, (rows, LENGTH)).copy()


def without(judged: Any, row: int, block: int) -> set[float]:
    """The losses of the variants that do not hold a block."""
    return set(judged.nll[row][~judged.held[row, :, block]].tolist())


def test_losses_are_those_of_plain_loops() -> None:
    """Of sequences with matches of all lengths, in blocks, across them and in the tail."""
    tokens = np.random.default_rng(1).integers(0, 8, (6, LENGTH))
    tokens[3:] = np.random.default_rng(2).integers(2, 6, (3, LENGTH))
    judged = guess(Batch(torch.from_numpy(tokens), None))
    kinds = set()
    for row, held, losses in zip(tokens.tolist(), judged.held, judged.nll, strict=True):
        saved = plain(row)
        kinds |= set(saved.flatten().tolist())
        for of_variant, nll in zip(held.numpy(), losses, strict=True):
            assert float(nll) == pytest.approx(-saved[of_variant].max(axis=0).sum(), abs=1e-5)
    assert len(kinds) > 5


class TestSaved:
    def test_a_block_with_a_match_in_context_is_worth_more(self) -> None:
        """The longer the match, the more; and one that has nothing is worth nothing."""
        found = []
        for length in (1, 2, 3):
            tokens = quiet()
            tokens[0, 4:8] = [5, 6, 7, 8]
            tokens[0, -2 - length : -2] = [5, 6, 7][3 - length :]
            judged = guess(Batch(torch.from_numpy(tokens), None))
            assert without(judged, 0, 1) == {0.0}
            (worth,) = set(judged.nll[0][judged.held[0, :, 1]].tolist())
            found.append(-worth)
        assert 0 < found[0] < found[1] < found[2]

    def test_rare_tokens_save_more(self) -> None:
        """Than one that occurs everywhere."""
        worth = []
        for token in (3, 7):
            tokens = quiet()
            tokens[0, 5] = tokens[0, -1] = token
            worth.append(float(guess(Batch(torch.from_numpy(tokens), None)).nll.min()))
        assert worth[1] < worth[0] < 0

    def test_nothing_is_saved_where_the_tail_has_it(self) -> None:
        """As long a match; a third is where the block's is longer than the tail's single token."""
        tokens = quiet(3)
        tokens[:, 4:8] = tokens[:, -4:] = [5, 6, 7, 8]
        tokens[0, -12:-8] = [5, 6, 7, 8]  # the tail has all of it
        tokens[1, -12:-8] = [5, 30, 7, 31]  # has single tokens
        tokens[2, -12:-8] = [32, 33, 34, 35]
        judged = guess(Batch(torch.from_numpy(tokens), None))
        whole, some, none = (float(nll.min()) for nll in judged.nll)
        assert none < some < whole == 0

    def test_the_token_itself_is_no_match(self) -> None:
        """Nor what comes after it."""
        assert (guess(Batch(torch.from_numpy(quiet()), None)).nll == 0).all()


class TestAsked:
    def batch(self) -> Batch:
        tokens = quiet(2)
        tokens[:, 8] = tokens[:, -1] = 5  # a match in block 2, whatever is asked for
        asked = np.array([[1, 6, -1], [-1, -1, -1]])
        return Batch(torch.from_numpy(tokens), None, asked_blocks=asked)

    @pytest.mark.parametrize("counts", [RARE, None])
    def test_what_is_asked_for_is_worth_holding(self, counts: Any) -> None:
        """Each block of a fact alike, and words count no more then; -1 is no block."""
        judged = guess(self.batch(), counts)
        facts = judged.held[0, :, [1, 6]].sum(1)
        assert judged.nll[0].tolist() == (-4.0 * facts).tolist()
        assert {*facts.tolist()} == {0, 1, 2}
        assert (float(judged.nll[1].min()) < 0) == (counts is not None)


class TestVariants:
    def test_how_many_hold_what(self) -> None:
        """As many blocks as there is room for in each, never one twice; the seed makes them."""
        batch = Batch(torch.from_numpy(quiet(3)), None)
        judged = guess(batch, picks=3, variants=7)
        assert judged.held.shape == (3, 7, BLOCKS)
        assert (judged.held.sum(-1) == 3).all()
        assert judged.tokens is batch.tokens
        again, other = guess(batch, picks=3, variants=7), guess(batch, seed=1, picks=3, variants=7)
        assert again.held.equal(judged.held)
        assert not other.held.equal(judged.held)

    def test_some_lean_to_blocks_that_save_more(self) -> None:
        """So that good ones are compared with each other; the others are drawn blindly."""
        tokens = quiet()
        tokens[0, 4:8] = tokens[0, -4:] = [5, 6, 7, 8]
        judged = guess(Batch(torch.from_numpy(tokens), None), variants=4_000, picks=2)
        shares = judged.held[0].float().mean(0)
        others = torch.cat([shares[:1], shares[2:]])
        assert others.std() < 0.01
        assert 0.3 < float(shares[1]) < 0.7  # a quarter by chance; 0.475 were all leaning ones to
