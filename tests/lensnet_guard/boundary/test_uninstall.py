"""What is armed passes for what it was, and is put back as it was."""

import abc
import copy
import gc
import inspect
import pickle
import weakref

import pytest
import torch
from tests.lensnet_guard.boundary.lens import Block, Forwarding, Lens, guard_free
from tests.lensnet_guard.helpers import X
from torch import nn

from lensnet_guard import BypassedGuard, guard_module, guard_of, lensnet_guard
from lensnet_guard.boundary.armed_class import ArmedMeta
from lensnet_guard.boundary.inside import Inside
from lensnet_guard.boundary.tripwire import Tripwire


@pytest.fixture
def guard(lens):
    return guard_module(lens)


def snapshot(module):
    """Classes and attributes of every part, and their hooks."""
    return [
        (part, type(part), dict(part.__dict__), dict(part._forward_hooks))
        for part in module.modules()
    ]


class TestUninstall:
    def test_restores_classes_and_attributes(self, lens):
        """The very same objects, nothing added, nothing gone."""
        before = snapshot(lens)
        guard = guard_module(lens)
        assert type(lens) is not Lens
        guard.uninstall()
        after = snapshot(lens)
        assert before == after
        assert [type(a[0]) is b[1] for a, b in zip(after, before, strict=True)] == [True] * len(
            after
        )
        lens(X)

    def test_lensnet_guard_restores_its_owner(self, lens):
        """On a normal end and on an exception."""
        owner = nn.Module()
        owner.lensnet = lens
        before = snapshot(owner)
        with lensnet_guard(owner):
            pass
        assert snapshot(owner) == before
        with pytest.raises(ZeroDivisionError), lensnet_guard(owner):
            raise ZeroDivisionError
        assert snapshot(owner) == before
        assert owner.lensnet is lens

    def test_a_module_guarded_before_stays_guarded(self, lens):
        """Only the one who armed it disarms it."""
        owner = nn.Module()
        owner.lensnet = lens
        guard = guard_module(lens)
        with lensnet_guard(owner) as same:
            assert same is guard
            assert owner.lensnet is guard.module
        assert owner.lensnet is lens
        with pytest.raises(BypassedGuard):
            lens(X)

    def test_twice(self, guard, lens):
        """It does no harm."""
        guard.uninstall()
        guard.uninstall()
        assert type(lens) is Lens

    def test_again_after(self, guard, lens):
        """The module can be guarded anew."""
        guard.uninstall()
        assert guard_of(lens) is None
        again = guard_module(lens)
        assert guard_of(lens) is again

    def test_a_class_that_changed_meanwhile(self, guard, lens):
        """What somebody else put there is left, unarmed."""

        class Other(Lens):
            pass

        lens.__class__ = Other
        guard.uninstall()
        assert type(lens) is Other
        assert type(lens.blocks[0]) is Block

    def test_when_guarding_fails(self, lens, tmp_path):
        """A guard that cannot log is no guard, and leaves nothing armed."""
        with pytest.raises(TypeError, match="log must be a folder's path"):
            guard_module(lens, log=42)
        assert type(lens) is Lens

    def test_instance_forward(self, lens):
        """A forward that somebody put on the instance, as accelerate does, is checked and kept."""
        calls = []
        own = lens.forward

        def forward(x):
            calls.append(1)
            return own(x)

        lens.forward = forward
        guard = guard_module(lens)
        assert lens.__dict__["forward"] is not forward
        with pytest.raises(BypassedGuard):
            lens(X)
        with guard.context("inference"):
            guard.module(X)
        assert calls == [1]
        guard.uninstall()
        assert lens.__dict__["forward"] is forward

    def test_a_module_with_a_setattr_of_its_own_was_changed_for_good(self):
        """Fabric's hands what it is given to the module inside: both got the other's class."""
        outer = Forwarding(Block())
        inner = outer.inside
        guard = guard_module(outer)
        assert (type(outer).__name__, type(inner).__name__) == ("Forwarding", "Block")
        with guard.context("inference"):
            assert guard.module(X).shape == X.shape
        for raw in (outer, inner):
            with pytest.raises(BypassedGuard):
                raw(X)
        guard.uninstall()
        assert (type(outer), type(inner)) == (Forwarding, Block)
        assert outer(X).shape == X.shape

    def test_what_cannot_be_armed_is_left_as_it_was(self):
        """The parts before it stayed armed, and no guard answered for them."""

        class Closed(type):
            def mro(cls):
                if len(cls.__bases__) > 1:
                    raise RuntimeError("no subclasses")
                return super().mro()

        class Last(nn.Linear, metaclass=Closed):
            pass

        module = nn.Sequential(Block(), Last(3, 3))
        module[0].forward = module[0].forward
        before = snapshot(module)
        with pytest.raises(RuntimeError, match="no subclasses"):
            guard_module(module)
        assert snapshot(module) == before
        assert not any(isinstance(type(part), ArmedMeta) for part in module.modules())

    def test_a_forward_that_was_replaced_meanwhile_is_left(self, lens):
        """It is no longer the guard's to restore."""
        lens.forward = lens.forward
        guard = guard_module(lens)
        lens.forward = newer = lambda x: x
        guard.uninstall()
        assert lens.__dict__["forward"] is newer


class TestClasses:
    def test_look_the_same(self, guard, lens):
        """Name, text, isinstance, and forward, which is the original's where it is read."""
        assert type(lens).__name__ == "Lens"
        assert type(lens).__qualname__ == Lens.__qualname__
        assert isinstance(lens, Lens)
        assert repr(lens) == repr(guard_free(lens))
        assert type(lens).forward is Lens.forward
        assert inspect.signature(lens.forward) == inspect.signature(Lens().forward)

    def test_pickles_are_of_the_original_class(self, guard, lens):
        """What is saved is not armed, and loads where there is no guard."""
        loaded = pickle.loads(pickle.dumps(lens))
        assert type(loaded) is Lens
        assert type(loaded.blocks[0].linear) is nn.Linear
        loaded(X)

    def test_registries_learn_nothing(self):
        """Neither ``__init_subclass__`` nor a metaclass sees the armed class."""
        seen = []

        class Meta(type):
            def __init__(cls, *args):
                super().__init__(*args)
                seen.append(cls)

        class Registered(nn.Linear, metaclass=Meta):
            def __init_subclass__(cls, *, key):
                seen.append(key)

        assert seen == [Registered]
        module = Registered(3, 2)
        guard = guard_module(module)
        assert seen == [Registered]
        guard.uninstall()
        assert type(module) is Registered

    def test_a_class_that_was_changed_meanwhile_stays(self, guard, lens):
        """fully_shard and parametrizations make subclasses, which are none of the guard's."""
        part = nn.utils.parametrizations.weight_norm(lens.blocks[0].linear)
        assert isinstance(type(part), ArmedMeta)
        guard.uninstall()
        assert not isinstance(type(part), ArmedMeta)
        assert (type(part).__name__, type(part).__bases__) == ("ParametrizedLinear", (nn.Linear,))

    def test_a_guard_is_collected_with_its_module(self):
        """Arming keeps nothing alive that the user has dropped."""
        module = Lens()
        gone = weakref.ref(module), weakref.ref(guard_module(module))
        del module
        gc.collect()
        assert [ref() for ref in gone] == [None, None]

    def test_an_abc_forgot_its_subclasses(self):
        """The armed class shared the caches of isinstance with its original, for good."""

        class Base(nn.Linear, abc.ABC):
            pass

        class Derived(Base):
            pass

        module, other = Base(3, 2), Derived(3, 2)
        guard = guard_module(module)
        assert isinstance(other, type(module))
        assert issubclass(Derived, type(module))
        guard.uninstall()
        assert isinstance(other, Base)
        assert issubclass(Derived, Base)

    def test_a_new_module_of_the_same_class_is_free(self, guard, lens):
        """`type(module)(...)`, as target networks are made."""
        other = type(lens)()
        assert type(other) is Lens
        other(X)

    def test_copies_run_again_when_the_guard_is_gone(self, guard, lens):
        """They were refused for good, and the remedy was a guard that is not there."""
        copied = copy.deepcopy(lens)
        with pytest.raises(BypassedGuard):
            copied(X)
        guard.uninstall()
        assert torch.equal(copied(X), lens(X))

    def test_modules_without_a_forward_are_left_alone(self, guard, lens):
        """A ModuleList cannot be run."""
        assert type(lens.blocks) is nn.ModuleList

    def test_tripwire_alone(self):
        """It needs no guard: what it calls instead decides what happens."""
        module, inside = nn.Linear(3, 2), Inside()
        wire = Tripwire(module, None, inside, lambda part, _, *rest: (part, *rest))
        assert module(X, scale=2) == (module, (X,), {"scale": 2}, None)
        inside.here = True
        assert module(X).shape == (2, 2)
        wire.disarm()
        assert type(module) is nn.Linear


class TestAbstractClasses:
    def test_isinstance_of_an_abstract_class_never_ended(self):
        """DDP is abstract; with one guarded, asking whether anything is a DDP recursed."""

        class Abstract(nn.Linear, abc.ABC):
            pass

        module = Abstract(3, 2)
        guard = guard_module(module)
        other = nn.Linear(3, 2)
        assert not isinstance(other, Abstract)
        assert not isinstance(other, type(module))
        assert isinstance(module, Abstract)
        assert isinstance(Abstract(1, 1), type(module))
        assert issubclass(Abstract, type(module))
        assert guard.module is not None
