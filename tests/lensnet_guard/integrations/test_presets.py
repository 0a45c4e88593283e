"""From a trainer to its contracts: which preset is whose, and what is said where there is none."""

import importlib
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL comes with the extra trl")

import trl
from torch import nn

from lensnet_guard import CallPolicy, Scope, eval_mode, frozen, guard_module, guard_of, no_grad
from lensnet_guard.integrations import NoContract
from lensnet_guard.integrations._preset import around, contracts_of, preset_of
from lensnet_guard.integrations.presets import PRESETS, as_policy, as_reference
from lensnet_guard.integrations.transformers import guarded_trainer

pytestmark = [
    pytest.mark.usefixtures("still_heap", "fresh_accelerate"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),  # TRL's own
]


ROOT = Path(__file__).parents[3]


class Mine(trl.DPOTrainer):
    """A trainer of a user's."""

    def _compute_loss(self, *args):
        return super()._compute_loss(*args)


class TestPresetOf:
    def test_each_names_a_trainer_that_there_is(self):
        """And the version of the library that it was read from."""
        for name, preset in PRESETS.items():
            assert re.fullmatch(r"trl \d+\.\d+\.\d+", preset.read_from)
            module, _, kind = name.partition(":")
            if kind != "PPOTrainer":  # gone since 1.13
                assert preset_of(object.__new__(_class(module, kind))) is preset

    def test_one_of_a_users_own_is_of_the_kind_it_derives_from(self):
        """What it changes is checked all the same."""
        assert preset_of(object.__new__(Mine)) is PRESETS["trl.trainer.dpo_trainer:DPOTrainer"]

    def test_one_that_the_library_derives_is_of_none(self):
        """It calls otherwise than what it derives from."""
        derived = type("OtherTrainer", (trl.DPOTrainer,), {"__module__": "trl.experimental.other"})
        assert preset_of(object.__new__(derived)) is None

    def test_anything_else_has_none(self):
        assert preset_of(object()) is None


def _class(module, name):
    return getattr(importlib.import_module(module), name)


class TestContracts:
    def test_a_reference(self, make):
        """Once in each micro-step, as it always is; not frozen where it follows the policy."""
        contract = contracts_of(make("dpo"))["ref_model"]
        assert contract.to_json()["scopes"] == {
            "reference": {
                "calls": 1,
                "caller": "trl.trainer.dpo_trainer:DPOTrainer._compute_loss",
            }
        }
        assert contract.requires == (no_grad, eval_mode, frozen)
        synced = make("dpo", sync_ref_model=True)
        assert contracts_of(synced)["ref_model"].requires == (no_grad, eval_mode)

    def test_the_method_of_a_users_own_makes_the_calls(self, make):
        """It is on the stack whether or not it calls the library's."""
        contract = contracts_of(make("dpo", Mine))["ref_model"]
        assert contract.in_full["reference"].caller == f"{__name__}:Mine._compute_loss"

    def test_adapters_tell_the_reference_from_the_policy(self, make):
        """Where there is no other model, the base model is the reference."""
        contract = contracts_of(make("kto", peft=True))["model"]
        states = {name: scope.when for name, scope in contract.in_full.items()}
        assert states == {
            "reference": as_reference,
            "reference_kl": as_reference,
            "policy": as_policy,
            "policy_kl": as_policy,
        }

    def test_what_is_trained_where_nothing_else_is_held(self, make):
        """Something is checked in any case."""
        trainer = make("dpo", reference=False, precompute_ref_log_probs=True)
        assert contracts_of(trainer)["model"].budgets == {"policy": 1}

    def test_no_module_in_the_place(self, make):
        """As where a server is the teacher."""
        trainer = make("distillation")
        trainer.teacher_model = None
        message = (
            "DistillationTrainer holds nothing to guard: its teacher_model is no module here.\n"
            "  what to do   Train it without guarded_trainer, or name what it calls."
        )
        with pytest.raises(NoContract, match=f"^{re.escape(message)}$"):
            contracts_of(trainer)

    def test_one_module_in_two_places(self, make):
        """Nobody could say which of them is called; a teacher that is its student teaches none."""
        trainer = make("grpo")
        for name in ("reward_funcs", "reward_processing_classes", "reward_func_names"):
            setattr(trainer, name, getattr(trainer, name) * 2)
        trainer.reward_weights = trainer.reward_weights.repeat(2)
        message = (
            "reward_funcs.0 and reward_funcs.1 of GRPOTrainer are one module, so nobody could say "
            "which of them is called.\n"
            "  what to do   Load it twice; or guard it once, with a policy that counts the calls "
            'of both: guarded_trainer(trainer, "reward_funcs.1", policy=CallPolicy(...)).'
        )
        with pytest.raises(NoContract, match=f"^{re.escape(message)}$"):
            contracts_of(trainer)
        caller = "trl.trainer.grpo_trainer:GRPOTrainer._calculate_rewards"
        policy = CallPolicy({"reward": Scope(2, per="generation", caller=caller)})
        with guarded_trainer(trainer, "reward_funcs.1", policy=policy) as callback:
            trainer.train()
        assert callback.verdict.calls == {"reward": 6}
        trainer = make("gkd")
        trainer.teacher_model = trainer.model
        message = (
            "model, which it trains, and teacher_model of GKDTrainer are one module, so nobody "
            "could say which of them is called.\n"
            "  what to do   Load it twice: a reference or a teacher that is the trained model "
            "itself teaches nothing."
        )
        with pytest.raises(NoContract, match=f"^{re.escape(message)}$"):
            contracts_of(trainer)

    def test_weights_in_one_memory(self, make):
        """A reference of which a part is the policy's; what nobody trains may be shared."""
        trainer = make("dpo")
        head, its = trainer.model.lm_head, trainer.ref_model.lm_head
        its.weight.data = head.weight.data
        message = (
            "lm_head.weight of ref_model of DPOTrainer is in the memory of lm_head.weight of "
            "model, which it trains, so the one would move with the "
            "other.\n  what to do   Load it twice; or freeze in model what they share, "
            "requires_grad_(False)."
        )
        with pytest.raises(NoContract, match=f"^{re.escape(message)}$"):
            contracts_of(trainer)
        head.weight.requires_grad_(False)
        assert contracts_of(trainer).keys() == {"ref_model"}

    def test_a_module_with_a_contract_of_its_own(self, make):
        """It is not overruled."""
        trainer = make("dpo")
        guard = guard_module(trainer.ref_model, policy=CallPolicy({"kl": 1}), name="mine")
        trainer.ref_model = guard.module
        message = (
            "ref_model of DPOTrainer is guarded already, as mine, with a contract of its own.\n"
            "  what to do   Give that guard, guarded_trainer(trainer, guard_of(...)); or take it "
            "off first, guard.uninstall()."
        )
        with pytest.raises(NoContract, match=f"^{re.escape(message)}$"):
            contracts_of(trainer)

    def test_another_version_of_the_library(self, make, monkeypatch):
        """A method that is gone is told, with the version that had it."""
        trainer = make("dpo")
        monkeypatch.delattr(trl.DPOTrainer, "_compute_loss")
        message = (
            f"DPOTrainer has no method '_compute_loss', which calls the module in trl 1.16.0; "
            f"trl {trl.__version__} is another.\n  what to do   Write the contract: "
        )
        with pytest.raises(NoContract, match=f"^{re.escape(message)}"):
            contracts_of(trainer)


def test_the_page_has_a_row_of_each():
    """With what it holds, and the version that it was read from."""
    rows = (ROOT / "docs" / "trl.md").read_text().split("\n| `")[1:]
    page = {row.partition("`")[0]: row for row in rows}
    assert {name.rpartition(":")[2] for name in PRESETS} == page.keys()
    for name, preset in PRESETS.items():
        row = page[name.rpartition(":")[2]]
        assert preset.read_from in row
        assert all(f"`{held.place}`" in row for held in preset.held)


class TestUnknown:
    def test_says_what_it_holds(self, make):
        """And how to write a contract of it."""
        trainer = make("sft")
        trainer.critic = trainer.model
        message = (
            f"no contract is known of SFTTrainer (trl {trl.__version__}); TRL's trainers that have "
            "one are DPO, KTO, GRPO, RLOO, OnlineDPO, GKD, Distillation, Reward, PPO.\n"
            "  it holds     critic (Qwen2ForCausalLM)\n"
            '  what to do   Write the contract: guarded_trainer(trainer, "ref_model", '
            "policy=CallPolicy(...)), with the attribute that holds the module. To see what it "
            'calls, guard it once with policy=CallPolicy(scopes={}), mode="observe", '
            'log="runs/observed"; `lensnet-guard suggest runs/observed` writes the policy that '
            "this run has kept."
        )
        with pytest.raises(NoContract, match=f"^{re.escape(message)}$"), guarded_trainer(trainer):
            pytest.fail("it was opened")
        assert "train" not in vars(trainer)

    def test_holds_nothing(self, make):
        with pytest.raises(NoContract, match="it holds     no module but the one that it trains"):
            contracts_of(make("sft"))

    def test_no_trainer_at_all(self):
        with pytest.raises(NoContract, match="no contract is known of object"):
            contracts_of(object())

    def test_says_what_it_holds_in_lists_and_dicts(self, make):
        """The items of a tuple too, which cannot be guarded there, and say so."""
        trainer = make("sft")
        trainer.judges, trainer.teachers = {"taste": nn.Linear(1, 1)}, (nn.Linear(1, 1),)
        with pytest.raises(NoContract) as caught:
            contracts_of(trainer)
        assert "judges.taste (Linear), teachers.0 (Linear)" in str(caught.value)
        policy = CallPolicy({"kl": 1})
        with guarded_trainer(trainer, "judges.taste", policy=policy) as callback:
            assert guard_of(trainer.judges["taste"]) is callback.guard
        message = "^item 0 of a tuple cannot be guarded in its place; make the tuple a list$"
        opened = guarded_trainer(trainer, "teachers.0", policy=policy)
        with pytest.raises(TypeError, match=message), opened:
            pytest.fail("it was opened")
        assert guard_of(trainer.teachers[0]) is None

    def test_a_module_beside_others_twice(self, make):
        """Whichever of those that are guarded it is."""
        trainer = make("grpo")
        with guarded_trainer(trainer) as callback:
            again = guarded_trainer(trainer, callback.guards["reward_funcs.0"])
            message = "^reward_funcs.0 of this GRPOTrainer is guarded already: by a guarded_trainer"
            with pytest.raises(ValueError, match=message), again:
                pytest.fail("it was opened")

    def test_the_same_trainer_twice(self, make):
        """Two callbacks would open each micro-step twice."""
        trainer = make("dpo")
        with guarded_trainer(trainer) as callback:
            again = guarded_trainer(trainer, callback.guard)
            message = "^ref_model of this DPOTrainer is guarded already: by a guarded_trainer that"
            with pytest.raises(ValueError, match=message), again:
                pytest.fail("it was opened")
            trainer.train()
        assert callback.verdict.violations == 0

    def test_a_policy_without_a_name(self, make):
        """Nobody could say which module it is of."""
        message = (
            "guarded_trainer: a policy is given, and no attribute that it is for; name the one "
            'that holds the module, guarded_trainer(trainer, "ref_model", policy=...)'
        )
        opened = guarded_trainer(make("dpo"), policy=CallPolicy({"kl": 1}))
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"), opened:
            pytest.fail("it was opened")


class Loud:
    """A trainer with one method."""

    def ask(self, *args):
        return args


class TestAround:
    def test_decorates_a_method(self):
        """Its arguments and its result pass through; it is the trainer's own afterwards."""
        told = []

        @contextmanager
        def opened():
            told.append("in")
            yield
            told.append("out")

        loud = Loud()
        with around(loud, {"ask": opened()}):
            assert loud.ask(1, 2) == (1, 2)
            assert loud.ask(3) == (3,)
        assert loud.ask(4) == (4,)
        assert (told, vars(loud)) == (["in", "out"] * 2, {})

    def test_puts_back_what_was_there(self):
        """A method that somebody has put on the trainer, also after an exception."""
        loud = Loud()
        loud.ask = own = len
        with pytest.raises(KeyError), around(loud, {"ask": partial(partial, pytest.fail)}):
            raise KeyError("mine")
        assert loud.ask is own

    def test_leaves_what_was_put_there_meanwhile(self):
        """A method that somebody has put on the trainer in the block."""
        loud = Loud()
        with around(loud, {"ask": partial(partial, pytest.fail)}):
            loud.ask = len
        assert loud.ask is len
