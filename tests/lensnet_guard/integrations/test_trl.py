"""TRL's trainers in real trainings with one line, ``guarded_trainer(trainer)``: correct ones."""

import random

import pytest
import torch
from torch import nn

from lensnet_guard import Verdicts, guard_of

pytest.importorskip("trl", reason="TRL comes with the extra trl")

from tests.lensnet_guard.integrations.trl_kit import losses

from lensnet_guard.integrations.transformers import guarded_trainer

pytestmark = [
    pytest.mark.usefixtures("still_heap", "fresh_accelerate"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),  # TRL's own
]

REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
STEPWISE = {"eval_strategy": "steps", "eval_steps": 2}
SYNCED = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
OFTEN = {"gradient_accumulation_steps": 4, "max_steps": 4}

CASES = [
    # kind, options of its configuration, calls of each module in training
    ("dpo", {}, {"ref_model": 3}),
    ("dpo", {"gradient_accumulation_steps": 4, **STEPWISE}, {"ref_model": 12}),
    ("dpo", {"precompute_ref_log_probs": True, **STEPWISE}, {"ref_model": 0}),
    ("dpo", SYNCED, {"ref_model": 3}),
    ("dpo", {"gradient_checkpointing": True}, {"ref_model": 3}),
    ("dpo", {"gradient_checkpointing": True, **REENTRANT}, {"ref_model": 3}),
    ("kto", {"gradient_accumulation_steps": 4, **STEPWISE}, {"ref_model": 24}),
    ("kto", {"loss_type": "apo_zero_unpaired"}, {"ref_model": 3}),
    ("kto", {"precompute_ref_log_probs": True}, {"ref_model": 0}),
    ("grpo", {}, {"ref_model": 3, "reward_funcs.0": 3}),
    ("grpo", {**OFTEN, **STEPWISE}, {"ref_model": 16, "reward_funcs.0": 4}),
    ("grpo", {**OFTEN, "num_iterations": 2}, {"ref_model": 8, "reward_funcs.0": 2}),
    (
        "grpo",
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2, **SYNCED},
        {"ref_model": 8, "reward_funcs.0": 2},
    ),
    ("grpo", {"beta": 0.0, "gradient_checkpointing": True}, {"reward_funcs.0": 3}),
    ("rloo", {"num_iterations": 2, **OFTEN, **STEPWISE}, {"ref_model": 8, "reward_funcs.0": 2}),
    ("online_dpo", {"gradient_accumulation_steps": 4}, {"ref_model": 12, "reward_funcs.0": 12}),
    ("gkd", {"seq_kd": True, "lmbda": 0.0, **STEPWISE}, {"teacher_model": 6}),
    ("gkd", {"seq_kd": False, "lmbda": 1.0, **OFTEN}, {"teacher_model": 16}),
    ("distillation", {"gradient_accumulation_steps": 4}, {"teacher_model": 12}),
    ("reward", {"gradient_accumulation_steps": 4, **STEPWISE}, {"model": 12}),
    ("reward", {"gradient_checkpointing": True, **REENTRANT}, {"model": 3}),
    ("dpo", {"peft": True, "gradient_accumulation_steps": 4, **STEPWISE}, {"model": 24}),
    ("dpo", {"peft": True, "gradient_checkpointing": True}, {"model": 6}),
    ("dpo", {"peft": True, "gradient_checkpointing": True, **REENTRANT}, {"model": 6}),
    ("dpo", {"reference": False, "precompute_ref_log_probs": True}, {"model": 3}),
    ("kto", {"peft": True}, {"model": 12}),
    ("grpo", {"peft": True, **OFTEN, "num_iterations": 2}, {"reward_funcs.0": 2, "model": 34}),
    ("grpo", {"judge": False, "beta": 0.0}, {"model": 6}),
    ("rloo", {"peft": True, **STEPWISE}, {"reward_funcs.0": 3, "model": 12}),
    ("online_dpo", {"peft": True}, {"reward_funcs.0": 3, "model": 9}),
    ("distillation", {"gradient_checkpointing": True, **REENTRANT}, {"teacher_model": 3}),
]


def trained(trainer, **options):
    """A training in a guard; what it came to, by module."""
    random.seed(0)
    with guarded_trainer(trainer, **options) as callback:
        trainer.train()
    verdict = callback.verdict
    return verdict if isinstance(verdict, Verdicts) else {callback.guard.name: verdict}


@pytest.mark.parametrize(("kind", "options", "calls"), CASES)
def test_logs_what_it_logs_without_a_guard(make, kind, options, calls):
    """Each makes exactly the calls of its contract, evaluation in between is free."""
    bare = make(kind, **options)
    random.seed(0)
    bare.train()
    trainer = make(kind, **options)
    verdicts = trained(trainer)
    assert losses(trainer) == losses(bare)
    assert len(losses(bare)) == bare.args.max_steps
    made = {name: sum(verdict.calls.values()) for name, verdict in verdicts.items()}
    assert made == calls
    assert all(verdict.violations == 0 for verdict in verdicts.values())
    assert all(guard_of(module) is None for module in held(trainer))


def held(trainer):
    """Every module that a trainer holds."""
    values = [*vars(trainer).values(), *getattr(trainer, "reward_funcs", [])]
    return [value for value in values if isinstance(value, nn.Module)]


def test_an_adapter_that_was_there_before(make):
    """TRL loads a copy of it by the name "ref", which is the reference."""
    trainers = [make("dpo", tuned=True) for _ in range(2)]
    assert set(trainers[0].model.peft_config) == {"default", "ref"}
    trainers[0].train()
    verdict = trained(trainers[1])["model"]
    assert losses(trainers[1]) == losses(trainers[0])
    assert verdict.calls == {"reference": 3, "policy": 3}


def test_a_teacher_that_writes_by_lot(make):
    """Where chance decides who writes a completion, the teacher does so once or not at all."""
    trainer = make("gkd", seq_kd=True, lmbda=0.5, gradient_accumulation_steps=4)
    verdict = trained(trainer)["teacher_model"]
    assert verdict.calls["distillation"] == 12
    assert 0 < verdict.calls["generation"] < 12


def test_the_methods_are_the_trainers_own_again(make):
    """What opens windows is on the trainer for the length of the block."""
    trainer = make("grpo")
    with guarded_trainer(trainer):
        assert "_generate_and_score_completions" in vars(trainer)
    assert "_generate_and_score_completions" not in vars(trainer)


def test_a_training_that_is_resumed(make, tmp_path):
    """It goes on in the midst of what was generated, from a checkpoint on disk."""
    options = {"num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
    first = make("grpo", **options, save_strategy="steps", save_steps=1)
    trained(first)
    trainer = make("grpo", **options)
    random.seed(0)
    with guarded_trainer(trainer) as callback:
        trainer.train(resume_from_checkpoint=str(first.args.output_dir) + "/checkpoint-1")
    assert trainer.state.global_step == 3
    verdict = callback.verdict["ref_model"]
    assert (verdict.micro_steps, verdict.violations) == (4, 0)
    assert sum(verdict.calls.values()) > 0


def test_a_training_is_logged_and_observed(make, tmp_path):
    """The options of one module hold for all that are found."""
    verdicts = trained(make("grpo"), mode="observe", log=tmp_path / "log")
    assert {verdict.violations for verdict in verdicts.values()} == {0}
    written = (tmp_path / "log" / "lensnet.rank0.jsonl").read_text()
    assert "ref_model" in written
    assert "reward_funcs.0" in written


def test_an_evaluation_alone_is_free(make):
    """Nothing is due in it."""
    trainer = make("dpo")
    with guarded_trainer(trainer) as callback:
        trainer.evaluate()
        assert callback.guard.count("inference") == 1
    assert callback.guard.violation_count == 0


def test_the_random_numbers_are_those_of_the_program(make):
    """A guard draws none."""
    trainer = make("dpo")
    before = torch.get_rng_state()
    with guarded_trainer(trainer):
        assert torch.equal(torch.get_rng_state(), before)
