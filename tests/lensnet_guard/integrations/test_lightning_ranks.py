"""Lightning's fit on two processes: their logs, their numbers, and what they compare."""

import re

import pytest
from tests.lensnet_guard.helpers import read
from tests.lensnet_guard.integrations.two_ranks import run_scenarios

from lensnet_guard.postmortem import read_verdict

pytest.importorskip("lightning")

MODEL = """
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lensnet_guard import CallPolicy
from lensnet_guard.integrations import sanctioned
from lensnet_guard.integrations.lightning import LensNetGuardCallback

class Distiller(LightningModule):
    def __init__(self, scenario):
        super().__init__()
        self.scenario = scenario
        self.net, self.reference = nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False)

    def training_step(self, batch, index):
        target = self.ask(batch[0])
        if (self.global_rank, index) == (1, 1):
            if self.scenario == "unequal":
                self.ask(batch[0])
            if self.scenario == "failing":
                raise ValueError("out of luck")
        with sanctioned(self.net, "student"):
            return F.mse_loss(self.net(batch[0]), target)

    def ask(self, x):
        with sanctioned(self.reference, "kl"):
            return self.reference(x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)

def fit(scenario, strategy):
    torch.set_num_threads(1)
    policies = {"reference": CallPolicy({"kl": (1, 2)}), "net": CallPolicy({"student": 1})}
    callback = LensNetGuardCallback(policies, log=f"{scenario}.log", compare_ranks=True)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, callbacks=[callback],
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(TensorDataset(torch.ones(12, 3)), batch_size=2)
    trainer.fit(Distiller(scenario), data)
    return callback.verdict
"""
RANKS = """
def train(scenario, rank):
    print(fit(scenario, "ddp"))
"""
SUMS = "reference: 3 micro-steps, 3 training calls (kl 3), 0 inference calls, 0 violations"


def check_logs(folder):
    """Each of two ranks has written a file of its own, which says which it is."""
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["lensnet.rank0.jsonl", "lensnet.rank1.jsonl"]
    for number, name in enumerate(files):
        header = read(folder / name)[0]
        assert (header["rank"], header["module"]) == (str(number), "reference, net")
    verdict = read_verdict(folder)
    assert (verdict.calls, verdict.violations) == (12, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ended(folder):
    """Processes that find no ``RANK`` in their environment, as Lightning launches them."""
    return run_scenarios(folder, MODEL + RANKS, ["alike", "unequal", "failing"], tells_rank=False)


class TestCompareRanks:
    def test_ranks_that_call_alike_train(self, ended, folder):
        """Each has a verdict, and a log that is named by its number."""
        for rank in ended["alike"]:
            assert rank.code == 0, rank.err
            assert SUMS in rank.out
        check_logs(folder / "alike.log")

    def test_unequal_calls_that_the_budget_allows(self, ended):
        """Both ranks say what each has done, before the backward."""
        for rank in ended["unequal"]:
            assert rank.code == 1
            assert re.search(
                r"rank 0 +\d net, 2 reference training calls in 2 micro-steps", rank.err
            )
            assert re.search(
                r"rank 1 +\d net, 3 reference training calls in [12] micro-steps", rank.err
            )

    def test_an_exception_on_one_rank_is_told_to_the_other(self, ended):
        """Which ends, and says why."""
        first, second = ended["failing"]
        assert (first.code, second.code) == (1, 1)
        assert "RankStopped: rank 1 stopped: ValueError: out of luck" in first.err


class TestProcessesOfLightnings:
    def test_each_rank_has_a_log_of_its_own(self, run_python, tmp_path):
        """Lightning launches the second process itself, after the callback is made."""
        done = run_python(f'{MODEL}\nif __name__ == "__main__":\n    fit("launched", "ddp")')
        assert done.returncode == 0, done.stderr
        check_logs(tmp_path / "launched.log")
