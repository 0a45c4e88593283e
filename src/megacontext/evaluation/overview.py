"""Pictures: of a run (losses, agreement, LensNet calls, LOD strips), and of an evaluation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lensnet_guard.postmortem import LogVerdict
from megacontext.allocators.cut import Cut
from megacontext.evaluation.lod_image import LOD_COLOURS, named_strips
from megacontext.files import replacing
from megacontext.micro_step import Cuts

_LOD_NAMES = {-1: "not held", 0: "LOD0 (tokens)", 1: "LOD1 (gist)", 2: "LOD2 (gist of gists)"}


def draw_overview(
    file: BinaryIO,
    rows: Sequence[Mapping[str, float | None]],
    verdict: LogVerdict,
    cuts: Cuts | None,
    unigram_entropy: float,
) -> None:
    """Draw the picture of a run.

    Args:
        file: Where it is written to, as PNG.
        rows: The lines of its metrics.
        verdict: From its log.
        cuts: Whose LODs to show; None (a resumed run with nothing left to do) leaves them out.
        unigram_entropy: Of the held-out text, nats, drawn as the line to beat.
    """
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    _lines(axes[0, 0], rows, {"lm_loss": "training, mixed LODs", "validation_loss": "held out"})
    axes[0, 0].axhline(unigram_entropy, color="0.4", ls="--", lw=1, label="unigram entropy")
    axes[0, 0].set(title="language model", xlabel="step", ylabel="nats per token")
    axes[0, 0].legend()
    _lines(
        axes[0, 1],
        rows,
        {
            "lens_loss": "lens loss",
            "preference_agreement": "agreement",
            "validation_agreement": "agreement, held out",
            "policy_score_std_mean": "spread of scores",
        },
    )
    axes[0, 1].axhline(0.5, color="0.4", ls="--", lw=1, label="chance agreement")
    axes[0, 1].set(title="preference learning", xlabel="step", ylim=(0, 1.05))
    axes[0, 1].legend()
    calls = verdict.calls_per_micro_step
    axes[1, 0].step(np.arange(len(calls)), calls, where="mid", color="#1b6ca8")
    axes[1, 0].set(
        title=f"from the log: {verdict}",
        xlabel="micro-step",
        ylabel="LensNet calls",
        ylim=(0, max([2, *calls]) + 0.2),
    )
    axes[1, 0].yaxis.get_major_locator().set_params(integer=True)
    _lod_strips(axes[1, 1], cuts)
    _save(figure, file)


def draw_evaluation(
    path: Path,
    losses: Mapping[str, tuple[float, tuple[float, float]]],
    examples: Mapping[str, Cut],
    num_tokens: int,
) -> None:
    """Write the picture of an evaluation.

    Args:
        path: Of the picture.
        losses: By way of picking, mean NLL and its interval, nats.
        examples: By way, its cut of the same ``num_tokens`` tokens.
        num_tokens: Of that history.

    Raises:
        OSError: It cannot be written; what was there is kept.
    """
    figure = Figure(figsize=(12, 0.42 * len(losses) + 2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = np.arange(len(losses))
    means = np.array([mean for mean, _ in losses.values()])
    intervals = np.array([interval for _, interval in losses.values()])
    errors = np.maximum(np.abs(intervals.T - means), 0)
    left.errorbar(means, rows, xerr=errors, fmt="o", color=LOD_COLOURS[0], capsize=3)
    left.set_yticks(rows, list(losses))
    left.set_ylim(len(losses) - 0.5, -0.5)
    left.set(title="NLL on the horizon, 95 % intervals", xlabel="nats per label")
    left.grid(axis="x", alpha=0.3)
    _draw_strips(right, [(name, examples[name]) for name in losses], num_tokens)
    right.set(title="LOD of every token of one sequence", xlabel="token", yticks=[])
    with replacing(path) as file:  # a kill leaves the old picture or the new one
        _save(figure, file)


def _save(figure: Figure, file: BinaryIO) -> None:
    figure.savefig(file, format="png", dpi=110)


def _lines(
    axes: Axes, rows: Sequence[Mapping[str, float | None]], names: Mapping[str, str]
) -> None:
    for key, label in names.items():
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        axes.plot(*np.array(points, dtype=float).reshape(-1, 2).T, label=label)


def _lod_strips(axes: Axes, cuts: Cuts | None) -> None:
    axes.set(title="LOD of every token in working contexts of equal length", xlabel="token")
    if cuts is None:
        axes.text(0.5, 0.5, "no step was run", ha="center", transform=axes.transAxes)
        return
    shown = named_strips(cuts)
    _draw_strips(axes, shown, max(int(cut.ends[-1]) for _, cut in shown))


def _draw_strips(axes: Axes, shown: Sequence[tuple[str, Cut]], num_tokens: int) -> None:
    strips = np.stack([cut.token_lods(num_tokens) for _, cut in shown])
    colours = ListedColormap(list(LOD_COLOURS.values()))
    axes.imshow(strips, aspect="auto", interpolation="nearest", cmap=colours, vmin=-1, vmax=2)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    handles = [Patch(color=LOD_COLOURS[lod], label=_LOD_NAMES[lod]) for lod in _LOD_NAMES]
    axes.legend(handles=handles, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
