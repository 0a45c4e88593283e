"""Fixtures of the ranks' tests."""

from collections.abc import Iterator

import pytest
from tests.lensnet_guard.ranks.launcher import Launcher


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    """What starts real ranks, the quicker the more it has started."""
    with Launcher() as launcher:
        yield launcher
