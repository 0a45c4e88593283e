"""The conditions on PEFT's adapters, with PEFT itself and small random models."""

import sys

import pytest
import torch
from packaging.version import Version
from tests.lensnet_guard.adapted import IDS, lora, make_model, peft
from tests.lensnet_guard.calls.asked import call, guarded
from torch import nn

from lensnet_guard import (
    CallPolicy,
    ConditionUnmet,
    Scope,
    active_adapter,
    adapters_off,
    adapters_on,
    guard_module,
)
from lensnet_guard.calls.scope import name_of

# Each of the two is older than the other expects, and says so.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)

LAYER = "model.layers.{}.self_attn.q_proj"
PEFT_LAYER = f"base_model.model.{LAYER}"


CONFIGS = {
    "LoRA": lora,
    "DoRA": lambda: lora(use_dora=True),
    "LoRA and a whole module": lambda: lora(modules_to_save=["lm_head"]),
    "LoRA and tokens": lambda: lora(trainable_token_indices=[2]),
    "IA3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "LoHa": lambda: peft.LoHaConfig(target_modules=["q_proj"]),
    "VeRA": lambda: peft.VeraConfig(target_modules=["q_proj"], r=2),
    "norms": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "prompts": lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "prefixes": lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "adaption prompts": lambda: peft.AdaptionPromptConfig(
        adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"
    ),
}


# What PEFT had not, or had not for today's attentions, before the release that constraints.txt has.
LATER = ("LoRA and tokens", "prefixes", "adaption prompts")


@pytest.fixture(params=CONFIGS)
def kind(request):
    if request.param in LATER and Version(peft.__version__) < Version("0.18"):
        pytest.skip(f"PEFT {peft.__version__} has no {request.param} for this transformers")
    return request.param


@pytest.fixture
def model(kind):
    """A PeftModel of each kind."""
    return peft.get_peft_model(make_model(), CONFIGS[kind]())


@pytest.fixture
def lora_model():
    return peft.get_peft_model(make_model(), lora())


def refusal(module, condition, **more):
    """What a call is refused for, after the condition's name; the module did not run."""
    guard, runs = guarded(module, condition), []
    handle = module.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(ConditionUnmet) as refused:
        call(guard, IDS, **more)
    handle.remove()
    guard.uninstall()
    assert runs == []
    return str(refused.value).partition("\n")[0].partition(f"{name_of(condition)}: ")[2]


def holds(module, condition, **more):
    """Whether a call is let through."""
    guard = guarded(module, condition)
    call(guard, IDS, **more)
    guard.uninstall()
    return guard.count() == 1


class TestEveryKind:
    def test_on(self, model):
        """As it is made: its adapters are on, and not off."""
        assert holds(model, adapters_on)
        assert " is on" in refusal(model, adapters_off)

    def test_off(self, model, kind):
        """Inside PEFT's own block; afterwards it is on again."""
        with model.disable_adapter():
            assert holds(model, adapters_off)
            gone = kind == "adaption prompts"  # the block takes these out of the model
            expected = "the module has no adapter of PEFT's." if gone else " is off"
            assert expected in refusal(model, adapters_on)
        assert holds(model, adapters_on)

    def test_the_base_model(self, model, kind):
        """Has the adapters in it, but for prompts, which PEFT puts in front of it."""
        base = model.get_base_model()
        if kind in ("prompts", "prefixes"):
            assert holds(base, adapters_off)
            assert refusal(base, adapters_on) == "the module has no adapter of PEFT's."
        else:
            assert holds(base, adapters_on)
            assert " is on" in refusal(base, adapters_off)
            with model.disable_adapter():
                assert holds(base, adapters_off)

    def test_inside_another_module(self, model):
        """As TRL's model with a value head holds a PeftModel."""
        outer = nn.Module()
        outer.pretrained_model = model
        outer.forward = lambda ids: model(ids)
        assert holds(outer, adapters_on)
        with model.disable_adapter():
            assert holds(outer, adapters_off)


class TestMessages:
    def test_on_where_it_must_be_off(self, lora_model):
        """The first layer, with its class, and how many."""
        assert refusal(lora_model, adapters_off) == (
            f"the adapter of {PEFT_LAYER.format(0)} (Linear) is on, as 2 of 2 are; make the call "
            "inside disable_adapter()."
        )

    def test_off_where_it_must_be_on(self, lora_model):
        """And what to leave, or to call."""
        with lora_model.disable_adapter():
            assert refusal(lora_model, adapters_on) == (
                f"the adapter of {PEFT_LAYER.format(0)} (Linear) is off, as 2 of 2 are; leave "
                "disable_adapter(), or enable the adapters."
            )

    def test_of_a_model_with_prompts(self):
        """The model itself is what has them."""
        model = peft.get_peft_model(make_model(), CONFIGS["prompts"]())
        assert refusal(model, adapters_off) == (
            "the adapter of the module itself (PeftModelForCausalLM) is on; make the call inside "
            "disable_adapter()."
        )

    def test_of_a_mixed_state(self, lora_model):
        """Satisfies neither, and each names its own first layer."""
        lora_model.get_submodule(PEFT_LAYER.format(0)).enable_adapters(False)
        assert refusal(lora_model, adapters_on).startswith(
            f"the adapter of {PEFT_LAYER.format(0)} (Linear) is off, as 1 of 2 are;"
        )
        assert refusal(lora_model, adapters_off).startswith(
            f"the adapter of {PEFT_LAYER.format(1)} (Linear) is on, as 1 of 2 are;"
        )


class TestTransformers:
    """A model of transformers with adapters, and no PeftModel around it."""

    @pytest.fixture(autouse=True)
    def _any_peft(self, monkeypatch):
        """What transformers needs for this is in earlier versions of PEFT than it asks for."""
        integration = pytest.importorskip("transformers.integrations.peft")
        monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "0.13.0")

    @pytest.fixture
    def model(self):
        model = make_model()
        model.add_adapter(lora())
        return model.eval()

    def test_on_and_off(self, model):
        """By its own methods."""
        assert holds(model, adapters_on)
        model.disable_adapters()
        assert holds(model, adapters_off)
        assert LAYER.format(0) in refusal(model, adapters_on)
        model.enable_adapters()
        assert holds(model, adapters_on)

    def test_a_whole_module_that_stays_off(self):
        """transformers' enable_adapters() forgets what disable_adapters() had turned off too."""
        model = make_model()
        model.add_adapter(lora(modules_to_save=["lm_head"]))
        model.disable_adapters()
        model.enable_adapters()
        wrapper = peft.utils.ModulesToSaveWrapper
        if not isinstance(model.lm_head, wrapper) or not model.lm_head.disable_adapters:
            pytest.skip("this transformers does not forget it")
        assert refusal(model, adapters_on).startswith(
            "the adapter of lm_head (ModulesToSaveWrapper) is off, as 1 of 3 are;"
        )


class TestMerged:
    def test_is_on(self, lora_model):
        """The base weights have the adapter in them, and are what runs."""
        expected = lora_model(IDS).logits
        lora_model.merge_adapter()
        assert holds(lora_model, adapters_on)
        assert " is on" in refusal(lora_model, adapters_off)
        assert torch.allclose(lora_model(IDS).logits, expected, atol=1e-5)

    def test_and_disabled_is_off(self, lora_model):
        """PEFT takes it out of the weights again as the first call runs."""
        lora_model.merge_adapter()
        with lora_model.disable_adapter():
            assert holds(lora_model, adapters_off)
            assert torch.allclose(lora_model(IDS).logits, make_model()(IDS).logits, atol=1e-5)
            assert " is off" in refusal(lora_model, adapters_on)
        assert holds(lora_model, adapters_on)

    def test_and_unloaded_is_none(self, lora_model):
        """There is nothing left that could be on or off."""
        merged = lora_model.merge_and_unload()
        assert holds(merged, adapters_off)
        assert refusal(merged, adapters_on) == "the module has no adapter of PEFT's."

    def test_of_one_that_is_not_active(self, lora_model):
        """What was merged works, whichever is active."""
        lora_model.merge_adapter()
        lora_model.get_submodule(PEFT_LAYER.format(0))._active_adapter = []
        assert f"{PEFT_LAYER.format(0)} (Linear) is on" in refusal(lora_model, adapters_off)


class TestActive:
    def test_layers_of_another_adapter(self, lora_model):
        """They have none that is active, and are in nobody's way."""
        lora_model.add_adapter("other", lora(target_modules=["v_proj"]))
        assert holds(lora_model, adapters_on)
        assert "q_proj (Linear) is on, as 2 of 4 are" in refusal(lora_model, adapters_off)
        lora_model.set_adapter("other")
        assert holds(lora_model, adapters_on)
        assert "v_proj (Linear) is on, as 2 of 4 are" in refusal(lora_model, adapters_off)
        with lora_model.disable_adapter():
            assert holds(lora_model, adapters_off)

    def test_none_is(self, lora_model):
        """Then what runs is the base model, and the adapters are called on all the same."""
        lora_model.base_model.set_adapter([])
        assert holds(lora_model, adapters_off)
        assert refusal(lora_model, adapters_on) == (
            "the module's adapters are on, and none of them is active; call set_adapter()."
        )


class TestActiveAdapter:
    """Policy and reference are two adapters of one model."""

    @pytest.fixture
    def model(self, lora_model):
        lora_model.add_adapter("ref", lora())
        return lora_model.eval()

    def test_by_its_name(self, model):
        """Each holds while it is the active one, and the other is told."""
        first = f"{PEFT_LAYER.format(0)} (Linear)"
        assert holds(model, active_adapter("default"))
        assert refusal(model, active_adapter("ref")) == (
            f"'default' works in {first}; call set_adapter('ref')."
        )
        model.set_adapter("ref")
        assert holds(model, active_adapter("ref"))
        assert refusal(model, active_adapter("default")) == (
            f"'ref' works in {first}; call set_adapter('default')."
        )

    def test_off_and_idle(self, model):
        """As `adapters_on` has it."""
        with model.disable_adapter():
            assert refusal(model, active_adapter("ref")) == refusal(model, adapters_on)
        model.base_model.set_adapter([])
        assert refusal(model, active_adapter("ref")) == refusal(model, adapters_on)

    def test_two_at_once(self, model):
        """Are neither alone."""
        model.base_model.set_adapter(["default", "ref"])
        assert refusal(model, active_adapter("ref")).startswith("'default' and 'ref' works in ")

    def test_merged(self, model):
        """What was merged works, whichever is active."""
        model.merge_adapter(["default"])
        for layer in model.modules():
            if hasattr(layer, "merged_adapters"):
                layer._active_adapter = ["ref"]
        assert holds(model, active_adapter("default"))
        assert "'default' works in " in refusal(model, active_adapter("ref"))

    def test_prompts(self):
        """A model has those of one adapter at a time."""
        model = peft.get_peft_model(make_model(), CONFIGS["prompts"]())
        model.add_adapter("ref", CONFIGS["prompts"]())
        assert holds(model, active_adapter("default"))
        model.set_adapter("ref")
        assert holds(model, active_adapter("ref"))
        with model.disable_adapter():
            assert " is off; " in refusal(model, active_adapter("ref"))

    def test_of_a_policy(self):
        """Two names contradict each other, and a name is a string."""
        both = (active_adapter("ref"), active_adapter("default"))
        with pytest.raises(ValueError, match=r"^active_adapter\('ref'\) and active_adapter\('def"):
            CallPolicy({"kl": 1}, requires=both)
        with pytest.raises(TypeError, match=r"^active_adapter: the name must be a string, not 3$"):
            active_adapter(3)


class TestRows:
    """`adapter_names` says of each row of a batch which adapter it has."""

    BASE, OWN, MIXED = ["__base__"] * 2, ["default"] * 2, ["__base__", "default"]

    @pytest.mark.parametrize(
        "beside",
        [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [2]}],
        ids=["alone", "a whole module", "tokens"],
    )
    def test_all_without(self, beside):
        """The call is one of the base model, in PEFT and for the conditions."""
        if "trainable_token_indices" in beside and Version(peft.__version__) < Version("0.18"):
            pytest.skip(f"PEFT {peft.__version__} has no tokens for this transformers")
        model = peft.get_peft_model(make_model(), lora(**beside)).eval()
        expected = make_model()(IDS).logits
        assert torch.equal(model(input_ids=IDS, adapter_names=self.BASE).logits, expected)
        assert holds(model, adapters_off, adapter_names=self.BASE)
        found = refusal(model, adapters_on, adapter_names=self.BASE)
        assert " is off" in found
        assert found.endswith("leave disable_adapter(), or name an adapter for each row.")

    def test_all_with(self, lora_model):
        """As without names."""
        lora_model.add_adapter("other", lora())
        lora_model.eval()
        assert holds(lora_model, adapters_on, adapter_names=self.OWN)
        assert " is on" in refusal(lora_model, adapters_off, adapter_names=self.OWN)
        assert holds(lora_model, active_adapter("other"), adapter_names=["other"] * 2)
        both = ["other", "default"]
        assert "works in" in refusal(lora_model, active_adapter("other"), adapter_names=both)

    def test_mixed(self, lora_model):
        """Satisfies neither."""
        lora_model.eval()
        assert " is off" in refusal(lora_model, adapters_on, adapter_names=self.MIXED)
        assert refusal(lora_model, adapters_off, adapter_names=self.MIXED) == (
            f"the adapter of {PEFT_LAYER.format(0)} (Linear) is on, as 2 of 2 are, for some rows "
            "of adapter_names; name '__base__' for every row."
        )

    def test_of_the_base_model(self, lora_model):
        """Guarded itself, it is told by the layers, which PEFT tells."""
        lora_model.eval()
        guard = guarded(lora_model.get_base_model(), adapters_off)
        lora_model.base_model.model = guard.module
        with guard.context("training"), guard.micro_step(), guard.sanctioned("kl"):
            lora_model(input_ids=IDS, adapter_names=self.BASE)
        with pytest.raises(ConditionUnmet, match="is on"):
            call(guard, IDS)

    def test_of_adapters_that_have_no_rows(self):
        """PEFT takes the names, and runs the adapter for every row all the same."""
        config = peft.IA3Config(
            target_modules=["q_proj"], feedforward_modules=[], modules_to_save=["lm_head"]
        )
        model = peft.get_peft_model(make_model(), config).eval()
        found = refusal(model, adapters_off, adapter_names=self.BASE)
        assert " is on, as 3 of 3 are; make" in found
        assert holds(model, adapters_on, adapter_names=self.BASE)

    def test_and_disabled(self, lora_model):
        """Then no row has one."""
        lora_model.eval()
        with lora_model.disable_adapter():
            assert holds(lora_model, adapters_off, adapter_names=self.OWN)


class TestXLora:
    """Its layers never are disabled themselves."""

    def test_is_off_where_it_computes_the_base_model(self, tmp_path):
        """In the block, but not in a PEFT whose block turns it off in name alone."""
        for name in ("a", "b"):
            peft.get_peft_model(make_model(), lora(task_type="CAUSAL_LM")).save_pretrained(
                tmp_path / name
            )
        config = peft.XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=8,
            xlora_depth=1,
            adapters={"0": str(tmp_path / "a"), "1": str(tmp_path / "b")},
        )
        model = peft.get_peft_model(make_model(use_cache=False), config).eval()
        assert holds(model, adapters_on)
        assert " is on" in refusal(model, adapters_off)
        with model.disable_adapter():
            is_base = torch.equal(model(input_ids=IDS).logits, make_model()(IDS).logits)
            right, wrong = (adapters_off, adapters_on) if is_base else (adapters_on, adapters_off)
            assert holds(model, right)
            assert refusal(model, wrong).startswith("the adapter of base_model.")
        assert holds(model, adapters_on)


class TestWithoutPeft:
    def test_is_not_imported(self, run_python):
        """A module of a program that has not loaded PEFT has no adapters."""
        code = """
            import sys, torch
            from lensnet_guard import CallPolicy, ConditionUnmet, adapters_off, adapters_on
            from lensnet_guard import guard_module
            for condition in adapters_off, adapters_on:
                policy = CallPolicy({"kl": 1}, requires=(condition,))
                guard = guard_module(torch.nn.Linear(3, 2), policy=policy)
                try:
                    with guard.context("training"), guard.sanctioned("kl"):
                        guard.module(torch.ones(3))
                        print("passes")
                except ConditionUnmet as refused:
                    print(str(refused).partition("\\n")[0].partition("allow: ")[2])
            print("peft" in sys.modules)
        """
        assert run_python(code).stdout == (
            "passes\nadapters_on: the module has no adapter of PEFT's.\nFalse\n"
        )

    def test_while_it_is_being_imported(self, monkeypatch, lora_model):
        """What has no classes yet has no layers either."""
        for module in ("peft.tuners.tuners_utils", "peft.utils.other", "peft.peft_model"):
            monkeypatch.delitem(sys.modules, module)
        assert holds(lora_model, adapters_off)


class TestScopes:
    def test_policy_and_reference_in_one_model(self, lora_model):
        """As DPO with PEFT has it: which of them a call is, its adapters tell."""
        policy = CallPolicy(
            {"policy": Scope(1, when=adapters_on), "reference": Scope(1, when=adapters_off)}
        )
        guard = guard_module(lora_model, policy=policy)
        with guard.context("training"), guard.micro_step() as step:
            guard.module(IDS)
            with guard.module.disable_adapter():
                guard.module(IDS)
        assert step.calls == {"policy": 1, "reference": 1}
