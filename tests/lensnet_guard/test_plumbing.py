"""Model plumbing: what torch, and people's own class hierarchies, do to a guarded module."""

import copy
import functools
import io
import pickle
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from lensnet_guard import (
    BudgetExceeded,
    BypassedGuard,
    CallPolicy,
    NoContext,
    UnsanctionedCall,
    guard_module,
    guard_of,
)
from lensnet_guard.proxy import EAGER, GuardedModule

SCOPE = "preference_scorer"
X = torch.tensor([[1.0, 2.0, -1.0], [0.5, -1.0, 3.0]])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return self.linear(x).tanh()


class Critic(nn.Module):
    """The guarded module of these tests."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Model(nn.Module):
    """A model that holds a critic, guarded or not, behind a layer of its own."""

    def __init__(self, critic):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.critic = critic

    def forward(self, x):
        return self.critic(self.body(x))


class Tied(nn.Module):
    """A critic that reads a language model's own embedding."""

    def __init__(self, emb):
        super().__init__()
        self.emb = emb
        self.head = nn.Linear(3, 2)

    def forward(self, tokens):
        return self.head(self.emb(tokens))


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.emb.weight

    def forward(self, tokens):
        return self.out(self.emb(tokens))


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def critic():
    return Critic()


@pytest.fixture
def guard(critic):
    return guard_module(critic)


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone, met through a file of its own."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def mesh(group):
    return init_device_mesh("cpu", (1,))


def train(guard, model):
    """One training step on one sanctioned call; whether every parameter has moved."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with guard.context("training"), guard.sanctioned(SCOPE):
        loss = model(X).square().sum()
    loss.backward()
    optimizer.step()
    after = [parameter.detach() for parameter in model.parameters()]
    assert guard.violations == ()
    return not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def only_call(guard):
    """The function that made the one recorded call."""
    (record,) = guard.calls
    assert (record.kind, record.verdict, record.outcome) == ("call", "allow", "returned")
    assert record.caller.file == __file__
    return record.caller.function


def is_refused(run, *args):
    try:
        run(*args)
    except BypassedGuard:
        return True
    return False


def saved_and_loaded(thing, **options):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, **options)


@pytest.mark.usefixtures("group")
class TestDataParallel:
    def test_around_the_model(self, guard):
        """The critic inside a DDP model trains, and the record names the model's own line."""
        model = DistributedDataParallel(Model(guard.module))
        assert train(guard, model)
        assert only_call(guard) == "Model.forward"
        assert model.module.critic is guard.module

    def test_around_the_proxy(self, guard):
        """DDP of the guarded module itself calls the proxy."""
        model = DistributedDataParallel(guard.module)
        assert train(guard, model)
        assert only_call(guard) == "train"
        with pytest.raises(NoContext):
            model(X)

    def test_inside_the_guard(self, critic):
        """A module that is DDP already can be guarded, with everything in it."""
        model = DistributedDataParallel(critic)
        guard = guard_module(model)
        assert train(guard, guard.module)
        assert only_call(guard) == "train"
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
        assert caught.value.record.caller.function == "Model.forward"
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
        assert only_call(guard) == "Model.forward"
        held = model.module.critic
        assert type(held.module if unit is Critic else held) is GuardedModule

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


class TestFullySharded2:
    REFUSAL = (
        "{} is guarded, and something wants to change its class (fully_shard and parametrizations "
        "do). Do that first and guard afterwards: fully_shard(module); guard_module(module)"
    )

    def shard(self, critic, mesh):
        for block in critic.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(critic, mesh=mesh)

    def test_before_guarding(self, critic, mesh):
        """Sharded, then guarded: one call recorded, everything trained."""
        guard = guard_module(self.shard(critic, mesh))
        assert train(guard, guard.module)
        assert only_call(guard) == "train"
        assert is_refused(critic, X)
        assert is_refused(critic.blocks[0], X)

    def test_before_guarding_inside_a_sharded_model(self, critic, mesh):
        """A model that holds the guarded module is sharded around it."""
        guard = guard_module(self.shard(critic, mesh))
        model = fully_shard(Model(guard.module), mesh=mesh)
        assert train(guard, model)
        assert only_call(guard) == "Model.forward"

    def test_model_around_a_guarded_module_that_is_not_sharded_itself(self, guard, mesh):
        """The parent's own unit takes the guarded module's parameters in."""
        model = fully_shard(Model(guard.module), mesh=mesh)
        assert train(guard, model)
        assert only_call(guard) == "Model.forward"

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

    @pytest.mark.parametrize("way", ["proxy", "raw", "part"])
    def test_after_guarding(self, guard, critic, mesh, way):
        """It is refused in so many words, through the proxy and behind it."""
        self.shard(Critic(), mesh)  # torch remembers the classes that it has made
        target = {"proxy": guard.module, "raw": critic, "part": critic.head}[way]
        with pytest.raises(RuntimeError) as caught:
            fully_shard(target, mesh=mesh)
        assert str(caught.value) == self.REFUSAL.format("Linear" if way == "part" else "Critic")


IMPLEMENTATIONS = {
    CheckpointImpl.REENTRANT: "returned",
    CheckpointImpl.NO_REENTRANT: "stopped early",
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
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
        assert only_call(guard) == "Model.forward"
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
        assert only_call(guard) == "TestAutocast.test_training"
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
        assert type(loaded.critic) is GuardedModule
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


class TestWalking:
    def test_children_are_proxies(self, guard):
        """What a model hands out by name is the guarded module."""
        model = Model(guard.module)
        assert dict(model.named_children())["critic"] is guard.module
        assert model.get_submodule("critic") is guard.module

    def test_modules_are_raw_and_refuse_to_run(self, guard, critic):
        """named_modules() yields what lies behind; guard_of() leads back to the proxy."""
        inner = dict(Model(guard.module).named_modules())
        assert list(inner)[2:5] == ["critic", "critic.blocks", "critic.blocks.0"]
        assert inner["critic"] is critic
        assert is_refused(inner["critic"], X)
        assert is_refused(inner["critic.blocks.0.linear"], X)
        assert guard_of(inner["critic"]).module is guard.module

    def test_hooks_on_what_it_yields(self, guard):
        """Tools that hook every module, as profilers do, see the run from inside."""
        model, seen = Model(guard.module), []
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
        with guard.context("inference"):
            model(X)
        blocks = [f"critic.blocks.{n}{part}" for n in (0, 1) for part in (".linear", "")]
        assert seen == ["body", *blocks, "critic.head", "critic", ""]

    def test_apply(self, guard, critic):
        """The usual initialisation by isinstance reaches every part, through model and proxy."""

        def initialise(module):
            if isinstance(module, nn.Linear):
                nn.init.ones_(module.weight)

        Model(guard.module).apply(initialise)
        assert all((b.linear.weight == 1).all() for b in critic.blocks)
        nn.init.zeros_(critic.head.weight)
        assert guard.module.apply(initialise) is guard.module
        assert (critic.head.weight == 1).all()
        assert guard.calls == ()

    @pytest.mark.parametrize(
        "is_linear",
        [
            lambda module: type(module) == nn.Linear,  # noqa: E721 - nn.Module.apply's docs say so
            lambda module: type(module) in (nn.Linear, nn.Conv1d),
        ],
    )
    def test_apply_by_exact_type(self, guard, is_linear):
        """`type(m) == nn.Linear`, as torch's own documentation of apply has it."""
        found = []
        guard.module.apply(lambda m: found.append(m) if is_linear(m) else None)
        assert len(found) == 3


class TestContainers:
    @pytest.mark.parametrize("depth", [1, 5])
    def test_sequential(self, guard, depth):
        """Called through containers, the record names the line that called the outermost."""
        model = nn.Sequential(nn.Linear(3, 3), guard.module)
        for _ in range(depth - 1):
            model = nn.Sequential(model)
        assert train(guard, model)
        assert only_call(guard) == "train"

    def test_several_guarded_modules_in_one(self):
        """Each keeps its own book, in lists, dicts and sequences."""
        guards = [guard_module(nn.Linear(3, 3), name=f"critic {n}") for n in range(3)]
        proxies = [guard.module for guard in guards]
        listed, named = nn.ModuleList(proxies), nn.ModuleDict(zip("abc", proxies, strict=True))
        with guards[0].context("inference"), guards[2].context("inference"):
            listed[0](X)
            named["c"](X)
            with pytest.raises(NoContext, match=r"^critic 1 was used"):
                nn.Sequential(*proxies)(X)
        assert [guard.count() for guard in guards] == [2, 0, 1]
        assert listed[-1] is named["c"] is proxies[2]
        assert list(listed.state_dict())[:2] == ["0.weight", "0.bias"]

    def test_slices_and_changes(self, guard):
        """A slice of a list, an insertion and a replacement hold the proxy."""
        layers = nn.ModuleList([nn.Identity(), nn.Identity()])
        layers.insert(0, guard.module)
        layers[1] = guard.module
        assert [type(layer) is GuardedModule for layer in layers[:2]] == [True, True]
        model = nn.Sequential(nn.Identity()).append(guard.module).extend([nn.Identity()])
        assert model[1:][0] is guard.module
        with pytest.raises(NoContext):
            model(X)

    def test_twice_in_one_model(self, guard):
        """The same guarded module at two places is called twice, and counted twice."""
        model = nn.Sequential(guard.module, nn.Linear(2, 3), guard.module)
        assert len(list(model.parameters())) == len(list(guard.module.parameters())) + 2
        with pytest.raises(BudgetExceeded), guard.context("training"), guard.sanctioned(SCOPE):
            model(X)
        assert guard.count() == 1


class TestFunctionalCall:
    @pytest.fixture
    def zeros(self, critic):
        return {name: torch.zeros_like(p) for name, p in critic.named_parameters()}

    def test_on_the_proxy(self, guard, zeros):
        """It is a call, by the caller of functional_call, with the given weights."""
        with guard.context("training"), guard.sanctioned(SCOPE):
            scores = torch.func.functional_call(guard.module, zeros, (X,))
        assert (scores == 0).all()
        assert only_call(guard) == "TestFunctionalCall.test_on_the_proxy"
        with pytest.raises(UnsanctionedCall), guard.context("training"):
            torch.func.functional_call(guard.module, zeros, (X,))
        assert (guard.module.head.weight != 0).any()

    def test_on_a_model(self, guard):
        """Inside a model that is called functionally, the guarded module is called as ever."""
        model = Model(guard.module)
        zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        with guard.context("inference"):
            assert (torch.func.functional_call(model, zeros, (X,)) == 0).all()
        assert only_call(guard) == "Model.forward"

    def test_under_grad(self, guard, critic):
        """A functional gradient of the call is one call."""
        weights = dict(critic.named_parameters())

        def loss(weights):
            return torch.func.functional_call(guard.module, weights, (X,)).square().sum()

        with guard.context("training"), guard.sanctioned(SCOPE):
            gradients = torch.func.grad(loss)(weights)
        assert set(gradients) == set(weights)
        assert guard.count() == 1

    def test_on_the_raw_module(self, guard, critic, zeros):
        """Behind the proxy it is a bypass, also in the sanctioned scope."""
        with pytest.raises(BypassedGuard), guard.context("training"), guard.sanctioned(SCOPE):
            torch.func.functional_call(critic, zeros, (X,))
        assert guard.count() == 0
        assert (critic.head.weight != 0).any()


class TestExport:
    def test_of_the_proxy(self, guard, critic):
        """Tracing is one call; the exported program has no guard, and nothing of ours in it."""
        with guard.context("inference"):
            program = torch.export.export(guard.module, (X,))
            expected = guard.module(X)
        assert guard.count("inference") == 2
        assert torch.equal(program.module()(X), expected)
        assert set(program.state_dict) == set(critic.state_dict())
        assert guard.count() == 2

    def test_of_a_model(self, guard):
        """A model that holds the guarded module is exported with it, and with its names."""
        model = Model(guard.module)
        with guard.context("inference"):
            program = torch.export.export(model, (X,))
        assert set(program.state_dict) == set(model.state_dict())
        assert guard.count("inference") == 1

    @pytest.mark.parametrize(("context", "refusal"), [(None, NoContext), ("inference", None)])
    def test_needs_what_a_call_needs(self, guard, context, refusal):
        """Without a context it is refused as itself, and leaves the guard in order."""
        if refusal is not None:
            with pytest.raises(refusal):
                torch.export.export(guard.module, (X,))
        with guard.context("inference"):
            guard.module(X)
        assert guard.violation_count == (refusal is not None)

    def test_of_the_raw_module(self, guard, critic):
        """Behind the proxy it is a bypass; after uninstall it is not."""
        with pytest.raises(BypassedGuard), guard.context("inference"):
            torch.export.export(critic, (X,))
        guard.uninstall()
        assert torch.export.export(critic, (X,)).module()(X).shape == (2, 2)

    def test_strict(self, guard):
        """It wants one full graph, which a guarded call is not; the message says what to do."""
        with pytest.raises(Exception, match=re.escape(EAGER)), guard.context("inference"):
            torch.export.export(guard.module, (X,), strict=True)

    def test_before_guarding(self, critic):
        """A program exported before has its own copy of the code, which no guard can see."""
        program = torch.export.export(critic, (X,)).module()
        guard = guard_module(critic)
        program(X)
        assert guard.calls == ()

    def test_exported_module_under_a_guard(self, critic):
        """An exported module can be guarded itself, like any other."""
        program = torch.export.export(critic, (X,)).module()
        guard = guard_module(program)
        with guard.context("inference"):
            assert torch.equal(guard.module(X), critic(X))
        assert is_refused(program, X)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
class TestTorchScript:
    @pytest.mark.parametrize("wrap", [lambda proxy: proxy, Model])
    def test_trace(self, guard, wrap):
        """Tracing calls the module, the check of the trace twice more; the trace has no guard."""
        model = wrap(guard.module)
        with guard.context("inference"):
            traced = torch.jit.trace(model, (X,))
            assert torch.equal(traced(X), model(X))
        assert guard.count("inference") == 4
        traced(X)
        assert guard.count() == 4

    def test_trace_in_training(self, guard):
        """Its repeated runs are calls like any other, over the budget."""
        with pytest.raises(BudgetExceeded), guard.context("training"), guard.sanctioned(SCOPE):
            torch.jit.trace(guard.module, (X,))
        assert guard.count() == 1

    def test_trace_of_the_raw_module(self, guard, critic):
        """Behind the proxy it is a bypass."""
        with pytest.raises(BypassedGuard), guard.context("inference"):
            torch.jit.trace(critic, (X,))

    def test_before_guarding(self, critic):
        """A trace or script made before has its own code, which no guard can see."""
        traced = torch.jit.trace(critic, (X,))
        scripted = torch.jit.script(critic.head)
        guard = guard_module(critic)
        traced(X)
        scripted(X)
        assert guard.calls == ()

    @pytest.mark.parametrize("way", ["proxy", "model", "raw", "part", "no globals"])
    def test_script(self, guard, critic, way):
        """A guarded module cannot be scripted, and the message says so."""
        target = {
            "proxy": lambda: guard.module,
            "model": lambda: Model(guard.module),
            "raw": lambda: critic,
            "part": lambda: critic.head,
            "no globals": lambda: guard_module(nn.Identity()).module.__wrapped__,
        }[way]()
        with pytest.raises(Exception, match="guarded by lensnet_guard"):
            torch.jit.script(target)

    @pytest.mark.parametrize("compile_it", [torch.jit.script, lambda m: torch.jit.trace(m, (X,))])
    def test_a_compiled_part(self, compile_it):
        """A guarded module may have parts that run without Python."""
        guard = guard_module(nn.Sequential(compile_it(nn.Linear(3, 2))))
        with guard.context("inference"):
            assert guard.module(X).shape == (2, 2)
        with pytest.raises(NoContext):
            guard.module(X)
        assert guard.count() == 1

    @pytest.mark.parametrize("compile_it", [torch.jit.script, lambda m: torch.jit.trace(m, (X,))])
    def test_guarding_a_compiled_module(self, compile_it):
        """A module that runs without Python could be run behind the proxy unseen: refused."""
        with pytest.raises(TypeError, match=r"^Linear is TorchScript, .* Guard the module that it"):
            guard_module(compile_it(nn.Linear(3, 2)))


class TestGraphModules:
    @pytest.fixture
    def graph(self, critic):
        return torch.fx.symbolic_trace(critic)

    @pytest.fixture
    def expected(self, critic):
        return critic(X)

    def test_guarded(self, expected, graph):
        """A traced graph module has a class of its own, and is guarded all the same."""
        guard = guard_module(graph)
        with guard.context("inference"):
            assert torch.equal(guard.module(X), expected)
        assert is_refused(graph, X)
        guard.uninstall()
        assert torch.equal(graph(X), expected)

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
    def test_copied_and_pickled(self, expected, graph, duplicate):
        """Its copies are guarded."""
        copied = duplicate(guard_module(graph).module)
        with pytest.raises(NoContext):
            copied(X)
        with guard_of(copied).context("inference"):
            assert torch.equal(copied(X), expected)
        assert is_refused(copied.__wrapped__, X)

    @pytest.mark.parametrize("write", [lambda graph: graph.recompile(), pickle.dumps])
    def test_written_again_after_guarding(self, expected, graph, write):
        """After an edit of the graph, or a save, the module runs on, guarded."""
        guard = guard_module(graph)
        write(graph)
        with guard.context("inference"):
            assert torch.equal(guard.module(X), expected)
        assert is_refused(graph, X)
        guard.uninstall()
        assert torch.equal(graph(X), expected)

    def test_tracing_behind_the_proxy(self, guard, critic):
        """Symbolic tracing behind the proxy is a bypass."""
        with pytest.raises(BypassedGuard):
            torch.fx.symbolic_trace(critic)


NORMS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda part: parametrize.register_parametrization(part, "weight", Doubled()),
}


class TestParametrizations:
    @pytest.mark.parametrize("norm", NORMS)
    def test_before_guarding(self, critic, norm):
        """A parametrized layer trains under the guard, as one call."""
        NORMS[norm](critic.head)
        NORMS[norm](critic.blocks[0].linear)
        guard = guard_module(critic)
        before = critic.head.parametrizations.weight.original0 if norm == "weight_norm" else None
        before = before.detach().clone() if before is not None else None
        train(guard, guard.module)
        assert only_call(guard) == "train"
        if before is not None:
            assert not torch.equal(critic.head.parametrizations.weight.original0, before)
        assert is_refused(critic.head, X)

    def test_computes_the_same(self, critic):
        """Output and gradients are those of the unguarded twin, cached or not."""
        for norm in NORMS.values():
            twin = copy.deepcopy(critic)
            norm(twin.head)
            guarded = guard_module(copy.deepcopy(twin))
            expected = twin.eval()(X)
            with guarded.context("inference"):
                assert torch.equal(guarded.module.eval()(X), expected)
                with parametrize.cached():
                    assert torch.equal(guarded.module(X), expected)

    def test_uninstall_leaves_them_on(self, critic):
        """The parametrized class comes back as it was."""
        NORMS["own"](critic.head)
        parametrized = type(critic.head)
        guard_module(critic).uninstall()
        assert type(critic.head) is parametrized
        assert parametrize.is_parametrized(critic.head, "weight")
        critic(X)

    @pytest.mark.parametrize("norm", NORMS)
    def test_reading_the_weight(self, critic, norm):
        """To read a weight, for a regulariser or a log, is no run of the module."""
        NORMS[norm](critic.head)
        guard = guard_module(critic)
        assert guard.module.head.weight.shape == (2, 3)
        assert guard.violations == ()

    def test_setting_the_weight(self, critic):
        """Nor is to assign one."""
        parametrizations.orthogonal(critic.head)
        guard = guard_module(critic)
        guard.module.head.weight = torch.eye(2, 3)
        assert torch.allclose(guard.module.head.weight, torch.eye(2, 3), atol=1e-6)
        assert guard.violations == ()

    def test_removed_after_guarding(self, critic):
        """Torch changes the class back then, which is refused as the change before is."""
        NORMS["own"](critic.head)
        guard = guard_module(critic)
        with pytest.raises(RuntimeError, match="is guarded, and something wants to change its"):
            parametrize.remove_parametrizations(critic.head, "weight")
        with guard.context("inference"):
            guard.module(X)
        assert is_refused(critic.head, X)
        guard.uninstall()
        parametrize.remove_parametrizations(critic.head, "weight")
        assert type(critic.head) is nn.Linear

    @pytest.mark.parametrize("through", [lambda guard: guard.module.head, lambda g: g._raw.head])
    def test_after_guarding(self, guard, through):
        """It is refused in so many words."""
        with pytest.raises(RuntimeError) as caught:
            NORMS["own"](through(guard))
        assert str(caught.value) == TestFullySharded2.REFUSAL.format("Linear")

    @pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
    @pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
    @pytest.mark.parametrize("order", ["before guarding", "after guarding"])
    def test_the_older_hooks(self, critic, norm, order):
        """weight_norm and spectral_norm of old are pre-hooks, which go on at any time."""
        if order == "before guarding":
            norm(critic.head)
        guard = guard_module(critic)
        if order == "after guarding":
            norm(guard.module.head)
        assert guard.module.head.weight.shape == (2, 3)
        train(guard, guard.module)
        assert only_call(guard) == "train"


class TestPruning:
    @pytest.mark.parametrize("order", ["before guarding", "after guarding"])
    def test_prune(self, critic, order):
        """Masks are pre-hooks: they go on at any time, and come off again."""
        if order == "before guarding":
            prune.l1_unstructured(critic.head, "weight", amount=2)
        guard = guard_module(critic)
        if order == "after guarding":
            prune.l1_unstructured(guard.module.head, "weight", amount=2)
        assert train(guard, guard.module)
        with guard.context("inference"):
            guard.module(X)
        assert (critic.head.weight == 0).sum() == 2
        assert list(guard.module.head.state_dict()) == ["bias", "weight_orig", "weight_mask"]
        prune.remove(guard.module.head, "weight")
        assert set(guard.module.head.state_dict()) == {"bias", "weight"}
        assert is_refused(critic.head, X)

    def test_global(self, guard, critic):
        """Pruning over all layers at once goes through the proxy's parts."""
        layers = [(block.linear, "weight") for block in guard.module.blocks]
        prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=6)
        assert prune.is_pruned(guard.module)
        assert sum(int((layer.weight == 0).sum()) for layer, _ in layers) == 6
        with guard.context("inference"):
            guard.module(X)
        assert guard.violations == ()


class TestTiedWeights:
    TOKENS = torch.tensor([1, 4])

    @pytest.fixture
    def model(self):
        return LanguageModel()

    @pytest.fixture
    def tied(self, model):
        return guard_module(Tied(model.emb), policy=CallPolicy(shared_submodules=("emb",)))

    def test_both_train_the_embedding(self, tied, model):
        """The other model runs the shared part freely; its gradients come from both."""
        with tied.context("training"), tied.sanctioned(SCOPE):
            loss = model(self.TOKENS).sum() + tied.module(self.TOKENS).sum()
        loss.backward()
        alone = LanguageModel()
        alone.load_state_dict(model.state_dict())
        alone(self.TOKENS).sum().backward()
        assert not torch.equal(model.emb.weight.grad, alone.emb.weight.grad)
        assert tied.module.emb is model.emb
        assert (tied.count(), tied.violation_count) == (1, 0)

    def test_the_rest_is_guarded(self, tied):
        """What is not shared stays behind the proxy."""
        assert is_refused(tied.module.head, X)
        assert is_refused(tied.module.__wrapped__, self.TOKENS)

    def test_without_the_policy(self, model):
        """A part that nobody declared shared is refused to the other model, by its name."""
        guard_module(Tied(model.emb))
        with pytest.raises(BypassedGuard, match=r"^Tied was run .*: emb was run alone\.") as caught:
            model(self.TOKENS)
        assert "CallPolicy(shared_submodules=...)" in str(caught.value)
        assert caught.value.record.caller.function == "LanguageModel.forward"

    @pytest.mark.parametrize(
        "duplicate",
        [
            copy.deepcopy,
            lambda pair: pickle.loads(pickle.dumps(pair)),
            lambda pair: saved_and_loaded(pair, weights_only=False),
        ],
    )
    @pytest.mark.parametrize("first", ["model", "critic"])
    def test_copies_stay_tied(self, tied, model, duplicate, first):
        """Copied together they share as before, and the copy's model is as free as the original."""
        pair = {"model": model, "critic": tied.module}
        order = pair if first == "model" else dict(reversed(pair.items()))
        copied = duplicate(order)
        assert copied["critic"].emb is copied["model"].emb
        assert copied["model"].out.weight is copied["critic"].emb.weight
        assert copied["model"].emb is not model.emb
        copied["model"](self.TOKENS)
        assert is_refused(copied["critic"].head, X)

    def test_tied_inside_one_module(self, model):
        """A module whose own parts share a weight is one module, with as many parameters."""
        guard = guard_module(model)
        assert len(list(guard.module.parameters())) == 1
        with guard.context("training"), guard.sanctioned(SCOPE):
            guard.module(self.TOKENS).sum().backward()
        assert model.out.weight.grad is model.emb.weight.grad is not None


class TestClassHierarchies:
    @pytest.fixture
    def registry(self):
        return {}

    @pytest.fixture
    def registering(self, registry):
        """A base whose subclasses must give a key, and may not give one twice."""

        class Base(nn.Module):
            def __init_subclass__(cls, *, key, **kwargs):
                super().__init_subclass__(**kwargs)
                if key in registry:
                    raise ValueError(f"{key!r} is taken")
                registry[key] = cls

        class Scorer(Base, key="scorer"):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(3, 2)

            def forward(self, x):
                return self.linear(x)

        return Scorer

    @pytest.fixture
    def meta(self, registry):
        """A metaclass that demands a tag and keeps every class it makes."""

        class Meta(type):
            def __new__(cls, name, bases, namespace, *, tag, **kwargs):
                return super().__new__(cls, name, bases, namespace, **kwargs)

            def __init__(cls, name, bases, namespace, *, tag, **_):
                super().__init__(name, bases, namespace)
                registry.setdefault(tag, []).append(cls)

        return Meta

    def works(self, guard):
        with guard.context("inference"):
            assert guard.module(X).shape == (2, 2)
        return is_refused(guard.module.__wrapped__, X) and guard.count() == 1

    def test_init_subclass(self, registering, registry):
        """Guarding, copying and uninstalling make no subclass that the registry could see."""
        module = registering()
        guard = guard_module(module)
        assert self.works(guard)
        assert self.works(guard_of(copy.deepcopy(guard.module)))
        assert self.works(guard_of(copy.copy(guard.module)))
        guard.uninstall()
        assert type(module) is registering
        assert registry == {"scorer": registering}

    def test_registering_metaclass(self, meta, registry):
        """A metaclass with arguments of its own is neither asked nor told."""

        class Scorer(nn.Linear, metaclass=meta, tag="scorers"):
            pass

        module = Scorer(3, 2)
        guard = guard_module(module)
        assert self.works(guard)
        assert self.works(guard_of(copy.deepcopy(guard.module)))
        assert isinstance(type(module), meta)
        guard.uninstall()
        assert type(module) is Scorer
        assert registry == {"scorers": [Scorer]}

    def test_both_at_once_in_a_deep_hierarchy(self, registering, meta, registry):
        """Parts of one module may come from both families."""

        class Both(registering, metaclass=meta, tag="tagged", key="both"):
            def __init__(self):
                super().__init__()
                self.inner = registering()

            def forward(self, x):
                return super().forward(x) + self.inner(x)

        known = copy.copy(registry)
        guard = guard_module(Both())
        assert self.works(guard)
        assert is_refused(guard.module.inner, X)
        assert self.works(guard_of(copy.deepcopy(guard.module)))
        assert registry == known == {"scorer": registering, "both": Both, "tagged": [Both]}

    def test_own_classes_can_still_be_derived(self, registering, registry):
        """The user's own subclassing of a guarded module's class goes on as before."""
        guard_module(registering())

        class Another(registering, key="another"):
            pass

        assert registry == {"scorer": registering, "another": Another}
        assert self.works(guard_module(Another()))

    def test_super_properties_and_private_names(self):
        """Zero-argument super, mangled names and properties mean what they meant."""

        class Base(nn.Module):
            def forward(self, x):
                return x[:, :2]

        class Odd(Base):
            __scale = 3

            def __init__(self):
                super().__init__()
                self.__shift = 1

            @property
            def shift(self):
                return self.__shift

            def forward(self, x):
                return super().forward(x) * self.__scale + self.shift

        guard = guard_module(Odd())
        with guard.context("inference"):
            assert torch.equal(guard.module(X), X[:, :2] * 3 + 1)
        assert guard.module.shift == 1

    def test_abstract_generic_and_slotted(self):
        """Classes with ABCMeta, type parameters or slots are guarded like any other."""
        import abc
        from typing import Generic, TypeVar

        item = TypeVar("item")

        class Abstract(nn.Module, abc.ABC):
            @abc.abstractmethod
            def forward(self, x): ...

        class Concrete(Abstract, Generic[item]):
            __slots__ = ("note",)

            def __init__(self):
                super().__init__()
                self.note = "kept"

            def forward(self, x):
                return x[:, :2]

        guard = guard_module(Concrete())
        assert self.works(guard)
        assert guard.module.note == "kept"
        assert isinstance(guard.module, Abstract)

    def test_parts_of_torch_with_a_fast_path(self):
        """nn.TransformerEncoder in eval mode takes its fast path and gives the same."""
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2).eval()
        twin, x = copy.deepcopy(encoder), torch.randn(2, 5, 8)
        guard = guard_module(encoder)
        with guard.context("inference"), torch.inference_mode():
            assert torch.equal(guard.module(x), twin(x))
        assert is_refused(encoder.layers[0], x)

    def test_recurrent(self):
        """nn.LSTM keeps its flattened weights through conversion, copy and pickle."""
        guard = guard_module(nn.LSTM(3, 4))
        guard.module.double().float()
        for proxy in (
            *(guard.module, copy.deepcopy(guard.module)),
            pickle.loads(pickle.dumps(guard.module)),
        ):
            with guard_of(proxy).context("inference"):
                assert proxy(X)[0].shape == (2, 4)
            assert is_refused(proxy.__wrapped__, X)


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.LazyLinear(2)

    def forward(self, x):
        return self.linear(x)


class TestLazyModules:
    def test_first_call_builds_the_weights(self):
        """As a part of a guarded module a lazy layer is built within the first admitted call."""
        guard = guard_module(Lazy())
        with pytest.raises(NoContext):
            guard.module(X)
        assert guard.module.linear.has_uninitialized_params()
        with guard.context("inference"):
            guard.module(X)
            guard.module(X)
        assert guard.module.linear.weight.shape == (2, 3)
        assert isinstance(guard.module.linear, nn.Linear)
        assert guard.count() == 2

    def test_copies_before_the_first_call(self):
        """A copy is as lazy as its original, and builds its own weights."""
        guard = guard_module(Lazy())
        for proxy in (copy.deepcopy(guard.module), pickle.loads(pickle.dumps(guard.module))):
            with guard_of(proxy).context("inference"):
                proxy(X)
            assert proxy.linear.weight.shape == (2, 3)
        assert guard.module.linear.has_uninitialized_params()

    @pytest.mark.parametrize("part", [True, False])
    def test_is_guarded_after_the_first_call(self, part):
        """Built, the layer is guarded as before."""
        raw = Lazy() if part else nn.LazyLinear(2)
        guard = guard_module(raw)
        with guard.context("inference"):
            guard.module(X)
        assert is_refused(raw.linear if part else raw, X)
        assert guard_of(raw) is guard

    def test_uninstall_after_the_first_call(self):
        """A built layer is given back as what it has become, without a warning."""
        raw = Lazy()
        guard = guard_module(raw)
        with guard.context("inference"):
            guard.module(X)
        guard.uninstall()
        assert type(raw.linear) is nn.Linear
        raw(X)

    def test_refused_twice(self):
        """A refused run does not open the way for the next."""
        raw = Lazy()
        guard_module(raw)
        assert is_refused(raw.linear, X)
        assert is_refused(raw.linear, X)
