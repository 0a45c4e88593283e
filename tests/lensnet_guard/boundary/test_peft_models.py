"""What PEFT's models do that others do not, with PEFT itself and small random models."""

import copy
import inspect

import pytest
import torch
from packaging.version import Version
from tests.lensnet_guard.adapted import IDS, lora, make_model, peft
from torch import nn
from torch.utils.checkpoint import checkpoint

from lensnet_guard import BypassedGuard, CallPolicy, adapters_off, guard_module
from lensnet_guard.boundary.peft_models import prompts_of, unloading_methods, whole_methods

# PEFT and transformers are older than each other expects, and say so.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)

CONFIGS = {
    "LoRA": lambda: lora(task_type="CAUSAL_LM"),
    "LoRA and a whole module": lambda: lora(task_type="CAUSAL_LM", modules_to_save=["lm_head"]),
    "prompts": lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "encoded prompts": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=2, task_type="CAUSAL_LM", encoder_hidden_size=8
    ),
    "prefixes": lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    """A PeftModel of each kind."""
    if request.param == "prefixes" and Version(peft.__version__) < Version("0.18"):
        pytest.skip(f"PEFT {peft.__version__} has no prefixes for this transformers")
    return peft.get_peft_model(make_model(), CONFIGS[request.param]()).eval()


@pytest.fixture
def lora_model():
    return peft.get_peft_model(make_model(), lora(task_type="CAUSAL_LM")).eval()


def generate(model):
    return model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)


def logits(guard):
    with guard.context("inference"):
        return guard.module(IDS).logits


class TestGenerate:
    """PEFT's runs the base model, its embedding and the prompts, each alone: it was a bypass."""

    def test_is_one_call(self, model):
        """Of that name, with the same tokens as without a guard, adapters on or off."""
        expected = generate(model)
        with model.disable_adapter():
            base = generate(model)
        guard = guard_module(model)
        with guard.context("inference"):
            assert torch.equal(generate(guard.module), expected)
            with guard.module.disable_adapter():
                assert torch.equal(generate(guard.module), base)
        assert [call.method for call in guard.calls] == ["generate", "generate"]
        assert guard.calls[0].caller.function == "generate"
        assert guard.violations == ()

    def test_of_the_raw_model(self, lora_model):
        """Is a bypass, named as what was called."""
        guard = guard_module(lora_model)
        with pytest.raises(BypassedGuard, match=r"^PeftModelForCausalLM\.generate was run behind"):
            generate(lora_model)
        guard.uninstall()
        assert generate(lora_model).shape == (2, 7)

    def test_of_a_mixed_model(self):
        """Of adapters of several kinds, likewise."""
        guard = guard_module(peft.get_peft_model(make_model(), lora(), mixed=True).eval())
        with guard.context("inference"):
            generate(guard.module)
        assert [call.method for call in guard.calls] == ["generate"]

    def test_opens_no_way_for_checkpoints(self, lora_model):
        """A method that the policy counts may hide what is recomputed; this one hides nothing."""
        guard = guard_module(lora_model)
        runs = []

        def only_when_recomputed(x):
            if runs:
                lora_model(IDS)
            runs.append(1)
            return x.sin()

        out = checkpoint(
            only_when_recomputed, torch.ones(2, requires_grad=True), use_reentrant=True
        )
        with pytest.raises(BypassedGuard), guard.context("inference"):
            out.sum().backward()

    def test_of_a_model_of_transformers(self):
        """Runs the model itself: each forward is a call, as without adapters."""
        assert whole_methods(make_model()) == frozenset()


class TestPrompts:
    def test_are_saved(self, model, tmp_path):
        """Through the proxy and past it: that runs their encoder alone, and not the model."""
        guard = guard_module(model)
        expected = logits(guard)
        for where, saved in (("proxy", guard.module), ("raw", model)):
            saved.save_pretrained(tmp_path / where)
            loaded = peft.PeftModel.from_pretrained(make_model(), tmp_path / where).eval()
            torch.testing.assert_close(loaded(IDS).logits, expected)

    def test_are_all_that_is_left_alone(self):
        """The base model beside them is armed."""
        model = peft.get_peft_model(make_model(), CONFIGS["prompts"]())
        assert {type(part).__name__ for part in prompts_of(model)} >= {"PromptEmbedding"}
        guard_module(model)
        with pytest.raises(BypassedGuard, match=r"base_model\.model\.embed_tokens was run alone"):
            model.base_model.model.embed_tokens(IDS)

    def test_in_front_of_a_guarded_base_model(self):
        """Its embedding is run alone for them: refused, by name, until the policy shares it."""
        config = CONFIGS["prompts"]()
        guard = guard_module(make_model())
        with pytest.raises(BypassedGuard) as refused, guard.context("inference"):
            peft.get_peft_model(guard.module, config)(IDS)
        lines = str(refused.value).splitlines()
        assert lines[0].endswith("behind its guard's back: model.embed_tokens was run alone.")
        assert lines[1].endswith("in TestPrompts.test_in_front_of_a_guarded_base_model")
        assert "is named in CallPolicy(shared_submodules=...)" in str(refused.value)

        shared = CallPolicy(shared_submodules=("model.embed_tokens",))
        guard = guard_module(make_model(), policy=shared)
        model = peft.get_peft_model(guard.module, config)
        with guard.context("inference"):
            model(IDS)
        assert (guard.count(), guard.violations) == (1, ())


class TestUnloaded:
    """The model that `merge_and_unload` and `unload` give back was refused as a part."""

    def test_is_a_model_of_its_own(self, lora_model, tmp_path):
        """It runs, is saved, trained and copied, guarded anew, and no part of it is armed."""
        expected = lora_model(IDS).logits
        guard = guard_module(lora_model)
        merged = guard.module.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, expected)
        torch.testing.assert_close(copy.deepcopy(merged)(IDS).logits, expected)
        merged.save_pretrained(tmp_path)
        loaded = type(merged).from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(IDS).logits, expected)
        merged.requires_grad_(True)
        merged(input_ids=IDS, labels=IDS).loss.backward()
        assert all(parameter.grad is not None for parameter in merged.parameters())
        assert guard.violations == ()

        again = guard_module(merged, name="merged")
        torch.testing.assert_close(logits(again), expected)
        with pytest.raises(BypassedGuard, match=r"^merged was run behind its guard's back"):
            merged(IDS)

    @pytest.mark.parametrize("name", ["merge_and_unload", "unload"])
    @pytest.mark.parametrize("way", ["proxy", "raw", "tuner", "copy", "raw copy"])
    @pytest.mark.parametrize("mode", ["enforce", "observe"])
    def test_by_any_way(self, name, way, mode):
        """Copies of parts are let go too: the head that was trained beside the adapters is one."""
        config = CONFIGS["LoRA and a whole module"]()
        model = peft.get_peft_model(make_model(), config).eval()
        guard = guard_module(model, mode=mode)
        held = {
            "proxy": lambda: guard.module,
            "raw": lambda: model,
            "tuner": lambda: model.base_model,
            "copy": lambda: copy.deepcopy(guard.module),
            "raw copy": lambda: copy.deepcopy(model),
        }[way]()
        merged = getattr(held, name)()
        merged(IDS)
        merged.lm_head(torch.ones(1, 8))
        merged.model.layers[0].self_attn.q_proj(torch.ones(1, 8))
        assert guard.violations == ()

    def test_forwards_of_its_parts(self, lora_model):
        """What somebody has put there stands there as it was put."""
        norm = lora_model.get_base_model().model.norm
        norm.forward = own = torch.nn.Identity().forward
        guard = guard_module(lora_model)
        merged = guard.module.unload()
        assert merged.model.norm.__dict__["forward"] is own

    def test_what_it_was_a_part_of(self, lora_model):
        """Is guarded as before, and has no adapters any more."""
        guard = guard_module(lora_model, policy=CallPolicy({"base": 1}, requires=(adapters_off,)))
        guard.module.merge_and_unload()
        with pytest.raises(BypassedGuard):
            lora_model(IDS)
        with guard.context("training"), guard.sanctioned("base"):
            guard.module(IDS)

    def test_and_adapted_again(self, lora_model):
        """With a guard of its own, which arms all of it."""
        guard_module(lora_model)
        again = peft.get_peft_model(lora_model.merge_and_unload(), lora())
        guard = guard_module(again)
        logits(guard)
        with pytest.raises(BypassedGuard, match=r"model\.layers\.0\.mlp\.up_proj was run alone"):
            again.base_model.model.model.layers[0].mlp.up_proj(torch.ones(1, 8))

    def test_of_a_guarded_base_model(self):
        """Is the guarded base model itself."""
        guard = guard_module(make_model())
        model = peft.get_peft_model(guard.module, lora())
        merged = model.merge_and_unload()
        assert merged is guard.module
        logits(guard)
        with pytest.raises(BypassedGuard):
            guard.module.__wrapped__(IDS)
        with pytest.raises(BypassedGuard, match=r"q_proj was run alone"):
            merged.model.layers[0].self_attn.q_proj(torch.ones(1, 8))

    def test_when_it_fails(self, lora_model, monkeypatch):
        """Nothing is let go."""
        layer = lora_model.base_model.model.model.layers[0].self_attn.q_proj

        def broken(**_):
            raise ZeroDivisionError

        monkeypatch.setattr(layer, "merge", broken)
        guard = guard_module(lora_model)
        with pytest.raises(ZeroDivisionError):
            guard.module.merge_and_unload()
        with pytest.raises(BypassedGuard):
            lora_model.get_base_model()(IDS)

    def test_methods_look_as_they_are(self, lora_model):
        """By name, signature and class; and only tuners have them."""
        guard = guard_module(lora_model)
        method = guard.module.merge_and_unload
        assert method.__name__ == "merge_and_unload"
        assert "safe_merge" in inspect.signature(method).parameters
        tuner = type(lora_model.base_model)
        assert tuner.unload is peft.LoraModel.unload
        assert unloading_methods(peft.LoraModel) == {"merge_and_unload", "unload"}
        assert unloading_methods(nn.Linear) == frozenset()
