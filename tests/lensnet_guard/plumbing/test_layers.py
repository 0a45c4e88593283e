"""Parametrizations, pruning and lazy layers."""

import copy
import pickle

import pytest
import torch
from tests.lensnet_guard.plumbing.models import (
    Doubled,
    X,
    is_refused,
    named,
    only_call,
    train,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from lensnet_guard import (
    NoContext,
    guard_module,
    guard_of,
)

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
        assert only_call(guard) == named("train")
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
        """Torch changes the class back then, and it is guarded as before."""
        NORMS["own"](critic.head)
        guard = guard_module(critic)
        parametrize.remove_parametrizations(critic.head, "weight")
        with guard.context("inference"):
            guard.module(X)
        assert is_refused(critic.head, X)
        guard.uninstall()
        assert type(critic.head) is nn.Linear

    @pytest.mark.parametrize(
        "through", [lambda guard: guard.module.head, lambda g: g.module.__wrapped__.head]
    )
    @pytest.mark.parametrize("norm", NORMS)
    def test_one_put_on_after_guarding_was_refused_and_left_no_weight(self, guard, through, norm):
        """The part becomes of another class, and trains as guarded as before."""
        head = NORMS[norm](through(guard))
        assert train(guard, guard.module)
        assert only_call(guard) == named("train")
        assert is_refused(head, X)

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
        assert only_call(guard) == named("train")


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
