"""Putting a guard on, and taking it off again without a trace."""

import contextlib
import gc
import re
import threading
import weakref

import pytest
import torch
from tests.lensnet_guard.helpers import X
from torch import nn

from lensnet_guard import (
    BypassedGuard,
    CallPolicy,
    LensNetViolation,
    NoContext,
    UnsanctionedCall,
    guard_module,
    guard_of,
    lensnet_guard,
)


class Controller:
    """A plain owner."""

    def __init__(self, module):
        self.lensnet = module


class Model(nn.Module):
    """An owner that is a module itself, with the lensnet in the middle."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.lensnet = nn.Linear(3, 2)
        self.last = nn.Linear(2, 1)

    def forward(self, x):
        return self.last(self.lensnet(self.first(x)))


class Slotted:
    __slots__ = ("lensnet",)


class SlottedHeir(Slotted):
    """The attribute is a slot, though there is a __dict__ too."""


class WithProperty:
    def __init__(self):
        self._module = nn.Linear(3, 2)

    @property
    def lensnet(self):
        return self._module

    @lensnet.setter
    def lensnet(self, module):
        self._module = module


def make_owner(kind):
    """``(owner, raw module)`` for every sort of owner."""
    module = nn.Linear(3, 2)
    if kind == "plain":
        owner = Controller(module)
    elif kind == "hidden in a module":
        owner = nn.Module()
        vars(owner)["lensnet"] = module
    elif kind == "module":
        owner = Model()
    elif kind == "slots":
        owner = Slotted()
        owner.lensnet = module
    elif kind == "slots and dict":
        owner = SlottedHeir()
        owner.lensnet = module
    elif kind == "property":
        owner = WithProperty()
    elif kind == "class attribute":
        owner = type("Owner", (), {"lensnet": module})()
    elif kind == "class itself":
        owner = type("Owner", (), {"lensnet": module})
    else:
        owner = type("Heir", (type("Owner", (), {"lensnet": module}),), {})
    return owner, owner.lensnet


KINDS = [
    *("plain", "module", "slots", "slots and dict", "property", "class attribute"),
    *("class itself", "inheriting class", "hidden in a module"),
]


def state(owner):
    """Everything that an installation could have changed."""
    return (
        dict(vars(owner)) if hasattr(owner, "__dict__") else None,
        list(owner._modules.items()) if isinstance(owner, nn.Module) else None,
        dict(vars(type(owner))),
    )


class TestInstallation:
    @pytest.mark.parametrize("kind", KINDS)
    def test_inside_the_block(self, kind):
        """The owner's attribute is the proxy, and is enforced and counted."""
        owner, raw = make_owner(kind)
        with lensnet_guard(owner) as guard:
            assert owner.lensnet is guard.module
            assert owner.lensnet.__wrapped__ is raw
            with guard.context("inference"):
                owner.lensnet(X)
            with guard.context("training"), guard.sanctioned("preference_scorer"):
                owner.lensnet(X)
        assert guard.count() == 2

    def test_a_hidden_module_does_not_become_a_submodule(self):
        """A frozen teacher is often put past ``__setattr__``, and was saved in the block."""
        owner, _ = make_owner("hidden in a module")
        with lensnet_guard(owner):
            assert not owner.state_dict()

    @pytest.mark.parametrize("kind", KINDS)
    def test_restores_the_owner_exactly(self, kind):
        """Afterwards the very same object is back, in the same place, and nothing else changed."""
        owner, raw = make_owner(kind)
        before = state(owner)
        with lensnet_guard(owner):
            pass
        assert owner.lensnet is raw
        assert state(owner) == before
        assert type(owner.lensnet) is nn.Linear

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit, SystemExit])
    def test_restores_the_owner_after_an_exception(self, kind, error):
        """However the block ends, and whatever ends it comes out as it was."""
        owner, raw = make_owner(kind)
        before = state(owner)
        mine = error("mine")
        with pytest.raises(error) as caught, lensnet_guard(owner):
            raise mine
        assert caught.value is mine
        assert owner.lensnet is raw
        assert type(owner.lensnet) is nn.Linear
        assert state(owner) == before

    def test_keeps_the_order_of_submodules(self):
        """The guarded submodule stays in its place among its siblings, inside and after."""
        model = Model()
        names, keys = list(model._modules), list(model.state_dict())
        with lensnet_guard(model):
            assert (list(model._modules), list(model.state_dict())) == (names, keys)
        assert (list(model._modules), list(model.state_dict())) == (names, keys)

    def test_call_through_the_owner(self):
        """The owner's own code meets the guard without a change."""
        model = Model()
        with lensnet_guard(model) as guard:
            with pytest.raises(NoContext):
                model(X)
            with guard.context("inference"):
                model(X)
            guard._history.violation_count = 0
        assert guard.calls[-1].caller.function.endswith("forward")

    def test_other_attribute(self):
        """Any attribute that is a module can be guarded."""
        owner = Controller(None)
        owner.critic = raw = nn.Linear(3, 1)
        with lensnet_guard(owner, attribute="critic") as guard:
            assert owner.critic is guard.module
            assert owner.lensnet is None
        assert owner.critic is raw

    def test_module_as_owner_of_another_attribute(self):
        """A module can own the guarded attribute under any name."""
        model = Model()
        with lensnet_guard(model, attribute="last") as guard:
            assert model.last is guard.module
            assert guard_of(model.lensnet) is None

    def test_bare_module(self):
        """A module without a lensnet is guarded itself; nothing is installed anywhere."""
        module = nn.Linear(3, 2)
        with lensnet_guard(module) as guard:
            assert guard.module.__wrapped__ is module
            with guard.context("inference"):
                guard.module(X)
            with pytest.raises(BypassedGuard), guard.context("inference"):
                module(X)
            guard._history.violation_count = 0
        module(X)
        assert guard.count() == 1

    def test_one_after_the_other(self):
        """An owner can be guarded again, each time by a new guard."""
        owner, raw = make_owner("plain")
        guards = []
        for _ in range(2):
            with lensnet_guard(owner) as guard:
                guards.append(guard)
        assert guards[0] is not guards[1]
        assert owner.lensnet is raw

    def test_nested(self):
        """The inner block uses the outer one's guard, and leaves it on."""
        owner, raw = make_owner("module")
        with lensnet_guard(owner) as outer:
            with lensnet_guard(owner) as inner:
                assert inner is outer
            assert owner.lensnet is outer.module
        assert owner.lensnet is raw

    def test_policy_and_mode(self):
        """The block takes the contract and the mode of its guard."""
        owner, _ = make_owner("plain")
        policy = CallPolicy({"critic": 2})
        with lensnet_guard(owner, policy=policy, mode="observe") as guard:
            assert (guard.policy, guard.mode) == (policy, "observe")

    def test_environment(self, monkeypatch):
        """LENSNET_GUARD decides the mode of a block as of a guard."""
        monkeypatch.setenv("LENSNET_GUARD", "observe")
        with lensnet_guard(make_owner("plain")[0]) as guard:
            assert guard.mode == "observe"

    def test_leaves_no_reference(self):
        """After the block, owner and module do not keep the guard alive."""
        owner, _ = make_owner("plain")
        with lensnet_guard(owner) as guard:
            ref = weakref.ref(guard)
        del guard
        gc.collect()
        assert ref() is None

    def test_owner_that_refuses_the_proxy(self, tmp_path):
        """An attribute that cannot be set is the owner's error; log and owner are left in order."""

        class ReadOnly:
            module = nn.Linear(3, 2)

            @property
            def lensnet(self):
                return self.module

        owner = ReadOnly()
        with pytest.raises(AttributeError), lensnet_guard(owner, log=tmp_path):
            pytest.fail("the block was entered")
        assert type(owner.lensnet) is nn.Linear
        assert "run.end" in (tmp_path / "lensnet.rank0.jsonl").read_text()


class TestAttributeReplacedInside:
    @pytest.mark.parametrize("kind", ["plain", "module", "slots", "class attribute"])
    def test_warns_and_leaves_the_new_object(self, kind):
        """What the user put there stays there; that its calls were not guarded is told."""
        owner, _ = make_owner(kind)
        new = nn.Linear(3, 2)
        with pytest.warns(RuntimeWarning) as caught, lensnet_guard(owner):
            owner.lensnet = new
        (warning,) = caught
        assert str(warning.message) == (
            f"lensnet_guard: {type(owner).__name__}.lensnet was replaced inside the block, "
            "so calls of the new object were not guarded; it is left in place"
        )
        assert warning.filename == __file__
        assert owner.lensnet is new

    def test_deleted(self):
        """An attribute that is gone is not brought back."""
        owner, _ = make_owner("plain")
        with pytest.warns(RuntimeWarning, match="was replaced"), lensnet_guard(owner):
            del owner.lensnet
        assert not hasattr(owner, "lensnet")

    def test_put_back_by_the_user(self):
        """The raw module put back inside the block ran unguarded, which is told as well."""
        owner, raw = make_owner("plain")
        with pytest.warns(RuntimeWarning, match="was replaced"), lensnet_guard(owner):
            owner.lensnet = raw
        assert owner.lensnet is raw

    def test_fluent_reassignment_is_no_replacement(self):
        """`owner.lensnet = owner.lensnet.to(device)` keeps the guard on."""
        owner, raw = make_owner("module")
        with lensnet_guard(owner):
            owner.lensnet = owner.lensnet.to("cpu").train()
        assert owner.lensnet is raw

    def test_with_an_exception(self):
        """The exception comes out, the warning is given all the same."""
        owner, _ = make_owner("plain")
        with pytest.warns(RuntimeWarning, match="was replaced"), pytest.raises(KeyError):
            with lensnet_guard(owner):
                owner.lensnet = None
                raise KeyError


class TestAlreadyGuarded:
    @pytest.fixture
    def owner(self):
        return Controller(guard_module(nn.Linear(3, 2)).module)

    def test_keeps_its_guard_and_adds_the_log(self, owner, tmp_path):
        """The block adds the log, and takes away nothing but the log."""
        proxy, existing = owner.lensnet, guard_of(owner.lensnet)
        with lensnet_guard(owner, log=tmp_path) as guard:
            assert guard is existing
            assert owner.lensnet is proxy
            with guard.context("inference"):
                owner.lensnet(X)
        assert owner.lensnet is proxy
        assert guard_of(owner.lensnet) is existing
        with existing.context("inference"):
            owner.lensnet(X)
        text = (tmp_path / "lensnet.rank0.jsonl").read_text()
        assert [text.count(event) for event in ("run.begin", "call.begin", "run.end")] == [1, 1, 1]

    def test_keeps_a_log_that_it_did_not_start(self, tmp_path):
        """Without a log of its own, the block does not end the guard's."""
        owner = Controller(guard_module(nn.Linear(3, 2), log=tmp_path).module)
        with lensnet_guard(owner):
            pass
        guard_of(owner.lensnet).end_log()
        assert (tmp_path / "lensnet.rank0.jsonl").read_text().count("run.end") == 1

    def test_second_log_is_refused(self, tmp_path):
        """Two logs at once are a mistake; the first goes on."""
        owner = Controller(guard_module(nn.Linear(3, 2), log=tmp_path / "a").module)
        with pytest.raises(ValueError, match=r"^Linear already logs to .*a$"):
            lensnet_guard(owner, log=tmp_path / "b").__enter__()
        assert not (tmp_path / "b").exists()
        assert not guard_of(owner.lensnet)._history.log.closed

    def test_the_proxy_itself(self, owner):
        """The guarded module can be given instead of its owner."""
        with lensnet_guard(owner.lensnet) as guard:
            assert guard is guard_of(owner.lensnet)

    def test_same_policy_and_mode_are_fine(self, owner):
        """To repeat what holds is no change."""
        with lensnet_guard(owner, policy=CallPolicy(), mode="enforce") as guard:
            assert guard is guard_of(owner.lensnet)

    @pytest.mark.parametrize(
        "change", [{"policy": CallPolicy({"a": 1})}, {"mode": "observe"}, {"mode": "off"}]
    )
    def test_another_policy_or_mode_is_refused(self, owner, change):
        """An existing contract cannot be loosened from outside."""
        guard = guard_of(owner.lensnet)
        with pytest.raises(ValueError) as caught:
            lensnet_guard(owner, **change).__enter__()
        assert str(caught.value) == (
            f"Linear is guarded already, in mode 'enforce' with {guard.policy}; "
            "lensnet_guard cannot change that, leave policy and mode out"
        )

    def test_environment_does_not_loosen_it(self, owner, monkeypatch):
        """LENSNET_GUARD=off says nothing to a guard that exists."""
        monkeypatch.setenv("LENSNET_GUARD", "off")
        with lensnet_guard(owner) as guard:
            assert guard.mode == "enforce"


class TestFinalVerdict:
    def swallow(self, guard):
        with guard.context("training"):
            with contextlib.suppress(LensNetViolation):
                guard.module(X)

    def test_swallowed_violations(self):
        """If violations were recorded and none came out, the end of the block says so."""
        with pytest.warns(RuntimeWarning) as caught:
            with lensnet_guard(make_owner("plain")[0]) as guard:
                self.swallow(guard)
                self.swallow(guard)
        (warning,) = caught
        assert str(warning.message) == (
            "lensnet_guard: 2 violations of Linear's contract were recorded and none left this "
            f"block; the last is UnsanctionedCall at {guard.violations[-1].caller}"
        )
        assert warning.filename == __file__

    def test_observed_violations(self):
        """In observe mode it is the one thing that a user sees."""
        with pytest.warns(RuntimeWarning, match="1 violations of Linear's contract"):
            with lensnet_guard(make_owner("plain")[0], mode="observe") as guard:
                guard.module(X)

    def test_not_when_one_came_out(self):
        """A violation that is raised out of the block needs no warning."""
        with pytest.raises(UnsanctionedCall), lensnet_guard(make_owner("plain")[0]) as guard:
            with guard.context("training"):
                guard.module(X)

    def test_not_for_violations_before_the_block(self):
        """A block answers for itself only."""
        guard = guard_module(nn.Linear(3, 2))
        self.swallow(guard)
        with lensnet_guard(guard.module):
            pass
        assert guard.violation_count == 1  # which a warning, an error here, would have told

    def test_violation_in_a_forgotten_thread(self):
        """A thread that died of a violation, unseen, is not forgotten."""
        with pytest.warns(RuntimeWarning, match="the last is NoContext"):
            with lensnet_guard(make_owner("plain")[0]) as guard:

                def work():
                    with pytest.raises(NoContext):
                        guard.module(X)

                thread = threading.Thread(target=work)
                thread.start()
                thread.join()


class TestOff:
    @pytest.mark.parametrize("kind", [*KINDS, "bare"])
    def test_installs_nothing(self, kind):
        """In mode off the owner is never touched, inside the block or after."""
        owner = nn.Linear(3, 2) if kind == "bare" else make_owner(kind)[0]
        raw = owner if kind == "bare" else owner.lensnet
        before = state(owner)
        with lensnet_guard(owner, mode="off") as guard:
            assert guard.module is raw
            assert state(owner) == before
            guard.module(X)
        assert state(owner) == before

    def test_owner_that_cannot_be_set_failed(self):
        """An owner with a read-only attribute needs no setter when nothing is installed."""
        owner = type("Owner", (), {"lensnet": property(lambda self: nn.Identity())})()
        with lensnet_guard(owner, mode="off") as guard:
            assert guard.module(X) is X

    def test_replaced_attribute_was_warned_of(self):
        """Where nothing is guarded, a replaced attribute loses no guard."""
        owner, _ = make_owner("plain")
        with lensnet_guard(owner, mode="off"):
            owner.lensnet = replacement = nn.Linear(3, 2)
        assert owner.lensnet is replacement


class TestWrongArguments:
    @pytest.mark.parametrize(
        ("owner", "attribute", "message"),
        [
            (None, "lensnet", "NoneType.lensnet is missing"),
            (3, "lensnet", "int.lensnet is missing"),
            (Controller("text"), "lensnet", "Controller.lensnet is a str"),
            (Controller(nn.Linear), "lensnet", "Controller.lensnet is a type"),
            (Controller(nn.Linear(1, 1)), "critic", "Controller.critic is missing"),
            (nn.Linear(1, 1), "critic", "Linear.critic is missing"),
            (nn.Linear(1, 1), "weight", "Linear.weight is a Parameter"),
        ],
    )
    def test_neither_module_nor_owner(self, owner, attribute, message):
        """The message says what was looked for and what was found."""
        with pytest.raises(TypeError) as caught:
            lensnet_guard(owner, attribute=attribute).__enter__()
        assert str(caught.value) == (
            f"lensnet_guard needs an nn.Module, or an owner whose attribute {attribute!r} is one; "
            + message
        )

    def test_a_model_whose_lensnet_is_not_built_yet_was_guarded_itself(self):
        """A module with a lensnet of None is an owner without a module, not a bare module."""
        model = Model()
        model.lensnet = None
        with pytest.raises(TypeError, match=r"Model\.lensnet is a NoneType$"):
            lensnet_guard(model).__enter__()

    @pytest.mark.parametrize("module", [None, 3, "x", nn.Linear, torch.relu, [nn.Linear(1, 1)]])
    def test_guard_module_of_no_module(self, module):
        """Only modules have forwards to guard."""
        with pytest.raises(TypeError) as caught:
            guard_module(module)
        assert str(caught.value) == (
            f"only an nn.Module can be guarded, not {type(module).__name__}"
        )

    @pytest.mark.parametrize("mode", ["enforce", "observe", "off"])
    @pytest.mark.parametrize(
        "module", [nn.ModuleList([nn.Linear(3, 2)]), nn.ModuleDict({"a": nn.Linear(3, 2)})]
    )
    def test_a_module_without_a_forward_was_guarded_for_nothing(self, module, mode):
        """No call of it could ever be counted, and its parts were refused."""
        before = [type(part) for part in module.modules()]
        with pytest.raises(TypeError) as caught:
            guard_module(module, mode=mode)
        assert str(caught.value) == (
            f"a {type(module).__name__} has no forward, so there is no call of it to count. Guard "
            "the modules in it one by one, or name what is called of it in "
            "CallPolicy(methods=..., parts=...)"
        )
        assert [type(part) for part in module.modules()] == before

    def test_methods_of_a_module_without_a_forward_could_not_be_counted(self):
        """Each run of one is a call then, and so is one behind the guard's back."""

        class Average(nn.ModuleList):
            def update(self):
                return 7

        guard = guard_module(Average([nn.Linear(1, 1)]), policy=CallPolicy(methods=("update",)))
        assert guard_of(guard.module.__wrapped__) is guard
        with guard.context("inference"):
            assert guard.module.update() == 7
            with pytest.raises(BypassedGuard):
                guard.module.__wrapped__.update()
        assert guard.count() == 1
        with pytest.raises(BypassedGuard):
            guard.module[0](torch.ones(1, 1))
        guard.uninstall()
        assert type(guard.module.__wrapped__) is Average

    def test_a_module_with_a_call_and_no_forward_was_refused(self):
        """Its calls can be counted, and past the proxy there is nothing to arm."""

        class CallOnly(nn.Module):
            def __call__(self, x):
                return 2 * x

        guard = guard_module(CallOnly())
        with guard.context("inference"):
            assert guard.module(torch.ones(1)).item() == 2
        assert guard.count() == 1

    def test_guard_module_twice(self):
        """A guarded module is not guarded again."""
        guard = guard_module(nn.Linear(1, 1), name="critic")
        message = "critic is guarded already; use its guard: guard_of(module)"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            guard_module(guard.module)

    @pytest.mark.parametrize("policy", [{"a": 1}, "preference_scorer", CallPolicy, 0])
    def test_policy_of_another_type(self, policy):
        """A dict is not a policy."""
        with pytest.raises(TypeError) as caught:
            guard_module(nn.Linear(1, 1), policy=policy)
        assert str(caught.value) == f"policy must be a CallPolicy, not {policy!r}"

    @pytest.mark.parametrize("name", [3, b"critic", ["critic"]])
    def test_name_of_another_type(self, name):
        """A name is text."""
        with pytest.raises(TypeError) as caught:
            guard_module(nn.Linear(1, 1), name=name)
        assert str(caught.value) == f"name must be a string, not {name!r}"

    def test_default_name(self):
        """Without a name, or with an empty one, it is the class name."""
        assert guard_module(nn.Linear(1, 1)).name == "Linear"
        assert guard_module(nn.Linear(1, 1), name="").name == "Linear"

    @pytest.mark.parametrize("wrong", [{"mode": "on"}, {"policy": 3}, {"log": 3}])
    def test_nothing_is_installed_when_an_argument_is_wrong(self, wrong):
        """A block that is refused leaves the owner as it was."""
        owner, raw = make_owner("plain")
        with pytest.raises((TypeError, ValueError)), lensnet_guard(owner, **wrong):
            pytest.fail("the block was entered")
        assert owner.lensnet is raw
        assert type(owner.lensnet) is nn.Linear
