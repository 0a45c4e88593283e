"""The transformers callback in real trainings of a tiny model, evaluation in between."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lensnet_guard import (
    BudgetExceeded,
    BudgetUnmet,
    CallPolicy,
    NoContext,
    Scope,
    UnsanctionedCall,
    guard_module,
    guard_of,
)
from lensnet_guard.integrations import GuardLost, sanctioned

pytest.importorskip("transformers")

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lensnet_guard.integrations.transformers import LensNetGuardCallback, guarded_trainer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

KL = CallPolicy(scopes={"kl": 1})


def tiny_model():
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, max_position_embeddings=8, **sizes, **heads))


class Distiller(Trainer):
    """Learns from a frozen reference; ``extra`` is called in training, after the one legal call."""

    extra = None
    asks = True

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        outputs = model(**inputs)
        target = outputs.logits.detach()
        if self.asks or not model.training:
            target = self.ask(inputs)
        if self.extra is not None and model.training:
            self.extra(inputs)
        loss = F.mse_loss(outputs.logits, target)
        return (loss, outputs) if return_outputs else loss

    def ask(self, inputs):
        with torch.no_grad(), sanctioned(self.reference, "kl"):
            return self.reference(**inputs).logits


@pytest.fixture
def make_trainer(tmp_path):
    """A trainer of ten samples in five batches: three optimizer steps an epoch."""

    def make(cls=Distiller, **options):
        samples = [{"input_ids": torch.arange(4), "labels": torch.arange(4)} for _ in range(10)]
        arguments = {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "no",
            "logging_strategy": "no",
        }
        quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
        trainer = cls(
            tiny_model(),
            TrainingArguments(str(tmp_path), **(arguments | options), **quiet),
            train_dataset=samples,
            eval_dataset=samples[:2],
        )
        trainer.reference = tiny_model().requires_grad_(False)
        return trainer

    return make


class TestBudget:
    def test_one_call_per_micro_batch_is_kept_and_told(self, make_trainer, capsys):
        """Ten micro-batches, and evaluations before the first step and after every second."""
        trainer = make_trainer(eval_on_start=True)
        with guarded_trainer(trainer, "reference", policy=KL) as guarded:
            trainer.train()
        said = "reference: 10 micro-steps, 10 training calls (kl 10), 4 inference calls, "
        assert str(guarded.verdict) == said + "0 violations"
        assert capsys.readouterr().out.count(f"lensnet_guard: {guarded.verdict}\n") == 1

    def test_steps_are_numbered_as_the_trainer_counts_them(self, make_trainer):
        """The last optimizer step of an epoch has one micro-batch only."""
        trainer = make_trainer()
        with guarded_trainer(trainer, "reference", policy=KL) as guarded:
            trainer.train()
        numbers = [(c.step, c.micro_step) for c in guarded.guard.calls if c.context == "training"]
        first = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
        assert numbers == first + [(step + 3, micro_step) for step, micro_step in first]

    def test_a_second_call_in_the_scope_is_refused(self, make_trainer):
        """`train` raises it, before the module runs."""
        trainer = make_trainer()
        trainer.extra = trainer.ask
        with pytest.raises(BudgetExceeded, match="reference was called in training more often"):
            with guarded_trainer(trainer, "reference", policy=KL):
                trainer.train()

    def test_a_call_outside_the_scope_is_refused(self, make_trainer):
        """By the line that makes it."""
        trainer = make_trainer()
        trainer.extra = lambda inputs: trainer.reference(**inputs)
        with pytest.raises(UnsanctionedCall, match=r"called from .*test_transformers.*<lambda>"):
            with guarded_trainer(trainer, "reference", policy=KL):
                trainer.train()

    @pytest.mark.parametrize("asked_in", [0, 1])
    def test_a_micro_batch_without_the_call_is_refused(self, make_trainer, asked_in):
        """Whether it is the first of its optimizer step or the last."""
        trainer = make_trainer()
        batches = iter(range(10))

        class Sometimes(Distiller):
            asks = property(lambda _: next(batches) == asked_in)

        trainer.__class__ = Sometimes
        with pytest.raises(BudgetUnmet, match=f"step 0, micro-step {1 - asked_in} "):
            with guarded_trainer(trainer, "reference", policy=KL):
                trainer.train()

    def test_a_training_that_is_stopped_in_mid_step_owes_nothing(self, make_trainer):
        """A callback stops it after a substep, when the next micro-step is open already."""

        class Stop(TrainerCallback):
            def on_substep_end(self, args, state, control, **_):
                control.should_training_stop = True

        trainer = make_trainer(eval_strategy="epoch")  # which comes right after
        trainer.add_callback(Stop())
        with guarded_trainer(trainer, "reference", policy=KL) as guarded:
            trainer.train()
        verdict = guarded.verdict
        assert (verdict.micro_steps, verdict.calls, verdict.inference_calls) == (1, {"kl": 1}, 1)
        assert verdict.violations == 0

    def test_evaluation_outside_training_is_free(self, make_trainer):
        """In the block; the verdict is of the last training alone."""
        trainer = make_trainer(eval_strategy="no")
        with guarded_trainer(trainer, "reference", policy=KL) as guarded:
            for _ in range(2):
                trainer.evaluate()
                trainer.train()
        assert (guarded.verdict.micro_steps, guarded.verdict.inference_calls) == (10, 0)
        assert (guarded.guard.count("training"), guarded.guard.count("inference")) == (20, 2)

    def test_mixed_precision(self, make_trainer):
        """The trainer patches the model's forward, and leaves the reference alone."""
        trainer = make_trainer(bf16=True)
        with guarded_trainer(trainer, "reference", policy=KL) as guarded:
            trainer.train()
        assert guarded.verdict.calls == {"kl": 10}

    def test_a_part_of_the_model(self, make_trainer, tmp_path):
        """A dotted path leads to it; what is saved can be loaded without a guard."""
        trainer = make_trainer(eval_strategy="no")
        caller = f"{__name__}:Distiller.compute_loss"
        contract = CallPolicy(sanctioned_callers={caller: 1})
        with guarded_trainer(trainer, "model.lm_head", policy=contract) as guarded:
            trainer.train()
            trainer.save_model(str(tmp_path / "saved"))
        assert guarded.verdict.calls == {caller: 10}
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
        assert all(loaded[k].equal(v) for k, v in trainer.model.state_dict().items())


class TestTheModuleIsGivenBack:
    def test_after_training(self, make_trainer):
        """The very same object, with its own class; the callback is gone too."""
        trainer = make_trainer()
        raw, callbacks = trainer.reference, list(trainer.callback_handler.callbacks)
        with guarded_trainer(trainer, "reference", policy=KL) as guarded:
            assert guard_of(trainer.reference) is guarded.guard
            trainer.train()
        assert trainer.reference is raw
        assert type(raw) is LlamaForCausalLM
        assert guarded.guard.current_context is None
        assert trainer.callback_handler.callbacks == callbacks

    def test_after_an_exception_and_a_second_training_goes_well(self, make_trainer):
        """The trainer tells its callbacks nothing of it; the block closes what is open."""
        trainer = make_trainer()
        raw = trainer.reference
        trainer.extra = lambda _: 1 / 0
        with pytest.raises(ZeroDivisionError):
            with guarded_trainer(trainer, "reference", policy=KL) as guarded:
                trainer.train()
        assert trainer.reference is raw
        assert type(raw) is LlamaForCausalLM
        assert guarded.guard.current_context is None
        trainer.extra = None
        with guarded_trainer(trainer, "reference", policy=KL) as guarded:
            trainer.train()
        assert guarded.verdict.calls == {"kl": 10}


class Evaluates(TrainerCallback):
    """Of the user's, so before the guard's in the list: evaluates at one of the trainer's hooks."""

    def __init__(self, trainer, hook):
        self.trainer = trainer
        setattr(self, hook, self.evaluate)

    def evaluate(self, *_, **__):
        self.trainer.evaluate()
        self.trainer.predict(self.trainer.eval_dataset)


class TestEvaluationInBetween:
    @pytest.mark.parametrize(
        ("hook", "times"),
        [
            *[(f"on_{name}", 6) for name in ("step_begin", "pre_optimizer_step", "step_end")],
            *[("on_optimizer_step", 6), ("on_substep_end", 4), ("on_epoch_end", 2)],
        ],
    )
    def test_of_a_callback_of_ones_own(self, make_trainer, hook, times):
        """Its calls are free, also while a micro-step is open, whose budget is due all the same."""
        trainer = make_trainer(eval_strategy="no")
        trainer.add_callback(Evaluates(trainer, hook))
        with guarded_trainer(trainer, "reference", policy=KL) as guarded:
            trainer.train()
        assert (guarded.verdict.calls, guarded.verdict.violations) == ({"kl": 10}, 0)
        assert guarded.verdict.inference_calls == 2 * times

    @pytest.mark.parametrize(("hook", "times"), [("on_step_end", 6), ("on_substep_end", 4)])
    def test_a_callback_that_calls_the_module_itself(self, make_trainer, hook, times):
        """As a step has ended, for a metric: outside of it, whoever came first."""
        trainer = make_trainer(eval_strategy="no")
        callback = TrainerCallback()
        batch = {"input_ids": torch.arange(4)[None]}
        setattr(callback, hook, lambda *_, **__: trainer.reference(**batch) and None)
        trainer.add_callback(callback)
        with guarded_trainer(trainer, "reference", policy=KL) as guarded:
            trainer.train()
        assert (guarded.verdict.calls, guarded.verdict.violations) == ({"kl": 10}, 0)
        assert guarded.verdict.inference_calls == times

    @pytest.mark.parametrize(("hook", "times"), [("on_step_begin", 6), ("on_substep_end", 4)])
    def test_a_callback_that_is_added_in_the_block(self, make_trainer, hook, times):
        """It comes between the guard's like any other."""
        trainer = make_trainer(eval_strategy="no")
        callback, batch = TrainerCallback(), {"input_ids": torch.arange(4)[None]}
        setattr(callback, hook, lambda *_, **__: trainer.reference(**batch) and None)
        before = [*trainer.callback_handler.callbacks]
        with guarded_trainer(trainer, "reference", policy=KL) as guarded:
            trainer.add_callback(callback)
            trainer.train()
        assert guarded.verdict.inference_calls == times
        assert trainer.callback_handler.callbacks == [*before, callback]

    def test_by_another_door(self, make_trainer):
        """A class's own method, and the loop alone, in the midst of a micro-step."""
        trainer = make_trainer(eval_strategy="no", max_steps=1)

        class Evaluating(TrainerCallback):
            def on_pre_optimizer_step(self, *_, **__):
                Trainer.evaluate(trainer)
                loader = trainer.get_eval_dataloader()
                trainer.evaluation_loop(loader, "mine", prediction_loss_only=True)

        trainer.add_callback(Evaluating())
        with guarded_trainer(trainer, "reference", policy=KL) as guarded:
            trainer.train()
        assert (guarded.verdict.calls, guarded.verdict.inference_calls) == ({"kl": 2}, 2)

    def test_callbacks_that_are_replaced_in_the_block(self, make_trainer):
        """The block ends well, and leaves what is there."""
        trainer = make_trainer()
        before = [*trainer.callback_handler.callbacks]
        with guarded_trainer(trainer, "reference", policy=KL):
            trainer.callback_handler.callbacks = [*before]
        assert trainer.callback_handler.callbacks == before

    def test_does_not_pay_for_the_micro_step(self, make_trainer):
        """A loss that asks the reference never, but evaluates."""
        trainer = make_trainer()
        trainer.asks = False
        trainer.extra = lambda _: trainer.evaluate()
        with pytest.raises(BudgetUnmet, match="kl made 0 of 1 calls"):
            with guarded_trainer(trainer, "reference", policy=KL):
                trainer.train()


class TestCutShort:
    @pytest.mark.parametrize("per", ["micro_step", "step"])
    def test_what_is_caught_inside_the_block(self, make_trainer, per):
        """A Ctrl-C: evaluations and calls are free afterwards, and so is a second training."""
        trainer = make_trainer(max_steps=2)
        policy = CallPolicy({"kl": Scope((1, 2), per=per)})

        def stop(_):
            if trainer.state.global_step == 1:
                raise KeyboardInterrupt

        trainer.extra = stop
        with guarded_trainer(trainer, "reference", policy=policy) as guarded:
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            assert guarded.guard.current_context == "inference"
            trainer.evaluate()
            trainer.reference(input_ids=torch.arange(4)[None])
            trainer.extra = None
            trainer.train()
        assert guarded.verdict.violations == guarded.guard.violation_count == 0

    @pytest.mark.parametrize("per", ["micro_step", "step"])
    def test_a_batch_that_was_too_large(self, make_trainer, per):
        """accelerate catches that inside of ``train``, and begins again with smaller ones."""
        trainer = make_trainer(auto_find_batch_size=True, max_steps=2)
        policy = CallPolicy({"kl": Scope(1 if per == "micro_step" else 2, per=per)})
        left = [torch.OutOfMemoryError("CUDA out of memory.")]

        def fill(_):
            if left:
                raise left.pop()

        trainer.extra = fill
        with guarded_trainer(trainer, "reference", policy=policy) as guarded:
            trainer.train()
        assert (guarded.verdict.calls, guarded.verdict.violations) == ({"kl": 4}, 0)

    def test_leaves_the_trainer_as_it_was(self, make_trainer):
        """Its methods are of its class again."""
        trainer = make_trainer()
        with guarded_trainer(trainer, "reference", policy=KL):
            assert {"train", "evaluate", "predict"} <= vars(trainer).keys()
        assert not {"train", "evaluate", "predict"} & vars(trainer).keys()


class TestCopies:
    def test_of_a_module_in_the_block_are_raw(self, make_trainer):
        """Somebody keeps the best so far, or an average: copies, of which nobody opens contexts."""
        trainer = make_trainer()
        kept = []
        trainer.extra = lambda _: kept.append(copy.deepcopy(trainer.reference))
        with guarded_trainer(trainer, "reference", policy=KL):
            trainer.train()
            kept.append(pickle.loads(pickle.dumps(trainer.reference)))
            kept.append(copy.deepcopy(nn.ModuleList([trainer.reference]))[0])
        assert len(kept) == 12
        for copied in kept:
            assert guard_of(copied) is None
            assert type(copied) is LlamaForCausalLM
            copied(input_ids=torch.arange(4)[None])

    def test_of_a_guard_that_was_there_are_guarded(self, make_trainer):
        """As it says of its copies; the block does not change it."""
        trainer = make_trainer()
        guard = guard_module(trainer.reference, policy=KL, name="reference")
        trainer.reference = guard.module
        with guarded_trainer(trainer, guard):
            copied = copy.deepcopy(trainer.reference)
        with pytest.raises(NoContext):
            copied(input_ids=torch.arange(4)[None])


class TestCallbackAlone:
    @pytest.fixture
    def guarded(self, make_trainer):
        trainer = make_trainer()
        guard = guard_module(trainer.reference, policy=KL, name="reference")
        trainer.reference = guard.module
        callback = LensNetGuardCallback(guard)
        trainer.add_callback(callback)
        return trainer, callback

    def test_two_trainings_count_each_for_itself(self, guarded):
        """The guard goes on counting; the verdict is of one training."""
        trainer, callback = guarded
        for _ in range(2):
            trainer.train()
            assert callback.verdict.calls == {"kl": 10}
        assert callback.guard.count("training") == 20
        assert callback.guard.current_context is None

    @pytest.mark.parametrize("closes", [True, False])
    def test_after_an_exception_the_next_training_begins_anew(self, guarded, closes):
        """`close` ends what is open at once."""
        trainer, callback = guarded
        trainer.extra = lambda _: 1 / 0
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        assert callback.guard.current_context == "training"
        if closes:
            callback.close()
            assert callback.guard.current_context is None
        trainer.extra = None
        trainer.train()
        assert callback.verdict.calls == {"kl": 10}

    def test_a_part_of_the_model_must_stay_in_its_place(self, make_trainer):
        """A model that is given another head while it trains."""
        trainer = make_trainer()
        caller = f"{__name__}:Distiller.compute_loss"
        guard = guard_module(
            trainer.model.lm_head, policy=CallPolicy(sanctioned_callers={caller: 1}), name="head"
        )
        trainer.model.lm_head = guard.module
        trainer.add_callback(LensNetGuardCallback(guard))

        def replace(_):
            trainer.model.lm_head = nn.Linear(8, 16)

        trainer.extra = replace
        with pytest.raises(GuardLost, match=r"LlamaForCausalLM\.lm_head is a Linear without"):
            trainer.train()


class TestLostGuards:
    def test_a_reference_that_was_replaced_before(self, make_trainer):
        """The guard is known, and its module nowhere in the trainer."""
        trainer = make_trainer()
        guard = guard_module(trainer.reference, policy=KL, name="reference")
        with pytest.raises(GuardLost, match="its module is nowhere in Distiller"):
            with guarded_trainer(trainer, guard):
                trainer.train()

    def test_a_reference_that_is_replaced_in_training(self, make_trainer):
        """Found at the next micro-batch."""
        trainer = make_trainer()

        def replace(_):
            trainer.reference = tiny_model()

        trainer.extra = replace
        with pytest.warns(RuntimeWarning, match=r"Distiller\.reference was replaced inside"):
            with pytest.raises(GuardLost, match="reference is a LlamaForCausalLM without a guard"):
                with guarded_trainer(trainer, "reference", policy=KL):
                    trainer.train()


class TestEvidence:
    def test_without_a_log_the_calls_are_written_to_the_output_folder(self, make_trainer, tmp_path):
        """And the exception says so."""
        trainer = make_trainer()
        trainer.extra = trainer.ask
        with pytest.raises(BudgetExceeded) as caught:
            with guarded_trainer(trainer, "reference", policy=KL):
                trainer.train()
        path = tmp_path / "lensnet.rank0.jsonl"
        assert '"reason":"BudgetExceeded"' in path.read_text()
        note = f"lensnet_guard: the calls of reference are in {path}"
        assert caught.value.__notes__ == [note]
