"""Methods of which each run is one call, and the average of weights that is updated by one."""

import copy
import pickle
from unittest.mock import patch

import pytest
import torch
from tests.lensnet_guard.boundary.lens import guard_free
from tests.lensnet_guard.boundary.methods import Net
from tests.lensnet_guard.helpers import FILE, X, read
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from lensnet_guard import (
    BudgetExceeded,
    BudgetUnmet,
    BypassedGuard,
    CallPolicy,
    NoContext,
    ReentrantCall,
    Scope,
    UnsanctionedCall,
    guard_module,
    guard_of,
)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def whole(net):
    """A guard that counts each run of `generate` as one call."""
    return guard_module(net, policy=CallPolicy({"s": 1}, methods=("generate", "fails")))


class TestMethodsThatAreCalls:
    def test_one_call_with_all_that_runs_in_it(self, whole, net, tmp_path):
        """Decided, recorded, logged and budgeted like a forward."""
        expected = guard_free(net).generate(X)
        whole.start_log(tmp_path)
        with whole.context("training"), whole.sanctioned("s"):
            assert torch.equal(whole.module.generate(X), expected)
        whole.end_log()
        (record,) = whole.calls
        assert (record.method, record.scope, record.outcome) == ("generate", "s", "returned")
        assert record.inputs == ("float32[2, 3] cpu",)
        assert record.caller.function.endswith("that_runs_in_it")
        assert record.caller.file == __file__
        begin = next(line for line in read(tmp_path / FILE) if line["event"] == "call.begin")
        assert begin["method"] == "generate"

    def test_refused(self, whole):
        """By its name, before it runs."""
        with pytest.raises(UnsanctionedCall) as caught, whole.context("training"):
            whole.module.generate(X)
        assert str(caught.value).startswith("Net.generate was called in training outside its")
        with pytest.raises(NoContext):
            whole.module.generate(X)
        with pytest.raises(BudgetExceeded), whole.context("training"), whole.sanctioned("s"):
            whole.module.generate(X)
            whole.module.generate(X)
        assert whole.count() == 1

    def test_the_module_s_own_call_is_one_too(self, whole):
        """Both are booked in one budget, unless scopes tell them apart."""
        with pytest.raises(BudgetExceeded), whole.context("training"), whole.sanctioned("s"):
            whole.module(X)
            whole.module.generate(X)

    def test_of_the_raw_module(self, whole, net):
        """A bypass, by whatever name it was kept; also where the method runs no part."""
        for run in (net.generate, whole.module.me().generate):
            with pytest.raises(BypassedGuard) as caught, whole.context("inference"):
                run(X, steps=0)
            assert str(caught.value).startswith("Net.generate was run behind its guard's back.")
            assert caught.value.record.method == "generate"

    def test_another_module_of_the_class_is_free(self, whole, net):
        """The tripwire is on the one module, and on no other instance."""
        Net().generate(X)
        assert type(net).generate is Net.generate
        net.other = Net()
        net.other.generate(X)

    def test_a_part_of_the_same_class(self, net):
        """It is checked as a part, and not by the module's methods."""
        net.part = Net()
        whole = guard_module(net, policy=CallPolicy({"s": 1}, methods=("generate",)))
        with pytest.raises(BypassedGuard, match="part was run alone") as caught:
            net.part.generate(X)
        assert caught.value.record.method is None
        assert whole.violation_count == 1

    def test_re_entered(self, whole, net):
        """From inside a running call, through the proxy; not by self."""
        net.linear.register_forward_hook(lambda *_: whole.module.generate(X) and None)
        with pytest.raises(ReentrantCall), whole.context("inference"):
            whole.module(X)

    def test_a_method_that_raises(self, whole, net):
        """Has been made, and leaves no door open."""
        with whole.context("inference"):
            with pytest.raises(ZeroDivisionError):
                whole.module.fails(X)
            with pytest.raises(BypassedGuard):
                net(X)
        assert whole.calls[0].outcome == "raised ZeroDivisionError"

    @pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_guarded_copies(self, whole, make):
        """Each counts its own."""
        copied = make(whole.module)
        with guard_of(copied).context("inference"):
            copied.generate(X)
        with pytest.raises(BypassedGuard):
            copied.__wrapped__.generate(X)
        assert (guard_of(copied).count(), whole.count(), whole.violations) == (1, 0, ())

    def test_copies_of_the_raw_module(self, whole, net):
        """A bypass, as its forward is; free when the guard is gone."""
        copied = copy.deepcopy(net)
        with pytest.raises(BypassedGuard, match=r"Net\.generate .* Net, a copy or a former part"):
            copied.generate(X)
        whole.uninstall()
        copied.generate(X)

    def test_uninstalled(self, whole, net):
        """The class is the one that was there."""
        kept = net.generate
        whole.uninstall()
        assert type(net) is Net
        kept(X)
        with pytest.raises(NoContext):  # the proxy goes on checking its own calls
            whole.module.generate(X)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_recomputed(self, whole, reentrant):
        """A checkpoint around it repeats the call, with its name."""
        x = X.clone().requires_grad_()
        with whole.context("training"), whole.sanctioned("s"):
            out = checkpoint(whole.module.generate, x, use_reentrant=reentrant)
        out.sum().backward()
        assert [(c.kind, c.method) for c in whole.calls] == [
            ("call", "generate"),
            ("recompute", "generate"),
        ]

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("what", ["the module", "its forward", "the method", "a part"])
    def test_checkpoints_inside(self, net, what, reentrant):
        """What they repeat is a part of the call that has long returned."""

        class Checkpointed(Net):
            def generate(self, x):
                run = {
                    "the module": self,
                    "its forward": self.forward,
                    "the method": super().generate,
                    "a part": self.linear,
                }[what]
                return checkpoint(run, x, use_reentrant=reentrant)

        guard = guard_module(Checkpointed(), policy=CallPolicy({"s": 1}, methods=("generate",)))
        x = X.clone().requires_grad_()
        with guard.context("training"), guard.sanctioned("s"):
            out = guard.module.generate(x)
        out.sum().backward()
        assert guard.violations == ()
        assert (guard.count(), guard.calls[0].method) == (1, "generate")
        assert x.grad is not None

    def test_replaced_on_the_instance(self, whole, net):
        """What somebody puts there is counted in its place, and what was there is given back."""
        original = net.generate
        net.generate = newer = (lambda self, x: self(x)).__get__(net)
        with whole.context("inference"):
            whole.module.generate(X)
        with pytest.raises(BypassedGuard, match=r"Net\.generate was run"):
            net.generate(X)
        assert [call.method for call in whole.calls] == ["generate", "generate"]
        net.generate = original
        assert "generate" not in net.__dict__
        whole.module.generate = lambda x: newer(x)
        with whole.context("inference"):
            whole.module.generate(X)
        whole.uninstall()
        assert net.__dict__["generate"](X).shape == X.shape

    def test_mocked_on_the_class(self, net):
        """A mock that a test has put in a method's place is the method, and its runs count."""
        with patch.object(Net, "generate", return_value=X) as mock:
            guard = guard_module(net, policy=CallPolicy({"s": 1}, methods=("generate",)))
            with guard.context("training"), guard.micro_step(0), guard.sanctioned("s"):
                assert guard.module.generate(X) is X
            assert (guard.count("training", "s"), mock.call_count) == (1, 1)
            guard.uninstall()
        assert net.generate(X).shape == X.shape

    @pytest.mark.filterwarnings("ignore::UserWarning:torch")
    def test_compiled(self, whole, net):
        """A module that is compiled runs compiled in a method that is one call."""
        torch._dynamo.reset()
        count = CompileCounter()
        net.compile(backend=count)
        for _ in range(3):
            with whole.context("inference"):
                whole.module.generate(X)
        assert (whole.count(), count.frame_count) == (3, 1)
        torch._dynamo.reset()


class TestNames:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("generat", "methods: Net has no method 'generat'"),
            ("linear", "methods: Net has no method 'linear'"),
            ("size", "methods: Net has no method 'size'"),
            ("scale", "methods: Net has no method 'scale'"),
            ("make", "methods: Net has no method 'make'"),
            ("forward", "methods: 'forward' of Net is counted anyway; leave it out"),
            ("__call__", "methods: '__call__' of Net is counted anyway; leave it out"),
            (
                "state_dict",
                "methods: 'state_dict' is a method of every module, and no way to call Net; name "
                "one of its own",
            ),
            (
                "stream",
                "methods: Net.stream returns before its body has run, which no call could hold; "
                "name the method that runs it to its end",
            ),
            (
                "agenerate",
                "methods: Net.agenerate returns before its body has run, which no call could "
                "hold; name the method that runs it to its end",
            ),
        ],
    )
    def test_what_cannot_be_counted(self, net, name, message):
        """Is told as the guard is made, and the module is as it was."""
        with pytest.raises(ValueError) as caught:
            guard_module(net, policy=CallPolicy({"s": 1}, methods=("generate", name)))
        assert str(caught.value) == message
        assert type(net) is Net


class TestAverages:
    """An average of weights is updated once per optimizer step, after it."""

    @pytest.fixture
    def model(self):
        return nn.Linear(3, 1)

    @pytest.fixture
    def ema(self, model):
        policy = CallPolicy({"ema": Scope(1, per="step")}, methods=("update_parameters",))
        return guard_module(AveragedModel(model), policy=policy, name="EMA")

    def step(self, guard, model, updates, every_micro_step=False):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with guard.context("training"), guard.window("step"):
            for micro_step in range(2):
                with guard.micro_step(0, micro_step):
                    model(X).sum().backward()
                    if every_micro_step:
                        with guard.sanctioned("ema"):
                            guard.module.update_parameters(model)
            optimizer.step()
            for _ in range(updates):
                with guard.sanctioned("ema"):
                    guard.module.update_parameters(model)

    def test_once(self, ema, model):
        """Right, and the average has moved."""
        before = ema.module.module.weight.clone()
        self.step(ema, model, 1)
        self.step(ema, model, 1)
        assert ema.count("training", "ema") == 2
        assert not torch.equal(ema.module.module.weight, before)

    def test_never(self, ema, model):
        """Told at the end of the step."""
        with pytest.raises(BudgetUnmet, match=r'in "step"|ema made 0 of 1 calls') as caught:
            self.step(ema, model, 0)
        assert "ema made 0 of 1 calls" in str(caught.value)

    def test_twice(self, ema, model):
        """Refused, and the average did not move again."""
        with pytest.raises(BudgetExceeded, match=r"^EMA\.update_parameters was called"):
            self.step(ema, model, 2)
        assert ema.module.n_averaged == 1

    def test_in_every_micro_step(self, ema, model):
        """Refused at the second."""
        with pytest.raises(BudgetExceeded):
            self.step(ema, model, 0, every_micro_step=True)
        assert ema.module.n_averaged == 1
