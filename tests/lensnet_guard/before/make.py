"""Made the files beside it, once, by commit b8ffdb3: `test_before` says what is read from them.

Example: python make.py FOLDER
"""

import os
import pickle
import socket
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lensnet_guard import CallPolicy, LensNetViolation, guard_module

folder = Path(sys.argv[1])
socket.gethostname = lambda: "host"
POLICY = CallPolicy({"critic": 1}, {"train:score": 2}, ("0",))


def critic() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


# A run of two ranks: rank 0 stops at a violation, rank 1 only observes that it misses a budget.
x = torch.ones(2, 3)
os.environ["RANK"] = "0"
guard = guard_module(critic(), policy=CallPolicy({"critic": 1}), log=folder / "run", name="critic")
try:
    with guard.context("training"):
        for step in range(3):
            with guard.micro_step(step):
                with guard.sanctioned("critic"):
                    checkpoint(
                        guard.module, x.requires_grad_(), use_reentrant=False
                    ).sum().backward()
                with guard.sanctioned("critic"):
                    if step == 2:
                        guard.module(x)
except LensNetViolation as error:
    over_budget = error
guard.end_log()
os.environ["RANK"] = "1"
observed = guard_module(
    critic(), policy=CallPolicy({"critic": 1}), mode="observe", log=folder / "run", name="critic"
)
with observed.context("training"):
    for step in range(3):
        with observed.micro_step(step) as ledger:
            if step != 1:
                with observed.sanctioned("critic"):
                    observed.module(x)
with observed.context("inference"):
    observed.module(x)
observed.end_log()

torch.save(guard_module(critic(), policy=POLICY, name="critic").module, folder / "module.pt")
values = {
    "guard": guard_module(critic(), policy=POLICY, name="critic"),
    "off": guard_module(critic(), policy=POLICY, mode="off"),
    "class of a part": type(guard_module(critic())._raw),
    "policy": POLICY,
    "micro-step": ledger,
    "records": guard.calls + observed.violations,
    "violation": over_budget,
}
(folder / "values.pkl").write_bytes(pickle.dumps(values))
