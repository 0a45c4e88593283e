"""What is said of each way of picking: its loss, and how it compares with LensNet's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megacontext.evaluation.compare import Evaluation, gap_closed
from megacontext.evaluation.intervals import paired_interval
from megacontext.evaluation.ways import FULL, LENSNET, Kind

Interval = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """What is said of one way to pick.

    Attributes:
        way: Its name.
        kind: What it goes by.
        entries: Of its working contexts.
        nll: Mean NLL per label, nats.
        interval: Of that.
        closed: Share of the gap from random collapse to the oracle that it closes; nan
            where there is no gap.
        closed_to_full: Share of the gap from random collapse to full context that it closes; nan
            where there is no gap.
        behind: By how much its NLL is above that of LensNet focus, nats.
        behind_interval: Of that, paired by sequence.
    """

    way: str
    kind: Kind
    entries: int
    nll: float
    interval: Interval
    closed: float
    closed_to_full: float
    behind: float
    behind_interval: Interval

    def to_json(self) -> dict[str, Any]:
        """Return what ``eval.json`` is to hold of it."""
        return {
            "way": self.way,
            "kind": self.kind.value,
            "entries": self.entries,
            "nll": self.nll,
            "nll_interval": list(self.interval),
            "gap_closed": None if math.isnan(self.closed) else self.closed,
            "gap_to_full_closed": None if math.isnan(self.closed_to_full) else self.closed_to_full,
            "behind_lensnet": self.behind,
            "behind_lensnet_interval": list(self.behind_interval),
        }


def comparison_rows(evaluation: Evaluation) -> list[Row]:
    """Make a row for each way, with 95 % intervals that are clustered by file.

    Args:
        evaluation: The losses.

    Returns:
        The rows, in the order of the ways.
    """
    lensnet, clusters = evaluation.nll[LENSNET], evaluation.clusters
    return [
        Row(
            way=way,
            kind=evaluation.kinds[way],
            entries=evaluation.entries[way],
            nll=float(nll.mean()),
            interval=paired_interval(nll, clusters),
            closed=gap_closed(evaluation, way),
            closed_to_full=gap_closed(evaluation, way, FULL),
            behind=float((nll - lensnet).mean()),
            behind_interval=paired_interval(nll - lensnet, clusters),
        )
        for way, nll in evaluation.nll.items()
    ]


def as_good_as_lensnet(rows: Sequence[Row]) -> list[Row]:
    """Return the ways that know no more than LensNet and are not clearly worse than it."""
    others = [row for row in rows if row.kind.is_baseline]
    return [row for row in others if row.behind_interval[0] <= 0]
