"""Bootstrap intervals: honest coverage, also of sequences that belong together."""

import numpy as np

from megacontext.evaluation.intervals import paired_interval


class TestPairedInterval:
    def test_it_covers_the_mean_as_often_as_it_says(self) -> None:
        """95 % of intervals of 200 samples hold the true mean."""
        rng = np.random.default_rng(0)
        hits = 0
        for _ in range(100):
            low, high = paired_interval(rng.exponential(size=200), draws=300)
            hits += low <= 1 <= high
        assert 87 <= hits <= 100

    def test_sequences_of_one_file_resemble_each_other(self) -> None:
        """By file the interval still covers the mean; as if they were apart it is too narrow."""
        rng = np.random.default_rng(0)
        hits = {True: 0, False: 0}
        files = np.repeat(np.arange(40), 5)
        for _ in range(100):
            values = rng.normal(size=40)[files] + 0.1 * rng.normal(size=200)
            for clustered in hits:
                low, high = paired_interval(values, files if clustered else None, draws=300)
                hits[clustered] += low <= 0 <= high
        assert hits[True] >= 87
        assert hits[False] <= 75

    def test_large_files_count_as_much_as_they_have_sequences(self) -> None:
        """The interval is of the mean over sequences, which one file can make up alone."""
        values, files = np.array([0.0] * 98 + [1.0, 1.0]), np.array([7] * 98 + [3, 5])
        low, high = paired_interval(values, files, draws=2_000)
        assert low == 0
        assert high == 1  # once in 27 draws the large file is not there

    def test_sequences_of_one_file_alone_are_not_certain(self) -> None:
        """They are drawn one by one: an interval of no width would be clear of everything."""
        values = np.random.default_rng(0).normal(size=30)
        one_file = np.full(30, 7)
        assert paired_interval(values, one_file) == paired_interval(values)
        assert np.ptp(paired_interval(values, one_file)) > 0.2

    def test_it_narrows_with_more_values(self) -> None:
        """By the root of their number."""
        rng = np.random.default_rng(0)
        widths = [np.ptp(paired_interval(rng.normal(size=n), draws=500)) for n in (50, 5_000)]
        assert 7 < widths[0] / widths[1] < 14

    def test_seeds_reproduce(self) -> None:
        """The same seed gives the same ends; another others."""
        values = np.random.default_rng(0).normal(size=30)
        assert paired_interval(values) == paired_interval(values, np.arange(30)[::-1][::-1])
        assert paired_interval(values) != paired_interval(values, seed=1)
