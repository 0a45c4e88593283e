"""DPO of a model with PEFT's adapters: its base pass and its policy pass are two scopes of it.

Where the base pass is the policy by mistake, the loss is ln 2 for ever, and nothing else tells.
"""

import contextlib
import copy
import linecache
import math

import pytest
import torch
import torch.nn.functional as F
from tests.lensnet_guard.adapted import lora, make_model, peft
from torch.utils.checkpoint import checkpoint

from lensnet_guard import (
    BudgetExceeded,
    BudgetUnmet,
    BypassedGuard,
    CallPolicy,
    ConditionUnmet,
    Scope,
    UnsanctionedCall,
    active_adapter,
    adapters_off,
    adapters_on,
    guard_module,
    no_grad,
)

# PEFT and transformers are older than each other expects, and say so.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)

BATCHES = torch.randint(1, 15, (2, 4, 6), generator=torch.Generator().manual_seed(0))
STEPS = 3


# The training, which knows of no guard -----------------------------------------------------------


def log_probabilities(logits, ids):
    """Of each sequence. The prompts that some adapters put in front have logits as well."""
    found = F.log_softmax(logits[:, -ids.shape[1] : -1], dim=-1)
    return found.gather(-1, ids[:, 1:, None]).sum((1, 2))


def base_pass(model, ids):
    """What it should be."""
    with torch.no_grad(), model.disable_adapter():
        return model(input_ids=ids).logits


def policy_pass(model, ids):
    """Likewise."""
    return model(input_ids=ids).logits


def train(model, block=lambda step, n: contextlib.nullcontext(), base=base_pass, own=policy_pass):
    """Two micro-batches in each of a few steps; chosen and rejected are halves of a batch."""
    torch.manual_seed(1)
    model.train()
    trained = [p for n, p in model.named_parameters() if p.requires_grad and ".ref." not in n]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    losses = []
    for step in range(STEPS):
        for n, ids in enumerate(BATCHES):
            with block(step, n):
                reference = log_probabilities(base(model, ids), ids)
                policy = log_probabilities(own(model, ids), ids)
            chosen, rejected = (policy - reference).chunk(2)
            loss = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
            (loss / len(BATCHES)).backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


# The models --------------------------------------------------------------------------------------


def zero(**settings):
    """An adapter as PEFT makes it: it changes nothing before it is trained."""
    layers = ["q_proj", "v_proj", "up_proj", "down_proj"]
    return lora(
        **{
            "init_lora_weights": True,
            "lora_dropout": 0.1,
            "task_type": "CAUSAL_LM",
            "target_modules": layers,
            **settings,
        }
    )


CONFIGS = {
    "LoRA": zero,
    "LoRA and a whole module": lambda: zero(modules_to_save=["lm_head"]),
    "DoRA": lambda: zero(use_dora=True),
    "IA3": lambda: peft.IA3Config(
        target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"
    ),
    "prompts": lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "encoded prompts": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=2, task_type="CAUSAL_LM", encoder_hidden_size=8
    ),
}


def base_model():
    """With weights large enough for an adapter to tell."""
    return make_model(initializer_range=0.5)


def adapted(config=zero, reentrant=None, base=None):
    """A PeftModel; checkpointed by transformers where ``reentrant`` says how."""
    base = base if base is not None else base_model()
    if reentrant is not None:
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(2)
    return peft.get_peft_model(base, config())


def gradients(call):
    """What tells the policy pass from a base pass whose adapters were left on."""
    return None if call.grad_enabled else "autograd does not record, so this is the base pass"


BY_STATE = CallPolicy(
    {"base": Scope(1, when=adapters_off, requires=(no_grad,)), "policy": Scope(1, when=adapters_on)}
)
POLICY = CallPolicy(
    {
        "base": Scope(1, when=adapters_off, requires=(no_grad,)),
        "policy": Scope(1, when=adapters_on, requires=(gradients,)),
    }
)
MADE = STEPS * len(BATCHES)


def guarded_train(model, policy=POLICY, **passes):
    """The same training under a guard of the whole model; returns its losses, and the guard."""
    guard = guard_module(model, policy=policy)
    with guard.context("training"):
        return train(guard.module, guard.micro_step, **passes), guard


class TestTwoScopes:
    """The losses are those without a guard, to the last bit."""

    @pytest.mark.parametrize("config", CONFIGS)
    def test_every_kind(self, config):
        """Each pass is one call, of its own scope, under gradient accumulation."""
        expected = train(adapted(CONFIGS[config]))
        losses, guard = guarded_train(adapted(CONFIGS[config]))
        assert losses == expected
        assert [guard.count("training", scope) for scope in POLICY.scopes] == [MADE, MADE]
        assert guard.violations == ()

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointed_by_transformers(self, reentrant):
        """Layers are recomputed in backward, with the adapters on: no call, and no bypass."""
        expected = train(adapted(reentrant=reentrant))
        losses, guard = guarded_train(adapted(reentrant=reentrant))
        assert losses == expected == pytest.approx(train(adapted()), abs=1e-5)
        assert {call.kind for call in guard.calls} == {"call"}

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointed_as_a_whole(self, reentrant):
        """The policy pass is recomputed, of which no condition is asked again.

        Where that is reentrant, its first run has no gradients: nothing may ask for them.
        """

        def recomputed(model, ids):
            model.get_input_embeddings().requires_grad_(True)  # or a reentrant one has no gradient
            embedded = model.get_input_embeddings().weight[ids]
            run = lambda x: model(inputs_embeds=x).logits  # noqa: E731
            return checkpoint(run, embedded, use_reentrant=reentrant)

        expected = train(adapted(), own=recomputed)
        policy = BY_STATE if reentrant else POLICY
        losses, guard = guarded_train(adapted(), policy, own=recomputed)
        assert losses == expected
        kinds = [call.kind for call in guard.calls]
        assert (kinds.count("call"), kinds.count("recompute")) == (2 * MADE, MADE)

    def test_a_merged_adapter(self):
        """PEFT takes it out of the weights as the base pass runs."""

        def merged(model, ids):
            model.merge_adapter()
            return base_pass(model, ids)

        expected = train(adapted(), base=merged)
        losses, guard = guarded_train(adapted(), base=merged)
        assert losses == expected
        assert guard.violations == ()

    def test_the_base_model_is_guarded_first(self):
        """A pass through the PeftModel around it is one call, by the line that makes it."""
        expected = train(adapted())
        guard = guard_module(base_model(), policy=POLICY)
        with guard.context("training"):
            assert train(adapted(base=guard.module), guard.micro_step) == expected
        assert [guard.count("training", scope) for scope in POLICY.scopes] == [MADE, MADE]
        assert {call.caller.function for call in guard.calls} == {"base_pass", "policy_pass"}

    def test_starts_at_ln_2(self):
        """A new adapter changes nothing: policy and reference are equal then, and rightly so."""
        losses, _ = guarded_train(adapted())
        assert losses[:2] == pytest.approx([math.log(2)] * 2)
        assert all(loss < 0.65 for loss in losses[2:])

    def test_by_transformers_alone(self, monkeypatch):
        """With `add_adapter` of the model, and no PeftModel around it."""
        integration = pytest.importorskip("transformers.integrations.peft")
        monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "0.13.0")

        def disabled(model, ids):
            model.disable_adapters()
            with torch.no_grad():
                logits = model(input_ids=ids).logits
            model.enable_adapters()
            return logits

        found = []
        for guarded in (False, True):
            guard = guard_module(base_model(), policy=POLICY)
            if not guarded:
                guard.uninstall()
            model = guard.module if guarded else guard.module.__wrapped__
            torch.manual_seed(2)
            model.add_adapter(zero())  # while it is guarded
            with guard.context("training"):
                block = guard.micro_step if guarded else lambda *_: contextlib.nullcontext()
                found.append(train(model, block, base=disabled))
        assert found[0] == found[1]
        assert [guard.count("training", scope) for scope in POLICY.scopes] == [MADE, MADE]


# Mistakes ----------------------------------------------------------------------------------------


def left_on(model, ids):
    """The reference is the policy."""
    with torch.no_grad():
        return model(input_ids=ids).logits  # wrong


def off_elsewhere(model, ids):
    """A copy has its adapters off."""
    with torch.no_grad(), peft.get_peft_model(make_model(), zero()).disable_adapter():
        return model(input_ids=ids).logits  # wrong


def on_again(model, ids):
    """Something inside the block turns them on."""
    with torch.no_grad(), model.disable_adapter():
        model.base_model.enable_adapter_layers()
        return model(input_ids=ids).logits  # wrong


def merged_and_on(model, ids):
    """The base weights have the adapter in them."""
    model.merge_adapter()
    try:
        with torch.no_grad():
            return model(input_ids=ids).logits  # wrong
    finally:
        model.unmerge_adapter()


def with_gradients(model, ids):
    with model.disable_adapter():
        return model(input_ids=ids).logits  # wrong


def twice(model, ids):
    base_pass(model, ids)
    with torch.no_grad(), model.disable_adapter():
        return model(input_ids=ids).logits  # wrong


def policy_off(model, ids):
    with model.disable_adapter():
        return model(input_ids=ids).logits  # wrong


def policy_left_off(model, ids):
    model.base_model.disable_adapter_layers()
    return model(input_ids=ids).logits  # wrong


SILENT = (left_on, off_elsewhere, on_again, merged_and_on)


def is_wrong(record):
    """Whether a record's caller is the line of the mistake."""
    return linecache.getline(record.caller.file, record.caller.line).endswith("# wrong\n")


NO_POLICY = "budget allows: not in the scope 'policy', for adapters_on: the adapter of .* is off"


class TestMistakes:
    @pytest.mark.parametrize("mistake", SILENT)
    def test_reference_is_policy(self, mistake):
        """Silent without a guard, and stuck; with one it ends at the first wrong call."""
        stuck = train(adapted(lambda: zero(lora_dropout=0.0)), base=mistake)
        assert stuck == pytest.approx([math.log(2)] * MADE, abs=1e-6)
        with pytest.raises(ConditionUnmet, match="gradients: autograd does not record") as refused:
            guarded_train(adapted(), base=mistake)
        assert is_wrong(refused.value.record)
        assert refused.value.record.scope == "policy"

    @pytest.mark.parametrize("mistake", SILENT)
    def test_reference_is_policy_in_a_scope_of_its_own(self, mistake):
        """Where the base pass is known by what calls it, `adapters_off` itself finds it."""
        here = f"{__name__}:{mistake.__name__}"
        policy = CallPolicy(
            {
                "base": Scope(1, caller=here, requires=(adapters_off, no_grad)),
                "policy": Scope(1, when=adapters_on),
            }
        )
        with pytest.raises(
            ConditionUnmet, match=r"adapters_off: the adapter of .* is on"
        ) as refused:
            guarded_train(adapted(), policy, base=mistake)
        assert is_wrong(refused.value.record)

    def test_reference_is_policy_by_state_alone(self):
        """Then it is the policy pass that is one too many, and the message names both."""
        with pytest.raises(BudgetExceeded) as refused:
            guarded_train(adapted(), BY_STATE, base=left_on)
        (spent_by,) = refused.value.earlier
        assert is_wrong(spent_by)
        assert refused.value.record.caller.function == "policy_pass"
        assert f"spent by     call 1 at {spent_by.caller}" in str(refused.value)

    @pytest.mark.parametrize(
        ("passes", "error", "message"),
        [
            ({"base": with_gradients}, ConditionUnmet, "no_grad: autograd records"),
            ({"base": twice}, BudgetExceeded, "more often than its budget allows"),
            ({"own": policy_off}, BudgetExceeded, NO_POLICY),
            ({"own": policy_left_off}, BudgetExceeded, NO_POLICY),
        ],
    )
    def test_others(self, passes, error, message):
        """Each at its line, before the model has run."""
        with pytest.raises(error, match=message) as refused:
            guarded_train(adapted(), **passes)
        assert is_wrong(refused.value.record)
        assert refused.value.record.scope == "base"

    @pytest.mark.parametrize("mistake", SILENT[:1])
    def test_of_a_guarded_base_model(self, mistake):
        """PEFT's own lines are between, and are not the ones that are named."""
        guard = guard_module(base_model(), policy=POLICY)
        with pytest.raises(ConditionUnmet) as refused, guard.context("training"):
            train(adapted(base=guard.module), guard.micro_step, base=mistake)
        assert is_wrong(refused.value.record)
        assert "site-packages" not in str(refused.value)

    def test_a_pass_that_is_missing(self):
        """The base pass was not made: its micro-step says whose call it was."""
        with pytest.raises(BudgetUnmet, match="base made 0 of 1 calls") as refused:
            guarded_train(adapted(), base=lambda model, ids: torch.zeros(4, 6, 16))
        assert "due from     calls with adapters_off" in str(refused.value)

    @pytest.mark.parametrize("config", ["IA3", "prompts"])
    def test_of_other_kinds(self, config):
        """The adapter is no LoRA."""
        with pytest.raises(ConditionUnmet) as refused:
            guarded_train(adapted(CONFIGS[config]), base=left_on)
        assert is_wrong(refused.value.record)

    def test_the_raw_model(self):
        """A base pass that goes past the guard."""
        model = adapted()
        with pytest.raises(BypassedGuard):
            guarded_train(model, base=lambda _, ids: base_pass(model, ids))


# Two adapters ------------------------------------------------------------------------------------


class TestReferenceIsAnAdapter:
    """A policy that had an adapter before keeps a copy of it, as TRL's trainers do."""

    POLICY = CallPolicy(
        {
            "reference": Scope(1, when=active_adapter("ref"), requires=(no_grad,)),
            "policy": Scope(1, when=active_adapter("default"), requires=(gradients,)),
        }
    )

    @staticmethod
    def model():
        """Both adapters start alike, and change what the base model computes."""
        model = adapted(lambda: lora(task_type="CAUSAL_LM"))
        model.add_adapter("ref", lora(task_type="CAUSAL_LM"))
        weights = dict(model.named_parameters())
        for name, weight in weights.items():
            if ".default." in name:
                weights[name.replace(".default.", ".ref.")].data.copy_(weight.data)
        return model

    @staticmethod
    def reference_pass(model, ids):
        """Switches, and switches back."""
        model.set_adapter("ref")
        try:
            with torch.no_grad():
                return model(input_ids=ids).logits
        finally:
            model.set_adapter("default")

    def test_two_scopes(self):
        """The same losses, and as many calls of each."""
        expected = train(self.model(), base=self.reference_pass)
        losses, guard = guarded_train(self.model(), self.POLICY, base=self.reference_pass)
        assert losses == expected
        assert losses[0] == pytest.approx(math.log(2))
        assert [guard.count("training", scope) for scope in self.POLICY.scopes] == [MADE, MADE]

    def test_not_switched(self):
        """The reference is the policy."""
        with pytest.raises(ConditionUnmet) as refused:
            guarded_train(self.model(), self.POLICY, base=left_on)
        assert is_wrong(refused.value.record)

    def test_not_switched_back(self):
        """The policy is the reference, and the reference is trained."""

        def stays(model, ids):
            model.set_adapter("ref")
            return model(input_ids=ids).logits  # wrong

        expected = r"for active_adapter\('default'\): 'ref' works in "
        with pytest.raises(BudgetExceeded, match=expected) as refused:
            guarded_train(self.model(), self.POLICY, base=self.reference_pass, own=stays)
        assert is_wrong(refused.value.record)

    def test_off_is_neither(self):
        """The base model is no reference here; the message says what each scope asks for."""
        expected = r"not in the scope 'reference', for active_adapter\('ref'\): .* is off"
        with pytest.raises(UnsanctionedCall, match=expected):
            guarded_train(self.model(), self.POLICY)


# What is done to a guarded model -----------------------------------------------------------------


def second(model):
    model.add_adapter("second", lora(target_modules=["k_proj"], task_type="CAUSAL_LM"))


def loaded(model, folder):
    peft.get_peft_model(make_model(), lora(task_type="CAUSAL_LM")).save_pretrained(folder)
    model.load_adapter(str(folder), "loaded")
    model.set_adapter("loaded")


DEEDS = {
    "added": lambda model, _: second(model),
    "added and set": lambda model, _: (second(model), model.set_adapter("second")),
    "deleted": lambda model, _: (second(model), model.delete_adapter("second")),
    "loaded": loaded,
    "merged": lambda model, _: model.merge_adapter(),
    "merged and unmerged": lambda model, _: (model.merge_adapter(), model.unmerge_adapter()),
}


@pytest.mark.parametrize("deed", DEEDS)
@pytest.mark.parametrize("order", ["base first", "whole"])
def test_done_to_a_guarded_model(deed, order, tmp_path):
    """It computes what it does without a guard, is saved by the same names, and stays guarded."""

    def make(base):
        torch.manual_seed(3)
        return peft.get_peft_model(base, lora(task_type="CAUSAL_LM"))

    expected = make(make_model())
    torch.manual_seed(4)
    DEEDS[deed](expected, tmp_path / "expected")
    if order == "whole":
        guard = guard_module(make(make_model()))
        model = guard.module
    else:
        guard = guard_module(make_model())
        model = make(guard.module)
    torch.manual_seed(4)
    DEEDS[deed](model, tmp_path / "guarded")
    ids = BATCHES[0]
    with guard.context("inference"):
        assert torch.equal(model.eval()(ids).logits, expected.eval()(ids).logits)
        with model.disable_adapter():
            model(ids)
    assert (guard.count(), guard.violations) == (2, ())
    assert model.state_dict().keys() == expected.state_dict().keys()
    model.save_pretrained(tmp_path / "saved")
    again = peft.PeftModel.from_pretrained(make_model(), tmp_path / "saved")
    assert (
        peft.get_peft_model_state_dict(again).keys()
        == peft.get_peft_model_state_dict(model, adapter_name="default").keys()
    )
    with pytest.raises(BypassedGuard):
        guard.module.__wrapped__(ids)


def test_a_guarded_part_that_gets_an_adapter():
    """The layer that PEFT puts around it calls it, and gives it back."""
    base = make_model()
    guard = guard_module(base.lm_head, name="head")
    base.lm_head = guard.module
    model = peft.get_peft_model(base, lora(target_modules=["lm_head"]))
    with guard.context("inference"):
        model(BATCHES[0])
        model.merge_and_unload()(BATCHES[0])
    assert (guard.count(), guard.violations) == (2, ())
    assert copy.deepcopy(base).lm_head is not guard.module
