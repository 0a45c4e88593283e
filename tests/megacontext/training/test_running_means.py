"""Running means of metrics: with all of the losses, or with some."""

import math

import pytest
import torch

from megacontext.training.running_means import RunningMeans


@pytest.fixture
def means() -> RunningMeans:
    return RunningMeans(torch.device("cpu"))


@pytest.mark.parametrize("losses", [("loss",), ("loss", "lens_loss"), ("lens_loss",)])
class TestSomeOfTheLosses:
    def test_means_by_name(self, means: RunningMeans, losses: tuple[str, ...]) -> None:
        """Of what was added, in whatever order; what is undefined now and then is left out."""
        for value, other in ((1.0, math.nan), (3.0, 4.0)):
            metrics = {"agreement": torch.tensor(other), "calls": 1}
            means.add(metrics | {name: torch.tensor(value) for name in losses})
        assert means.take() == dict.fromkeys(losses, 2.0) | {"agreement": 4.0, "calls": 1.0}
        assert means.take() == {}

    def test_a_loss_that_is_not_finite_is_seen(
        self, means: RunningMeans, losses: tuple[str, ...]
    ) -> None:
        """And a metric that is none, or not finite, is not held for one."""
        assert bool(means.finite())
        fine = {name: torch.tensor(1.0) for name in losses}
        undefined = {"agreement": torch.tensor(math.nan), "corr": torch.tensor(math.inf)}
        means.add(undefined | fine)
        assert bool(means.finite())
        means.add(undefined | fine | {losses[-1]: torch.tensor(math.nan)})
        assert not bool(means.finite())

    def test_they_go_on_where_they_were_saved(
        self, means: RunningMeans, losses: tuple[str, ...]
    ) -> None:
        """In another process."""
        for value in (1.0, 2.0):
            means.add({name: torch.tensor(value) for name in losses})
        other = RunningMeans(torch.device("cpu"))
        other.load(means.state())
        assert bool(other.finite())
        other.add({name: torch.tensor(6.0) for name in losses})
        assert other.take() == dict.fromkeys(losses, 3.0)
