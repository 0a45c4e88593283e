"""Reading logs after the fact. Imports nothing of the live guard."""

from lensnet_guard.postmortem.verdict import LogVerdict, read_verdict

__all__ = ["LogVerdict", "read_verdict"]
