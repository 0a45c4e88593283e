"""Parts of a module whose runs alone are calls of it, as PPO trainers run reward models."""

import copy
import pickle

import pytest
import torch
import transformers
from tests.lensnet_guard.boundary.lens import Lens, guard_free
from tests.lensnet_guard.helpers import FILE, X, read
from torch import nn
from torch.utils.checkpoint import checkpoint

from lensnet_guard import (
    BudgetExceeded,
    BudgetUnmet,
    BypassedGuard,
    CallPolicy,
    NoContext,
    UnsanctionedCall,
    guard_module,
    guard_of,
)


class Reward(nn.Module):
    """Has a backbone, and a head that is run after it."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.score = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        self.reentrant = None

    def forward(self, x):
        x = self.model(x)
        if self.reentrant is None:
            return self.score(x)
        return checkpoint(self.score, x, use_reentrant=self.reentrant)

    def in_one(self, x):
        return self.score(self.model(x))


@pytest.fixture
def reward():
    torch.manual_seed(0)
    return Reward()


POLICY = CallPolicy({"reward": 1}, parts=("score",), shared_submodules=("model",))


@pytest.fixture
def guard(reward):
    return guard_module(reward, policy=POLICY)


class TestPartsThatAreCalls:
    def test_run_alone(self, guard, reward, tmp_path):
        """A call of the module, by the name of the part, that runs the part and its hooks."""
        expected, seen = guard_free(reward)(X), []
        reward.score.register_forward_pre_hook(lambda *_: seen.append(1))
        guard.start_log(tmp_path)
        with guard.context("training"), guard.sanctioned("reward"):
            assert torch.equal(guard.module.score(guard.module.model(X)), expected)
        guard.end_log()
        (record,) = guard.calls
        assert (record.kind, record.method, record.scope) == ("call", "score", "reward")
        assert record.caller.function.endswith("test_run_alone")
        begin = next(line for line in read(tmp_path / FILE) if line["event"] == "call.begin")
        assert begin["method"] == "score"
        assert seen == [1]

    @pytest.mark.parametrize("forward", [False, True])
    def test_judged_like_the_module(self, guard, reward, forward):
        """In every context; also by its forward, without its hooks."""
        score = reward.score.forward if forward else reward.score
        with pytest.raises(NoContext, match=r"^Reward\.score was used in a thread"):
            score(X)
        with pytest.raises(UnsanctionedCall, match=r"^Reward\.score was called in training out"):
            with guard.context("training"):
                score(X)
        with pytest.raises(BudgetExceeded), guard.context("training"), guard.sanctioned("reward"):
            score(X)
            score(X)
        with pytest.raises(BudgetUnmet), guard.context("training"), guard.sanctioned("reward"):
            guard.module.model(X)
        with guard.context("inference"):
            score(X)
        assert guard.count() == 2

    def test_inside_the_module_s_own_call(self, guard):
        """It is just a part."""
        with guard.context("training"), guard.sanctioned("reward"):
            guard.module(X)
        assert [call.method for call in guard.calls] == [None]

    def test_inside_a_method_that_was_fetched(self, guard):
        """Run alone there, it is a call of its own."""
        with guard.context("inference"):
            guard.module.in_one(X)
        assert [call.method for call in guard.calls] == ["score"]

    def test_a_part_of_the_part(self, guard, reward):
        """Is refused alone, and free inside it."""
        with pytest.raises(BypassedGuard, match=r"score\.0 was run alone"):
            reward.score[0](X)

    def test_other_parts_are_refused(self, reward):
        """One door is no other."""
        guard = guard_module(reward, policy=CallPolicy({"reward": 1}, parts=("score",)))
        with pytest.raises(BypassedGuard, match="model was run alone"), guard.context("inference"):
            guard.module.model(X)

    def test_the_module_itself_is_refused_behind_the_proxy(self, guard, reward):
        """As ever."""
        with pytest.raises(BypassedGuard), guard.context("inference"):
            reward(X)

    @pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies(self, guard, make):
        """Of the proxy have calls of their own; of the part alone they are bypasses."""
        copied = make(guard.module)
        with guard_of(copied).context("inference"):
            copied.score(X)
        assert (guard_of(copied).count(), guard.count()) == (1, 0)
        with pytest.raises(BypassedGuard), guard.context("inference"):
            copy.deepcopy(guard.module.score)(X)

    def test_uninstalled(self, guard, reward):
        """The part is what it was."""
        guard.uninstall()
        assert type(reward.score) is nn.Sequential
        reward.score(X)
        assert guard.calls == ()

    def test_compiled(self, guard, reward):
        """A compiled part runs compiled, alone and inside."""
        torch._dynamo.reset()
        reward.score.compile(backend="eager")
        with guard.context("inference"), torch.no_grad():
            assert torch.equal(guard.module.score(guard.module.model(X)), guard.module(X))
        assert guard.count() == 2
        torch._dynamo.reset()

    def test_of_a_module_with_cuda_graphs(self, guard, reward):
        """A part alone runs no graph of the module, and writes over none of its outputs."""
        torch._dynamo.reset()
        reward.compile(backend="eager")
        reward._compiled_call_impl.get_compiler_config = lambda: {"triton.cudagraphs": True}
        with guard.context("inference"), torch.no_grad():
            kept = guard.module(X)
            guard.module.score(kept.expand(2, 3))
        assert [call.compiled is None for call in guard.calls] == [False, True]
        torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
class TestRecomputes:
    def test_of_a_call(self, guard, reentrant):
        """A checkpoint around the part repeats the call, in its place and with its name."""
        x = X.clone().requires_grad_()
        with guard.context("training"), guard.sanctioned("reward"):
            out = checkpoint(guard.module.score, x, use_reentrant=reentrant)
        out.sum().backward()
        assert [(c.kind, c.method, c.recompute_of) for c in guard.calls] == [
            ("call", "score", None),
            ("recompute", "score", 1),
        ]

    def test_inside_the_module_s_own_call(self, guard, reward, reentrant):
        """What is repeated is a part of that call, and no call."""
        reward.reentrant = reentrant
        x = X.clone().requires_grad_()
        with guard.context("training"), guard.sanctioned("reward"):
            out = guard.module(x)
        out.sum().backward()
        assert [(c.kind, c.method) for c in guard.calls] == [("call", None)]

    def test_two_in_one(self, reward, reentrant):
        """Both parts in one checkpoint are repeated in their order."""
        policy = CallPolicy({"reward": 2}, parts=("model", "score"))
        guard = guard_module(reward, policy=policy)
        x = X.clone().requires_grad_()
        with guard.context("training"), guard.sanctioned("reward"):
            out = checkpoint(guard.module.in_one, x, use_reentrant=reentrant)
        out.sum().backward()
        assert [(c.method, c.recompute_of) for c in guard.calls] == [
            *[("model", None), ("score", None), ("model", 1), ("score", 2)]
        ]


class TestNames:
    @pytest.mark.parametrize(
        ("policy", "message"),
        [
            ({"parts": ("scor",)}, "parts: Lens has no submodule 'scor'"),
            ({"parts": ("",)}, "parts: Lens has no submodule ''"),
            (
                {"parts": ("blocks",)},
                "parts: 'blocks' has no forward, so there is no call of it to count",
            ),
            (
                {"parts": ("blocks.0.linear",), "shared_submodules": ("blocks.0",)},
                "parts: 'blocks.0.linear' is inside 'blocks.0' of shared_submodules, whose runs "
                "are no calls",
            ),
        ],
    )
    def test_what_cannot_be_counted(self, lens, policy, message):
        """Is told as the guard is made, and the module is as it was."""
        with pytest.raises(ValueError) as caught:
            guard_module(lens, policy=CallPolicy({"s": 1}, **policy))
        assert str(caught.value) == message
        assert type(lens) is Lens

    def test_a_part_with_a_guard_of_its_own(self, lens):
        """Its calls are counted there."""
        inner = guard_module(lens.blocks[0])
        policy = CallPolicy({"s": 1}, parts=("blocks.0",))
        message = "parts: 'blocks.0' has a guard of its own; leave it out"
        with pytest.raises(ValueError, match=message):
            guard_module(lens, policy=policy)
        assert guard_of(lens.blocks[0]) is inner


class TestRewardModel:
    """The calling convention of TRL's PPO: the backbone by its prefix, then `score`."""

    def test_is_one_call(self):
        """With a model of Hugging Face's."""
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
        )
        model = transformers.LlamaForSequenceClassification(config).eval()
        ids = torch.randint(1, 64, (2, 12))
        expected = model.score(model.model(ids).last_hidden_state)
        guard = guard_module(model, policy=POLICY)
        with guard.context("training"), guard.micro_step(0), guard.sanctioned("reward"):
            with torch.no_grad():
                backbone = getattr(guard.module, guard.module.base_model_prefix)
                hidden = backbone(ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
                assert torch.equal(guard.module.score(hidden), expected)
        assert guard.count("training", "reward") == 1
