"""Pictures: of a run (losses, agreement, LensNet calls, LOD strips), and of an evaluation."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
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
from megacontext.evaluation.rows import Row
from megacontext.evaluation.ways import LENSNET, Kind
from megacontext.files import replacing
from megacontext.micro_step import Cuts

_KIND_COLOURS = dict(zip(Kind, ("0.35", "#1b6ca8", "#6a4c93", "#b3312c", "#3a7d44"), strict=True))
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
    path: Path, rows: Sequence[Row], examples: Mapping[str, Cut], num_tokens: int
) -> None:
    """Write the picture of an evaluation.

    Args:
        path: Of the picture.
        rows: Of the ways of picking, those of one kind one after another.
        examples: By way, its cut of the same ``num_tokens`` tokens.
        num_tokens: Of that history.

    Raises:
        OSError: It cannot be written; what was there is kept.
    """
    figure = Figure(figsize=(14, 0.3 * len(rows) + 1.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = [_KIND_COLOURS[row.kind] for row in rows]
    for place, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        errors = np.maximum([[row.nll - row.interval[0]], [row.interval[1] - row.nll]], 0)
        left.errorbar(row.nll, place, xerr=errors, fmt="o", color=colour, capsize=3, ms=5)
    lensnet = next(row.nll for row in rows if row.way == LENSNET)
    left.axvline(lensnet, color=_KIND_COLOURS[Kind.LENSNET], ls="--", lw=1, zorder=0)
    left.set_yticks(range(len(rows)), [row.way for row in rows])
    for label, colour in zip(left.get_yticklabels(), colours, strict=True):
        label.set_color(colour)
    left.set_ylim(len(rows) - 0.5, -0.5)
    left.set(title="NLL on the horizon, 95 % intervals", xlabel="nats per label")
    left.grid(axis="x", alpha=0.3)
    _draw_strips(right, [(row.way, examples[row.way]) for row in rows], num_tokens)
    right.set(title="LOD of every token of one sequence", xlabel="token", yticks=[])
    right.get_legend().set_bbox_to_anchor((0.5, -2 / len(rows)))  # below the token axis
    for last in np.flatnonzero([a.kind is not b.kind for a, b in pairwise(rows)]):
        for axes in (left, right):
            axes.axhline(last + 0.5, color="black", lw=0.8)
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
