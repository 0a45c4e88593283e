"""One of two processes that train a small critic in each of torch's wrappers, guarded and not.

Started by test_wrappers.py as ``two_ranks.py FOLDER``; writes what it saw to a file there.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lensnet_guard import CallPolicy, UnsanctionedCall, guard_module, guard_of
from lensnet_guard.integrations import sanctioned

STEPS, ACCUMULATED = 2, 2
MESH = []


class Block(nn.Linear):
    """A unit of its own where parameters are sharded."""


class Critic(nn.Module):
    """A few layers, of which those in the middle may be run again in backward."""

    def __init__(self, reentrant):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([Block(4, 4), Block(4, 4)])
        self.head = nn.Linear(4, 1)
        self.reentrant = reentrant

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x).tanh()
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant).tanh()
        return self.head(x)


class Model(nn.Module):
    """What holds the critic, and opens its scope."""

    def __init__(self, critic, reentrant):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.critic = critic
        self.reentrant = reentrant

    def forward(self, x):
        x = self.body(x)
        with sanctioned(self.critic, "values"):
            if self.reentrant is None:
                return self.critic(x)
            return checkpoint(self.critic, x, use_reentrant=self.reentrant)


def guarded(module):
    return guard_module(module, policy=CallPolicy({"values": 1}), name="critic").module


def plain(module):
    return module


def wrap_1(module):
    units = ModuleWrapPolicy({Block})
    return FullyShardedDataParallel(module, auto_wrap_policy=units, device_id=torch.device("cpu"))


def shard(module, around=None):
    for part in (around or module).blocks:
        fully_shard(part, mesh=MESH[0])
    return fully_shard(module, mesh=MESH[0])


def shard_parts(module):
    for part in module.blocks:
        fully_shard(part, mesh=MESH[0])
    return module


PARTLY = "FSDP2 of parts of the guarded module"  # the rest is trained by each rank alone
# Each is given what puts the guard on, or does nothing, and a critic; it returns what is called.
WRAPPERS = {
    "DDP of the guarded module": lambda on, critic: DistributedDataParallel(on(critic)),
    "the guard of a DDP": lambda on, critic: on(DistributedDataParallel(critic)),
    "FSDP1 of the guarded module": lambda on, critic: wrap_1(on(critic)),
    "the guard of an FSDP1": lambda on, critic: on(wrap_1(critic)),
    "FSDP2 of the guarded module": lambda on, critic: shard(on(critic)),
    "FSDP2 behind the guard": lambda on, critic: [on(critic), shard(critic)][0],
    PARTLY: lambda on, critic: shard_parts(on(critic)),
    "the guard of an FSDP2": lambda on, critic: on(shard(critic)),
}
AROUND = {
    "DDP of a model around it": DistributedDataParallel,
    "FSDP1 of a model around it": wrap_1,
    "FSDP2 of a model around it": lambda model: fully_shard(model, mesh=MESH[0]),
}
# These begin with a collective before they come to the guard: one rank alone would wait in it.
GATHERS_FIRST = ("FSDP1 of the guarded module", "FSDP1 of a model around it")


def without_sync(model, sync):
    """Gather the gradients of this micro-step here only, as each wrapper has it."""
    if hasattr(model, "no_sync"):
        return model.no_sync() if not sync else torch.enable_grad()
    for part in model.modules():
        if hasattr(part, "set_requires_gradient_sync"):
            part.set_requires_gradient_sync(sync)
    return torch.enable_grad()


def train(model, guard, scope_of):
    """Two optimizer steps of two micro-steps; the losses, to the last bit."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        for n in range(ACCUMULATED):
            x = torch.randn(2, 3, generator=generator)
            with guard.micro_step(step, n), without_sync(model, n == ACCUMULATED - 1):
                with sanctioned(scope_of, "values"):
                    loss = model(x).square().mean()
                loss.backward()
            losses.append(loss.item().hex())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def call_again(model):
    return model(torch.ones(2, 3))


def planted(name, model, guard):
    """What becomes of a call too many, on rank 1 where the wrapper lets one rank be alone."""
    if dist.get_rank() == 0 and name not in GATHERS_FIRST:
        return None
    try:
        with guard.micro_step(STEPS):
            call_again(model)
    except UnsanctionedCall as error:
        return [error.record.caller.function, Path(error.record.caller.file).name, str(error)]
    return "nothing"


class NoGuard:
    def micro_step(self, *_):
        return torch.enable_grad()


def run(name, reentrant, on):
    torch.manual_seed(0)
    critic = Critic(reentrant if name in WRAPPERS else None)
    if name in WRAPPERS:
        model = scope_of = WRAPPERS[name](on, critic)
    else:
        model, scope_of = AROUND[name](Model(on(critic), reentrant)), None
    guard = guard_of(critic) or guard_of(model)
    if guard is None:
        result = {"losses": train(model, NoGuard(), scope_of)}
    else:
        with guard.context("training"):
            result = {"losses": train(model, guard, scope_of)}
        result["calls"] = [guard.count("training", "values"), guard.count()]
        result["recomputed"] = sum(record.kind == "recompute" for record in guard.calls)
        result["violations"] = guard.violation_count
    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=options)
    result["weights"] = {key: value.tolist() for key, value in state.items()}
    if guard is not None and name in WRAPPERS:
        with guard.context("training"):
            result["planted"] = planted(name, model, guard)
    return result


def main(folder):
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    MESH.append(init_device_mesh("cpu", (2,)))
    results = {}
    for name in (*WRAPPERS, *AROUND):
        for reentrant in (None, False, True):
            for on in (guarded, plain):
                key = f"{name}, {reentrant}, {on.__name__}"
                results[key] = run(name, reentrant, on)
                print(key, flush=True)
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
