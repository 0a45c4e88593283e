"""TRL's trainers where a policy is its own reference without its adapters: does that one move?"""

import random
import re
from functools import partial

import pytest
import torch

from lensnet_guard import ConditionUnmet

pytest.importorskip("trl", reason="TRL comes with the extra trl")

import trl
from peft import IA3Config, LoraConfig
from tests.lensnet_guard.integrations.trl_kit import losses
from transformers import TrainerCallback

from lensnet_guard.integrations.transformers import guarded_trainer

pytestmark = [
    pytest.mark.usefixtures("still_heap", "fresh_accelerate"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),  # TRL's own
]

LORA = partial(LoraConfig, r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

ADAPTERS = {
    "a whole head": lambda: LORA(modules_to_save=["lm_head"]),
    "whole norms": lambda: LORA(modules_to_save=["norm"]),
    "an embedding": lambda: LORA(target_modules=["q_proj", "embed_tokens"]),
    "tokens": lambda: LORA(trainable_token_indices=[2, 3]),
    "parameters": lambda: LORA(target_parameters=["mlp.up_proj.weight"]),
    "vectors": lambda: IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
}


def tuned(make, config, **options):
    """A trainer that puts new adapters onto its model."""
    cls = partial(trl.DPOTrainer, peft_config=config)
    return make("dpo", cls, reference=False, **options)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_logs_what_it_logs_without_a_guard(make, kind):
    """Whatever is trained, where the base model is what it was."""
    bare = tuned(make, ADAPTERS[kind]())
    random.seed(0)
    bare.train()
    trainer = tuned(make, ADAPTERS[kind]())
    random.seed(0)
    with guarded_trainer(trainer) as callback:
        trainer.train()
    assert losses(trainer) == losses(bare)
    assert callback.verdict.calls == {"reference": 3, "policy": 3}
    assert callback.verdict.violations == 0


def refused(trainer):
    """What ends a training, and how many steps had ended."""
    random.seed(0)
    with pytest.raises(ConditionUnmet) as caught, guarded_trainer(trainer):
        trainer.train()
    assert caught.value.mistake == "moved-weights"
    return str(caught.value).partition("\n")[0].partition("frozen_base: ")[2], trainer.state


def test_a_base_that_is_trained_along(make):
    """Somebody has unfrozen the model after its adapters were made."""
    trainer = make("dpo", peft=True)
    trainer.model.requires_grad_(True)
    told, state = refused(trainer)
    assert "embed_tokens.weight requires grad, as 27 of 27 of the base model do" in told
    assert state.global_step == 0


def test_biases_that_are_trained_along(make):
    """PEFT trains the base model's own, and they stay trained where adapters are off."""
    told, state = refused(tuned(make, LORA(bias="all")))
    assert told.endswith('leave bias= of the adapter\'s config at "none".')
    assert state.global_step == 0


class Moves(TrainerCallback):
    """Writes into the first parameter that has this in its name, once a step has ended."""

    def __init__(self, name):
        self.name = name

    def on_step_end(self, args, state, control, model, **kwargs):
        with torch.no_grad():
            next(p for path, p in model.named_parameters() if self.name in path).add_(1)


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        *((kind, {"peft": True}, "up_proj") for kind in ("dpo", "kto", "grpo", "rloo")),
        ("online_dpo", {"peft": True}, "up_proj"),
        ("dpo", {"tuned": True}, "lora_A.ref"),
        ("dpo", {"tuned": True}, "up_proj"),
    ],
)
def test_a_reference_that_moves(make, kind, options, name):
    """The base model, or the adapter that is the reference: told as its next pass begins."""
    trainer = make(kind, **options)
    trainer.add_callback(Moves(name))
    told, state = refused(trainer)
    assert re.search(rf"the parameter \S+{name}\S+ was written in place 1 time", told)
    assert state.global_step == 1
