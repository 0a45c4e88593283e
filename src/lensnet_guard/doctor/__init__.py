"""The doctor: which versions are installed, and whether the guard does here what it promises.

Each mechanism is tried for real, in a process of its own, so that one that crashes or hangs says
nothing about the others. Nothing in the process that asks loads torch.
"""

from lensnet_guard.doctor.examination import Examination, Finding, examine

__all__ = ["Examination", "Finding", "examine"]
