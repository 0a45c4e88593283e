"""The conditions on PEFT's adapters, with PEFT itself and small random models."""

import sys

import pytest
import torch
from packaging.version import Version
from tests.lensnet_guard.calls.asked import call, guarded
from torch import nn

from lensnet_guard import CallPolicy, ConditionUnmet, Scope, adapters_off, adapters_on, guard_module

peft = pytest.importorskip("peft", reason="the extra named test is not installed")
transformers = pytest.importorskip("transformers")

# Each of the two is older than the other expects, and says so.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)

IDS = torch.arange(8).reshape(2, 4)
LAYER = "model.layers.{}.self_attn.q_proj"
PEFT_LAYER = f"base_model.model.{LAYER}"


def make_model():
    """Two layers of eight, with weights that are the same each time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def lora(**settings):
    return peft.LoraConfig(
        **{"target_modules": ["q_proj"], "r": 2, "init_lora_weights": False, **settings}
    )


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


def refusal(module, condition):
    """What a call is refused for, after the condition's name; the module did not run."""
    guard, runs = guarded(module, condition), []
    handle = module.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(ConditionUnmet) as refused:
        call(guard, IDS)
    handle.remove()
    guard.uninstall()
    assert runs == []
    return str(refused.value).partition("\n")[0].partition(f"{condition.__name__}: ")[2]


def holds(module, condition):
    """Whether a call is let through."""
    guard = guarded(module, condition)
    call(guard, IDS)
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
