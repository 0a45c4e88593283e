"""How sure a mean is: bootstrap intervals, also where sequences belong together."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def paired_interval(
    differences: Floats,
    clusters: NDArray[np.int64] | None = None,
    *,
    seed: int = 0,
    draws: int = 10_000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Compute a percentile bootstrap interval of the mean (Efron 1979).

    Sequences of one file resemble each other, so it is files that are drawn, each with all its
    sequences: the cluster bootstrap (Davison and Hinkley 1997, section 3.8). Where all are of one
    file, nothing is known of others: then sequences are drawn, and the interval is of that file.

    Args:
        differences: Between two ways on the same sequences, or the losses of one, ``[S]``.
        clusters: Which cluster each sequence belongs to, int64 ``[S]``; by default each is one.
        seed: Of the draws.
        draws: How many.
        level: Of confidence.

    Returns:
        Its ends.
    """
    if clusters is None or len(np.unique(clusters)) == 1:
        clusters = np.arange(len(differences))
    _, member_of, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    sums = np.bincount(member_of, weights=differences)
    rng = np.random.default_rng(seed)
    means = []
    for done in range(0, draws, 100):
        drawn = rng.integers(0, len(sums), (min(100, draws - done), len(sums)))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
