"""The proxy looks, registers, saves and copies like the module, and never lets go of the guard."""

import copy
import gc
import inspect
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

from lensnet_guard import CallPolicy, LensNetViolation, NoContext, guard_module, guard_of
from lensnet_guard.boundary.proxy import FLUENT_METHODS, GuardedModule

# How each fluent method is called where a CPU is all there is.
ARGUMENTS = {
    "apply": (lambda module: None,),
    "requires_grad_": (True,),
    "to": ("cpu",),
    "type": (torch.float32,),
}
NEEDS_A_DEVICE = {"cuda", "ipu", "mtia", "xpu"}


@pytest.fixture
def linear():
    return nn.Linear(3, 2)


@pytest.fixture
def guard(linear):
    return guard_module(linear, policy=CallPolicy({"critic": 2}), mode="enforce", name="critic")


@pytest.fixture
def proxy(guard):
    return guard.module


def is_own_guard(proxy, of):
    """Whether a copied proxy has a guard of its own, with the same contract."""
    guard = guard_of(proxy)
    return (
        issubclass(type(proxy), GuardedModule)
        and guard is not of
        and guard.module is proxy
        and (guard.policy, guard.mode) == (of.policy, of.mode)
        and (guard.count(), guard.violation_count, guard.current_context) == (0, 0, None)
    )


class TestFluentMethods:
    def test_are_all_that_torch_has(self):
        """The list is what nn.Module annotates to return Self, or T as in 2.7, and `to`."""
        returning_self = {
            name
            for name, member in vars(nn.Module).items()
            if str(getattr(member, "__annotations__", {}).get("return")).endswith(("Self", "~T"))
        }
        assert len(returning_self) > 10
        assert set(FLUENT_METHODS) == returning_self | {"to"}

    @pytest.mark.parametrize("name", FLUENT_METHODS)
    def test_are_overridden(self, name):
        """Each is the proxy's own, with a name and a docstring."""
        method = vars(GuardedModule)[name]
        assert method.__qualname__ == f"GuardedModule.{name}"
        assert f"nn.Module.{name}" in method.__doc__

    @pytest.mark.parametrize("name", sorted({*FLUENT_METHODS} - NEEDS_A_DEVICE))
    def test_return_the_proxy(self, proxy, name):
        """`lens = lens.to(device)` keeps the guard on."""
        arguments = ARGUMENTS.get(name, ())
        if name == "to_empty":
            assert proxy.to_empty(device="cpu") is proxy
        else:
            assert getattr(proxy, name)(*arguments) is proxy
        assert guard_of(proxy) is not None

    @pytest.mark.parametrize("name", sorted(NEEDS_A_DEVICE))
    def test_return_the_proxy_without_the_device(self, name):
        """Methods of devices that are not here are tried on a module without parameters."""
        proxy = guard_module(nn.Identity()).module
        assert getattr(proxy, name)() is proxy

    def test_do_their_work(self, proxy, linear):
        """The raw module is converted, moved, frozen and switched."""
        chained = proxy.to(torch.float64).eval().requires_grad_(False)
        assert chained is proxy
        assert linear.weight.dtype is torch.float64
        assert not linear.training
        assert not linear.weight.requires_grad
        assert not proxy.training
        assert proxy.train().half().training
        assert linear.weight.dtype is torch.float16

    def test_a_method_that_returns_something_else(self):
        """A subclass whose fluent method gives another object gives just that."""

        class Odd(nn.Linear):
            def eval(self):
                return "another"

        assert guard_module(Odd(1, 1)).module.eval() == "another"

    def test_apply_reaches_the_submodules(self):
        """apply visits every submodule and the module itself."""
        seen = []
        proxy = guard_module(nn.Sequential(nn.Linear(1, 1), nn.ReLU())).module
        assert proxy.apply(lambda module: seen.append(type(module).__name__)) is proxy
        assert seen == ["Linear", "ReLU", "Sequential"]

    def test_wrong_arguments_are_the_modules_error(self, proxy):
        """The proxy checks nothing by itself."""
        with pytest.raises(RuntimeError, match="nonsense"):
            proxy.to("nonsense")


class TestLooksLikeTheModule:
    def test_isinstance(self, proxy):
        """The proxy passes for the module's class and its bases."""
        assert isinstance(proxy, nn.Linear)
        assert isinstance(proxy, nn.Module)
        assert not isinstance(proxy, nn.Sequential)
        assert callable(proxy)

    def test_it_is_the_first_of_its_own_modules(self):
        """As any module is; fully_shard looks there for its root, by identity."""
        raw = nn.Sequential(nn.Linear(1, 1))
        proxy = guard_module(raw).module
        first, second = proxy.named_modules(prefix="p")
        assert (first[0], second[0]) == ("p", "p.0")
        assert first[1] is proxy
        assert second[1] is raw[0]
        assert dict(nn.Sequential(proxy).named_modules())["0"] is raw

    def test_repr(self, proxy):
        """The repr is the module's, and says that it is guarded, inside a parent too."""
        text = "guarded Linear(in_features=3, out_features=2, bias=True)"
        assert repr(proxy) == text
        assert f"(0): {text}" in repr(nn.Sequential(proxy))

    def test_attributes_pass_through(self, proxy, linear):
        """Attributes are read, set and deleted on the raw module."""
        proxy.note = "here"
        assert linear.note == "here"
        del proxy.note
        assert not hasattr(linear, "note")
        assert proxy.weight is linear.weight
        assert dir(proxy) == dir(linear)
        with pytest.raises(AttributeError, match="no_such_thing"):
            proxy.no_such_thing  # noqa: B018

    def test_hash_and_equality_are_the_modules(self, proxy, linear):
        """Code that keeps modules in sets and dicts finds it again."""
        assert hash(proxy) == hash(linear)
        assert proxy == linear
        assert {linear: 1}[proxy] == 1

    def test_hooks(self, proxy, guard, linear):
        """Hooks registered through the proxy run with the raw module, and can be removed."""
        seen = []
        handle = proxy.register_forward_hook(lambda module, *_: seen.append(module))
        with guard.context("inference"):
            proxy(torch.ones(1, 3))
            handle.remove()
            proxy(torch.ones(1, 3))
        assert len(seen) == 1
        assert seen[0] is linear


class TestRegistersLikeTheModule:
    @pytest.fixture
    def parents(self):
        """Two equal networks, one of them with its middle guarded."""
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
        guarded = copy.deepcopy(plain)
        guard = guard_module(guarded[1])
        guarded[1] = guard.module
        return plain, guarded, guard

    def test_same_names(self, parents):
        """state_dict keys, parameters, buffers and modules have the names they had."""
        plain, guarded, _ = parents
        assert list(guarded.state_dict()) == list(plain.state_dict())
        for listing in ("named_parameters", "named_modules", "named_buffers", "named_children"):
            names = [[name for name, _ in getattr(m, listing)()] for m in parents[:2]]
            assert names[0] == names[1]
        assert guarded.get_submodule("1.0") is guarded[1][0]

    def test_attribute_of_a_module(self, proxy):
        """Assigned to a module's attribute, the proxy is a registered submodule."""
        parent = nn.Module()
        parent.critic = proxy
        parent.add_module("again", proxy)
        assert list(parent._modules) == ["critic", "again"]
        assert parent.critic is proxy
        assert len(list(parent.parameters())) == 2

    def test_in_module_list_and_dict(self, proxy, linear):
        """Torch's own containers take it, and hand the proxy out again."""
        assert nn.ModuleList([proxy])[0] is proxy
        assert nn.ModuleDict({"critic": proxy})["critic"] is proxy

    def test_state_dicts_travel_both_ways(self, parents):
        """What either saved, either loads."""
        plain, guarded, _ = parents
        with torch.no_grad():
            guarded[1][0].weight.fill_(7)
        plain.load_state_dict(guarded.state_dict())
        assert (plain[1][0].weight == 7).all()
        plain[1][0].weight.data.fill_(8)
        result = guarded.load_state_dict(plain.state_dict())
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert (guarded[1][0].weight == 8).all()

    def test_state_dict_file_with_weights_only(self, parents, tmp_path):
        """A checkpoint of weights holds no trace of the guard."""
        torch.save(parents[1].state_dict(), tmp_path / "weights.pt")
        loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
        assert list(loaded) == list(parents[0].state_dict())
        parents[0].load_state_dict(loaded)

    def test_trains_like_the_plain_one(self, parents):
        """Outputs, gradients and optimizer steps are bit for bit the same."""
        plain, guarded, guard = parents
        x = torch.randn(4, 3)
        for model in (plain, guarded):
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            for _ in range(2):
                with guard.context("training"), guard.sanctioned("preference_scorer"):
                    loss = model(x).square().sum()
                    if model is plain:
                        guard.module(x)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for mine, theirs in zip(guarded.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine, theirs)

    def test_train_and_eval_of_the_parent(self, parents):
        """Switching the parent switches the guarded child."""
        _, guarded, guard = parents
        guarded.eval()
        assert not guard.module.training
        guarded.train()
        assert guard.module[0].training

    def test_parent_moves_the_child(self, parents):
        """to() of the parent converts the child, which stays guarded."""
        _, guarded, guard = parents
        assert guarded.double()[1] is guard.module
        assert guard.module[0].weight.dtype is torch.float64


class TestForward:
    def test_setting_it_was_ignored(self, proxy, guard):
        """Autocast wrappers and compiled forwards stood on the proxy and were never run."""
        proxy.forward = torch.no_grad()(proxy.forward)
        with guard.context("inference"):
            assert not proxy(torch.ones(1, 3)).requires_grad
            del proxy.forward
            assert proxy(torch.ones(1, 3)).requires_grad
        assert (guard.count(), guard.violations) == (2, ())

    def test_its_signature_is_the_modules(self, proxy, linear):
        """Trainers drop the columns of a data set that are not in it."""
        assert inspect.signature(proxy.forward) == inspect.signature(linear.forward)
        assert proxy.forward.__name__ == "forward"

    def test_is_guarded(self, proxy, guard):
        """forward called by name is a call like any other, without the hooks."""
        x = torch.ones(1, 3)
        with pytest.raises(NoContext):
            proxy.forward(x)
        seen = []
        proxy.register_forward_hook(lambda *_: seen.append(1))
        with guard.context("inference"):
            assert torch.equal(proxy.forward(x), proxy(x))
        assert guard.count() == 2
        assert seen == [1]

    def test_taken_as_a_value(self, proxy, guard):
        """A bound forward that was kept is guarded as well."""
        forward = proxy.forward
        with pytest.raises(NoContext):
            forward(torch.ones(1, 3))

    def test_by_keyword(self, proxy, guard):
        """Arguments may be given by name."""
        with guard.context("inference"):
            proxy(input=torch.ones(1, 3))
            proxy.forward(input=torch.ones(1, 3))
        assert [r.inputs for r in guard.calls] == [("input=float32[1, 3] cpu",)] * 2

    def test_call_dunder(self, proxy):
        """Spelt out, __call__ is guarded too."""
        with pytest.raises(NoContext):
            proxy.__call__(torch.ones(1, 3))


class TestCopies:
    def test_deepcopy(self, proxy, guard, linear):
        """A deep copy has weights of its own, and a guard of its own with the same contract."""
        copied = copy.deepcopy(proxy)
        assert is_own_guard(copied, guard)
        assert guard_of(copied).name == "critic (copy)"
        assert copied.weight is not linear.weight
        assert torch.equal(copied.weight, linear.weight)

    def test_copy(self, proxy, guard, linear):
        """A shallow copy shares the weights, not the guard."""
        copied = copy.copy(proxy)
        assert is_own_guard(copied, guard)
        assert copied.__wrapped__ is not linear
        assert copied.weight is linear.weight

    def test_copy_is_enforced_by_itself(self, proxy, guard):
        """What is open for the original is not open for the copy."""
        copied = copy.deepcopy(proxy)
        with guard.context("inference"):
            proxy(torch.ones(1, 3))
            with pytest.raises(NoContext, match=r"^critic \(copy\) was used"):
                copied(torch.ones(1, 3))
        assert (guard.count(), guard.violation_count) == (1, 0)
        assert guard_of(copied).violation_count == 1

    def test_copy_made_inside_the_module(self, make_scorer):
        """A module that copies itself while it runs can call the copy: that is no re-entry."""
        guard = guard_module(make_scorer())
        results = []

        def copy_and_call():
            copied = copy.deepcopy(guard.module)
            copied.inside = None
            with guard_of(copied).context("inference"):
                results.append(copied(torch.ones(1, 3)))

        guard.module.inside = copy_and_call
        with guard.context("inference"):
            guard.module(torch.ones(1, 3))
        assert len(results) == 1

    def test_deepcopy_of_an_owner(self, guard):
        """An owner's copy has its guard and its proxy together, whichever comes first."""

        class Owner:
            pass

        for first in ("guard", "lens"):
            owner = Owner()
            setattr(owner, first, guard if first == "guard" else guard.module)
            owner.guard, owner.lens, owner.alias = guard, guard.module, guard.module
            copied = copy.deepcopy(owner)
            assert copied.guard.module is copied.lens is copied.alias
            assert guard_of(copied.lens) is copied.guard
            assert is_own_guard(copied.lens, guard)

    def test_deepcopy_of_a_parent_module(self, guard):
        """EMA copies of a whole model keep its part guarded."""
        parent = nn.Sequential(nn.Linear(3, 3), guard.module)
        copied = copy.deepcopy(parent)
        assert is_own_guard(copied[1], guard)
        assert parent[1] is guard.module
        averaged = torch.optim.swa_utils.AveragedModel(parent)
        assert is_own_guard(averaged.module[1], guard)

    def test_deepcopy_of_the_guard(self, guard):
        """The guard itself can be copied, and its copy guards a copy."""
        copied = copy.deepcopy(guard)
        assert copied.module is not guard.module
        assert is_own_guard(copied.module, guard)

    def test_deepcopy_of_a_guard_that_is_off(self, linear):
        """A guard in mode off copies its raw module."""
        copied = copy.deepcopy(guard_module(linear, mode="off"))
        assert copied.mode == "off"
        assert type(copied.module) is nn.Linear
        assert copied.module is not linear

    def test_deepcopy_shares_a_raw_reference(self, guard, linear):
        """Raw and guarded references to one module stay references to one module."""
        raw, proxy = copy.deepcopy([linear, guard.module])
        assert proxy.__wrapped__ is raw

    @pytest.mark.parametrize("copied_by", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_of_a_guard_that_does_not_guard_them(self, copied_by):
        """They are raw, with all their parts, and have the weights; the original is still guarded.

        A shallow copy runs the original's parts, so it is guarded like them.
        """
        guard = guard_module(nn.Sequential(nn.Linear(3, 2)), guard_copies=False)
        copied = copied_by(guard.module)
        assert guard_of(copied) is guard_of(copied[0]) is None
        assert [type(module) for module in copied.modules()] == [nn.Sequential, nn.Linear]
        with guard.context("inference"):
            expected = guard.module(torch.ones(1, 3))
            assert torch.equal(copied(torch.ones(1, 3)), expected)
            assert guard.count() == 1
        with pytest.raises(NoContext):
            guard.module(torch.ones(1, 3))
        shallow = copy.copy(guard.module)
        assert is_own_guard(shallow, guard)
        assert guard_of(copied_by(shallow)) is None

    def test_a_refused_copy_leaves_the_original_alone(self, guard):
        """A module that cannot be copied raises its own error."""
        guard.module.lock = threading.Lock()
        with pytest.raises(TypeError, match="pickle"):
            copy.deepcopy(guard.module)
        with guard.context("inference"):
            guard.module(torch.ones(1, 3))


class TestPickles:
    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_proxy(self, proxy, guard, linear, protocol):
        """A pickled proxy comes back guarded, by the same contract and name."""
        loaded = pickle.loads(pickle.dumps(proxy, protocol))
        assert is_own_guard(loaded, guard)
        assert guard_of(loaded).name == "critic"
        assert torch.equal(loaded.weight, linear.weight)

    def test_owner(self, guard):
        """Guard and proxy of one owner come back together."""
        loaded_guard, loaded = pickle.loads(pickle.dumps((guard, guard.module)))
        assert guard_of(loaded) is loaded_guard
        assert loaded_guard.module is loaded
        assert is_own_guard(loaded, guard)

    def test_guard_that_is_off(self, linear):
        """A guard in mode off pickles too."""
        loaded = pickle.loads(pickle.dumps(guard_module(linear, mode="off")))
        assert (loaded.mode, type(loaded.module)) == ("off", nn.Linear)

    def test_mode_is_that_of_the_original(self, linear, monkeypatch):
        """The environment of the process that loads does not change the contract."""
        data = pickle.dumps(guard_module(linear, mode="enforce").module)
        monkeypatch.setenv("LENSNET_GUARD", "off")
        assert guard_of(pickle.loads(data)).mode == "enforce"

    def test_torch_save(self, guard):
        """A whole model saved with torch.save is loaded guarded."""
        file = io.BytesIO()
        torch.save(nn.Sequential(nn.ReLU(), guard.module), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert is_own_guard(loaded[1], guard)
        assert torch.equal(loaded[1].weight, guard.module.weight)

    def test_while_a_log_is_open(self, linear, tmp_path):
        """The log stays with the process; the loaded guard has none."""
        guard = guard_module(linear, log=tmp_path)
        assert guard_of(pickle.loads(pickle.dumps(guard.module)))._history.log is None


def test_another_of_its_kind_is_made_by_its_type(guard):
    """As ``type(model)(model.config)`` makes one, to average weights in; nobody guards that."""
    other = type(guard.module)(4, 1, bias=False)
    assert type(other) is nn.Linear
    assert (other.in_features, other.bias, guard_of(other)) == (4, None, None)
    with pytest.raises(TypeError, match=r"Linear.__init__\(\) missing"):
        type(guard.module)()


def test_its_type_passes_for_the_class_of_the_raw_one():
    """Its name, its attributes, what is an instance of it; the same for all guards of a class."""

    class Net(nn.Linear):
        @classmethod
        def made(cls):
            return cls(2, 1)

    one, other = (guard_module(Net(3, 2)).module for _ in range(2))
    assert type(one) is type(other)
    assert type(one).__name__ == "Net"
    assert type(type(one).made()) is Net
    assert isinstance(Net(1, 1), type(one))
    assert isinstance(other, type(one))
    assert not isinstance(nn.Linear(1, 1), type(one))
    with pytest.raises(AttributeError, match="no_such"):
        type(one).no_such  # noqa: B018


def test_a_class_that_was_guarded_is_freed():
    """One that is made in a function, and gone with it."""

    def guarded():
        class Net(nn.Linear):
            pass

        guard_module(Net(1, 1)).uninstall()
        return weakref.ref(Net)

    gone = guarded()
    gc.collect()
    assert gone() is None


class TestGuardOf:
    def test_guarded(self, guard):
        """The proxy knows its guard."""
        assert guard_of(guard.module) is guard

    @pytest.mark.parametrize("thing", [None, 3, "x", nn.Linear(1, 1), nn.Linear, GuardedModule])
    def test_anything_else(self, thing):
        """For what is not guarded there is no guard, and no error."""
        assert guard_of(thing) is None

    def test_object_that_lies_about_its_class(self):
        """A class attribute that pretends does not fool guard_of."""

        class Liar:
            __class__ = GuardedModule

        assert guard_of(Liar()) is None


class TestLifetime:
    def test_proxy_alone_keeps_the_guard(self, linear):
        """A proxy whose guard nobody holds is enforced on."""
        proxy = guard_module(linear).module
        gc.collect()
        with pytest.raises(LensNetViolation):
            proxy(torch.ones(1, 3))

    def test_weakref(self, proxy):
        """The proxy can be referenced weakly."""
        assert weakref.ref(proxy)() is proxy


class TestWithoutTheCompiledWrapt:
    def test_pure_python_proxy(self, run_python):
        """Where wrapt has no compiled extension, the proxy guards, copies and pickles the same."""
        result = run_python(
            """
            import copy, pickle, torch, wrapt
            from torch import nn
            from lensnet_guard import NoContext, guard_module, guard_of

            assert wrapt.ObjectProxy.__mro__[1].__module__ == "wrapt.wrappers", "is it compiled?"
            guard = guard_module(nn.Linear(3, 2))
            copies = [pickle.loads(pickle.dumps(guard.module, n)) for n in range(6)]
            copies += [copy.copy(guard.module), copy.deepcopy(guard.module), guard.module.eval()]
            for proxy in copies:
                try:
                    proxy(torch.ones(1, 3))
                except NoContext:
                    with guard_of(proxy).context("inference"):
                        proxy(torch.ones(1, 3))
                        proxy.forward(torch.ones(1, 3))
            print(sum(guard_of(proxy).count() for proxy in copies))
            """,
            WRAPT_DISABLE_EXTENSIONS="1",
        )
        assert result.stdout == "18\n", result.stderr
