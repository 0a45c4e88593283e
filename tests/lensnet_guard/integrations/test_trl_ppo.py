"""TRL's PPO trainer, whose loop tells callbacks of the end of an update alone."""

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="TRL comes with the extra trl")
pytest.importorskip("trl.experimental.ppo", reason="TRL has no PPO trainer since 1.13")

from tests.lensnet_guard.integrations.trl_kit import adapters, prompts
from trl.experimental.ppo import PPOConfig, PPOTrainer

from lensnet_guard import BudgetExceeded, ConditionUnmet, UnsanctionedCall
from lensnet_guard.integrations.transformers import guarded_trainer

pytestmark = [
    pytest.mark.usefixtures("still_heap", "fresh_accelerate"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),  # TRL's own
]

SETTINGS = {
    "max_steps": -1,
    "response_length": 6,
    "total_episodes": 8,
    "num_ppo_epochs": 2,
    "num_mini_batches": 1,
    "local_rollout_forward_batch_size": 2,
    "num_sample_generations": 2,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "per_device_eval_batch_size": 4,
}


@pytest.fixture
def ppo(trl_models, tmp_path):
    """What makes a trainer."""
    from tests.lensnet_guard.integrations.trl_kit import Kit

    kit = Kit(trl_models, tmp_path / "training")

    def ask(row):
        return {"input_ids": (kit.tokenizer(row["prompt"])["input_ids"] * 4)[:6]}

    def make(cls=PPOTrainer, *, peft=False, **options):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        rows = prompts().map(ask, remove_columns=["prompt"])
        return cls(
            kit.arguments(PPOConfig, **(SETTINGS | options)),
            kit.tokenizer,
            kit.model(),
            None if peft else kit.model("reference"),
            kit.judge(),
            rows,
            kit.judge(),
            eval_dataset=rows.select(range(4)),
            **({"peft_config": adapters()} if peft else {}),
        )

    return make


def logged(trainer):
    """What a training has logged, but for how fast it was."""
    return [
        {name: value for name, value in entry.items() if name != "eps"}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize(
    ("options", "updates", "calls"),
    [
        ({}, 4, {"ref_model": 1, "reward_model": 2, "value_model": 6}),
        (
            {"gradient_accumulation_steps": 4, "num_mini_batches": 2},
            1,
            {"ref_model": 4, "reward_model": 8, "value_model": 24},
        ),
        ({"peft": True}, 4, {"reward_model": 2, "value_model": 6, "policy": 4}),
    ],
)
def test_logs_what_it_logs_without_a_guard(ppo, options, updates, calls):
    """Each update makes the calls of its contract; the samples that are shown between are free."""
    bare = ppo(**options)
    bare.train()
    trainer = ppo(**options)
    with guarded_trainer(trainer) as callback:
        trainer.train()
    assert logged(trainer) == logged(bare)
    assert len(logged(bare)) == updates
    verdicts = {one.module: one for one in callback.verdict.values()}
    made = {name: sum(one.calls.values()) for name, one in verdicts.items()}
    assert made == {name: number * updates for name, number in calls.items()}
    assert {one.micro_steps for one in verdicts.values()} == {updates}
    assert {one.violations for one in verdicts.values()} == {0}
    assert verdicts["reward_model"].inference_calls > 0


class JudgesAgain(PPOTrainer):
    """Asks the reward model for a metric, as an update ends."""

    def log(self, *args, **kwargs):
        self.reward_model(input_ids=next(iter(self.dataloader))["input_ids"])  # PLANTED
        super().log(*args, **kwargs)


def test_a_call_too_many(ppo):
    """It is refused where it is made."""
    trainer = ppo(JudgesAgain)
    with pytest.raises((UnsanctionedCall, BudgetExceeded)) as caught, guarded_trainer(trainer):
        trainer.train()
    assert caught.value.record.caller.function == "JudgesAgain.log"


def test_samples_that_are_shown_outside_of_a_training(ppo):
    """They are free, and open no update."""
    trainer = ppo()
    with guarded_trainer(trainer) as callback:
        trainer.generate_completions()
        trainer.train()
        trainer.generate_completions()
        contexts = {guard.current_context for guard in callback.guards.values()}
        assert contexts == {"inference"}
    assert {one.micro_steps for one in callback.verdict.values()} == {4}
    assert {guard.violation_count for guard in callback.guards.values()} == {0}


class AsksThePolicy(PPOTrainer):
    """Has lost the block that turns the adapters off for the reference."""

    @contextmanager
    def null_ref_context(self):
        yield


def test_a_reference_that_is_the_policy(ppo):
    """The KL would be 0 for ever."""
    trainer = ppo(AsksThePolicy, peft=True)
    with pytest.raises(UnsanctionedCall) as caught, guarded_trainer(trainer):
        trainer.train()
    assert "not in the scope 'reference', for as_reference: the adapter of" in str(caught.value)
    assert caught.value.mistake == "reference-with-adapters"


class KeepsGradients(PPOTrainer):
    """Has the reference record what nobody differentiates."""

    @contextmanager
    def null_ref_context(self):
        with super().null_ref_context(), torch.enable_grad():
            yield


class LeavesThemOff(PPOTrainer):
    """Has the adapters off as the policy writes, and as it learns."""

    def train(self):
        self.model.policy.base_model.disable_adapter_layers()
        super().train()


class MovesTheBase(PPOTrainer):
    """Writes into the base model as an update ends."""

    def log(self, *args, **kwargs):
        super().log(*args, **kwargs)
        with torch.no_grad():
            next(p for n, p in self.model.policy.named_parameters() if "up_proj" in n).add_(1)


@pytest.mark.parametrize(
    ("cls", "condition", "mistake"),
    [
        (KeepsGradients, "no_grad", "reference-with-gradients"),
        (LeavesThemOff, "as_policy", "reference-with-adapters"),
        (MovesTheBase, "frozen_base", "moved-weights"),
    ],
)
def test_a_state_that_is_wrong(ppo, cls, condition, mistake):
    """Of the policy, and of its reference, where both are one model."""
    trainer = ppo(cls, peft=True)
    with pytest.raises(ConditionUnmet, match=f" {condition}: ") as caught:
        with guarded_trainer(trainer):
            trainer.train()
    assert caught.value.mistake == mistake
