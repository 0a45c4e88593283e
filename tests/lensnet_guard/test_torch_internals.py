"""Every private name of torch that the guard reads is still there, and its absence does no harm."""

import importlib
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lensnet_guard import NoContext, _torch_internals, guard_module


class TestStillThere:
    """Fails when a new torch has moved something: then the guard knows less."""

    @pytest.mark.parametrize(
        "name",
        ["_REENTRANT_FORWARD", "_REENTRANT_BACKWARD", "_CHECKPOINT", "_UNPACK", "_ENGINE"],
    )
    def test_code_of_checkpointing(self, name):
        """The functions by which a recompute is recognised."""
        assert getattr(_torch_internals, name) is not None

    def test_the_exception_that_ends_a_recompute(self):
        """Non-reentrant checkpoints stop early by it."""
        assert issubclass(_torch_internals._STOP_RECOMPUTING, Exception)

    @pytest.mark.parametrize("name", ["_current_graph_task_id"])
    def test_functions_of_c(self, name):
        """Without it no backward is seen."""
        assert callable(getattr(torch._C, name))

    def test_saved_tensor_hooks(self):
        """None without hooks, something within a checkpoint."""
        seen = []

        def run(x):
            seen.append(_torch_internals.may_be_in_checkpoint())
            return x * 2

        assert not _torch_internals.may_be_in_checkpoint()
        checkpoint(run, torch.ones(1, requires_grad=True), use_reentrant=False)
        checkpoint(run, torch.ones(1, requires_grad=True), use_reentrant=True)
        assert seen == [True, True]

    def test_eager_only_needs_no_wrapper(self):
        """The function itself comes back, marked, and nothing of torch.compile is imported."""

        def function():
            return 1

        marked = _torch_internals.eager_only("a reason")(function)
        assert marked is function
        assert (function._torchdynamo_disable, function._torchdynamo_disable_msg) == (
            *(True,),
            "a reason",
        )

    def test_importing_the_guard_does_not_import_the_compiler(self, run_python):
        """torch._dynamo takes longer to import than most scripts take to start."""
        result = run_python("import sys, lensnet_guard; print('torch._dynamo' in sys.modules)")
        assert result.stdout == "False\n"


class TestGone:
    """A torch without a private name: the guard falls back to knowing less, and stays safe."""

    def test_checkpoints_are_not_recognised(self, monkeypatch, scorer):
        """Then a recompute is judged as a call, which is refused rather than missed."""
        monkeypatch.setattr(_torch_internals, "_UNPACK", None)
        guard = guard_module(scorer)
        with guard.context("training"), guard.sanctioned("preference_scorer"):
            x = torch.ones(1, 3, requires_grad=True)
            loss = checkpoint(guard.module, x, use_reentrant=False).sum()
        with pytest.raises(NoContext):
            loss.backward()

    @pytest.fixture
    def without(self, monkeypatch):
        """Import the module anew where some names are missing; the real one comes back after."""

        def reload(*names):
            for owner, name in names:
                monkeypatch.delattr(owner, name)
            spec = importlib.util.spec_from_file_location("degraded", _torch_internals.__file__)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module

        return reload

    def test_everything(self, without):
        """It still imports, and answers with unknown."""
        module = without(
            (torch.utils.checkpoint, "_checkpoint_hook"),
            (torch.utils.checkpoint, "CheckpointFunction"),
            (torch.utils.checkpoint, "_StopRecomputationError"),
            (torch.autograd.graph, "_engine_run_backward"),
            (torch._C, "_current_graph_task_id"),
            (torch._C._autograd, "_top_saved_tensors_default_hooks"),
        )
        frame = sys._getframe()
        assert module.backward_pass() is None
        assert module.may_be_in_checkpoint() is True
        assert list(module.open_checkpoints(frame)) == []
        assert module.recomputed_checkpoint(frame) is None
        assert module.stops_recomputing(RuntimeError()) is False

    def test_eager_only(self, without):
        """The public way out of a graph is taken instead."""
        module = without((torch._C._dynamo.eval_frame, "set_code_exec_strategy"))

        def function():
            return 1

        assert module.eager_only("why")(function)() == 1
