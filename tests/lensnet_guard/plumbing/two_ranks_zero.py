"""One of two processes that train a small critic in DeepSpeed's ZeRO, guarded and not.

Started by test_deepspeed.py as ``two_ranks_zero.py FOLDER``; writes what it saw to a file there.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from lensnet_guard import (
    CallPolicy,
    UnsanctionedCall,
    eval_mode,
    frozen,
    guard_module,
    guard_of,
    no_grad,
)
from lensnet_guard.integrations import sanctioned

STAGES = (2, 3)
STEPS, ACCUMULATED = 2, 2


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.body(x).tanh())


class Model(nn.Module):
    """What holds the critic, and opens its scope."""

    def __init__(self, critic):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.critic = critic

    def forward(self, x):
        with sanctioned(self.critic, "values"):
            return self.critic(self.body(x))


def guarded(module):
    return guard_module(module, policy=CallPolicy({"values": 1}), name="critic").module


def plain(module):
    return module


def engine(model, stage):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATED,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_allow_untested_optimizer": True,
    }
    parameters = list(model.parameters())
    return deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]


# Each is given what puts the guard on, or does nothing; it returns what is called.
WRAPPERS = {
    "an engine of the guarded module": lambda on, critic, stage: engine(on(critic), stage),
    "the guard of an engine": lambda on, critic, stage: on(engine(critic, stage)),
    "an engine of a model around it": lambda on, critic, stage: engine(Model(on(critic)), stage),
}
AROUND = "an engine of a model around it"


def frozen_reference():
    policy = CallPolicy({"kl": 1}, requires=(no_grad, eval_mode, frozen(fingerprint=True)))
    reference = Critic().eval().requires_grad_(False)
    return guard_module(reference, policy=policy, name="reference")


def call_again(model):
    return model(torch.ones(2, 4))


def run(name, stage, on):
    torch.manual_seed(0)
    critic = Critic()
    model, reference = WRAPPERS[name](on, critic, stage), frozen_reference()
    guard = guard_of(critic) or guard_of(model) or guard_module(nn.Identity(), mode="off")
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses, planted = [], None
    with guard.context("training"), reference.context("training"):
        for n in range(STEPS * ACCUMULATED):
            x = torch.randn(2, 4, generator=generator)
            with guard.micro_step(*divmod(n, ACCUMULATED)), reference.micro_step(n):
                with torch.no_grad(), reference.sanctioned("kl"):
                    soft = reference.module(x)
                with sanctioned(model if name != AROUND else None, "values"):
                    loss = F.mse_loss(model(x), soft + 1)
                model.backward(loss)
            model.step()
            losses.append(loss.item().hex())
        if on is guarded and name != AROUND:
            try:  # on both ranks, for with stage 3 the engine gathers weights before it calls
                with guard.micro_step(STEPS):
                    call_again(model)
            except UnsanctionedCall as error:
                planted = str(error)
    return {
        "losses": losses,
        "weights": weights(critic, stage),
        "calls": [guard.count("training"), reference.count("training", "kl")],
        "violations": [guard.violation_count, reference.violation_count],
        "planted": planted,
    }


def weights(critic, stage):
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(critic.parameters()), enabled=stage == 3):
        return [parameter.tolist() for parameter in critic.parameters()]


def main(folder):
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=int(rank), world_size=2)
    results = {}
    for stage in STAGES:
        for name in WRAPPERS:
            for on in (guarded, plain):
                results[f"{name}, {stage}, {on.__name__}"] = run(name, stage, on)
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
