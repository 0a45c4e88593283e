"""Where metrics go beside ``metrics.jsonl``: TensorBoard (curves, strips), or a sink of yours.

The trainer calls a sink between two steps: no micro-step is open then, and no guarded call runs.
"""

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lensnet_guard import LensNetViolation
from megacontext.allocators.cut import Cut
from megacontext.evaluation.lod_image import lod_image


class MetricSink(Protocol):
    """Takes what is logged. Whoever made it closes it."""

    def write(self, step: int, metrics: Mapping[str, float], strips: NDArray[np.uint8]) -> None:
        """Take what a line of ``metrics.jsonl`` holds, after it was written.

        Args:
            step: Optimizer steps so far. After a resume, steps come again that were told after the
                checkpoint.
            metrics: By name; what is undefined is left out.
            strips: The LODs of the last micro-step's working contexts, a strip each, coloured as in
                `evaluation.lod_image`; RGB, uint8 ``[height, width, 3]``.
        """


class MetricSinkError(RuntimeError):
    """A sink failed. The run was saved, as the message says, and can be resumed."""


def write_all(
    sinks: Sequence[MetricSink],
    step: int,
    metrics: Mapping[str, float],
    cuts: Sequence[Sequence[Cut]],
) -> None:
    """Tell all sinks, one after the other.

    Args:
        sinks: Whom to tell.
        step: Optimizer steps so far.
        metrics: By name; nan where undefined.
        cuts: Of the last micro-step, ``[B][1 + V]``.

    Raises:
        MetricSinkError: One failed, named; those after it were not told.
        LensNetViolation: One called LensNet.
    """
    if not sinks:
        return
    defined = {name: value for name, value in metrics.items() if math.isfinite(value)}
    strips = lod_image(cuts)
    for sink in sinks:
        _write(sink, step, defined, strips)


def _write(
    sink: MetricSink, step: int, metrics: Mapping[str, float], strips: NDArray[np.uint8]
) -> None:
    try:
        sink.write(step, metrics, strips)
    except LensNetViolation:
        raise
    except Exception as error:
        raise MetricSinkError(
            f"the metric sink {type(sink).__name__} failed at step {step} "
            f"({type(error).__name__}: {error})"
        ) from error


class TensorBoardSink:
    """Writes event files for TensorBoard, each step's to the kernel before the next begins.

    Args:
        path: Their folder. It is made with the first step, from which on what an earlier process
            wrote there no longer counts: a resumed run shows no step twice.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: Any = None
        try:
            self._module = import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise ImportError(
                f"TensorBoard's event files need the library tensorboard, which cannot be imported "
                f'({error}): pip install "lensnet-guard[tensorboard]"'
            ) from error

    def write(self, step: int, metrics: Mapping[str, float], strips: NDArray[np.uint8]) -> None:
        """Write scalars by their names, and the strips as image ``lods``; see `MetricSink`."""
        if self._writer is None:
            self._writer = self._module.SummaryWriter(str(self._path), purge_step=step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.add_image("lods", strips, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Let go of the files."""
        if self._writer is not None:
            self._writer.close()
