"""A torch that lacks what the guard reads, or that no test has seen: correct training goes on.

Every name is taken away in turn; training of every kind must still pass, every bypass must still be
refused, and what cannot be told any more is said once.
"""

import gc
import warnings

import pytest
import torch
from tests.lensnet_guard.boundary.lens import Lens
from tests.lensnet_guard.boundary.test_tripwire import BYPASSES
from tests.lensnet_guard.helpers import SCOPE, X
from torch import nn
from torch.distributed import HashStore
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lensnet_guard import (
    BypassedGuard,
    CallPolicy,
    NoContext,
    UnsanctionedCall,
    UntestedTorch,
    _torch_checkpoints,
    _torch_internals,
    guard_module,
    lensnet_guard,
    untested,
)
from lensnet_guard.postmortem import read_verdict

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")


def _no_objects(patch):
    """Torch keeps what it knows of a checkpoint elsewhere."""
    names = ((torch, "_CheckpointFrame", "which call a checkpoint runs again"),)
    patch.setattr(_torch_checkpoints, "_NAMES", names)
    patch.setattr(_torch_checkpoints, "_is_checkpoint", lambda _: False)


def _no_graph_task(patch):
    """Torch gives its backward passes no number."""
    names = ((torch, "_current_graph_task_id", "one backward pass from the next"),)
    patch.setattr(_torch_checkpoints, "_NAMES", names)
    patch.setattr(_torch_checkpoints, "_graph_task", None)


def _no_hooks(patch):
    """Torch does not show the hooks on top; nor does 2.7, and nothing is lost."""
    patch.setattr(_torch_checkpoints, "_hooks_on_top", None)


def _newer(patch):
    """No test has seen this torch."""
    patch.setattr(torch, "__version__", "2.99.0+cpu")


def _newer_and_rewritten(patch):
    """As 2.14 was: the objects are others, and nothing by name is missing."""
    _newer(patch)
    patch.setattr(_torch_checkpoints, "_is_checkpoint", lambda _: False)


def _not_compiled_in_place(patch):
    """A module does not say that it is compiled."""
    patch.setattr(_torch_internals, "_COMPILED_IN_PLACE", "_gone")


def _no_profiler_flag(patch):
    """The profiler does not say that it runs."""
    patch.setattr(_torch_internals, "_PROFILING", "_gone")


LOSSES = {
    _no_objects: "which call a checkpoint runs again",
    _no_graph_task: "one backward pass from the next",
    _no_hooks: None,
    _newer: "a call that torch's checkpoints add in backward",
    _newer_and_rewritten: "a call that torch's checkpoints add in backward",
    _not_compiled_in_place: "whether a module is compiled",
    _no_profiler_flag: "whether a profiler runs",
}


@pytest.fixture(params=LOSSES, ids=lambda take: take.__name__.strip("_"))
def loss(request, monkeypatch):
    """A torch without something; what the guard must say of it, if anything."""
    request.param(monkeypatch)
    return LOSSES[request.param]


@pytest.fixture
def told(loss):
    """All that is warned of meanwhile is the loss, once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UntestedTorch)
        yield loss
    said = [str(w.message) for w in caught if w.category is UntestedTorch]
    assert len(said) == (loss is not None)
    assert all(loss in message for message in said)


def train(guard, run, steps=3):
    """Some steps whose backward comes after the scope has closed."""
    for step in range(steps):
        with guard.context("training"), guard.micro_step(step), guard.sanctioned(SCOPE):
            out = run(X.clone().requires_grad_())
        out.sum().backward()
    assert guard.violations == ()
    assert guard.count("training", SCOPE) == steps
    return [(call.kind, call.recompute_of) for call in guard.calls]


class TestCorrectTraining:
    @pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
    def test_under_checkpoints(self, told, scorer, reentrant):
        """A recompute of the module is one, whether or not its call can be told."""
        guard = guard_module(scorer)
        calls = train(guard, lambda x: checkpoint(guard.module, x, use_reentrant=reentrant))
        assert [kind for kind, _ in calls] == ["call", "recompute"] * 3
        shown = told is None or "which call" not in told
        assert all(of is None for kind, of in calls if kind == "call")
        if shown and torch.__version__ != "2.99.0+cpu":
            assert [of for kind, of in calls if kind == "recompute"] == [1, 3, 5]

    @pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
    def test_with_checkpoints_of_its_own(self, told, reentrant):
        """A block that runs again is part of its call."""

        class Checkpointed(Lens):
            def forward(self, x):
                return checkpoint(super().forward, x, use_reentrant=reentrant)

        guard = guard_module(Checkpointed())
        calls = train(guard, guard.module)
        assert calls == [("call", None)] * 3

    def test_in_a_thread_without_a_context(self, told, scorer, in_thread):
        """As CUDA's backward threads are."""
        guard = guard_module(scorer)
        with guard.context("training"), guard.sanctioned(SCOPE):
            loss = checkpoint(guard.module, X.clone().requires_grad_(), use_reentrant=False).sum()
        in_thread(loss.backward)
        assert [call.kind for call in guard.calls] == ["call", "recompute"]

    def test_compiled(self, told):
        """The module, and the code that calls it."""
        torch._dynamo.reset()
        module = nn.Linear(3, 2)
        module.compile(backend="eager")
        guard = guard_module(module)
        train(guard, guard.module)
        train_step = torch.compile(lambda x: guard.module(x) * 2, backend="eager")
        with guard.context("training"), guard.micro_step(), guard.sanctioned(SCOPE):
            out = train_step(X)
        out.sum().backward()
        assert guard.violations == ()

    def test_data_parallel(self, told, scorer):
        """In a model that is wrapped."""
        torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        try:
            guard = guard_module(scorer)
            model = DistributedDataParallel(nn.Sequential(guard.module, nn.Linear(2, 2)))
            train(guard, model)
            assert guard.violations == ()
        finally:
            # Before the group: what is left of the model would end it, and hold Python's lock while
            # it waits for the group's threads, which may want that lock.
            model = None
            gc.collect()
            torch.distributed.destroy_process_group()

    def test_profiled(self, told, scorer):
        """While a trace is taken."""
        guard = guard_module(scorer)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            train(guard, guard.module)
        assert guard.count("training") > 0
        assert guard.violation_count == 0


class TestStaysClosed:
    @pytest.mark.parametrize("context", ["training", "inference"])
    @pytest.mark.parametrize("way", BYPASSES)
    def test_bypasses(self, told, way, context):
        """Every one of the list."""
        lens = Lens()
        guard = guard_module(lens)
        with pytest.raises(BypassedGuard), guard.context(context):
            BYPASSES[way](guard, lens)
        assert lens.runs == 0

    @pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
    def test_calls_of_hooks_in_backward(self, told, scorer, reentrant):
        """The user's own code is not torch's, also while a checkpoint is worked off around it."""
        guard = guard_module(scorer)

        def run(x):
            out = guard.module(x)
            if out.requires_grad and torch.is_grad_enabled():
                out.register_hook(lambda _: guard.module(X))
            return out * 1

        with guard.context("training"), guard.sanctioned(SCOPE):
            loss = checkpoint(run, X.clone().requires_grad_(), use_reentrant=reentrant).sum()
        with pytest.raises(NoContext):
            loss.backward()

    def test_a_checkpoint_in_a_hook(self, told, scorer):
        """A first forward in backward is a call, under whatever checkpoint."""
        guard = guard_module(scorer)
        held = X.clone().requires_grad_() * 1
        held.register_hook(lambda _: checkpoint(guard.module, X, use_reentrant=False))
        with pytest.raises(UnsanctionedCall), guard.context("training"):
            held.sum().backward()
        assert scorer.runs == 0

    def test_a_raw_module_under_a_checkpoint(self, told, scorer):
        """Its forward is the bypass; no recompute comes of it."""
        guard = guard_module(scorer)
        with pytest.raises(BypassedGuard), guard.context("training"):
            checkpoint(scorer, X.clone().requires_grad_(), use_reentrant=False)


class TestUnassigned:
    def test_in_the_log_and_the_post_mortem(self, monkeypatch, scorer, tmp_path):
        """A recompute of nobody knows which call is counted as one, and is no call."""
        _no_objects(monkeypatch)
        with pytest.warns(UntestedTorch), lensnet_guard(scorer, log=tmp_path) as guard:
            train(guard, lambda x: checkpoint(guard.module, x, use_reentrant=False), steps=1)
        record = guard.calls[1]
        assert (record.kind, record.recompute_of, record.outcome) == (
            *("recompute", None, "stopped early"),
        )
        assert str(read_verdict(tmp_path)) == "1 micro-step, 1 Scorer call, 0 violations"


class TestWarning:
    def test_its_words(self, monkeypatch, scorer):
        """Which torch, what it hides, and what to do."""
        monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
        with pytest.warns(UntestedTorch) as caught:
            guard_module(scorer)
        (warning,) = caught
        assert str(warning.message) == (
            "lensnet_guard is tested with torch 2.7 to 2.15; in this torch 2.99.0+cpu it cannot "
            "tell a call that torch's checkpoints add in backward from one that they repeat. All "
            "else is checked as ever. Install a torch that is tested, or a newer lensnet-guard"
        )

    def test_once_per_process(self, monkeypatch, make_scorer):
        """However many guards there are; a second loss is told when it is met."""
        _newer(monkeypatch)
        with pytest.warns(UntestedTorch) as caught:
            for _ in range(3):
                guard_module(make_scorer())
            _no_profiler_flag(monkeypatch)
            guard_module(make_scorer())
        assert len(caught) == 2

    def test_in_mode_off(self, monkeypatch, scorer):
        """Where nothing is read, nothing is missed."""
        _newer(monkeypatch)
        guard_module(scorer, mode="off")

    def test_as_an_error_it_leaves_the_module_alone(self, monkeypatch, scorer):
        """Nothing is installed by then."""
        _newer(monkeypatch)
        kind = type(scorer)
        with warnings.catch_warnings(), pytest.raises(UntestedTorch):
            warnings.simplefilter("error")
            guard_module(scorer)
        assert type(scorer) is kind

    @pytest.mark.parametrize(
        ("version", "tested"),
        [
            *[("2.7.1+cu126", True), ("2.15.0", True), ("2.13.0a0+git1", True)],
            *[("2.6.0", False), ("2.16.0.dev1", False), ("3.0", False), ("local", False)],
        ],
    )
    def test_versions(self, monkeypatch, version, tested):
        """By the minor version alone."""
        monkeypatch.setattr(torch, "__version__", version)
        assert untested.is_tested() is tested

    def test_none_in_a_torch_that_is_tested(self):
        """All names are there."""
        assert _torch_checkpoints.losses() == _torch_internals.losses() == []


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_several_backward_passes_without_a_number(monkeypatch, make_scorer, reentrant):
    """Recomputes start over where all calls of a checkpoint have been repeated."""
    _no_graph_task(monkeypatch)
    with pytest.warns(UntestedTorch):
        guard = guard_module(make_scorer(), policy=CallPolicy(scopes={SCOPE: 2}))

    def both(x):
        return guard.module(guard.module(x) @ torch.ones(2, 3)).exp()

    with guard.context("training"), guard.sanctioned(SCOPE):
        loss = checkpoint(both, X.clone().requires_grad_(), use_reentrant=reentrant).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert [call.recompute_of for call in guard.calls] == [None, None, 1, 2, 1, 2]
