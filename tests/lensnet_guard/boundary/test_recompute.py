"""Activation checkpointing: a recompute belongs to its call; all else in backward is a call."""

import contextlib
import functools
import gc
import importlib
import json
import threading

import pytest
import torch
from tests.lensnet_guard.helpers import SCOPE
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from lensnet_guard import (
    BudgetExceeded,
    BypassedGuard,
    CallPolicy,
    LensNetViolation,
    NoContext,
    UnsanctionedCall,
    guard_module,
    lensnet_guard,
)
from lensnet_guard.postmortem import read_verdict


@pytest.fixture(params=[False, True], ids=["non-reentrant", "reentrant"])
def reentrant(request):
    return request.param


@pytest.fixture
def x():
    return torch.ones(4, 3, requires_grad=True)


@pytest.fixture
def twice(make_scorer):
    """A guard that allows two calls per micro-step."""
    return guard_module(make_scorer(), policy=CallPolicy(scopes={SCOPE: 2}))


def kinds(guard):
    return [(call.kind, call.recompute_of, call.outcome) for call in guard.calls]


def checkpointed_loss(guard, x, reentrant, run=None):
    """One legal call under a checkpoint, its scope closed when this returns."""
    with guard.context("training"), guard.sanctioned(SCOPE):
        return checkpoint(run or guard.module, x, use_reentrant=reentrant).sum()


class TestRecompute:
    def test_after_the_scope_has_closed(self, guard, scorer, x, reentrant):
        """It runs, is recorded as what it is, and spends nothing; the gradient is right."""
        loss = checkpointed_loss(guard, x, reentrant)
        loss.backward()
        outcome = "returned" if reentrant else "stopped early"
        assert kinds(guard) == [("call", None, "returned"), ("recompute", 1, outcome)]
        assert (guard.count(), scorer.runs) == (1, 2)
        assert guard.violations == ()
        expected = scorer.linear.weight.sum(0).expand(4, 3)
        assert torch.allclose(x.grad, expected)

    def test_its_record(self, guard, x, reentrant):
        """It has a number and a stack of its own, and belongs to the micro-step of its call."""
        with guard.context("training"), guard.micro_step(3, 1), guard.sanctioned(SCOPE):
            loss = checkpoint(guard.module, x, use_reentrant=reentrant).sum()
        loss.backward()
        call, recompute = guard.calls
        assert (recompute.seq, recompute.verdict, recompute.reason) == (2, "allow", None)
        for name in ("module", "context", "scope", "step", "micro_step"):
            assert getattr(recompute, name) == getattr(call, name)
        assert recompute.caller.function.endswith("test_its_record")
        assert recompute.caller.line > call.caller.line

    def test_inside_the_micro_step(self, guard, x, reentrant):
        """Where a trainer's backward usually is: the budget is spent by the call alone."""
        with guard.context("training"), guard.micro_step() as step:
            with guard.sanctioned(SCOPE):
                loss = checkpoint(guard.module, x, use_reentrant=reentrant).sum()
            loss.backward()
        assert step.calls == {SCOPE: 1}
        assert guard.violations == ()

    def test_in_a_thread_without_a_context(self, guard, x, reentrant, in_thread):
        """As CUDA's backward threads are."""
        loss = checkpointed_loss(guard, x, reentrant)
        in_thread(loss.backward)
        assert [kind for kind, *_ in kinds(guard)] == ["call", "recompute"]

    def test_two_backwards(self, guard, x, reentrant):
        """With retain_graph each of them recomputes the same call."""
        loss = checkpointed_loss(guard, x, reentrant)
        loss.backward(retain_graph=True)
        loss.backward()
        assert [(kind, of) for kind, of, _ in kinds(guard)] == [
            *(("call", None), ("recompute", 1), ("recompute", 1)),
        ]
        assert guard.count() == 1

    def test_autograd_grad(self, guard, x):
        """The other door to the same engine; reentrant checkpoints do not support it."""
        loss = checkpointed_loss(guard, x, reentrant=False)
        torch.autograd.grad(loss, x)
        assert kinds(guard)[1] == ("recompute", 1, "stopped early")

    def test_several_calls_under_one_checkpoint(self, twice, x, reentrant):
        """Each recompute names the call it repeats, in order, in every backward."""

        def both(x):
            return twice.module(twice.module(x) @ torch.ones(2, 3)).exp()

        loss = checkpointed_loss(twice, x, reentrant, both)
        loss.backward(retain_graph=True)
        loss.backward()
        assert [of for kind, of, _ in kinds(twice)] == [None, None, 1, 2, 1, 2]
        assert twice.count() == 2

    def test_several_checkpoints(self, twice, x, reentrant):
        """Backward goes through them in reverse."""
        with twice.context("training"), twice.sanctioned(SCOPE):
            first = checkpoint(twice.module, x, use_reentrant=reentrant)
            second = checkpoint(twice.module, first @ torch.ones(2, 3), use_reentrant=reentrant)
        second.sum().backward()
        assert [of for kind, of, _ in kinds(twice)] == [None, None, 2, 1]

    def test_nested_checkpoints(self, guard, x, reentrant):
        """The innermost one is what counts, also when the outer one recomputes it."""

        def inner(x):
            return checkpoint(guard.module, x, use_reentrant=reentrant)

        loss = checkpointed_loss(guard, x, reentrant, inner)
        loss.backward()
        assert guard.violations == ()
        assert guard.count() == 1
        assert {kind for kind, *_ in kinds(guard)[1:]} == {"recompute"}

    def test_in_inference_context(self, guard, x, reentrant):
        """There too it is no new call."""
        with guard.context("inference"):
            loss = checkpoint(guard.module, x, use_reentrant=reentrant).sum()
        loss.backward()
        assert guard.count("inference") == 1
        assert kinds(guard)[1][:2] == ("recompute", 1)

    def test_in_the_log(self, scorer, x, reentrant, tmp_path):
        """With the number of its call, so that a reader can tell them apart; counted nowhere."""
        with lensnet_guard(scorer, log=tmp_path) as guard:
            checkpointed_loss(guard, x, reentrant).backward()
        lines = [*map(json.loads, (tmp_path / "lensnet.rank0.jsonl").read_text().splitlines())]
        begins = [line for line in lines if line["event"] == "call.begin"]
        assert [(b["kind"], b["recompute_of"]) for b in begins] == [
            *(("call", None), ("recompute", 1)),
        ]
        assert lines[-1]["calls"] == 1
        assert str(read_verdict(tmp_path)) == "1 micro-step, 1 Scorer call, 0 violations"

    def test_forgets_what_torch_has_freed(self, guard, x, reentrant):
        """A long run keeps no checkpoint and no record for one that is gone."""
        for _ in range(3):
            loss = checkpointed_loss(guard, x, reentrant)
        loss.backward()
        del loss
        assert len(guard._admission._recomputes._calls) == 0


class TestOtherCheckpoints:
    """Each way in which torch checkpoints a call; all are recomputes of that call."""

    @staticmethod
    def selective():
        def policy(ctx, op, *args, **kwargs):
            saved = op == torch.ops.aten.addmm.default
            return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

        return functools.partial(create_selective_checkpoint_contexts, policy)

    def test_selective(self, guard, x):
        """Some results are kept, the rest is run again."""
        with guard.context("training"), guard.sanctioned(SCOPE):
            out = checkpoint(guard.module, x, use_reentrant=False, context_fn=self.selective())
        out.exp().sum().backward()
        assert [kind for kind, *_ in kinds(guard)] == ["call", "recompute"]
        assert guard.calls[1].recompute_of == 1

    def test_without_early_stop(self, guard, x):
        """The call runs again to its end."""
        with guard.context("training"), guard.sanctioned(SCOPE), set_checkpoint_early_stop(False):
            loss = checkpoint(guard.module, x, use_reentrant=False).sum()
        loss.backward()
        assert kinds(guard)[1:] == [("recompute", 1, "returned")]

    def test_sequential(self, guard, x, reentrant):
        """In a segment of a longer model, and after it."""
        layers = [nn.Linear(3, 3), guard.module, nn.Linear(2, 2), nn.Linear(2, 1)]
        with guard.context("training"), guard.sanctioned(SCOPE):
            out = checkpoint_sequential(layers, 2, x, use_reentrant=reentrant)
        out.sum().backward()
        assert [(kind, of) for kind, of, _ in kinds(guard)] == [("call", None), ("recompute", 1)]

    @pytest.mark.parametrize("outer", [False, True])
    def test_of_the_other_kind_inside(self, guard, x, outer, reentrant):
        """Whichever kind is within whichever."""

        def inner(x):
            return checkpoint(guard.module, x, use_reentrant=reentrant)

        checkpointed_loss(guard, x, outer, inner).backward()
        assert guard.violations == ()
        assert {of for _, of, _ in kinds(guard)[1:]} == {1}

    def test_of_a_partial_of_checkpoint(self, guard, x):
        """No line of anybody's stands between the two."""
        inner = functools.partial(checkpoint, guard.module, use_reentrant=False)
        checkpointed_loss(guard, x, False, inner).backward()
        assert {of for _, of, _ in kinds(guard)[1:]} == {1}

    def test_with_hooks_inside(self, guard, x):
        """Those of the checkpoint are not on top then."""

        def run(x):
            with torch.autograd.graph.save_on_cpu():
                return guard.module(x)

        checkpointed_loss(guard, x, False, run).backward()
        assert guard.violations == ()

    def test_a_saved_tensor_that_is_read(self, guard, x):
        """It recomputes outside any backward pass, as often as it is read."""

        def run(x):
            return guard.module(x).exp()

        with guard.context("training"), guard.sanctioned(SCOPE):
            out = checkpoint(run, x, use_reentrant=False)
        for _ in range(2):
            assert out.grad_fn._saved_result.shape == (4, 2)
        assert [of for _, of, _ in kinds(guard)] == [None, 1, 1]

    def test_a_function_that_reads_saved_tensors(self, guard, x):
        """A user's backward asks for what torch then recomputes."""

        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x * x

            @staticmethod
            def backward(ctx, grad):
                return 2 * grad * ctx.saved_tensors[0]

        checkpointed_loss(guard, x, False, lambda x: Square.apply(guard.module(x))).backward()
        assert kinds(guard)[1:] == [("recompute", 1, "returned")]

    def test_compiled_autograd(self, guard, x):
        """The backward pass is compiled, and recomputes in Python."""
        torch._dynamo.reset()
        loss = checkpointed_loss(guard, x, reentrant=False)
        compile_it = torch.compile(backend="eager")
        with importlib.import_module("torch._dynamo.compiled_autograd")._enable(compile_it):
            loss.backward()
        assert [(kind, of) for kind, of, _ in kinds(guard)] == [("call", None), ("recompute", 1)]


class TestComposable:
    """``torch.distributed._composable.checkpoint`` opens a checkpoint by hooks on a module."""

    @pytest.fixture
    def composable(self):
        return importlib.import_module("torch.distributed._composable").checkpoint

    def test_of_the_module_itself(self, composable, scorer, x):
        """It opens inside the call, so that torch does not show which call is repeated."""
        guard = guard_module(composable(scorer))
        with guard.context("training"), guard.micro_step():
            with guard.sanctioned(SCOPE):
                loss = guard.module(x).sum()
            loss.backward()
        assert kinds(guard) == [
            *(("call", None, "returned"), ("recompute", None, "stopped early")),
        ]
        assert guard.calls[1].caller.function.endswith("test_of_the_module_itself")
        with pytest.raises(BypassedGuard), guard.context("training"):
            scorer(x)

    def test_of_a_part(self, composable, scorer, x):
        """A part that runs again is of the call."""
        composable(scorer.linear)
        guard = guard_module(scorer)
        with guard.context("training"), guard.sanctioned(SCOPE):
            loss = guard.module(x).exp().sum()
        loss.backward()
        assert kinds(guard) == [("call", None, "returned")]

    @pytest.mark.parametrize("nested", [False, True])
    def test_of_a_model_around_it(self, composable, guard, x, nested):
        """The call is known by the model's checkpoint, also under another one inside."""

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.critic = nn.Linear(3, 3), guard.module

            def forward(self, x):
                hidden = self.first(x).exp()
                if nested:
                    return checkpoint(self.critic, hidden, use_reentrant=False).exp()
                return self.critic(hidden).exp()

        model = composable(Model())
        with guard.context("training"), guard.sanctioned(SCOPE):
            loss = model(x).sum()
        loss.backward()
        assert guard.violations == ()
        assert {of for _, of, _ in kinds(guard)[1:]} == {1}


class TestRefusedUnderACheckpoint:
    def test_the_violation_kept_its_frames_alive(self, guard, x, reentrant):
        """Up to torch 2.13 those held saved-tensor hooks up, for whatever came after."""
        gc.collect()
        gc.disable()
        try:
            for settled in (False, True):
                block = guard.micro_step() if settled else contextlib.nullcontext()
                with contextlib.suppress(UnsanctionedCall), guard.context("training"), block:
                    checkpoint(guard.module, x, use_reentrant=reentrant)
            seen = x.exp()  # would be packed by a hook that was left
            assert seen.grad_fn._saved_result.data_ptr() == seen.data_ptr()
        finally:
            gc.enable()


class TestTheModulesOwnCheckpoints:
    @pytest.fixture
    def lens(self, reentrant):
        class Lens(nn.Module):
            def __init__(self):
                super().__init__()
                self.block = nn.Sequential(nn.Linear(3, 3), nn.Tanh())

            def forward(self, x):
                return checkpoint(self.block, x, use_reentrant=reentrant)

        return Lens()

    def test_blocks_recompute(self, lens, x):
        """A block that runs again in backward is part of the recorded call, and no record."""
        guard = guard_module(lens)
        with guard.context("training"), guard.sanctioned(SCOPE):
            loss = guard.module(x).sum()
        loss.backward()
        assert kinds(guard) == [("call", None, "returned")]
        assert lens.block[0].weight.grad is not None

    def test_the_door_is_shut_behind_them(self, lens, x):
        """Afterwards, and for whoever calls a block inside the same backward."""
        guard = guard_module(lens)
        with guard.context("training"), guard.sanctioned(SCOPE):
            out = guard.module(x)
        out.register_hook(lambda grad: lens.block(grad))
        with pytest.raises(BypassedGuard):
            out.sum().backward()
        with pytest.raises(BypassedGuard):
            lens.block(x)

    def test_a_checkpoint_of_a_bypass(self, lens, x, reentrant):
        """Checkpointing a block from outside is a bypass like any other."""
        guard = guard_module(lens)
        with pytest.raises(BypassedGuard), guard.context("training"):
            checkpoint(lens.block, x, use_reentrant=reentrant)


class TestCallsInBackward:
    """A call by the user's own code inside backward is no recompute."""

    def test_from_a_tensor_hook(self, guard, scorer, x, reentrant):
        """Refused, although a checkpoint is being worked off around it."""
        with (
            pytest.raises(UnsanctionedCall, match=r"called from  \S+test_recompute\.py:\d+ in"),
            guard.context("training"),
            guard.micro_step(),
        ):
            with guard.sanctioned(SCOPE):
                out = checkpoint(guard.module, x, use_reentrant=reentrant)
            out.register_hook(lambda _: guard.module(x.detach()))
            out.sum().backward()
        assert scorer.runs == 1

    def test_from_a_hook_on_the_input_of_a_checkpoint(self, guard, scorer, x, reentrant):
        """It runs after the recompute, in the same backward."""
        held = x * 1
        held.register_hook(lambda _: guard.module(x.detach()))
        loss = checkpointed_loss(guard, held, reentrant)
        with pytest.raises(NoContext):
            loss.backward()
        assert (scorer.runs, guard.count()) == (2, 1)

    def test_from_a_hook_inside_the_checkpointed_function(self, guard, x, reentrant):
        """For a reentrant checkpoint that hook runs in a backward of its own."""

        def run(x):
            out = guard.module(x)
            if torch.is_grad_enabled() and out.requires_grad:
                out.register_hook(lambda _: guard.module(x.detach()))
            return out * 1

        loss = checkpointed_loss(guard, x, reentrant, run)
        with pytest.raises(NoContext):
            loss.backward()

    def test_from_an_accumulated_gradient(self, guard, x):
        """Hooks on parameters run there as well."""
        weight = torch.ones(1, requires_grad=True)
        weight.register_post_accumulate_grad_hook(lambda _: guard.module(x))
        with pytest.raises(NoContext):
            weight.sum().backward()

    def test_from_a_custom_function(self, guard, x):
        """Code in a backward of one's own is user code."""

        class Calls(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 1

            @staticmethod
            def backward(ctx, grad):
                guard.module(grad)
                return grad

        with guard.context("training"), pytest.raises(UnsanctionedCall):
            Calls.apply(x).sum().backward()

    def test_more_calls_in_the_recompute_than_before(self, guard, x, reentrant):
        """A recompute repeats; what it adds is judged as a call."""
        runs = []

        def run(x):
            runs.append(1)
            out = guard.module(x)
            if len(runs) == 2:
                guard.module(x)
            return out.exp()

        loss = checkpointed_loss(guard, x, reentrant, run)
        with pytest.raises(LensNetViolation):
            loss.backward()
        assert guard.count() == 1

    def test_a_call_that_was_not_there_before(self, guard, scorer, x, reentrant):
        """A checkpoint whose forward did not call the module has nothing to recompute."""
        runs = []

        def run(x):
            runs.append(1)
            return (guard.module(x) @ torch.ones(2, 3) if len(runs) == 2 else x).exp()

        with guard.context("training"):
            loss = checkpoint(run, x, use_reentrant=reentrant).sum()
            with pytest.raises(UnsanctionedCall):
                loss.backward()
        assert scorer.runs == 0

    def test_a_second_call_is_still_one_too_many(self, guard, x, reentrant):
        """A checkpoint buys no budget."""
        with pytest.raises(BudgetExceeded), guard.context("training"):
            with guard.sanctioned(SCOPE):
                for _ in range(2):
                    checkpoint(guard.module, x, use_reentrant=reentrant)


class TestThreads:
    def test_backwards_side_by_side(self, make_scorer, reentrant):
        """Every thread's recompute finds its own call."""
        guard = guard_module(make_scorer())
        errors = []

        def work():
            try:
                for _ in range(20):
                    x = torch.ones(2, 3, requires_grad=True)
                    checkpointed_loss(guard, x, reentrant).backward()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, name=f"t{i}") for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        calls = {call.seq: call for call in guard.calls if call.kind == "call"}
        recomputes = [call for call in guard.calls if call.kind == "recompute"]
        assert len(calls) == len(recomputes) == 80
        assert sorted(r.recompute_of for r in recomputes) == sorted(calls)
        assert all(calls[r.recompute_of].thread == r.thread for r in recomputes)


class TestReplacedFunctions:
    """Scripts replace torch's public functions before they import the guard, and train on."""

    TRAINING = """
import torch
from torch import nn
from lensnet_guard import BypassedGuard, CallPolicy, guard_module

class Trainer:
    def __init__(self, how):
        self.raw = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.guard = guard_module(self.raw, policy=CallPolicy({"score": 1}))
        self.how = how

    def step(self):
        x = torch.ones(2, 4, requires_grad=True)
        with self.guard.context("training"), self.guard.micro_step():
            with self.guard.sanctioned("score"):
                loss = tool.checkpoint(self.guard.module, x, **self.how).sum()
            torch.autograd.backward(loss)
        with self.guard.context("training"):
            try:
                self.raw[0](x)
            except BypassedGuard:
                print("refused", end=" ")
        print([call.kind for call in self.guard.calls if call.kind != "bypass"])

for reentrant in (False, True):
    Trainer({"use_reentrant": reentrant}).step()
"""

    @pytest.mark.parametrize(
        "replaced",
        [
            "functools.partial(checkpoint, preserve_rng_state=False)",
            "lambda *args, **how: checkpoint(*args, **how)",
        ],
    )
    def test_a_checkpoint_of_the_scripts_own(self, run_python, replaced):
        """A partial stopped the import, and a wrapper made the script a file of torch's."""
        result = run_python(
            "import functools\nimport torch.utils.checkpoint as tool\n"
            f"checkpoint = tool.checkpoint\ntool.checkpoint = {replaced}\n{self.TRAINING}"
        )
        assert result.stdout == "refused ['call', 'recompute']\n" * 2, result.stderr

    def test_a_backward_of_the_scripts_own(self, run_python):
        """It made the script's file one of the engine's, and every recompute was refused."""
        result = run_python(
            "import torch\nimport torch.utils.checkpoint as tool\n"
            "backward = torch.autograd.backward\n"
            "torch.autograd.backward = lambda *args, **how: backward(*args, **how)\n"
            f"{self.TRAINING}"
        )
        assert result.stdout == "refused ['call', 'recompute']\n" * 2, result.stderr


class TestObserved:
    @pytest.mark.parametrize("bypass", [False, True], ids=["call", "bypass"])
    def test_a_violation_was_counted_again_as_it_was_recomputed(self, reentrant, bypass):
        """Each recompute is that of its own call, which was not to be and ran all the same."""
        module = nn.Linear(4, 4)
        guard = guard_module(module, policy=CallPolicy({"score": 1}), mode="observe")
        x = torch.ones(2, 4, requires_grad=True)

        def both(x):
            first = module(x) if bypass else guard.module(x)
            with guard.sanctioned("score"):
                return guard.module(first)

        with guard.context("training"), guard.micro_step():
            checkpoint(both, x, use_reentrant=reentrant).sum().backward()
        assert guard.violation_count == 1
        recomputes = [call for call in guard.calls if call.kind == "recompute"]
        assert [call.recompute_of for call in recomputes] == [1, 2]
