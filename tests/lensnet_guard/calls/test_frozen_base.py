"""The condition that a base model does not move with its adapters, with PEFT itself."""

import re

import pytest
import torch
from tests.lensnet_guard.adapted import IDS, lora, make_model, peft
from tests.lensnet_guard.calls.asked import call, guarded

from lensnet_guard import (
    CallPolicy,
    ConditionUnmet,
    Scope,
    active_adapter,
    frozen_base,
    guard_module,
)

# Each of the two is older than the other expects, and says so.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"

CONFIGS = {
    "LoRA": lora,
    "DoRA": lambda: lora(use_dora=True),
    "LoRA of embeddings": lambda: lora(target_modules=["embed_tokens"]),
    "LoRA and a whole module": lambda: lora(modules_to_save=["lm_head"]),
    "LoRA and whole norms": lambda: lora(modules_to_save=["norm"]),
    "AdaLoRA": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9),
    "IA3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "VeRA": lambda: peft.VeraConfig(target_modules=["q_proj"], r=2),
    "VB-LoRA": lambda: peft.VBLoRAConfig(
        target_modules=["q_proj"], num_vectors=4, vector_length=2, topk=1
    ),
    "norms": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "prompts": lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "LoRA of parameters": lambda: lora(
        target_modules=[], target_parameters=["self_attn.q_proj.weight"]
    ),
}


@pytest.fixture
def adapted():
    """A model with adapters, and its guard, which asks in passes without them."""

    def make(config, **settings):
        model = peft.get_peft_model(make_model(**settings), config)
        return model, guarded(model, frozen_base)

    return make


def base_pass(model, guard):
    with torch.no_grad(), model.disable_adapter():
        return call(guard, input_ids=IDS).logits


def train(model):
    """One step of everything that requires grad."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS).logits.square().sum().backward()
    optimizer.step()


def finding(model, guard, run=base_pass):
    """What a call is refused for."""
    with pytest.raises(ConditionUnmet) as refused:
        run(model, guard)
    assert refused.value.mistake == "moved-weights"
    headline = str(refused.value).partition("\n")[0]
    return re.fullmatch(r".* not allow: frozen_base: (.*)\.", headline).group(1)


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_that_are_trained(adapted, kind):
    """Whatever is trained of them, the base pass computes the same, and nothing is found."""
    if kind == "LoRA of parameters" and "target_parameters" not in vars(lora()):
        pytest.skip(f"PEFT {peft.__version__} has none")
    model, guard = adapted(CONFIGS[kind]())
    before = trained_of(model)
    first = base_pass(model, guard)
    for _ in range(2):
        with guard.context("inference"):
            train(guard.module)
        assert torch.equal(base_pass(model, guard), first)
    assert not all(map(torch.equal, before, trained_of(model)))


def trained_of(model):
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def test_a_base_that_is_not_frozen(adapted):
    """Told as the first call begins, before it has moved."""
    model, guard = adapted(lora())
    model.requires_grad_(True)
    assert finding(model, guard) == (
        "the parameter base_model.model.model.embed_tokens.weight requires grad, as 21 of 21 of "
        "the base model do, so the reference is trained with the policy; freeze all but the "
        "adapters, requires_grad_(False)"
    )


def test_biases_that_are_trained(adapted):
    """An adapter's setting has the base model's own trained along, and disabled they stay so."""
    model, guard = adapted(lora(bias="lora_only"), attention_bias=True)
    assert finding(model, guard) == (
        f"the parameter {Q_PROJ}.base_layer.bias requires grad, as 2 of 29 of the base model do, "
        "so the reference is trained with the policy; leave bias= of the adapter's config at "
        '"none"'
    )


def test_a_base_that_moves(adapted):
    """Though it requires no grad: it was loaded, averaged or clipped."""
    model, guard = adapted(lora())
    base_pass(model, guard)
    with torch.no_grad():
        model.get_parameter(f"{Q_PROJ}.base_layer.weight").mul_(2)
    assert finding(model, guard).startswith(
        f"the parameter {Q_PROJ}.base_layer.weight was written in place 1 time since the last call "
        "that was checked (the call before this one is call 1 at "
    )
    base_pass(model, guard)  # told once


def test_a_base_that_is_replaced(adapted):
    """A part of it, with the weights that it had."""
    model, guard = adapted(lora())
    base_pass(model, guard)
    base = model.base_model.model
    base.lm_head = torch.nn.Linear(8, 16, bias=False).requires_grad_(False)
    assert "the parameter base_model.model.lm_head.weight was replaced" in finding(model, guard)


@pytest.mark.parametrize("config", [CONFIGS["LoRA"], CONFIGS["IA3"]])
def test_a_reference_that_is_an_adapter(adapted, config):
    """Its weights stay what they are; those of the one that is trained may move."""
    model, guard = adapted(config())
    model.add_adapter("ref", model.peft_config["default"])

    def reference(model, guard):
        model.set_adapter("ref")
        with torch.no_grad():
            call(guard, input_ids=IDS)
        model.set_adapter("default")

    def move(name):
        moved = [p for path, p in model.named_parameters() if f".{name}" in path]
        assert moved
        with torch.no_grad():
            moved[0].add_(1)

    reference(model, guard)
    move("default")
    reference(model, guard)
    move("ref")
    found = finding(model, guard, reference)
    assert re.search(r"the parameter \S+\.ref\S* was written in place 1", found)


def test_an_adapter_that_is_merged_for_a_while(adapted):
    """As for an engine that has no adapters: its weights are put back."""
    model, guard = adapted(lora())
    base_pass(model, guard)
    model.merge_adapter()
    model.unmerge_adapter()
    base_pass(model, guard)
    assert (guard.count("training"), guard.violation_count) == (2, 0)


def test_a_model_without_adapters():
    """All of it is the base."""
    guard = guarded(make_model().requires_grad_(False), frozen_base)
    call(guard, input_ids=IDS)
    with torch.no_grad():
        guard.module.lm_head.weight.mul_(2)
    with pytest.raises(ConditionUnmet, match=r"lm_head\.weight was written in place 1 time"):
        call(guard, input_ids=IDS)


@pytest.mark.parametrize("kind", ["LoRA", "IA3"])
def test_does_not_look_through_the_model_again(adapted, kind, monkeypatch):
    """Where nothing but adapters has moved, and an added adapter is of no matter."""
    model, guard = adapted(CONFIGS[kind]())
    base_pass(model, guard)
    with guard.context("inference"):
        train(guard.module)
    looked, ask = [], model.named_parameters

    def named_parameters(*args, remove_duplicate=True, **options):
        looked.extend([] if remove_duplicate else ["all of them"])  # as nobody else does
        return ask(*args, remove_duplicate=remove_duplicate, **options)

    monkeypatch.setattr(model, "named_parameters", named_parameters)
    base_pass(model, guard)
    assert looked == []
    model.add_adapter("other", model.peft_config["default"])
    base_pass(model, guard)


def test_two_references_are_compared_each_with_itself():
    """Each scope has an adapter of its own, which may move while the other may not."""
    model = peft.get_peft_model(make_model(), lora(), adapter_name="a")
    model.add_adapter("b", lora())
    model.requires_grad_(False)
    scopes = {
        name: Scope((0, 9), when=active_adapter(name), requires=(frozen_base,)) for name in "ab"
    }
    guard = guard_module(model, policy=CallPolicy(scopes))

    def ask(name):
        model.set_adapter(name, inference_mode=True)
        with guard.context("training"), guard.micro_step(), torch.no_grad():
            guard.module(input_ids=IDS)

    for name in "abab":
        ask(name)
    with torch.no_grad():
        model.get_parameter(f"{Q_PROJ}.lora_A.b.weight").mul_(2)
    ask("a")
    with pytest.raises(ConditionUnmet, match=r"lora_A\.b\.weight was written in place 1 time"):
        ask("b")
