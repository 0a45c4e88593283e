"""Post-mortem: reads logs, without torch and without the live guard."""

from lensnet_guard.postmortem.analysis import analyse
from lensnet_guard.postmortem.findings import Analysis, Run
from lensnet_guard.postmortem.verdict import LogVerdict, read_verdict

__all__ = ["Analysis", "LogVerdict", "Run", "analyse", "read_verdict"]
