"""Walking, containers, functional calls, tied weights and class hierarchies."""

import copy
import pickle

import pytest
import torch
from tests.lensnet_guard.plumbing.models import (
    SCOPE,
    LanguageModel,
    Model,
    Tied,
    X,
    is_refused,
    named,
    only_call,
    saved_and_loaded,
    train,
)
from torch import nn

from lensnet_guard import (
    BudgetExceeded,
    BypassedGuard,
    CallPolicy,
    NoContext,
    UnsanctionedCall,
    guard_module,
    guard_of,
)
from lensnet_guard.boundary.proxy import GuardedModule


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
        assert only_call(guard) == named("train")

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
        assert all(issubclass(type(layer), GuardedModule) for layer in layers[:2])
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
        assert only_call(guard) == named("TestFunctionalCall.test_on_the_proxy")
        with pytest.raises(UnsanctionedCall), guard.context("training"):
            torch.func.functional_call(guard.module, zeros, (X,))
        assert (guard.module.head.weight != 0).any()

    def test_on_a_model(self, guard):
        """Inside a model that is called functionally, the guarded module is called as ever."""
        model = Model(guard.module)
        zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        with guard.context("inference"):
            assert (torch.func.functional_call(model, zeros, (X,)) == 0).all()
        assert only_call(guard) == named("Model.forward")

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
        assert caught.value.record.caller.function == named("LanguageModel.forward")

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
