"""Where tokens of a tail stand in blocks, against plain loops."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megacontext.model.matching import NO_TOKEN, blocks_holding, matches

SIZES = st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 4), st.integers(1, 6))


def drawn(seed: int, *shape: int) -> Tensor:
    """Few different tokens, so that many match; some are none."""
    return torch.randint(NO_TOKEN, 4, shape, generator=torch.Generator().manual_seed(seed))


class TestMatches:
    @given(SIZES, st.integers(0, 99))
    def test_each_token_with_those_before_it(self, sizes: tuple[int, ...], seed: int) -> None:
        """Also where the match begins in the block before; no token matches none."""
        batch, blocks, size, length = sizes
        history, tail = drawn(seed, batch, blocks, size), drawn(seed + 1, batch, length)
        found = matches(tail, history, 3)
        assert found.shape == (batch, 3, length, blocks, size)
        flat = history.flatten(1)
        for row in range(batch):
            for t in range(length):
                for place in range(blocks * size):
                    run = 0
                    while run < min(3, t + 1, place + 1) and (
                        tail[row, t - run] == flat[row, place - run] != NO_TOKEN
                    ):
                        run += 1
                    seen = found[row, :, t].flatten(1)[:, place].tolist()
                    assert seen == [run > n for n in range(3)]


class TestBlocksHolding:
    @given(SIZES, st.integers(0, 99))
    def test_each_token_counts_the_blocks_that_have_it(
        self, sizes: tuple[int, ...], seed: int
    ) -> None:
        """A block counts once, however often it has the token; none counts as one."""
        batch, blocks, size, _ = sizes
        history = drawn(seed, batch, blocks, size)
        expected = [
            [
                [1 if t == NO_TOKEN else sum(t in other for other in row) for t in block]
                for block in row
            ]
            for row in history.tolist()
        ]
        assert blocks_holding(history).tolist() == expected
