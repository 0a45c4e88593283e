"""Means of metrics over micro-steps, added up on the device and read when they are logged."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]
LOSSES = ("loss", "lm_loss", "lens_loss")  # are always defined: nan is a diverged run there


def _own(totals: Tensor) -> Tensor:
    return totals


class RunningMeans:
    """Adds up what is defined; nothing is read back from the device before `take`.

    Args:
        device: Where the metrics are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: tuple[str, ...] = ()
        self._totals: Tensor | None = None  # sums and counts, float32 [2, M]

    def add(self, metrics: Mapping[str, Tensor | int]) -> None:
        """Add those of one micro-step: by name, `LOSSES` among them; nan is undefined."""
        losses = [name for name in LOSSES if name in metrics]
        names = (*losses, *(name for name in metrics if name not in LOSSES))
        values = torch.stack([self._on_device(metrics[name]) for name in names])
        undefined = values.isnan()
        undefined[: len(losses)] = False
        summands = torch.stack([values.masked_fill(undefined, 0.0), (~undefined).float()])
        self._totals = summands if self._totals is None else self._totals + summands
        self._names = names

    def finite(self) -> Tensor:
        """Tell whether the losses so far are finite numbers, bool scalar on the device."""
        if self._totals is None:
            return torch.ones((), dtype=torch.bool, device=self._device)
        losses = sum(name in LOSSES for name in self._names)
        return self._totals[0, :losses].isfinite().all()

    def take(self, total: Total = _own) -> dict[str, float]:
        """Return means since the last call; this waits for the device.

        Args:
            total: Sums over all processes, which must take together.

        Returns:
            The means by name; nan where never defined.
        """
        if self._totals is None:
            return {}
        sums, counts = total(self._totals)
        means = dict(zip(self._names, (sums / counts).tolist(), strict=True))
        self._totals = None
        return means

    def state(self, total: Total = _own) -> dict[str, Any]:
        """Return what a checkpoint is to hold; see `take`."""
        totals = None if self._totals is None else total(self._totals)
        return {"names": list(self._names), "totals": totals}

    def load(self, state: dict[str, Any]) -> None:
        """Continue there; with several processes, in one of them."""
        self._names, self._totals = tuple(state["names"]), state["totals"]

    def _on_device(self, metric: Tensor | int) -> Tensor:
        if isinstance(metric, Tensor):
            return metric.float()
        # Filled in there: a number that is copied from the host waits for the device.
        return torch.full((), float(metric), device=self._device)
