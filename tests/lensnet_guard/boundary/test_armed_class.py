"""Classes of guarded modules: patched for a while, assigned, pickled, without harm to others."""

import contextlib
import copy
import gc
import pickle
import weakref
from unittest import mock

import pytest
import torch
from tests.lensnet_guard.helpers import X
from torch import nn

from lensnet_guard import BypassedGuard, guard_module, guard_of


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x):
        return self.linear(x)

    def score(self, x):
        return x + 1

    def inherited(self, x):
        return x + 2

    @staticmethod
    def scale(x):
        return 2 * x


class Critic(Base):
    """Has a forward and a score of its own, and inherits the rest."""

    def forward(self, x):
        return self.linear(x) + 1

    def score(self, x):
        return x + 3


class Heir(Critic):
    """Inherits its forward as well."""


@pytest.fixture(params=[Critic, Heir])
def cls(request):
    return request.param


@pytest.fixture
def guard(cls):
    return guard_module(cls())


def zeros(*_, **__):
    return torch.zeros(2, 1)


def patched_by_mock(cls, name):
    return mock.patch.object(cls, name, zeros)


def mocked(cls, name):
    return mock.patch.object(cls, name, return_value=torch.zeros(2, 1))


@contextlib.contextmanager
def patched_by_pytest(cls, name):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(cls, name, zeros)
        yield


@contextlib.contextmanager
def wrapped_by_hand(cls, name):
    original = getattr(cls, name)

    def timed(self, *args, **kwargs):
        original(self, *args, **kwargs)
        return torch.zeros(2, 1)

    setattr(cls, name, timed)
    try:
        yield
    finally:
        setattr(cls, name, original)


PATCHES = {
    "mock.patch.object with a function": patched_by_mock,
    "mock.patch.object with a mock": mocked,
    "monkeypatch.setattr": patched_by_pytest,
    "a wrapper of its own": wrapped_by_hand,
}
CLASSES = {
    "type(raw)": lambda guard: type(guard.module.__wrapped__),
    "module.__class__": lambda guard: guard.module.__class__,
}


class TestPatchedForAWhile:
    """The armed function ended up in the original class: no instance in the process ran again."""

    @pytest.mark.parametrize("through", CLASSES)
    @pytest.mark.parametrize("patch", PATCHES)
    def test_forward(self, cls, guard, patch, through):
        """The patch holds for guarded and other instances, and nothing of it is left."""
        own = dict(vars(cls))
        other = cls()
        with PATCHES[patch](CLASSES[through](guard), "forward"):
            assert torch.equal(other(X), torch.zeros(2, 1))
            with guard.context("inference"):
                assert torch.equal(guard.module(X), torch.zeros(2, 1))
            with pytest.raises(BypassedGuard):
                guard.module.__wrapped__(X)
        if patch == "a wrapper of its own" and cls is Heir:  # leaves it behind without a guard too
            assert cls.forward is Critic.forward
            del Heir.forward
        assert dict(vars(cls)) == own
        assert torch.equal(other(X), cls.forward(other, X))
        with guard.context("inference"):
            assert guard.module(X).shape == (2, 1)
        guard.uninstall()
        assert guard.module.__wrapped__(X).shape == cls()(X).shape == (2, 1)

    @pytest.mark.parametrize("patch", [p for p in PATCHES if p != "a wrapper of its own"])
    @pytest.mark.parametrize("name", ["__call__", "score", "inherited", "scale"])
    def test_anything_else(self, cls, guard, patch, name):
        """Own, inherited, static, and how a module is called."""
        own = dict(vars(cls))
        with PATCHES[patch](type(guard.module.__wrapped__), name):
            assert torch.equal(getattr(cls(), name)(X), torch.zeros(2, 1))
        assert dict(vars(cls)) == own

    @pytest.mark.parametrize("through", ["original", "armed"])
    def test_a_mock_is_called_as_without_a_guard(self, cls, guard, through):
        """It takes no self, for it is no function, and got one."""
        target = cls if through == "original" else type(guard.module.__wrapped__)
        with mock.patch.object(target, "forward", return_value=X) as forward:
            with guard.context("inference"):
                assert guard.module(X, scale=2) is X
        forward.assert_called_once_with(X, scale=2)

    def test_one_patch_inside_another(self, cls, guard):
        """Each puts back what it found, the outer one still patched."""
        own = dict(vars(cls))
        armed, other = type(guard.module.__wrapped__), cls()
        with mock.patch.object(armed, "forward", lambda self, x: x + 1):
            with mock.patch.object(armed, "forward", lambda self, x: x + 2):
                with mock.patch.object(armed, "score", zeros):
                    assert torch.equal(other(X), X + 2)
            assert torch.equal(other(X), X + 1)
        assert dict(vars(cls)) == own

    def test_over_the_end_of_the_guard(self, cls, guard):
        """What was patched under a guard is put back without one."""
        own = dict(vars(cls))
        with mock.patch.object(type(guard.module.__wrapped__), "forward", zeros):
            guard.uninstall()
            assert torch.equal(cls()(X), torch.zeros(2, 1))
        assert dict(vars(cls)) == own

    def test_under_two_guards(self, cls, guard):
        """Both are of the same class."""
        own = dict(vars(cls))
        second = guard_module(cls())
        with mock.patch.object(type(guard.module.__wrapped__), "forward", lambda self, x: x + 1):
            with mock.patch.object(
                type(second.module.__wrapped__), "forward", lambda self, x: x + 2
            ):
                assert torch.equal(cls()(X), X + 2)
            assert torch.equal(cls()(X), X + 1)
        assert dict(vars(cls)) == own

    def test_the_original_is_patched_after_the_armed_one_was(self, cls, guard):
        """What was put back on the guarded module's class follows the original again."""
        with mock.patch.object(type(guard.module.__wrapped__), "forward", zeros):
            pass
        with mock.patch.object(cls, "forward", lambda self, x: x + 7):
            with guard.context("inference"):
                assert torch.equal(guard.module(X), X + 7)

    def test_deleted_for_a_while(self, guard):
        """`monkeypatch.delattr`, of what the class has itself."""
        cls = type(guard.module.__wrapped__)._lensnet_original
        own = dict(vars(cls))
        with pytest.MonkeyPatch.context() as monkeypatch:
            if "score" in own:
                monkeypatch.delattr(type(guard.module.__wrapped__), "score")
                assert torch.equal(cls().score(X), X + 1)
            else:
                with pytest.raises(AttributeError, match="score"):
                    monkeypatch.delattr(type(guard.module.__wrapped__), "score")
                monkeypatch.undo = lambda: None  # as without a guard, it would raise once more
        assert dict(vars(cls)) == own

    def test_set_for_good(self, cls, guard):
        """It is set on the original, also for the time after the guard."""
        type(guard.module.__wrapped__).added = 42
        assert cls.added == 42
        guard.uninstall()
        assert cls.added == 42
        del cls.added

    @pytest.mark.parametrize("name", ["forward", "__call__"])
    @pytest.mark.parametrize("way", ["closure", "__wrapped__"])
    def test_a_wrapper_around_the_guard_s_own_function(self, cls, guard, name, way):
        """It would call the guard, and the guard it: refused, and nothing is changed."""
        own, armed = dict(vars(cls)), type(guard.module.__wrapped__)
        function = vars(armed)[name]

        def wrapper(self, *args):
            return function(self, *args) if way == "closure" else None

        wrapper.__wrapped__ = function if way == "__wrapped__" else None
        with pytest.raises(RuntimeError) as caught:
            setattr(armed, name, wrapper)
        assert str(caught.value) == (
            f"{cls.__name__} is guarded, and its {name} was to be wrapped together with the "
            f"guard's check. Wrap that of {cls.__module__}.{cls.__qualname__}, the class itself, "
            "or wrap first and guard afterwards"
        )
        assert dict(vars(cls)) == own

    def test_what_was_patched_is_not_kept_for_ever(self, guard):
        """A class that is patched in every step holds no more than the newest patches."""
        armed = type(guard.module.__wrapped__)
        for number in range(1_000):
            armed.number = number
        assert sum(map(len, armed._lensnet_patches.values())) < 100
        del guard.module.__wrapped__.__class__._lensnet_original.number


class Merged(Critic):
    """What token merging makes of a block, by assigning `__class__`."""

    def forward(self, x):
        return x + 5


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.critic = Critic()

    def forward(self, x):
        return self.critic(x)


ASSIGNMENTS = {
    "to the module": lambda guard: setattr(guard.module.__wrapped__, "__class__", Merged),
    "through the proxy": lambda guard: setattr(guard.module, "__class__", Merged),
    "past setattr of the module": lambda guard: object.__setattr__(
        guard.module.__wrapped__, "__class__", Merged
    ),
    "the armed class of another": lambda guard: setattr(
        guard.module.__wrapped__, "__class__", type(guard_module(Merged()).module.__wrapped__)
    ),
}


class TestAssignedClass:
    """`module.__class__ = Other` took the tripwire off in silence."""

    @pytest.mark.parametrize("mode", ["enforce", "observe"])
    @pytest.mark.parametrize("way", ASSIGNMENTS)
    def test_what_the_module_becomes_is_armed(self, way, mode):
        """It computes what the new class computes, and still asks first."""
        guard = guard_module(Critic(), mode=mode)
        ASSIGNMENTS[way](guard)
        assert guard.module.__class__ == Merged
        assert guard_of(guard.module.__wrapped__) is guard
        with guard.context("inference"):
            assert torch.equal(guard.module(X), X + 5)
        assert guard.violations == ()
        with contextlib.suppress(BypassedGuard):
            guard.module.__wrapped__(X)
        (record,) = guard.violations
        assert record.reason == "BypassedGuard"
        guard.uninstall()
        assert type(guard.module.__wrapped__) is Merged

    def test_a_part(self):
        """Run alone it was let through in training."""
        guard = guard_module(Outer())
        guard.module.critic.__class__ = Merged
        with pytest.raises(BypassedGuard, match=r"critic was run alone"):
            guard.module.critic(X)
        with guard.context("inference"):
            assert torch.equal(guard.module(X), X + 5)

    @pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
    def test_a_copy_of_the_raw_module(self, make):
        """Stays a copy, and refused."""
        copied = make(guard_module(Critic()).module.__wrapped__)
        copied.__class__ = Merged
        with pytest.raises(BypassedGuard, match="a copy or a former part"):
            copied(X)

    def test_for_a_while(self):
        """Back to the class that it had."""
        guard = guard_module(Critic())
        before = guard.module.__class__
        guard.module.__class__ = Merged
        guard.module.__class__ = before
        with guard.context("inference"):
            assert torch.equal(guard.module(X), Critic.forward(guard_free(guard), X))
        guard.uninstall()
        assert type(guard.module.__wrapped__) is Critic

    @pytest.mark.parametrize("other", [int, object, "Merged", None])
    def test_what_is_no_module(self, other):
        """Refused, and the module is what it was."""
        guard = guard_module(Critic())
        armed = type(guard.module.__wrapped__)
        with pytest.raises(TypeError) as caught:
            guard.module.__wrapped__.__class__ = other
        assert str(caught.value) == (
            f"a guarded Critic can only become an nn.Module of another class, not {other!r}"
        )
        assert type(guard.module.__wrapped__) is armed

    def test_a_lazy_layer(self):
        """It becomes another class when it first runs, and stays armed."""
        guard = guard_module(nn.Sequential(nn.LazyLinear(2)))
        with guard.context("inference"):
            guard.module(X)
        with pytest.raises(BypassedGuard):
            guard.module.__wrapped__[0](X)
        guard.uninstall()
        assert type(guard.module.__wrapped__[0]) is nn.Linear


def guard_free(guard):
    return pickle.loads(pickle.dumps(guard.module.__wrapped__))


class TestPickles:
    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_of_the_original_class(self, guard, cls, protocol):
        """By every protocol."""
        loaded = pickle.loads(pickle.dumps(guard.module.__wrapped__, protocol))
        assert (type(loaded), type(loaded.linear)) == (cls, nn.Linear)
        assert loaded(X).shape == (2, 1)

    @pytest.mark.parametrize("what", ["proxy", "raw", "owner", "closure", "guard"])
    def test_cloudpickle_kept_the_class_with_its_tripwire(self, run_python, what, tmp_path):
        """What Ray, joblib and submitit send: refused for the thread-local that went with it."""
        run_python(
            """
            import sys, cloudpickle, torch
            from torch import nn
            from lensnet_guard import guard_module

            class Critic(nn.Module):  # of __main__, so that it is kept by value
                def __init__(self):
                    super().__init__()
                    self.layers = nn.Sequential(nn.Linear(3, 3), nn.ReLU())

                def forward(self, x):
                    return self.layers(x)

            guard = guard_module(Critic())
            module = guard.module
            what = {
                "proxy": module,
                "raw": guard.module.__wrapped__,
                "owner": {"critic": module},
                "closure": lambda: module,
                "guard": guard,
            }[sys.argv[1]]
            with open("pickle", "wb") as file:
                cloudpickle.dump(what, file)
            """,
            what,
        ).check_returncode()
        loaded = run_python(
            """
            import pickle, sys, torch
            from lensnet_guard import BypassedGuard, guard_of

            with open("pickle", "rb") as file:
                found = pickle.load(file)
            what = sys.argv[1]
            if what == "raw":
                assert guard_of(found) is None
                print(tuple(found(torch.ones(2, 3)).shape))
                sys.exit()
            if what == "guard":
                module = found.module
            else:
                module = {"proxy": lambda: found, "owner": lambda: found["critic"],
                          "closure": found}[what]()
            for run in (module, module.layers, module.__wrapped__):
                try:
                    run(torch.ones(2, 3))
                except Exception as error:
                    print(type(error).__name__)
            with guard_of(module).context("inference"):
                print(tuple(module(torch.ones(2, 3)).shape))
            """,
            what,
        )
        assert loaded.stderr == ""
        refused = ["NoContext", "BypassedGuard", "BypassedGuard"] if what != "raw" else []
        assert loaded.stdout.splitlines() == [*refused, "(2, 3)"]


class Static(nn.Module):
    """A module whose forward takes no self, and a module around it."""

    @staticmethod
    def forward(x):
        return 2 * x


class TestOtherForwards:
    @pytest.mark.parametrize("module", [Static(), nn.Sequential(Static())], ids=["it", "part"])
    def test_a_static_forward_was_given_self(self, module):
        """It computes what it computes without a guard, and is refused past it."""
        guard = guard_module(module)
        with guard.context("inference"):
            assert guard.module(torch.ones(1)).item() == 2
            with pytest.raises(BypassedGuard):
                module(torch.ones(1))

    def test_a_mock_on_the_instance_was_asked_how_it_is_compiled(self):
        """It answers to every name."""
        module = nn.Linear(1, 1)
        module.forward = mock.MagicMock(return_value=torch.ones(1))
        guard = guard_module(module)
        with guard.context("inference"):
            guard.module(1)
        assert module.forward.__wrapped__.mock_calls == [mock.call(1)]
        assert guard.calls[0].compiled is None


class TestClasses:
    def test_tensors_that_a_class_caches_were_kept(self):
        """A mask that every forward makes anew, say: one at a time, as without a guard."""

        class Caching(nn.Module):
            def forward(self, x):
                type(self).mask = torch.ones(3)
                kept.append(weakref.ref(type(self).mask))
                return x

        kept = []
        guard = guard_module(Caching())
        with guard.context("inference"):
            for _ in range(5):
                guard.module(1)
        gc.collect()
        assert sum(reference() is not None for reference in kept) == 1

    def test_two_guarded_modules_of_a_class_were_of_two(self):
        """As a script that compares a policy with its reference would have it."""
        first, second, other = nn.Linear(1, 1), nn.Linear(1, 1), nn.ReLU()
        for module in (first, second, other):
            guard_module(module)
        assert type(first) == type(second)  # noqa: E721
        assert type(first) != type(other)  # noqa: E721
