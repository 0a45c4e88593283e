"""The condition that nobody has changed a module between two of its calls."""

import contextlib
import copy
import gc
import pickle
import re
import weakref

import pytest
import torch
from tests.lensnet_guard.calls.asked import call, guarded
from tests.lensnet_guard.helpers import X
from torch import nn
from torch.distributed.fsdp import fully_shard

from lensnet_guard import ConditionUnmet, frozen, guard_module
from lensnet_guard.calls.scope import name_of

FINGERPRINT = frozen(fingerprint=True)


class Net(nn.Module):
    """Parameters, one without a bias, buffers, one of them a counter, and a part without any."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU())
        self.head = nn.Linear(3, 2, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.eval()

    def forward(self, x):
        return self.head(self.body(x)) * self.scale


@pytest.fixture
def net():
    return Net()


@pytest.fixture(params=[frozen, FINGERPRINT], ids=["frozen", "fingerprint"])
def guard(request, net):
    """It has been called twice, without a finding."""
    guard = guarded(net, request.param)
    call(guard, X)
    call(guard, X)
    return guard


def finding(guard):
    """What a call is refused for, without the condition's name and the call before."""
    with pytest.raises(ConditionUnmet) as refused:
        call(guard, X)
    headline = str(refused.value).partition("\n")[0]
    return re.fullmatch(
        r"(?:FSDP)?Net was called in .*?: frozen(?:\(fingerprint=True\))?: (.*) "
        r"\(the call before this one is call \d+ at \S+\.py:\d+ in \S+\)\.",
        headline,
    ).group(1)


def in_place(tensor):
    with torch.no_grad():
        tensor.mul_(2)


def replace(module, name):
    setattr(module, name, nn.Parameter(getattr(module, name).detach().clone()))


CHANGES = {
    "in place": (
        lambda net: in_place(net.head.weight),
        "the parameter head.weight was written in place 1 time",
    ),
    "in place, of the module itself": (
        lambda net: in_place(net.scale),
        "the parameter scale was written in place 1 time",
    ),
    "in place, often": (
        lambda net: [in_place(net.body[0].bias) for _ in range(3)],
        "the parameter body.0.bias was written in place 3 times",
    ),
    "a buffer in place": (
        lambda net: net.body[1].num_batches_tracked.add_(1),
        "the buffer body.1.num_batches_tracked was written in place 1 time",
    ),
    "several": (
        lambda net: list(map(in_place, net.parameters())),
        "the parameter scale was written in place 1 time, and 5 others changed",
    ),
    "two": (
        lambda net: (in_place(net.scale), in_place(net.head.weight)),
        "the parameter scale was written in place 1 time, and 1 other changed",
    ),
    "loaded": (
        lambda net: net.head.load_state_dict(net.head.state_dict()),
        "the parameter head.weight was written in place 1 time",
    ),
    "a parameter replaced": (
        lambda net: replace(net.head, "weight"),
        "the parameter head.weight was replaced",
    ),
    "an equal scalar": (
        lambda net: replace(net, "scale"),
        "the parameter scale was replaced",
    ),
    "a buffer replaced": (
        lambda net: setattr(net.body[1], "running_mean", torch.zeros(3)),
        "the buffer body.1.running_mean was replaced",
    ),
    "behind setattr": (
        lambda net: net.head._parameters.update(weight=nn.Parameter(torch.ones(2, 3))),
        "the parameter head.weight was replaced",
    ),
    "a parameter added": (
        lambda net: setattr(net.body[2], "slope", nn.Parameter(torch.ones(1))),
        "the parameter body.2.slope was added",
    ),
    "a bias where there was None": (
        lambda net: setattr(net.head, "bias", nn.Parameter(torch.ones(2))),
        "the parameter head.bias was added",
    ),
    "a parameter gone": (
        lambda net: delattr(net.body[0], "bias"),
        "the parameter body.0.bias is gone",
    ),
    "the last parameter gone": (
        lambda net: setattr(net.head, "weight", None),
        "the parameter head.weight is gone",
    ),
    "all of the last part gone": (
        lambda net: net.head._parameters.clear(),
        "the parameter head.weight is gone",
    ),
    "a submodule replaced": (
        lambda net: setattr(net, "head", copy.deepcopy(net.head)),
        "the submodule head was replaced, and 1 other changed",
    ),
    "a submodule added": (
        lambda net: net.body.append(nn.Dropout()),
        "the submodule body.3 was added",
    ),
    "a submodule added to one without": (
        lambda net: net.body[2].add_module("inner", nn.ReLU()),
        "the submodule body.2.inner was added",
    ),
    "a submodule gone": (
        lambda net: net.body.__delitem__(2),
        "the submodule body.2 is gone",
    ),
    "one added, one gone": (
        lambda net: (delattr(net.body[0], "bias"), net.head.register_buffer("b", torch.ones(3))),
        "the buffer head.b was added, and 1 other changed",
    ),
}


class TestFrozen:
    def test_the_whole_message(self, scorer, x):
        """What changed, how, since when, what was called before, who calls now."""
        guard = guarded(scorer, frozen)
        call(guard, x)
        in_place(scorer.linear.weight)
        with pytest.raises(ConditionUnmet) as refused:
            call(guard, x)
        caller = refused.value.record.caller
        rows = refused.value.record.stack()[1:3]
        assert str(refused.value) == (
            "Scorer was called in a state that its contract does not allow: frozen: the parameter "
            "linear.weight was written in place 1 time since the last call that was checked (the "
            f"call before this one is call 1 at {caller}).\n"
            f"  called from  {caller}\n"
            f"               {rows[0]}\n"
            f"               {rows[1]}\n"
            "  context      training, step 0, micro-step 0 (thread MainThread)\n"
            "  scope        kl\n"
            "  budget       kl: 0 of 1 spent\n"
            "  what to do   Bring about that state where the call is made; or, if calls are right "
            "without it, leave the condition out of CallPolicy.\n"
            "  explained by lensnet-guard explain moved-weights"
        )
        assert scorer.runs == 1

    @pytest.mark.parametrize("change", CHANGES)
    def test_tells_each_change_once(self, guard, net, change):
        """By its path, and what happened; the call after that is compared with what is now."""
        make, expected = CHANGES[change]
        make(net)
        assert finding(guard) == f"{expected} since the last call that was checked"
        with contextlib.suppress(AttributeError, TypeError):  # of a forward without its weight
            call(guard, X)
        assert guard.violation_count == 1

    def test_a_training_in_between(self, guard, net):
        """The mistake itself: the reference's parameters are in the policy's optimizer."""
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with guard.context("inference"):
            guard.module(X).sum().backward()
        optimizer.step()
        assert finding(guard).startswith("the parameter scale was written in place")

    def test_batch_norm_in_train_mode(self, guard, net):
        """It writes to its buffers as it runs; torch counts the last of these writes alone."""
        net.train()
        call(guard, X)
        counted = "the buffer body.1.num_batches_tracked was written in place 1 time"
        read = "the buffer body.1.running_mean was written through .data or the like, and 2 others"
        assert finding(guard).startswith(counted if guard.policy.requires == (frozen,) else read)

    def test_a_good_call_walks_through_nothing(self, guard, monkeypatch):
        """What was seen once is looked at in a few steps, a bias of None and a counter included."""
        monkeypatch.setattr(nn.Module, "named_modules", None)
        monkeypatch.setattr(nn.Module, "named_parameters", None)
        call(guard, X)
        assert guard.count() == 3

    def test_what_is_no_change(self, guard, net):
        """Modes, gradients, hooks, reads, and a parameter that is taken out and put back."""
        net.train()
        net.body[1].eval()
        net.requires_grad_(False)
        net.register_forward_hook(lambda *_: None)
        net.state_dict()
        weight = net.head.weight
        net.head.weight = nn.Parameter(torch.zeros(2, 3))
        net.head.weight = weight
        call(guard, X)
        assert guard.violations == ()

    def test_observed(self, net):
        """It is recorded once, and the call runs."""
        guard = guarded(net, frozen, mode="observe")
        call(guard, X)
        in_place(net.scale)
        assert call(guard, X) is not None
        call(guard, X)
        assert [v.reason for v in guard.violations if v.kind == "call"] == ["ConditionUnmet"]

    def test_calls_that_are_not_checked(self, guard, net):
        """A change is told whenever it was made since the last check, and not as if since then."""
        in_place(net.scale)
        with guard.context("inference"):
            guard.module(X)
        with pytest.raises(ConditionUnmet) as refused:
            call(guard, X)
        assert "since the last call that was checked (the call before this one is call 3" in str(
            refused.value
        )

    def test_after_a_first_call_that_was_refused(self, net):
        """Then there is none before."""

        def picky(call):
            return "no" if refuse else None

        refuse, guard = True, guarded(net, frozen, picky)
        with pytest.raises(ConditionUnmet, match="picky"):
            call(guard, X)
        in_place(net.scale)
        refuse = False
        with pytest.raises(ConditionUnmet, match=r"\(the call before this one is none\)"):
            call(guard, X)

    def test_each_guard_has_its_own_memory(self, net):
        """A copy, an unpickled one and a second guard begin with what is then."""
        guard = guarded(net, frozen)
        call(guard, X)
        copied = copy.deepcopy(guard)
        loaded = pickle.loads(pickle.dumps(guard))
        in_place(net.scale)
        call(copied, X)
        call(loaded, X)
        guard.uninstall()
        second = guarded(net, frozen)
        call(second, X)
        assert second.violations == ()

    def test_a_part_in_two_places(self, net):
        """Is looked at in both."""
        net.again = net.head
        guard = guarded(net, frozen)
        call(guard, X)
        net.again = nn.Linear(3, 2, bias=False)
        assert finding(guard).startswith("the submodule again was replaced, and 1 other changed")

    @pytest.mark.filterwarnings("ignore:`torch.jit")
    @pytest.mark.parametrize("script", [torch.jit.script, lambda m: torch.jit.trace(m, X)])
    def test_a_scripted_part(self, net, script):
        """TorchScript's keep their things elsewhere, and are looked at all the same."""
        net.body[0] = script(net.body[0])
        guard = guarded(net, frozen)
        call(guard, X)
        call(guard, X)
        in_place(net.body[0].weight)
        assert finding(guard) == (
            "the parameter body.0.weight was written in place 1 time since the last call that was "
            "checked"
        )

    def test_made_in_inference_mode(self, net):
        """Such a tensor has no counter: it is named, at every call, and what to do."""
        with torch.inference_mode():
            net.head.weight = nn.Parameter(torch.ones(2, 3), requires_grad=False)
        guard = guarded(net, frozen)
        for _ in range(2):
            with pytest.raises(ConditionUnmet) as refused:
                call(guard, X)
            assert (
                str(refused.value)
                .partition("\n")[0]
                .endswith(
                    ": frozen: the parameter head.weight was made in inference mode, so torch "
                    "counts no writes to it; make it outside, or ask for frozen(fingerprint=True)."
                )
            )

    def test_other_tensors_without_a_counter(self, net):
        """Also named: one of a class that lets nobody ask."""

        class Shy(torch.Tensor):
            @classmethod
            def __torch_function__(cls, *_, **__):
                raise TypeError("do not ask")

        net.shy = nn.ReLU()
        net.shy._buffers["kept"] = torch.ones(1).as_subclass(Shy)
        guard = guarded(net, frozen)
        with pytest.raises(ConditionUnmet) as refused:
            call(guard, X)
        assert ": frozen: the buffer shy.kept has no counter of writes (TypeError)." in str(
            refused.value
        )

    def test_meta_tensors(self):
        """Have a counter, and no values."""
        net = Net().to("meta")
        guard = guarded(net, frozen)
        meta = torch.ones(2, 3, device="meta")
        call(guard, meta)
        call(guard, meta)
        guard = guarded(Net().to("meta"), FINGERPRINT)
        with pytest.raises(ConditionUnmet, match="the parameter scale cannot be read "):
            call(guard, meta)

    def test_keeps_no_tensor_alive(self, net):
        """What was replaced is freed at once."""
        guard = guarded(net, frozen, FINGERPRINT)
        call(guard, X)
        call(guard, X)
        old = weakref.ref(net.head.weight)
        net.head.weight = nn.Parameter(torch.ones(2, 3))
        assert old() is None

    def test_goes_with_its_module(self):
        """Though its parts lead back to it, as armed ones do."""
        net = Net()
        guard = guarded(net, frozen, FINGERPRINT)
        call(guard, X)
        call(guard, X)
        gone = list(map(weakref.ref, [net, net.head, *net.parameters(), *net.buffers()]))
        del guard, net
        gc.collect()
        assert [ref() for ref in gone] == [None] * len(gone)

    def test_are_values(self):
        """The bare one is a function; the other is equal to its like, and pickles."""
        assert pickle.loads(pickle.dumps(frozen)) is frozen is frozen(fingerprint=False)
        assert pickle.loads(pickle.dumps(FINGERPRINT)) == FINGERPRINT == frozen(fingerprint=True)
        assert [name_of(frozen), name_of(FINGERPRINT)] == ["frozen", "frozen(fingerprint=True)"]


BITS = {
    "float32": lambda: torch.randn(5),
    "bfloat16": lambda: torch.randn(5).bfloat16(),
    "float16": lambda: torch.randn(5).half(),
    "float64": lambda: torch.randn(5).double(),
    "float8": lambda: torch.randn(5).to(torch.float8_e4m3fn),
    "int64": lambda: torch.arange(5),
    "int8": lambda: torch.arange(5).to(torch.int8),
    "bool": lambda: torch.tensor([True, False, True]),
    "complex64": lambda: torch.randn(5, dtype=torch.complex64),
    "complex128": lambda: torch.randn(5, dtype=torch.complex128),
    "conjugate": lambda: torch.randn(5, dtype=torch.complex64).conj(),
    "0-dim": lambda: torch.tensor(3.0),
    "transposed": lambda: torch.randn(3, 4).T,
    "sliced": lambda: torch.randn(9).bfloat16()[1::2],
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
    "nested": lambda: torch.nested.nested_tensor(
        [torch.ones(2), torch.ones(3)], layout=torch.jagged
    ),
}


def flip_first(tensor):
    """Change one bit of a tensor, past its counter."""
    data = tensor.values() if tensor.is_nested else tensor.data
    data = data.data.resolve_conj() if not data.is_conj() else data.data.conj()
    data = data.as_strided((1,), (1,), data.storage_offset())
    bits = data.view(torch.uint8)
    bits[0] ^= 1


class TestFingerprint:
    @pytest.mark.parametrize("kind", BITS)
    def test_tells_a_bit_of_each_kind(self, net, kind):
        """That was changed without the counter's knowledge; `frozen` alone does not see it."""
        net.register_buffer("kept", BITS[kind]())
        guard, counters = guarded(net, FINGERPRINT), guarded(Net(), frozen)
        for _ in range(2):
            call(guard, X)
        before = net.kept._version
        flip_first(net.kept)
        assert net.kept._version == before
        assert finding(guard) == (
            "the buffer kept was written through .data or the like since the last call that was "
            "checked"
        )
        call(guard, X)
        call(counters, X)

    def test_what_counters_do_not_see(self, net):
        """Writes through .data, as of an optimizer over a flat buffer, and `.to`."""
        guard = guarded(net, frozen)
        call(guard, X)
        net.head.weight.data.mul_(2)
        net.head.weight.data = torch.ones(2, 3)
        net.head.to(torch.float64).to(torch.float32)
        call(guard, X)
        assert guard.violations == ()

    @pytest.mark.parametrize(
        "write",
        [
            lambda weight: weight.data.neg_(),
            lambda weight: weight.data.copy_(weight.data.flip(0)),
            lambda weight: weight.data.copy_(weight.data.roll(1, 1)),
            lambda weight: setattr(weight, "data", weight.data.clone().add_(1)),
        ],
        ids=["signs", "rows", "columns", "another"],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    def test_tells_order_and_signs(self, net, write, dtype):
        """Which a sum of values, or of whole words, would not."""
        net.body[0].to(dtype)
        net.body.forward = lambda x: x
        guard = guarded(net, FINGERPRINT)
        call(guard, X)
        write(net.body[0].weight)
        assert "body.0.weight was written through .data" in finding(guard)

    def test_empty_tensors(self, net):
        """Have no bits that could change."""
        net.register_buffer("none", torch.empty(0, 3))
        guard = guarded(net, FINGERPRINT)
        call(guard, X)
        call(guard, X)
        assert guard.violations == ()

    def test_made_in_inference_mode(self, net):
        """Bits need no counter."""
        with torch.inference_mode():
            net.head.weight = nn.Parameter(torch.ones(2, 3), requires_grad=False)
        guard = guarded(net, FINGERPRINT)
        with torch.no_grad():
            call(guard, X)
            call(guard, X)
        assert guard.violations == ()
        with torch.inference_mode():
            net.head.weight.mul_(2)
        assert "head.weight was written through .data or the like" in finding(guard)

    def test_what_cannot_be_read(self, net):
        """Is named, with torch's reason."""
        net.register_buffer("sparse", torch.eye(3).to_sparse())
        guard = guarded(net, FINGERPRINT)
        with pytest.raises(ConditionUnmet) as refused:
            call(guard, X)
        assert (
            str(refused.value)
            .partition("\n")[0]
            .endswith(
                ": frozen(fingerprint=True): the buffer sparse cannot be read (RuntimeError: "
                "reshape is not implemented for sparse tensors)."
            )
        )

    @pytest.mark.filterwarnings("ignore:.*quantiz")
    def test_quantised_tensors(self, net):
        """By their integers."""
        net.register_buffer("q", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8))
        guard = guarded(net, FINGERPRINT)
        call(guard, X)
        call(guard, X)
        net.q.data.copy_(torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8))
        assert "the buffer q was written" in finding(guard)

    def test_moves_no_random_numbers(self, net):
        """A program computes the same whether it is asked or not."""
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        call(guarded(net, FINGERPRINT), X)
        assert torch.equal(torch.rand(3), expected)


@pytest.mark.usefixtures("group")
class TestSharded:
    """One process that is a group of its own."""

    @pytest.fixture
    def group(self, tmp_path):
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
        )
        yield
        torch.distributed.destroy_process_group()

    @pytest.fixture(params=[frozen, FINGERPRINT], ids=["frozen", "fingerprint"])
    def guard(self, request, net):
        """Of a model whose parameters are all in parts that are sharded again after each call."""
        del net.scale
        net.register_buffer("scale", torch.ones(1))
        for part in (net.body, net.head, net):
            fully_shard(part)
        guard = guard_module(net, policy=guarded(Net(), request.param).policy)
        with torch.no_grad():
            call(guard, X)
            call(guard, X)
        assert guard.violations == ()
        return guard

    def test_counters_of_dtensors(self, guard, net):
        """Move with writes in place, as others do."""
        in_place(net.head.weight)
        assert "head.weight was written in place 1 time" in finding(guard)

    def test_bits_of_dtensors(self, guard, net):
        """Are those of the local shard: other ranks are not waited for."""
        net.head.weight.to_local().data.mul_(2)
        if guard.policy.requires == (frozen,):
            with torch.no_grad():
                call(guard, X)
        else:
            assert "head.weight was written through .data" in finding(guard)

    def test_what_stays_whole(self, net):
        """By default the outermost parameters stay as they were gathered: they were replaced."""
        fully_shard(net)
        guard = guard_module(net, policy=guarded(Net(), frozen).policy)
        with torch.no_grad():
            call(guard, X)
            assert "the parameter scale was replaced" in finding(guard)
            call(guard, X)
