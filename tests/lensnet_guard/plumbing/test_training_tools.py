"""Checkpoint wrappers, autocast, saving, averaged copies and optimizers."""

import copy
import functools
import pickle

import pytest
import torch
from tests.lensnet_guard.plumbing.models import (
    SCOPE,
    Block,
    Critic,
    Model,
    X,
    is_refused,
    named,
    only_call,
    saved_and_loaded,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from lensnet_guard import (
    BudgetExceeded,
    NoContext,
    guard_module,
    guard_of,
)
from lensnet_guard.boundary.proxy import GuardedModule

IMPLEMENTATIONS = {
    CheckpointImpl.REENTRANT: "returned",
    CheckpointImpl.NO_REENTRANT: "stopped early",
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.filterwarnings("ignore:Please specify CheckpointImpl:FutureWarning")  # torch 2.7
class TestActivationCheckpointing:
    def apply(self, model, kind, implementation):
        wrap = functools.partial(checkpoint_wrapper, checkpoint_impl=implementation)
        apply_activation_checkpointing(
            model, checkpoint_wrapper_fn=wrap, check_fn=lambda part: isinstance(part, kind)
        )

    @pytest.fixture
    def twin(self, critic):
        """An unguarded model with the weights of ``Model(critic)``, and its gradients."""
        twin = Model(copy.deepcopy(critic))
        twin(X).square().sum().backward()
        return twin

    def model_like(self, twin, critic):
        model = Model(critic)
        model.body.load_state_dict(twin.body.state_dict())
        return model

    def assert_same_gradients(self, model, twin):
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)

    @pytest.mark.parametrize("backward", ["in the scope", "after the micro-step"])
    def test_of_the_guarded_module(self, critic, twin, implementation, backward):
        """Backward runs it again: recorded as a recompute, and paid by no budget."""
        guard = guard_module(critic)
        model = self.model_like(twin, guard.module)
        self.apply(model, Critic, implementation)
        assert type(model.critic) is CheckpointWrapper
        with guard.context("training"), guard.micro_step(7, 1) as ledger:
            with guard.sanctioned(SCOPE):
                loss = model(X).square().sum()
                if backward == "in the scope":
                    loss.backward()
        if backward == "after the micro-step":
            loss.backward()
        self.assert_same_gradients(model, twin)
        call, recompute = guard.calls
        assert (call.kind, call.outcome, call.recompute_of) == ("call", "returned", None)
        assert (recompute.kind, recompute.verdict) == ("recompute", "allow")
        assert recompute.outcome == IMPLEMENTATIONS[implementation]
        assert recompute.recompute_of == call.seq
        assert (recompute.context, recompute.scope) == ("training", SCOPE)
        assert (recompute.step, recompute.micro_step) == (7, 1)
        assert ledger.calls == {SCOPE: 1}
        assert (guard.count(), guard.violation_count) == (1, 0)

    def test_names_are_those_without(self, guard, implementation):
        """A checkpoint of weights knows neither the wrapper nor the guard."""
        model = Model(guard.module)
        self.apply(model, Critic, implementation)
        assert list(model.state_dict()) == list(Model(Critic()).state_dict())
        model.load_state_dict(Model(Critic()).state_dict())

    @pytest.mark.parametrize("order", ["before guarding", "after guarding"])
    def test_of_its_submodules(self, critic, twin, implementation, order):
        """Parts that run again inside backward are no bypass, and no call."""
        if order == "before guarding":
            self.apply(critic, Block, implementation)
        guard = guard_module(critic)
        model = self.model_like(twin, guard.module)
        if order == "after guarding":
            self.apply(model, Block, implementation)
        blocks = [wrapper._checkpoint_wrapped_module for wrapper in critic.blocks]
        with guard.context("training"), guard.sanctioned(SCOPE):
            loss = model(X).square().sum()
        loss.backward()
        assert [block.runs for block in blocks] == [2, 2]
        self.assert_same_gradients(model, twin)
        assert only_call(guard) == named("Model.forward")
        assert is_refused(blocks[0], X)

    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
    def test_of_the_guarded_module_and_its_submodules(self, guard, critic, implementation):
        """Checkpoints within a checkpoint: still one call and one recompute of it."""
        model = Model(guard.module)
        self.apply(model, (Critic, Block), implementation)
        with guard.context("training"), guard.sanctioned(SCOPE):
            loss = model(X).square().sum()
        loss.backward()
        assert [(r.kind, r.recompute_of) for r in guard.calls] == [("call", None), ("recompute", 1)]
        assert guard.violations == ()

    def test_another_call_during_backward(self, guard, implementation):
        """A call from a hook in the same backward is a call without a context, not a recompute."""
        model = Model(guard.module)
        self.apply(model, Critic, implementation)
        with guard.context("training"), guard.sanctioned(SCOPE):
            loss = model(X).square().sum()
        loss.register_hook(lambda _: guard.module(X))
        with pytest.raises(NoContext):
            loss.backward()
        assert [r.verdict for r in guard.calls] == ["allow", "refuse"]


class TestAutocast:
    def test_training(self, guard):
        """Outputs are bfloat16, gradients float32, the record says what came in."""
        with guard.context("training"), guard.sanctioned(SCOPE):
            with torch.autocast("cpu", torch.bfloat16):
                scores = guard.module(X)
        scores.float().sum().backward()
        assert scores.dtype is torch.bfloat16
        assert guard.module.head.weight.grad.dtype is torch.float32
        assert only_call(guard) == named("TestAutocast.test_training")
        assert guard.calls[0].inputs == ("float32[2, 3] cpu",)

    def test_half_of_the_module(self, guard):
        """A converted module answers in its new type, still guarded."""
        lens = guard.module.to(torch.bfloat16).eval()
        with guard.context("inference"):
            assert lens(X.bfloat16()).dtype is torch.bfloat16
        assert lens is guard.module
        assert guard.calls[0].inputs == ("bfloat16[2, 3] cpu",)


class TestSaving:
    def test_names_of_the_weights(self, guard):
        """They are those of the unguarded module, by itself and inside a model."""
        assert list(guard.module.state_dict()) == list(Critic().state_dict())
        assert list(Model(guard.module).state_dict()) == list(Model(Critic()).state_dict())

    @pytest.mark.parametrize("assign", [False, True])
    def test_weights_of_an_unguarded_model(self, guard, assign):
        """They load, copied or assigned, and the next call uses them."""
        plain = Model(Critic())
        model = Model(guard.module)
        result = model.load_state_dict(plain.state_dict(), assign=assign)
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        with guard.context("inference"):
            assert torch.equal(model(X), plain(X))

    def test_whole_model(self, guard):
        """It is loaded guarded: with the contract of the original, and a book of its own."""
        model = Model(guard.module)
        loaded = saved_and_loaded(model, weights_only=False)
        again = guard_of(loaded.critic)
        assert issubclass(type(loaded.critic), GuardedModule)
        with pytest.raises(NoContext):
            loaded(X)
        with guard.context("inference"), again.context("inference"):
            assert torch.equal(loaded(X), model(X))
        assert is_refused(loaded.critic.blocks[0], X)
        assert (again.count(), again.violation_count) == (1, 2)
        assert (guard.count(), guard.violation_count) == (1, 0)

    @pytest.mark.parametrize("part", [lambda critic: critic, lambda critic: critic.blocks[0]])
    def test_raw_module_or_part(self, guard, critic, part):
        """What is saved behind the proxy is loaded plain, and leaves the original guarded."""
        loaded = saved_and_loaded(part(critic), weights_only=False)
        assert type(loaded) in (Critic, Block)
        assert {type(inner) for inner in loaded.modules()} <= {
            *(Critic, Block, nn.Linear),
            nn.ModuleList,
        }
        loaded(X)
        assert guard.calls == ()
        assert is_refused(critic, X)

    def test_optimizer_of_a_saved_run(self, guard):
        """An optimizer's state saved with the guarded module fits the unguarded one."""
        optimizer = torch.optim.Adam(guard.module.parameters())
        with guard.context("training"), guard.sanctioned(SCOPE):
            guard.module(X).sum().backward()
        optimizer.step()
        plain = torch.optim.Adam(Critic().parameters())
        plain.load_state_dict(saved_and_loaded(optimizer.state_dict(), weights_only=True))
        assert len(plain.state_dict()["state"]) == len(list(guard.module.parameters()))


COPIES = {
    "deepcopy": lambda model: copy.deepcopy(model).critic,
    "deepcopy of the proxy": lambda model: copy.deepcopy(model.critic),
    "AveragedModel": lambda model: AveragedModel(model).module.critic,
    "AveragedModel of the proxy": lambda model: AveragedModel(model.critic).module,
}


class TestAveragedCopies:
    @pytest.mark.parametrize("way", COPIES)
    def test_has_its_own_guard(self, guard, critic, way):
        """Its calls, context and violations are its own, and so are its weights."""
        copied = COPIES[way](Model(guard.module))
        own = guard_of(copied)
        assert own is not guard
        assert (own.name, own.policy, own.mode) == ("Critic (copy)", guard.policy, guard.mode)
        assert own.module is copied
        assert copied.head.weight is not critic.head.weight
        with guard.context("inference"), pytest.raises(NoContext):
            copied(X)
        with own.context("training"), own.sanctioned(SCOPE):
            copied(X)
        assert (own.count(), own.violation_count) == (1, 1)
        assert (guard.count(), guard.violation_count) == (0, 0)

    @pytest.mark.parametrize("way", COPIES)
    def test_behind_its_back(self, guard, way):
        """Running the copy's raw module, or a part of it, is the copy's violation."""
        copied = COPIES[way](Model(guard.module))
        own = guard_of(copied)
        with own.context("inference"):
            assert is_refused(copied.__wrapped__, X)
            assert is_refused(copied.blocks[1], X)
        assert (own.violation_count, guard.violation_count) == (2, 0)
        assert [block.runs for block in copied.blocks] == [0, 0]

    def test_follows_the_original(self, guard):
        """update_parameters averages through the proxies without a call."""
        model = Model(guard.module)
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        averaged.update_parameters(model)
        start = model.critic.head.bias.detach().clone()
        with torch.no_grad():
            model.critic.head.bias += 1
        averaged.update_parameters(model)
        assert torch.allclose(averaged.module.critic.head.bias, start + 0.5)
        assert guard.calls == guard_of(averaged.module.critic).calls == ()

    def test_update_bn(self):
        """A pass over the data is a pass of calls, which need a context."""
        guard = guard_module(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
        with pytest.raises(NoContext):
            update_bn([X], guard.module)
        with guard.context("inference"):
            update_bn([X, X], guard.module)
        assert guard.count("inference") == 2

    def test_of_the_raw_module_can_be_guarded(self, guard, critic):
        """A copy taken behind the proxy is nobody's module, and may get a guard of its own."""
        copied = copy.deepcopy(critic)
        assert guard_of(copied) is None
        own = guard_module(copied, name="target")
        with own.context("inference"):
            own.module(X)
        assert (own.count(), guard.count(), guard.violation_count) == (1, 0, 0)
        assert copied.blocks[0].runs == 1
        assert critic.blocks[0].runs == 0


class TestTraining:
    @pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
    def test_a_step_moves_the_weights(self, guard, critic, optimizer):
        """A loop over the proxy's parameters trains the raw module, as without a guard."""
        twin = pickle.loads(pickle.dumps(critic))
        for module, run in ((twin, twin), (critic, guard.module)):
            steps = optimizer(run.parameters(), lr=0.1)
            for step in range(3):
                with guard.context("training"):
                    if module is twin:
                        loss = run(X).square().sum()
                    else:
                        with guard.micro_step(step), guard.sanctioned(SCOPE):
                            loss = run(X).square().sum()
                steps.zero_grad()
                loss.backward()
                steps.step()
        assert not torch.equal(critic.head.weight, Critic().head.weight)
        for mine, theirs in zip(critic.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        assert [r.step for r in guard.calls] == [0, 1, 2]

    def test_an_optimizer_that_calls_again(self, guard):
        """LBFGS evaluates its closure as often as it likes; the budget says how often it may."""
        optimizer = torch.optim.LBFGS(guard.module.parameters(), max_iter=5)

        def closure():
            optimizer.zero_grad()
            loss = guard.module(X).square().sum()
            loss.backward()
            return loss

        with pytest.raises(BudgetExceeded), guard.context("training"), guard.sanctioned(SCOPE):
            optimizer.step(closure)
        assert guard.count() == 1

    def test_conversions_keep_the_guard(self, guard):
        """`critic = critic.to(...).half().eval()` is the guarded module still."""
        critic = guard.module.to("cpu", torch.float64).half().float().eval()
        assert critic is guard.module
        with pytest.raises(NoContext):
            critic(X)
        with guard.context("inference"), torch.no_grad():
            critic(X)
        assert guard.calls[-1].grad_enabled is False

    def test_conversions_of_the_model(self, guard):
        """The model around it converts and switches it without taking the guard off."""
        model = Model(guard.module).double().eval()
        assert model.critic is guard.module
        assert guard.module.head.weight.dtype is torch.float64
        with guard.context("inference"):
            assert model(X.double()).dtype is torch.float64
        assert not guard.module.blocks[0].training
