"""What the doctor found, as tables."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lensnet_guard.doctor.examination import Examination

STYLES = {"holds": "green", "fails": "bold red", "not tried": "yellow"}


def render(examination: Examination, console: Console) -> None:
    """Versions, then mechanisms, then a verdict in one line."""
    versions = Table(box=None, show_header=False, pad_edge=False)
    for name, version in examination.versions.items():
        versions.add_row(name, Text(version or "not installed"))
    mechanisms = Table(box=None, pad_edge=False)
    for heading in ("mechanism", "state", "seconds", "what was seen"):
        mechanisms.add_column(heading, justify="right" if heading == "seconds" else "left")
    for found in examination.findings:
        state = Text(found.state, STYLES[found.state])
        mechanisms.add_row(found.name, state, f"{found.seconds:.1f}", Text(found.detail))
    console.print(versions, "", mechanisms, "", sep="\n")
    failing = [found.name for found in examination.findings if found.state == "fails"]
    console.print(f"does not hold: {'; '.join(failing)}" if failing else "all that was tried holds")
