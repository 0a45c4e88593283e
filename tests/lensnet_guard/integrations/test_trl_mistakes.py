"""TRL's trainers in real trainings with one line, ``guarded_trainer(trainer)``: planted mistakes.

Each is what somebody writes into a trainer of their own, and is named at its line.
"""

import importlib
import linecache
import math
import random
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from lensnet_guard import BudgetExceeded, BudgetUnmet, ConditionUnmet, UnsanctionedCall

pytest.importorskip("trl", reason="TRL comes with the extra trl")

import trl
from tests.lensnet_guard.integrations.trl_kit import losses
from transformers import TrainerCallback

from lensnet_guard.integrations import NothingChecked
from lensnet_guard.integrations.transformers import guarded_trainer

pytestmark = [
    pytest.mark.usefixtures("still_heap", "fresh_accelerate"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),  # TRL's own
]


def refused(trainer):
    """The violation that ends a training, which must have begun."""
    random.seed(0)
    with pytest.raises(Exception) as caught, guarded_trainer(trainer):
        trainer.train()
    return caught.value


def line_of(error):
    """The line of source that made the refused call."""
    return linecache.getline(error.record.caller.file, error.record.caller.line)


class AsksTwice(trl.DPOTrainer):
    """Asks the reference again, for a metric of its own."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.state.global_step == 1:
            with torch.no_grad():
                self.ref_model(input_ids=inputs["input_ids"])  # PLANTED
        return loss


class AsksNever(trl.DPOTrainer):
    """Takes zeros for the reference's log-probabilities in one step."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.precompute_ref_logps = self.state.global_step == 1
        zeros = torch.zeros(len(inputs["input_ids"]) // 2)
        inputs = dict(inputs, ref_chosen_logps=zeros, ref_rejected_logps=zeros)
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.precompute_ref_logps = False


class AsksForTheLoss(trl.GRPOTrainer):
    """Asks the reference in each step what it had said of the generation."""

    def _compute_loss(self, model, inputs):
        with torch.no_grad():
            self.ref_model(input_ids=inputs["prompt_ids"])  # PLANTED
        return super()._compute_loss(model, inputs)


class JudgesTwice(trl.GRPOTrainer):
    """Judges the completions again, for a metric."""

    def _calculate_rewards(self, *args):
        super()._calculate_rewards(*args)
        return super()._calculate_rewards(*args)


class JudgesNever(trl.RLOOTrainer):
    """Takes the same rewards for every generation."""

    def _calculate_rewards(self, inputs, *args):
        return torch.ones(len(inputs), 1)


class LearnsFromItsTeacher(trl.DistillationTrainer):
    """Lets the teacher see the batch outside of the loss."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        with torch.no_grad():
            self.teacher_model(input_ids=torch.ones(1, 3, dtype=torch.long))  # PLANTED
        return loss


@pytest.mark.parametrize(
    ("kind", "cls", "expected"),
    [
        ("dpo", AsksTwice, UnsanctionedCall),
        ("grpo", AsksForTheLoss, UnsanctionedCall),
        ("distillation", LearnsFromItsTeacher, UnsanctionedCall),
    ],
)
def test_a_call_too_many_is_named_at_its_line(make, kind, cls, expected):
    """It is refused before the module runs, in the step that makes it."""
    error = refused(make(kind, cls))
    assert type(error) is expected
    assert "# PLANTED" in line_of(error)


def test_rewards_that_are_computed_twice(make):
    """The second time is refused, where the library's own function makes the call."""
    error = refused(make("grpo", JudgesTwice))
    assert type(error) is BudgetExceeded
    assert "reward_funcs.0 was called" in str(error)
    assert f"{Path(__file__).name}:" in str(error)  # below the library's line, one's own


@pytest.mark.parametrize(
    ("kind", "cls", "told"),
    [
        ("dpo", AsksNever, "reference made 0 of 1 calls"),
        ("rloo", JudgesNever, "in 'generation' reward made 0 of 1 calls"),
    ],
)
def test_a_call_too_few(make, kind, cls, told):
    """It is told at the end of the micro-step, or of the generation."""
    error = refused(make(kind, cls))
    assert type(error) is BudgetUnmet
    assert told in str(error)


class Disturbs(TrainerCallback):
    """Does something to a module once a step has ended."""

    def __init__(self, module, disturb):
        self.module, self.disturb = module, disturb

    def on_step_end(self, args, state, control, **kwargs):
        self.disturb(self.module)


def moves(module):
    """What loads other weights, or trains the module along, does."""
    with torch.no_grad():
        next(module.parameters()).add_(1)


def trains(module):
    module.train()


def puts_off(model):
    model.base_model.disable_adapter_layers()


PLACES = [
    ("dpo", "ref_model"),
    ("kto", "ref_model"),
    ("rloo", "ref_model"),
    ("online_dpo", "ref_model"),
    ("gkd", "teacher_model"),
    ("distillation", "teacher_model"),
]


@pytest.mark.parametrize(
    ("kind", "place", "disturb", "condition"),
    [
        *((*held, moves, "frozen") for held in PLACES),
        # A reference's dropout would be on; the teachers' trainers call eval() themselves.
        *((*held, trains, "eval_mode") for held in PLACES[:4]),
    ],
)
def test_a_state_that_is_not_a_references(make, kind, place, disturb, condition):
    """Weights that move, train mode: told as the next call begins."""
    trainer = make(kind)
    trainer.add_callback(Disturbs(getattr(trainer, place), disturb))
    error = refused(trainer)
    assert type(error) is ConditionUnmet
    assert condition in str(error)


class Differentiates(trl.DPOTrainer):
    """Has a loss of its own, in which the reference has gradients."""

    def _compute_loss(self, model, inputs, return_outputs):
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        reference = self.ref_model(**batch)  # PLANTED
        return (model(**batch).logits - reference.logits).square().mean()


def test_a_reference_with_gradients(make):
    """The call of a method that is overridden is one of that method's."""
    error = refused(make("dpo", Differentiates))
    assert type(error) is ConditionUnmet
    assert "no_grad" in str(error)
    assert "# PLANTED" in line_of(error)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_reference_that_is_the_policy(make, monkeypatch, kind):
    """Nobody has put the adapters off: the loss is that of two equal models, for ever."""
    module = importlib.import_module(f"trl.trainer.{kind}_trainer")
    monkeypatch.setattr(module, "use_adapter", lambda *_, **__: nullcontext())
    bare = make(kind, peft=True)
    bare.train()
    if kind == "dpo":
        assert losses(bare) == pytest.approx([math.log(2)] * 3, abs=1e-6)
    error = refused(make(kind, peft=True))
    assert type(error) is BudgetExceeded
    assert "model was called in training more often than its budget allows" in str(error)
    assert re.search(r"not in the scope 'reference\w*', for as_reference: the adapter", str(error))
    assert error.mistake == "reference-with-adapters"
    assert "model(" in line_of(error)


def test_a_policy_without_its_adapters(make):
    """Somebody has left them off: it would be trained against itself."""
    trainer = make("dpo", peft=True)
    trainer.add_callback(Disturbs(trainer.model, puts_off))
    error = refused(trainer)
    assert type(error) is ConditionUnmet  # as the reference, which is run without gradients
    headline = str(error).partition("\n")[0]
    assert "allow: not in the scope 'policy', for as_policy: the adapter of" in headline
    assert "is off, as 4 of 4 are; leave disable_adapter(), or enable the adapters; so" in headline
    assert headline.endswith(
        "so it is one of 'reference', and no_grad: autograd records; make the call inside "
        "torch.no_grad()."
    )
    assert error.mistake == "reference-with-adapters"


def test_a_training_of_no_step(make):
    """Nothing was checked, and that is said."""
    trainer = make("dpo", max_steps=-1, num_train_epochs=0)
    assert type(refused(trainer)) is NothingChecked


def test_observed_mistakes_change_nothing(make, tmp_path):
    """They are counted, and the training goes on to its end."""
    trainer = make("dpo", AsksTwice)
    with pytest.warns(RuntimeWarning, match="1 violations of ref_model's contract"):
        with guarded_trainer(trainer, mode="observe", log=tmp_path / "log") as callback:
            trainer.train()
    assert trainer.state.global_step == 3
    assert callback.verdict.violations == 1
