"""The training allocator: random collapses until a cut has exactly the target length; no LensNet.

From the full LOD0 cut it collapses random eligible spans until that length is met. It works
on integers alone and has no handle on LensNet: import-linter holds it to that.
"""

from collections.abc import Sequence

import numpy as np

from megacontext.allocators.cut import Cut, Geometry, UnreachableTarget, from_block_lods
from megacontext.checks import check_int


class TrainingWCVariationAllocator:
    """Samples training working contexts by random collapse.

    Each draw replaces, with ``lod2_probability`` and when the target permits, a random eligible
    K²-token span by its LOD2 gist, else a random eligible block by its LOD1 gist, uniformly among
    the eligible ones; the last ``recent_tokens`` tokens stay at LOD0. Same seed, same cuts.

    Args:
        block_size: Tokens of a LOD1 gist, K, at least 2.
        max_lod: The highest level of detail, 1 or 2.
        lod2_probability: 0 forbids LOD2, 1 uses it whenever it fits.
        recent_tokens: Length of the protected tail.
        seed: A non-negative int or several.

    Attributes:
        drawn: Cuts sampled so far. Each has random numbers of its own, by seed and number, so
            assigning this is all that it takes to continue elsewhere, or to skip what another
            process samples.

    Raises:
        TypeError: An argument of another type; the message names it.
        ValueError: An argument out of these bounds; the message names it.
    """

    def __init__(
        self,
        block_size: int = 32,
        max_lod: int = 2,
        lod2_probability: float = 0.1,
        recent_tokens: int = 128,
        seed: int | Sequence[int] = 0,
    ) -> None:
        Geometry(block_size, max_lod, recent_tokens)  # checks the first two
        if max_lod > 2:
            raise ValueError(f"max_lod must be 1 or 2 (gists, and gists of gists), not {max_lod}")
        if not isinstance(lod2_probability, (int, float)) or not 0 <= lod2_probability <= 1:
            bad = ValueError if isinstance(lod2_probability, (int, float)) else TypeError
            raise bad(f"lod2_probability must be a number in [0, 1], not {lod2_probability!r}")
        check_int("recent_tokens", recent_tokens)
        if recent_tokens < 0:
            raise ValueError(f"recent_tokens must not be negative, but is {recent_tokens}")
        self.block_size = block_size
        self.max_lod = max_lod if lod2_probability > 0 else 1
        self.lod2_probability = lod2_probability
        self.recent_tokens = recent_tokens
        self._geometry = Geometry(block_size, self.max_lod, recent_tokens)
        self.drawn = 0
        self._bits = np.random.Philox(seed)
        self._start = self._bits.state

    def sample(self, num_tokens: int, target_length: int) -> Cut:
        """Sample a cut of tokens ``[0, num_tokens)`` with exactly ``target_length`` entries.

        Args:
            num_tokens: Of the history.
            target_length: Entries that are wanted.

        Returns:
            The cut.

        Raises:
            UnreachableTarget: No collapses lead there; the message names the lengths that are next
                to it.
        """
        check_int("num_tokens", num_tokens)
        check_int("target_length", target_length)
        self._check_reachable(num_tokens, target_length)
        rng = self._random_numbers(self.drawn)
        self.drawn += 1
        k = self.block_size
        collapsible = max(num_tokens - self.recent_tokens, 0)
        block_lods = np.zeros(collapsible // k, dtype=np.int64)
        num_spans = collapsible // k**2 if self.max_lod == 2 else 0

        # One unit is the K - 1 entries that a LOD1 collapse saves; a LOD2 collapse saves K + 1
        # units less one for each of its blocks that is collapsed already.
        units = (num_tokens - target_length) // (k - 1)
        span_units = [k + 1] * num_spans
        wants_lod2 = iter((rng.random(units) < self.lod2_probability).tolist())

        # What is no longer eligible never becomes so again: a block inside a LOD2 span is gone,
        # and each LOD1 draw takes one unit from `units` but at most one from a span's price, so a
        # span that does not fit will not fit later. Hence walking a random order once, skipping
        # what is not eligible, draws uniformly among the eligible at every draw.
        blocks = iter(rng.permutation(len(block_lods)).tolist())
        spans = iter(rng.permutation(num_spans).tolist())
        block, span = next(blocks, None), next(spans, None)
        while units:
            while span is not None and span_units[span] > units:
                span = next(spans, None)
            if span is None:
                break
            while block is not None and block_lods[block] == 2:
                block = next(blocks, None)
            if next(wants_lod2) or block is None:
                block_lods[span * k : (span + 1) * k] = 2
                units -= span_units[span]
                span = next(spans, None)
            else:
                block_lods[block] = 1
                units -= 1
                if block // k < num_spans:
                    span_units[block // k] -= 1
                block = next(blocks, None)
        if units:  # no span fits any more: what is left to draw are the next blocks, all at once
            left = np.array([block, *blocks])
            block_lods[left[block_lods[left] == 0][:units]] = 1
        return from_block_lods(block_lods, num_tokens, k)

    def _random_numbers(self, number: int) -> np.random.Generator:
        """Return the random numbers of one cut."""
        # The counter's highest word tells cuts apart: none uses 2**192 random numbers. Setting
        # the state takes a fifth of the time of a new generator.
        self._start["state"]["counter"][:] = 0, 0, 0, number
        self._bits.state = self._start
        return np.random.Generator(self._bits)

    def reachable_length(self, num_tokens: int, target_length: int) -> int:
        """Find the longest length that can be reached and does not exceed the target.

        Args:
            num_tokens: Of the history.
            target_length: Entries that are wanted.

        Returns:
            That length; the shortest reachable one where the target is below it.
        """
        step = self.block_size - 1
        shortest = self._geometry.shortest_length(num_tokens)
        if target_length <= shortest:
            return shortest
        if target_length >= num_tokens:
            return num_tokens
        return target_length - (target_length - num_tokens) % step

    def _check_reachable(self, num_tokens: int, target_length: int) -> None:
        if num_tokens < 1:
            raise ValueError(f"a cut needs at least one token, not {num_tokens}")
        below = self.reachable_length(num_tokens, target_length)
        if below == target_length:
            return
        nearest = {below, min(max(below, below + self.block_size - 1), num_tokens)}
        if target_length < below:
            nearest = {below}
        raise UnreachableTarget(
            f"a working context of {target_length} entries cannot be made from {num_tokens} "
            f"tokens with block_size {self.block_size}, LODs up to {self.max_lod} and the last "
            f"{self.recent_tokens} tokens at LOD0; the nearest reachable "
            + ("length is " if len(nearest) == 1 else "lengths are ")
            + " and ".join(map(str, sorted(nearest)))
        )
