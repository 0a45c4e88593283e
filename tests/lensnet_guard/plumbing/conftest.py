"""Fixtures of the plumbing tests."""

import pytest
import torch
import torch.distributed as dist
from tests.lensnet_guard.plumbing.models import Critic
from torch.distributed.device_mesh import init_device_mesh

from lensnet_guard import (
    guard_module,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def critic():
    return Critic()


@pytest.fixture
def guard(critic):
    return guard_module(critic)


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone, met through a file of its own."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def mesh(group):
    return init_device_mesh("cpu", (1,))
