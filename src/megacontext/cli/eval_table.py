"""What ``megacontext eval`` prints: a table in sections by kind of way, and plain words."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from rich import box
from rich.table import Table

from megacontext.evaluation.rows import Interval, Row, as_good_as_lensnet
from megacontext.evaluation.ways import FULL, LENSNET, ORACLE, RANDOM


def comparison_table(rows: Sequence[Row], title: str) -> Table:
    """Make the table, for a terminal of 80 columns.

    Args:
        rows: Those of one kind one after another.
        title: Above it.

    Returns:
        The table.
    """
    usual = Counter(row.entries for row in rows).most_common(1)[0][0]
    table = Table(title=f"{title}, {usual} entries", box=box.HORIZONTALS, padding=0, pad_edge=False)
    table.add_column("way to pick", min_width=30)
    headings = ("NLL,\nnats", "above LensNet focus", "closed,\noracle", "closed,\nfull")
    for heading in headings:
        table.add_column(heading, justify="right")
    for kind, of_kind in groupby(rows, key=lambda row: row.kind):
        table.add_section()
        table.add_row(f"[bold]{kind.value}[/bold]")
        for row in of_kind:
            behind = f"{row.behind:+.3f} {interval_text(row.behind_interval, '+')}"
            table.add_row(
                row.way if row.entries <= usual else f"{row.way} ({row.entries})",
                f"{row.nll:.3f}",
                "" if row.way == LENSNET else behind,
                _share(row.closed),
                _share(row.closed_to_full),
            )
    return table


def plain_words(rows: Sequence[Row]) -> list[str]:
    """Say which ways do as well as LensNet, and how far ahead of the best of the others it is.

    Args:
        rows: Of all ways.

    Returns:
        Lines.
    """
    lines = [
        f"Above {LENSNET}: nats, with 95 % intervals, paired by sequence. Closed: the share of the "
        f"gap from {RANDOM} to the {ORACLE}, and to {FULL}."
    ]
    good = as_good_as_lensnet(rows)
    if good:
        named = "; ".join(f"{row.way} ({row.behind:+.3f})" for row in good)
        return [*lines, f"Not clearly worse than {LENSNET} (no interval above 0): {named}."]
    best = min((row for row in rows if row.kind.is_baseline), key=lambda row: row.nll)
    return [
        *lines,
        f"{LENSNET} is better than every baseline; the best of them is {best.way}, "
        f"{best.behind:.3f} nats behind {interval_text(best.behind_interval)}.",
    ]


def interval_text(interval: Interval, sign: str = "") -> str:
    """Write an interval: ``[1.160, 1.359]``."""
    low, high = (f"{bound:{sign}.3f}" for bound in interval)
    return f"[{low}, {high}]"


def _share(of_gap: float) -> str:
    """Write the share of a gap that is closed; nothing where there is no gap."""
    return "" if math.isnan(of_gap) else f"{of_gap:.2f}"
