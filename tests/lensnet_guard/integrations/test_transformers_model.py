"""The model that a transformers Trainer trains is guarded itself, however the trainer holds it."""

import pytest
import torch

from lensnet_guard import BudgetExceeded, CallPolicy, UnsanctionedCall, guard_module, guard_of

pytest.importorskip("transformers")

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lensnet_guard.integrations import sanctioned
from lensnet_guard.integrations.transformers import guarded_trainer

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    # Transformers 5 has new words for checkpointing, which version 4 and peft do not know.
    pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning"),
]

LOSS = "transformers.trainer:Trainer.compute_loss"
ONCE = CallPolicy(sanctioned_callers={LOSS: 1})
SAVED = {"save_strategy": "steps", "save_steps": 1}


def checkpointing(*, reentrant):
    options = {"use_reentrant": reentrant}
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": options}


WAYS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 4, "max_steps": -1, "num_train_epochs": 1},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "bf16": {"bf16": True},
    "checkpointing": checkpointing(reentrant=False),
    "reentrant checkpointing": checkpointing(reentrant=True),
    "label smoothing": {"label_smoothing_factor": 0.1},  # which asks what the model is
    "the best model": {
        **SAVED,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    },
}


def tiny_model(*, lora=False):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=16, max_position_embeddings=8, **sizes, **heads)
    )
    if not lora:
        return model
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, adapter)


@pytest.fixture
def make_trainer(tmp_path):
    """A trainer of ten samples, with an evaluation every step."""

    def make(*, cls=Trainer, lora=False, **options):
        torch._dynamo.reset()
        torch.manual_seed(1)
        tokens = torch.randint(0, 16, (10, 4))
        # A column that is no argument of the model's forward, and is left out for that.
        samples = [{"input_ids": row, "labels": row, "line": "text"} for row in tokens]
        arguments = {
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "learning_rate": 0.1,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_strategy": "no",
            "logging_steps": 1,
        }
        quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
        return cls(
            tiny_model(lora=lora),
            TrainingArguments(str(tmp_path), **(arguments | options), **quiet),
            train_dataset=samples,
            eval_dataset=samples[:4],
        )

    return make


def losses(trainer):
    logged = [line.get("loss", line.get("eval_loss")) for line in trainer.state.log_history]
    return [loss for loss in logged if loss is not None]


def held(trainer):
    """What the trainer holds the model by."""
    return [
        *(trainer.model, trainer.model_wrapped, trainer.callback_handler.model),
        *trainer.accelerator._models,
    ]


class TestLosses:
    @pytest.mark.parametrize(
        ("way", "lora"),
        [
            *((way, False) for way in WAYS),
            *((way, True) for way in ("plain", "checkpointing", "the best model")),
        ],
    )
    def test_are_those_without_a_guard(self, make_trainer, way, lora):
        """In training and evaluation, in the block and after it; the model is given back."""
        plain = make_trainer(lora=lora, **WAYS[way])
        plain.train()
        plain.evaluate()
        trainer = make_trainer(lora=lora, **WAYS[way])
        raw, kind = trainer.model, type(trainer.model)
        with guarded_trainer(trainer, "model", policy=ONCE) as guarded:
            assert guard_of(trainer.model) is guarded.guard
            trainer.train()
            trainer.evaluate()
        assert losses(trainer) == losses(plain)
        assert guarded.verdict.calls == {LOSS: 5 if way == "accumulation" else 2}
        assert (guarded.verdict.violations, guarded.guard.count("inference")) == (0, 3)
        assert all(getattr(one, "_orig_mod", one) is raw for one in held(trainer))
        assert type(raw) is kind

    @pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
    def test_of_a_training_that_is_resumed(self, make_trainer, tmp_path, lora):
        """From a checkpoint of a guarded run, without a guard and with one."""
        trainer = make_trainer(lora=lora, **SAVED)
        with guarded_trainer(trainer, "model", policy=ONCE):
            trainer.train()
        again, plain = (make_trainer(lora=lora, **SAVED) for _ in range(2))
        with guarded_trainer(again, "model", policy=ONCE) as guarded:
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        assert losses(again) == losses(plain) == losses(trainer)
        assert guarded.verdict.calls == {LOSS: 1}


class TestPlaces:
    @pytest.mark.parametrize("trained", [False, True])
    @pytest.mark.parametrize("compiled", [False, True])
    def test_an_exception_gives_the_model_back(self, make_trainer, compiled, trained):
        """Wherever the trainer held it, or holds it by now; a training before has wrapped it."""

        class Stop(TrainerCallback):
            def on_step_end(self, *_, **__):
                raise KeyboardInterrupt

        options = WAYS["compiled"] if compiled else {}
        trainer = make_trainer(**options)
        if trained:
            trainer.train()
        raw = trainer.model
        trainer.add_callback(Stop())
        with pytest.raises(KeyboardInterrupt):
            with guarded_trainer(trainer, "model", policy=ONCE) as guarded:
                trainer.train()
        assert guarded.guard.count("training") == 1
        assert all(getattr(one, "_orig_mod", one) is raw for one in held(trainer))
        assert type(raw) is LlamaForCausalLM
        trainer.remove_callback(Stop)
        trainer.train()
        assert len(losses(trainer)) == 4

    @pytest.mark.parametrize("target", ["model", None])
    def test_a_guard_of_before_that_is_at_one_of_them(self, make_trainer, target):
        """The others get it for the block."""
        trainer = make_trainer()
        raw = trainer.model
        guard = guard_module(raw, policy=ONCE)
        trainer.model = guard.module
        with guarded_trainer(trainer, target or guard) as guarded:
            assert all(one is guard.module for one in held(trainer))
            trainer.train()
        assert guarded.verdict.calls == {LOSS: 2}
        assert trainer.model is guard.module
        assert trainer.model_wrapped is raw

    def test_nothing_is_put_anywhere_when_it_is_off(self, make_trainer):
        """As without the block."""
        trainer = make_trainer()
        raw = trainer.model
        with guarded_trainer(trainer, "model", policy=ONCE, mode="off"):
            trainer.train()
            assert all(one is raw for one in held(trainer))
        assert len(losses(trainer)) == 4


class Distiller(Trainer):
    """Opens the scope itself, and asks the model ``more`` in training."""

    more = None

    def compute_loss(self, model, inputs, *args, **kwargs):
        with sanctioned(model, "lm"):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.more is not None and model.training:
            self.more(self, model, inputs)
        return loss


def again(trainer, model, inputs):
    with sanctioned(model, "lm"):
        model(**inputs)


class TestMistakes:
    @pytest.mark.parametrize(
        ("more", "error", "way"),
        [
            (again, BudgetExceeded, "plain"),
            (again, BudgetExceeded, "compiled"),
            (lambda trainer, model, inputs: model(**inputs), UnsanctionedCall, "plain"),
            (lambda trainer, model, inputs: trainer.model(**inputs), UnsanctionedCall, "compiled"),
        ],
    )
    def test_a_call_too_many_is_refused(self, make_trainer, more, error, way):
        """By whatever name the trainer is asked for its model."""
        trainer = make_trainer(cls=Distiller, **WAYS[way])
        trainer.more = more
        with pytest.raises(error, match="test_transformers_model"):
            with guarded_trainer(trainer, "model", policy=CallPolicy({"lm": 1})):
                trainer.train()
