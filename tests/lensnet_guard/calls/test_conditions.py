"""The stock conditions on how a call is made, and on what it returned."""

import copy
import dataclasses
import pickle
import re
from collections import namedtuple

import pytest
import torch
from tests.lensnet_guard.calls.asked import call, guarded
from tests.lensnet_guard.helpers import X
from torch import nn
from torch.utils.checkpoint import checkpoint

from lensnet_guard import (
    CallPolicy,
    ConditionUnmet,
    Scope,
    adapters_off,
    adapters_on,
    autocast,
    detached,
    eval_mode,
    finite,
    frozen,
    guard_module,
    inference_too,
    no_grad,
    same_inputs,
)
from lensnet_guard.calls.scope import name_of


def refusal(guard, *args, **kwargs):
    """What a call is refused for: the message's headline after the condition's name."""
    with pytest.raises(ConditionUnmet) as refused:
        call(guard, *args, **kwargs)
    return str(refused.value).partition("\n")[0].partition(": ")[2]


class Returns(nn.Module):
    """A module that returns what it is given."""

    def forward(self, result):
        return result


class TestNoGrad:
    def test_the_whole_message(self, scorer, x):
        """What happened, who called, where, and what to do; the module has not run."""
        guard = guarded(scorer, no_grad)
        with pytest.raises(ConditionUnmet) as refused:
            call(guard, x)
        rows = refused.value.record.stack()[:3]
        assert [row.function.rpartition(".")[2] for row in rows[:2]] == [
            *("call", "test_the_whole_message")
        ]
        assert str(refused.value) == (
            "Scorer was called in a state that its contract does not allow: no_grad: autograd "
            "records; make the call inside torch.no_grad().\n"
            f"  called from  {rows[0]}\n"
            f"               {rows[1]}\n"
            f"               {rows[2]}\n"
            "  context      training, step 0, micro-step 0 (thread MainThread)\n"
            "  scope        kl\n"
            "  budget       kl: 0 of 1 spent\n"
            "  what to do   Bring about that state where the call is made; or, if calls are right "
            "without it, leave the condition out of CallPolicy.\n"
            "  explained by lensnet-guard explain reference-with-gradients"
        )
        assert scorer.runs == 0

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_holds(self, scorer, x, mode):
        """Inference mode counts: autograd records nothing there either."""
        guard = guarded(scorer, no_grad)
        with mode():
            call(guard, x)
        assert (guard.violations, scorer.runs) == ((), 1)

    def test_observed(self, scorer, x):
        """It is recorded, and the call runs and computes what it would."""
        guard = guarded(scorer, no_grad, mode="observe")
        assert torch.equal(call(guard, x), scorer.linear.bias + x @ scorer.linear.weight.T)
        refused = guard.violations[0]
        assert (refused.kind, refused.reason, refused.verdict, scorer.runs) == (
            *("call", "ConditionUnmet", "refuse", 1),
        )

    def test_is_not_asked_in_inference(self, scorer, x):
        """Where whoever validates may do as they like."""
        guard = guarded(scorer, no_grad)
        with guard.context("inference"):
            assert guard.module(x).requires_grad

    @pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
    def test_is_not_asked_of_a_recompute(self, scorer, x, reentrant):
        """What activation checkpoints run again is no call: one that records, and trains."""
        asked = []
        x.requires_grad_()

        def once(call):
            asked.append(call.grad_enabled)
            return eval_mode(call)

        guard = guarded(scorer.eval(), once)
        with guard.context("training"), guard.micro_step(), guard.sanctioned("kl"):
            loss = checkpoint(guard.module, x, use_reentrant=reentrant).sum()
        scorer.train()
        loss.backward()
        assert asked == [not reentrant]
        assert [record.kind for record in guard.calls] == ["call", "recompute"]
        assert guard.violations == ()


class TestOnesOwn:
    def test_that_raises(self, scorer, x):
        """It does not hold, and the message has what it raised."""

        def divides(call):
            return 1 / 0

        assert refusal(guarded(scorer, divides), x) == (
            "TestOnesOwn.test_that_raises.<locals>.divides: the condition raised "
            "ZeroDivisionError: division by zero."
        )
        assert scorer.runs == 0

    @pytest.mark.parametrize("rubbish", [True, 0, ["text"]])
    def test_that_returns_rubbish(self, scorer, x, rubbish):
        """True may mean that it holds, or that it is breached: neither is guessed."""
        guard = guarded(scorer, lambda call: rubbish)
        assert refusal(guard, x).endswith(
            f"the condition returned {rubbish!r}, and must return None or a text."
        )
        assert scorer.runs == 0


class TestEvalMode:
    @pytest.fixture
    def module(self):
        return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Dropout(), nn.ReLU())).eval()

    def test_holds(self, module):
        """Of all parts, at every call."""
        guard = guarded(module, eval_mode)
        for _ in range(3):
            call(guard, X)
        assert guard.count() == 3

    def test_a_part(self, module):
        """The first that trains is named with its class, whoever has put it into train mode."""
        guard = guarded(module, eval_mode)
        call(guard, X)
        module[1].train()
        assert refusal(guard, X) == (
            "eval_mode: 1 (Sequential) is in train mode, as 3 of 5 modules are; call eval() on the "
            "module."
        )
        module[1].training = False
        assert "eval_mode: 1.0 (Dropout) is in train mode, as 2 of 5" in refusal(guard, X)

    def test_the_module_itself(self, module):
        """Which has no path."""
        guard = guarded(module, eval_mode)
        module.training = True
        assert refusal(guard, X).startswith(
            "eval_mode: the module itself (Sequential) is in train mode, as 1 of 5 modules are"
        )

    def test_parts_without_parts(self, module):
        """An empty container is a part as well; None, where a part may be, is none."""
        module[1].empty = nn.ModuleList()
        module[1].empty.eval()
        module[1].nothing = None
        module[1].register_module("nothing_either", None)
        guard = guarded(module, eval_mode)
        module[1].forward = lambda x: x
        call(guarded(copy.deepcopy(module), eval_mode), X)
        module[1].empty.train()
        assert "1.empty (ModuleList) is in train mode, as 1 of 6" in refusal(guard, X)

    def test_a_part_in_two_places(self, module):
        """Is one, and is named by its first place."""
        module.append(module[1])
        guard = guarded(module, eval_mode)
        module[2].train()
        assert "1 (Sequential) is in train mode, as 3 of 5" in refusal(guard, X)

    @pytest.mark.filterwarnings("ignore:`torch.jit")
    @pytest.mark.parametrize(
        ("script", "kind"),
        [
            (torch.jit.script, "RecursiveScriptModule"),
            (lambda module: torch.jit.trace(module, X), "TopLevelTracedModule"),
        ],
    )
    def test_a_scripted_part(self, script, kind):
        """TorchScript's keep their parts in another kind of dict."""
        scripted = script(nn.Sequential(nn.Dropout(), nn.Linear(3, 3)).eval())
        guard = guarded(nn.Sequential(scripted).eval(), eval_mode)
        call(guard, X)
        scripted.train()
        assert f"0 ({kind}) is in train mode, as 3 of 4" in refusal(guard, X)


class TestAutocast:
    def test_off_where_it_must_be_on(self, scorer, x):
        """The message has the block to open, with the device that is meant."""
        assert refusal(guarded(scorer, autocast(torch.bfloat16)), x) == (
            "autocast(torch.bfloat16): autocast is off for cpu; make the call inside "
            'torch.autocast("cpu", torch.bfloat16).'
        )
        assert scorer.runs == 0

    def test_another_dtype(self, scorer, x):
        """Is as wrong as none."""
        guard = guarded(scorer, autocast(torch.bfloat16))
        with torch.autocast("cpu", torch.float16):
            assert "autocast is on with torch.float16 for cpu;" in refusal(guard, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert call(guard, x).dtype == torch.bfloat16

    def test_on_where_it_must_be_off(self, scorer, x):
        """As of a critic that computes in float32 beside a policy that does not."""
        guard = guarded(scorer, autocast(None))
        with torch.autocast("cpu", torch.bfloat16):
            assert refusal(guard, x) == (
                "autocast(None): autocast is on with torch.bfloat16 for cpu; make the call inside "
                'torch.autocast("cpu", enabled=False).'
            )
            with torch.autocast("cpu", enabled=False):
                assert call(guard, x).dtype == torch.float32

    @pytest.mark.parametrize(
        ("args", "kwargs"),
        [
            (("meta",), {}),
            ((), {"x": "meta"}),
            ((None, ["text", {"first": "meta"}]), {"x": "cpu"}),
        ],
        ids=["by position", "by name", "nested, before another"],
    )
    def test_asks_the_device_of_the_first_tensor(self, args, kwargs):
        """Wherever in the arguments it stands; a device without autocast is told as such."""

        def made(value):
            if isinstance(value, list):
                return list(map(made, value))
            if isinstance(value, dict):
                return {name: made(v) for name, v in value.items()}
            return torch.ones(1, device=value) if value in ("meta", "cpu") else value

        module = nn.Linear(3, 2)
        module.forward = lambda *args, **kwargs: None
        guard = guarded(module, autocast(None))
        assert "RuntimeError: unknown device type for autocast" in refusal(
            guard, *map(made, args), **made(kwargs)
        )

    def test_asks_the_device_of_the_first_parameter(self):
        """Where no argument is a tensor; without parameters either, it is the CPU's."""
        module = nn.Linear(3, 2, device="meta")
        module.forward = lambda text: text
        guard = guarded(module, autocast(None))
        assert "unknown device type for autocast" in refusal(guard, "text")
        assert call(guarded(Returns(), autocast(None)), "text") == "text"

    @pytest.mark.parametrize("dtype", ["bfloat16", True, 16, torch.float])
    def test_takes_a_dtype(self, dtype):
        """Or None, and nothing that torch would take as one elsewhere."""
        if dtype is torch.float:
            assert autocast(dtype).dtype is torch.float32
        else:
            expected = f"autocast: the dtype must be one of torch's or None, not {dtype!r}"
            with pytest.raises(TypeError, match=re.escape(expected)):
                autocast(dtype)

    def test_is_a_value(self):
        """Equal ones are equal, pickles as well, and it reads as it is written."""
        one = autocast(torch.bfloat16)
        assert one == autocast(torch.bfloat16) != autocast(torch.float16)
        assert pickle.loads(pickle.dumps(one)) == one
        assert len({one, autocast(torch.bfloat16)}) == 1
        assert repr(one) == "autocast(torch.bfloat16)"
        assert name_of(autocast(None)) == "autocast(None)"


Pair = namedtuple("Pair", ["left", "right"])


@dataclasses.dataclass
class Output:
    """What a model may return."""

    logits: object = None
    hidden_states: object = None


NAN, INF = float("nan"), float("inf")
BAD = torch.tensor([[1.0, NAN], [-INF, INF]])
GOOD = torch.ones(2, 2)
PLACES = {
    "the result": lambda bad: bad,
    "[0]": lambda bad: (bad, GOOD),
    "[1]": lambda bad: [GOOD, bad],
    "logits": lambda bad: {"logits": bad},
    "0": lambda bad: {0: bad},
    ".hidden_states[3]": lambda bad: Output(GOOD, [GOOD, GOOD, GOOD, bad]),
    ".right": lambda bad: Pair(GOOD, bad),
    "loss.left[0].logits": lambda bad: {"text": "a", "loss": Pair([Output(bad)], None)},
}


class TestFinite:
    @pytest.mark.parametrize("place", PLACES)
    def test_names_the_first_that_is_not(self, place):
        """By its place in the result, with how many values are what."""
        guard = guarded(Returns(), ensures=(finite,))
        call(guard, PLACES[place](GOOD))
        with pytest.raises(ConditionUnmet) as refused:
            call(guard, PLACES[place](BAD))
        headline = str(refused.value).partition("\n")[0]
        assert headline == (
            "Returns returned what its contract does not allow (call 2): finite: "
            f"{place} has 1 NaN and 2 infinite of 4 values."
        )

    def test_what_transformers_return(self):
        """A ModelOutput is a mapping, and is named by its keys."""
        outputs = pytest.importorskip("transformers.modeling_outputs")
        guard = guarded(Returns(), ensures=(finite,))
        result = outputs.CausalLMOutput(logits=GOOD, hidden_states=(GOOD, BAD))
        with pytest.raises(ConditionUnmet, match=re.escape("finite: hidden_states[1] has 1 NaN")):
            call(guard, result)

    @pytest.mark.parametrize(
        "dtype",
        [torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.float8_e5m2],
        ids=str,
    )
    def test_of_each_dtype(self, dtype):
        """Also those for which torch has few operators."""
        guard = guarded(Returns(), ensures=(finite,))
        call(guard, GOOD.to(dtype))
        with pytest.raises(ConditionUnmet, match="1 NaN and 2 infinite of 4 values"):
            call(guard, BAD.to(dtype))

    def test_of_a_dtype_without_infinity(self):
        """And for which torch before 2.15 cannot ask at all."""
        guard = guarded(Returns(), ensures=(finite,))
        call(guard, GOOD.to(torch.float8_e4m3fn))
        with pytest.raises(ConditionUnmet, match="the result has 1 NaN and 0 infinite of 2 values"):
            call(guard, torch.tensor([1.0, NAN]).to(torch.float8_e4m3fn))

    def test_what_has_no_such_values(self):
        """Integers, truth values, empty tensors, none at all, and what holds itself."""
        guard = guarded(Returns(), ensures=(finite,))
        endless = [GOOD]
        endless.append(endless)
        for result in (torch.arange(3), GOOD > 0, torch.empty(0), None, "text", (), endless):
            call(guard, result)
        assert guard.violations == ()

    def test_waits_once(self):
        """However many tensors there are: one scalar is read for all of them."""
        reads = []

        class Reads(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func.overloadpacket in (
                    torch.ops.aten._local_scalar_dense,
                    torch.ops.aten._to_copy,
                    torch.ops.aten.nonzero,
                ):
                    reads.append(func)
                return func(*args, **(kwargs or {}))

        tolist = torch.Tensor.tolist
        guard = guarded(Returns(), ensures=(finite,))
        with pytest.MonkeyPatch.context() as patch, Reads():
            patch.setattr(torch.Tensor, "tolist", lambda t: reads.append("tolist") or tolist(t))
            call(guard, [GOOD] * 9)
        assert reads == ["tolist"]

    def test_observed(self):
        """The result is given out, whatever it is."""
        guard = guarded(Returns(), ensures=(finite,), mode="observe")
        assert call(guard, BAD) is BAD
        assert [v.kind for v in guard.violations] == ["result"]


class TestDetached:
    @pytest.mark.parametrize("place", PLACES)
    def test_names_the_first_that_is_not(self, place):
        """And the operator that made it."""
        guard = guarded(Returns(), ensures=(detached,))
        call(guard, PLACES[place](GOOD))
        with pytest.raises(ConditionUnmet) as refused:
            call(guard, PLACES[place](GOOD.clone().requires_grad_() * 2))
        assert (
            str(refused.value)
            .partition("\n")[0]
            .endswith(
                f": detached: {place} requires grad (by MulBackward0); return it detached, or "
                "call the module inside torch.no_grad()."
            )
        )

    def test_a_leaf(self):
        """A parameter that is given out was made by no operator."""
        guard = guarded(Returns(), ensures=(detached,))
        with pytest.raises(ConditionUnmet, match="the result requires grad; return it detached"):
            call(guard, nn.Parameter(GOOD))

    def test_holds(self, scorer, x):
        """Under no_grad nothing requires grad, though the weights do."""
        guard = guarded(scorer, ensures=(detached,))
        with torch.no_grad():
            call(guard, x)
        assert guard.violations == ()


class TestInferenceToo:
    def test_is_asked_in_inference(self, scorer, x):
        """And in training, as ever; with its own words."""
        guard = guarded(scorer, *inference_too(no_grad))
        with guard.context("inference"), pytest.raises(ConditionUnmet) as refused:
            guard.module(x)
        assert "allow: no_grad: autograd records;" in str(refused.value)
        assert refusal(guard, x).startswith("no_grad: autograd records;")
        assert scorer.runs == 0

    def test_of_results(self, scorer, x):
        """What is returned in inference too."""
        guard = guarded(scorer, ensures=inference_too(detached))
        with guard.context("inference"):
            with torch.no_grad():
                guard.module(x)
            with pytest.raises(ConditionUnmet, match="detached: the result requires grad"):
                guard.module(x)

    @pytest.mark.parametrize(
        "condition", [no_grad, frozen, frozen(fingerprint=True), autocast(None), adapters_on]
    )
    def test_is_a_value_that_reads_as_the_condition(self, condition):
        """Equal, pickled, named and about the same."""
        (one,) = inference_too(condition)
        assert [one] == [*inference_too(condition)]
        assert pickle.loads(pickle.dumps(one)) == one
        assert name_of(one) == name_of(condition)
        assert one.about == getattr(condition, "about", None)
        assert one != condition

    def test_takes_conditions(self):
        """And several of them."""
        assert list(map(name_of, inference_too(no_grad, eval_mode))) == ["no_grad", "eval_mode"]
        with pytest.raises(TypeError, match="takes conditions, such as no_grad, not 'no_grad'"):
            inference_too("no_grad")


BF16, FP16 = autocast(torch.bfloat16), autocast(torch.float16)


class TestContradictions:
    @pytest.mark.parametrize(
        ("policy", "message"),
        [
            (
                lambda: CallPolicy(requires=(adapters_on, adapters_off)),
                "adapters_on and adapters_off cannot hold together, and CallPolicy asks for both "
                "in requires",
            ),
            (
                lambda: CallPolicy({"kl": Scope(requires=(BF16,))}, requires=(FP16,)),
                "autocast(torch.float16) and autocast(torch.bfloat16) cannot hold together, and "
                "CallPolicy asks for both in the scope 'kl', no call of which could be legal",
            ),
            (
                lambda: CallPolicy({"kl": Scope(when=adapters_on, requires=(adapters_off,))}),
                "adapters_on and adapters_off cannot hold together, and CallPolicy asks for both "
                "in the scope 'kl', no call of which could be legal",
            ),
            (
                lambda: CallPolicy(requires=(BF16, *inference_too(autocast(None)))),
                "autocast(torch.bfloat16) and autocast(None) cannot hold together, and CallPolicy "
                "asks for both in requires",
            ),
        ],
    )
    def test_are_refused(self, policy, message):
        """When the policy is made, with both names and the place."""
        with pytest.raises(ValueError) as refused:
            policy()
        assert str(refused.value) == message

    def test_that_are_none(self):
        """The same twice, asked in inference or not; and two scopes of two kinds."""
        twice = CallPolicy(requires=(BF16, autocast(torch.bfloat16), adapters_on))
        assert len(twice.requires) == 3
        everywhere = inference_too(adapters_on)
        policy = CallPolicy({"kl": Scope(requires=(adapters_on,))}, requires=everywhere)
        assert policy.requires == everywhere
        two = CallPolicy({"a": Scope(when=adapters_on), "b": Scope(when=adapters_off)})
        assert list(two.in_full) == ["a", "b"]


class TestTogether:
    def test_a_good_training_meets_every_condition(self):
        """Several steps of a policy against its reference, each condition asked every time."""
        torch.manual_seed(0)
        policy, reference = nn.Linear(3, 2), nn.Linear(3, 2)
        reference.load_state_dict(policy.state_dict())
        requires = (
            *(no_grad, eval_mode, frozen, frozen(fingerprint=True), adapters_off),
            *(autocast(torch.bfloat16), same_inputs(policy, "input")),
            *(same_inputs(policy, "input", values=True), *inference_too(no_grad)),
        )
        contract = CallPolicy({"kl": 1}, requires=requires, ensures=(finite, detached))
        guard = guard_module(reference.eval(), policy=contract)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
        losses = []
        for step in range(4):
            batch = torch.randn(8, 3)
            with guard.context("training"), guard.micro_step(step):
                with torch.autocast("cpu", torch.bfloat16):
                    score = policy(batch)
                    with torch.no_grad(), guard.sanctioned("kl"):
                        against = guard.module(batch)
                loss = (score - against - 1).square().mean()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert (guard.count("training"), guard.violations) == (4, ())
        assert losses[-1] < losses[0]
