"""What ``megacontext eval`` prints: a table in sections by kind of way, and plain words."""

from collections.abc import Sequence
from itertools import groupby

from rich.table import Table

from megacontext.evaluation.rows import Interval, Row, as_good_as_lensnet
from megacontext.evaluation.ways import LENSNET


def comparison_table(rows: Sequence[Row], title: str) -> Table:
    """Make the table.

    Args:
        rows: Those of one kind one after another.
        title: Above it.

    Returns:
        The table.
    """
    table = Table(title=title, pad_edge=False)
    table.add_column("way to pick", overflow="fold")
    for heading in ("entries", "NLL, nats", "above LensNet focus"):
        table.add_column(heading, justify="right")
    for heading in ("closed\nto oracle", "\nto full"):
        table.add_column(heading, justify="right")
    for kind, of_kind in groupby(rows, key=lambda row: row.kind):
        table.add_section()
        table.add_row(f"[bold]{kind.value}[/bold]")
        for row in of_kind:
            behind = f"{row.behind:+.3f} {interval_text(row.behind_interval, '+')}"
            table.add_row(
                f"  {row.way}",
                str(row.entries),
                f"{row.nll:.3f} {interval_text(row.interval)}",
                "" if row.way == LENSNET else behind,
                f"{row.closed:.2f}",
                f"{row.closed_to_full:.2f}",
            )
    return table


def plain_words(rows: Sequence[Row]) -> list[str]:
    """Say which ways do as well as LensNet, and how far ahead of the best of the others it is.

    Args:
        rows: Of all ways.

    Returns:
        Lines.
    """
    good = as_good_as_lensnet(rows)
    if good:
        named = "; ".join(f"{row.way} ({row.behind:+.3f})" for row in good)
        return [f"Not clearly worse than {LENSNET} (no interval above 0): {named}."]
    best = min((row for row in rows if row.kind.is_baseline), key=lambda row: row.nll)
    return [
        f"{LENSNET} is better than every baseline; the best of them is {best.way}, "
        f"{best.behind:.3f} nats behind {interval_text(best.behind_interval)}."
    ]


def interval_text(interval: Interval, sign: str = "") -> str:
    """Write an interval: ``[1.160, 1.359]``."""
    low, high = (f"{bound:{sign}.3f}" for bound in interval)
    return f"[{low}, {high}]"
