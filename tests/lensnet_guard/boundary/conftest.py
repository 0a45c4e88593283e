"""Fixtures of the tests of the boundary."""

import pytest
from tests.lensnet_guard.boundary.lens import Lens


@pytest.fixture
def lens():
    return Lens()
