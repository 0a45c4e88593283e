"""A frozen reference model in preference optimisation with the Trainer of transformers.

DPO (arXiv 2305.18290, equation 7) compares the policy's log-probabilities with those of a frozen
reference, which must be called exactly once per micro-batch, with both answers in one batch.
Run me, and then with --break-it, where it is called once for each answer: twice the cost, and
nothing in the loss curve shows it.
"""

import argparse
import copy
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from lensnet_guard import CallPolicy, LensNetViolation
from lensnet_guard.integrations import sanctioned
from lensnet_guard.integrations.transformers import guarded_trainer


class PreferenceTrainer(Trainer):
    """Prefers the chosen answer over the rejected one, relative to a frozen reference."""

    def __init__(self, *args: Any, reference: nn.Module, break_it: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reference = reference.requires_grad_(False).eval().to(self.args.device)
        self.break_it = break_it

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        both = torch.cat([inputs["chosen"], inputs["rejected"]])
        ours = log_probability(model, both)
        with torch.no_grad(), sanctioned(self.reference, "reference"):
            if self.break_it:
                parts = [log_probability(self.reference, part) for part in both.chunk(2)]
                theirs = torch.cat(parts)
            else:
                theirs = log_probability(self.reference, both)  # the one legal call
        margin = (ours - theirs).unflatten(0, (2, -1))
        loss = -F.logsigmoid(0.1 * (margin[0] - margin[1])).mean()
        return (loss, {"margin": margin}) if return_outputs else loss


def log_probability(model: nn.Module, tokens: Tensor) -> Tensor:
    """Summed log-probability ``[B]`` of each answer ``[B, T]``."""
    logits = model(input_ids=tokens).logits[:, :-1]
    picked = F.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None])
    return picked.squeeze(-1).sum(-1)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--break-it", action="store_true")
tiny = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
policy = GPT2LMHeadModel(GPT2Config(**tiny, bos_token_id=0, eos_token_id=0))
pairs = [
    dict(zip(("chosen", "rejected"), torch.randint(0, 32, (2, 12)), strict=True)) for _ in range(16)
]
with tempfile.TemporaryDirectory() as folder:
    trainer = PreferenceTrainer(
        policy,
        TrainingArguments(
            folder,
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            prediction_loss_only=True,
            label_names=["chosen", "rejected"],
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=pairs,
        eval_dataset=pairs[:4],
        reference=copy.deepcopy(policy),
        break_it=parser.parse_args().break_it,
    )
    contract = CallPolicy(scopes={"reference": 1})
    try:
        with guarded_trainer(trainer, "reference", policy=contract):
            trainer.train()  # prints its verdict
    except LensNetViolation as violation:
        print(f"{type(violation).__name__}: {violation}")
