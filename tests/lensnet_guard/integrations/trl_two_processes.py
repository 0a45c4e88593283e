"""Trains with TRL on two processes, without a guard and with one; prints what each rank has seen.

Run as ``torchrun --nproc-per-node 2 trl_two_processes.py MODELS OUTPUT``.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import trl
from tests.lensnet_guard.integrations.trl_kit import Kit, losses

from lensnet_guard import Verdicts
from lensnet_guard.integrations.transformers import guarded_trainer


class WritesAgain(trl.GRPOTrainer):
    """Writes some completions in several turns, as with tools: one rank more often than another."""

    def _generate_single_turn(self, *args):
        for _ in range(dist.get_rank()):
            super()._generate_single_turn(*args)
        return super()._generate_single_turn(*args)


def said(kit, kind, options, cls=None):
    """What a training logs without a guard, and with one; and the calls that were counted."""
    bare = kit.make(kind, cls, **options)
    bare.train()
    trainer = kit.make(kind, cls, **options)  # from the same random numbers
    with guarded_trainer(trainer, log=kit.output / kind, compare_ranks=True) as callback:
        trainer.train()
    verdict = callback.verdict
    verdicts = verdict if isinstance(verdict, Verdicts) else {callback.guard.name: verdict}
    calls = {name: sum(one.calls.values()) for name, one in verdicts.items()}
    return {"bare": losses(bare), "guarded": losses(trainer), "calls": calls}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    models, output = map(Path, sys.argv[1:])
    kit = Kit(models, output)
    told = {
        "dpo": said(kit, "dpo", {"gradient_accumulation_steps": 4}),
        "tuned": said(kit, "dpo", {"peft": True}),
        "grpo": said(kit, "grpo", {"num_iterations": 2, "gradient_accumulation_steps": 2}),
        "turns": said(kit, "grpo", {"judge": False, "beta": 0.0, "max_steps": 2}, WritesAgain),
    }
    (output / f"rank{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.destroy_process_group()
