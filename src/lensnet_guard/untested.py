"""Torch as the guard's tests have not seen it: what can no longer be told apart, said once."""

import re
import warnings
from collections.abc import Iterable

import torch

OLDEST_TESTED = 2, 7
NEWEST_TESTED = 2, 15


class UntestedTorch(UserWarning):
    """This torch is not one that the guard is tested with, or lacks something that the guard reads.

    Each loss is told once per process. Calls are checked as before; where the guard cannot know, it
    does not stop correct training.
    """


_told: set[str] = set()


def is_tested() -> bool:
    """Return whether the guard's tests run on this minor version of torch."""
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    return version is not None and OLDEST_TESTED <= tuple(map(int, version.groups())) <= (
        NEWEST_TESTED
    )


def tell_untested(losses: Iterable[str]) -> None:
    """Say what this torch does not let the guard tell apart, unless that was said before.

    Args:
        losses: Each as "what cannot be told (the missing name)".

    Warns:
        UntestedTorch: When there is anything new to say.
    """
    if not (new := [loss for loss in losses if loss not in _told]):
        return
    _told.update(new)
    oldest, newest = (".".join(map(str, v)) for v in (OLDEST_TESTED, NEWEST_TESTED))
    warnings.warn(
        f"lensnet_guard is tested with torch {oldest} to {newest}; in this torch "
        f"{torch.__version__} it cannot tell {'; nor '.join(new)}. All else is checked as ever. "
        "Install a torch that is tested, or a newer lensnet-guard",
        UntestedTorch,
        stacklevel=4,
    )
