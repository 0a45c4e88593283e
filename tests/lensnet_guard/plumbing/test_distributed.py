"""Data parallel and sharded training around a guarded module."""

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
    train,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from lensnet_guard import (
    NoContext,
    UnsanctionedCall,
    guard_module,
)
from lensnet_guard.boundary.armed_class import ArmedMeta
from lensnet_guard.boundary.proxy import GuardedModule


def named_classes(module):
    return [(name, type(part).__name__) for name, part in module.named_modules()]


@pytest.mark.usefixtures("group")
class TestDataParallel:
    def test_around_the_model(self, guard):
        """The critic inside a DDP model trains, and the record names the model's own line."""
        model = DistributedDataParallel(Model(guard.module))
        assert train(guard, model)
        assert only_call(guard) == named("Model.forward")
        assert model.module.critic is guard.module

    def test_around_the_proxy(self, guard):
        """DDP of the guarded module itself calls the proxy."""
        model = DistributedDataParallel(guard.module)
        assert train(guard, model)
        assert only_call(guard) == named("train")
        with pytest.raises(NoContext):
            model(X)

    def test_inside_the_guard(self, critic):
        """A module that is DDP already can be guarded, with everything in it."""
        model = DistributedDataParallel(critic)
        guard = guard_module(model)
        assert train(guard, guard.module)
        assert only_call(guard) == named("train")
        assert is_refused(model, X)
        assert is_refused(critic, X)

    def test_gradients_gathered_without_sync(self, guard):
        """Two micro-steps of one optimizer step, the first under no_sync."""
        model = DistributedDataParallel(Model(guard.module))
        with guard.context("training"):
            with model.no_sync(), guard.micro_step(0, 0), guard.sanctioned(SCOPE):
                model(X).sum().backward()
            with guard.micro_step(0, 1), guard.sanctioned(SCOPE):
                model(X).sum().backward()
        assert [(r.step, r.micro_step) for r in guard.calls] == [(0, 0), (0, 1)]
        twin = Model(Critic())
        twin.load_state_dict(model.module.state_dict())
        (2 * twin(X).sum()).backward()
        assert torch.allclose(model.module.body.weight.grad, twin.body.weight.grad)

    def test_refused_call(self, guard):
        """A violation goes out through DDP as it is, and the next step trains."""
        model = DistributedDataParallel(Model(guard.module))
        with pytest.raises(UnsanctionedCall) as caught, guard.context("training"):
            model(X)
        assert caught.value.record.caller.function == named("Model.forward")
        with guard.context("training"), guard.sanctioned(SCOPE):
            model(X).sum().backward()
        assert guard.count() == 1


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
class TestFullySharded1:
    def wrap(self, module, **options):
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **options)

    @pytest.mark.parametrize("unit", [None, Critic, Block, nn.Linear])
    def test_around_the_model(self, guard, unit):
        """Whatever is a unit of its own: the guarded module, its parts, or none of them."""
        policy = unit and ModuleWrapPolicy({unit})
        model = self.wrap(Model(guard.module), auto_wrap_policy=policy)
        assert train(guard, model)
        assert only_call(guard) == named("Model.forward")
        held = model.module.critic
        assert issubclass(type(held.module if unit is Critic else held), GuardedModule)

    def test_around_the_proxy(self, guard):
        """FSDP of the guarded module itself calls the proxy."""
        model = self.wrap(guard.module)
        assert train(guard, model)
        with pytest.raises(NoContext):
            model(X)

    def test_inside_the_guard(self, critic):
        """A module that is FSDP already can be guarded, with everything in it."""
        model = self.wrap(critic)
        guard = guard_module(model)
        assert train(guard, guard.module)
        assert is_refused(model, X)
        assert is_refused(critic, X)


@pytest.mark.filterwarnings("ignore:Deallocating Tensor that still has live:UserWarning")  # 2.9
class TestFullySharded2:
    def shard(self, critic, mesh):
        for block in critic.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(critic, mesh=mesh)

    def test_before_guarding(self, critic, mesh):
        """Sharded, then guarded: one call recorded, everything trained."""
        guard = guard_module(self.shard(critic, mesh))
        assert train(guard, guard.module)
        assert only_call(guard) == named("train")
        assert is_refused(critic, X)
        assert is_refused(critic.blocks[0], X)

    def test_before_guarding_inside_a_sharded_model(self, critic, mesh):
        """A model that holds the guarded module is sharded around it."""
        guard = guard_module(self.shard(critic, mesh))
        model = fully_shard(Model(guard.module), mesh=mesh)
        assert train(guard, model)
        assert only_call(guard) == named("Model.forward")

    def test_model_around_a_guarded_module_that_is_not_sharded_itself(self, guard, mesh):
        """The parent's own unit takes the guarded module's parameters in."""
        model = fully_shard(Model(guard.module), mesh=mesh)
        assert train(guard, model)
        assert only_call(guard) == named("Model.forward")

    def test_methods_and_names(self, critic, mesh):
        """The proxy is an FSDPModule and has its methods; the state has the names it had."""
        names = list(critic.state_dict())
        guard = guard_module(self.shard(critic, mesh))
        assert isinstance(guard.module, FSDPModule)
        guard.module.set_requires_gradient_sync(False)
        guard.module.unshard()
        guard.module.reshard()
        assert list(get_model_state_dict(guard.module)) == names

    def test_uninstall_leaves_it_sharded(self, critic, mesh):
        """What is taken away is the guard and nothing else."""
        sharded = type(self.shard(critic, mesh))
        guard_module(critic).uninstall()
        assert type(critic) is sharded
        assert critic(X).shape == (2, 2)

    @pytest.mark.parametrize("mode", ["enforce", "observe"])
    @pytest.mark.parametrize("way", ["proxy", "raw", "part"])
    def test_after_guarding_it_was_refused_or_never_ran(self, critic, mesh, way, mode):
        """The module becomes of another class, and trains as guarded as before."""
        self.shard(Critic(), mesh)  # torch remembers the classes that it has made
        guard = guard_module(critic, mode=mode)
        target = {"proxy": guard.module, "raw": critic, "part": guard.module.head}[way]
        assert fully_shard(target, mesh=mesh) is target
        assert isinstance(target, FSDPModule)
        assert train(guard, guard.module)
        assert only_call(guard) == named("train")
        for part in (critic, critic.head):
            assert is_refused(part, X) or guard.violations[-1].reason == "BypassedGuard"
        assert guard.violation_count == 2
        guard.uninstall()
        assert {name for name, cls in named_classes(critic) if cls.startswith("FSDP")} == {
            "head" if way == "part" else ""
        }
        assert not any(isinstance(type(part), ArmedMeta) for part in critic.modules())

    def test_after_guarding_and_then_a_model_around_it(self, guard, mesh):
        """The proxy was the root of its modules; now the model is, and only the model."""
        model = fully_shard(Model(self.shard(guard.module, mesh)), mesh=mesh)
        assert train(guard, model)
        assert only_call(guard) == named("Model.forward")

    def test_replicate(self, guard, mesh):
        """The composable DDP of torch 2.13 is made of the same parts."""
        replicate = pytest.importorskip("torch.distributed._composable.replicate_with_fsdp")
        replicate.replicate(guard.module, mesh=mesh)
        assert train(guard, guard.module)
        assert only_call(guard) == named("train")
        assert is_refused(guard.module.__wrapped__, X)
