"""Who writes the completions that TRL's online trainers learn from, and how often they are made."""

import random
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from lensnet_guard import ConditionUnmet, UnsanctionedCall

pytest.importorskip("trl", reason="TRL comes with the extra trl")

import trl
from tests.lensnet_guard.integrations.trl_kit import losses
from transformers import GenerationConfig

from lensnet_guard.integrations import NoContract
from lensnet_guard.integrations._preset import contracts_of
from lensnet_guard.integrations.transformers import guarded_trainer

pytestmark = [
    pytest.mark.usefixtures("still_heap", "fresh_accelerate"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),  # TRL's own
]

ALONE = {"judge": False, "beta": 0.0}  # so that nothing but the trained model is held


def served(prompts, trainer):
    """Completions as from a server, which has never heard of the model."""
    many = len(prompts)
    return {
        "prompt_ids": [[3, 4]] * many,
        "completion_ids": [[5, 6, 7 + n % 2] for n in range(many)],
        "logprobs": [[-1.0] * 3] * many,
    }


def written(prompts, trainer):
    """The same, and one more turn of the model itself."""
    with torch.no_grad():
        trainer.model.generate(torch.tensor([[3, 4]]), max_new_tokens=1, do_sample=False)
    return served(prompts, trainer)


def trained(trainer):
    random.seed(0)
    with guarded_trainer(trainer) as callback:
        trainer.train()
    return callback.guards["model"], losses(trainer)


def refused(trainer):
    """What ends a training."""
    random.seed(0)
    with pytest.raises(Exception) as caught, guarded_trainer(trainer):
        trainer.train()
    return caught.value


@pytest.mark.parametrize(
    ("rollout", "options", "generations"),
    [(served, ALONE, 0), (served, {"peft": True}, 0), (written, {"peft": True}, 2)],
)
def test_completions_that_a_function_writes(make, rollout, options, generations):
    """By whatever means: nothing is due from the model, and what it is asked for is legal."""
    cls = partial(trl.GRPOTrainer, rollout_func=rollout)
    bare = make("grpo", cls, max_steps=2, **options)
    random.seed(0)
    bare.train()
    guard, logged = trained(make("grpo", cls, max_steps=2, **options))
    assert logged == losses(bare)
    assert len(logged) == 2
    assert guard.count("training", "generation") == generations
    assert guard.violation_count == 0


@pytest.mark.parametrize("kind", ["grpo", "rloo", "online_dpo"])
def test_completions_that_an_engine_writes(make, kind):
    """The trained model is asked for none, so none are due from it."""
    trainer = make(kind, peft=True)
    scopes = contracts_of(trainer)["model"].in_full
    trainer.use_vllm = True
    if kind == "grpo":
        trainer.vllm_importance_sampling_correction = False
    by_engine = contracts_of(trainer)["model"].in_full
    assert scopes.keys() - by_engine.keys() == {"generation"}
    assert by_engine.items() <= scopes.items()


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_completions_that_a_thread_writes(make, kind):
    """What else is held is guarded, the model is not; where that is all there is, it is said."""
    batching = {"use_transformers_continuous_batching": True}
    assert [*contracts_of(make(kind, peft=True, **batching))] == ["reward_funcs.0"]
    message = (
        f"{kind.upper()}Trainer holds nothing to guard: its model writes by continuous batching, "
        "in a thread of transformers' own, where nobody could tell its calls from others.\n"
        "  what to do   Train it without guarded_trainer, or name what it calls."
    )
    with pytest.raises(NoContract, match=f"^{re.escape(message)}$"):
        contracts_of(make(kind, **ALONE, **batching))


class Twice:
    """Makes all completions of a batch again, scores and rewards included."""

    def _prepare_inputs(self, batch):
        if self.model.training:
            self._generate_and_score_completions(batch)
        return super()._prepare_inputs(batch)


class TwiceGRPO(Twice, trl.GRPOTrainer):
    pass


class TwiceRLOO(Twice, trl.RLOOTrainer):
    pass


@pytest.mark.parametrize(
    ("kind", "cls", "options"),
    [("grpo", TwiceGRPO, {}), ("grpo", TwiceGRPO, {"peft": True}), ("rloo", TwiceRLOO, ALONE)],
)
def test_a_generation_that_is_made_twice(make, kind, cls, options):
    """A micro-step has one at most, so the second has no window that it could count in."""
    error = refused(make(kind, cls, max_steps=1, **options))
    assert type(error) is UnsanctionedCall
    headline = str(error).partition("\n")[0]
    assert re.search(r"its scope '\w+' counts per \"generation\", and that of this", headline)
    assert headline.endswith("micro-step has ended.")
    assert error.mistake == "called-twice"


class Again(trl.GRPOTrainer):
    """Makes a generation anew that was broken off, by a judge that was slow to answer."""

    answers = False

    def _calculate_rewards(self, *args):
        if not self.answers:
            raise TimeoutError
        return super()._calculate_rewards(*args)

    def _prepare_inputs(self, batch):
        try:
            return super()._prepare_inputs(batch)
        except TimeoutError:
            self.answers = True
            return super()._prepare_inputs(batch)


def test_a_generation_that_was_broken_off(make):
    """It is made again in the same micro-step, and that is the one which counts."""
    with guarded_trainer(trainer := make("grpo", Again, max_steps=1)) as callback:
        trainer.train()
    assert callback.verdict["ref_model"].violations == 0
    assert callback.verdict["reward_funcs.0"].calls == {"reward": 1}


class WritesAsBase(trl.GRPOTrainer):
    """Has the base model write, in a block that was meant for the reference."""

    def _generate(self, *args):
        with self.model.disable_adapter():
            return super()._generate(*args)


class LearnsAsBase(trl.GRPOTrainer):
    """Has left the adapters off for the loss."""

    def _compute_loss(self, *args):
        with self.model.disable_adapter():
            return super()._compute_loss(*args)


@pytest.mark.parametrize("cls", [WritesAsBase, LearnsAsBase])
def test_a_policy_that_is_the_base_model(make, cls):
    """As it writes, and as it learns."""
    error = refused(make("grpo", cls, peft=True, max_steps=1))
    assert type(error) is ConditionUnmet
    assert "as_policy: the adapter of base_model.model.model.layers.0" in str(error)
    assert error.mistake == "reference-with-adapters"


CALLBACKS = {
    "averages": lambda trainer: trl.BEMACallback(update_freq=1),
    "shows progress": lambda trainer: trl.RichProgressCallback(),
    "logs completions": lambda trainer: trl.LogCompletionsCallback(
        trainer, generation_config=GenerationConfig(max_new_tokens=2), num_prompts=2, freq=1
    ),
}


@pytest.mark.parametrize(
    ("kind", "names"),
    [("dpo", [*CALLBACKS]), ("reward", ["averages", "shows progress"])],
)
def test_the_librarys_callbacks(make, kind, names):
    """They are given the trained model, which is guarded where nothing else is held."""
    logged = []
    for guarded in (False, True):
        trainer = make(kind, max_steps=2)
        for name in names:
            trainer.add_callback(CALLBACKS[name](trainer))
        if guarded:
            with guarded_trainer(trainer) as callback:
                trainer.train()
        else:
            trainer.train()
        logged.append(losses(trainer))
    assert logged[0] == logged[1]
    assert callback.verdict.violations == 0
    assert (Path(trainer.args.output_dir) / "bema" / "config.json").is_file()
