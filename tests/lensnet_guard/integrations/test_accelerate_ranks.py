"""Accelerate's loop on two processes, whose ranks compare what they call."""

import re

import pytest
from tests.lensnet_guard.integrations.two_ranks import run_scenarios

pytest.importorskip("accelerate")

SCRIPT = """
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lensnet_guard import CallPolicy
from lensnet_guard.integrations.accelerate import GuardedAccelerator

def train(scenario, rank):
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    guarded = GuardedAccelerator(
        accelerator, policy=CallPolicy({"value": (1, 2)}), name="critic", compare_ranks=True
    )
    critic, data = nn.Linear(3, 1), TensorDataset(torch.randn(12, 3))
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    critic, optimizer, data = guarded.prepare(critic, optimizer, DataLoader(data, batch_size=2))
    with guarded:
        for step, (x,) in enumerate(data):
            with guarded.accumulate(critic):
                with guarded.guard.sanctioned("value"):
                    values = critic(x)
                    if scenario == "unequal" and (rank, step) == (1, 1):
                        critic(x)
                if scenario == "failing" and (rank, step) == (1, 1):
                    raise ValueError("out of luck")
                accelerator.backward(values.square().mean())
                optimizer.step()
                optimizer.zero_grad()
    print(guarded.verdict)
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    return run_scenarios(tmp_path_factory.mktemp("ranks"), SCRIPT, ["alike", "unequal", "failing"])


class TestCompareRanks:
    def test_ranks_that_call_alike_train(self, ended):
        """Each has a verdict."""
        for rank in ended["alike"]:
            assert rank.code == 0, rank.err
            assert "critic: 3 micro-steps, 3 training calls (value 3), 0 inf" in rank.out

    def test_unequal_calls_that_the_budget_allows(self, ended):
        """Both ranks say what each has done, before the backward."""
        for rank in ended["unequal"]:
            assert rank.code == 1
            assert re.search(r"rank 0 +2 training calls in 2 micro-steps", rank.err)
            assert re.search(r"rank 1 +3 training calls in [12] micro-steps", rank.err)

    def test_an_exception_on_one_rank_is_told_to_the_other(self, ended):
        """Which ends, and says why."""
        first, second = ended["failing"]
        assert (first.code, second.code) == (1, 1)
        assert "RankStopped: rank 1 stopped: ValueError: out of luck" in first.err
