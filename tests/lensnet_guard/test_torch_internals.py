"""Every private name of torch that the guard reads is still there, and its absence does no harm."""

import importlib
import sys

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
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

    def test_profiling(self):
        """From the start of a profile to its end."""
        assert _torch_internals.profiling() is False
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            assert _torch_internals.profiling() is True
        assert _torch_internals.profiling() is False

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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler, on import
class TestCudaGraphs:
    """What torch tells of compilation; it can be looked up on a CPU, where nothing is captured."""

    @pytest.fixture
    def trees(self):
        return importlib.import_module("torch._inductor.cudagraph_trees")

    @pytest.mark.parametrize(
        ("how", "graphs"),
        [
            ({"mode": "reduce-overhead"}, True),
            ({"mode": "max-autotune"}, True),
            ({"options": {"triton.cudagraphs": True}}, True),
            ({}, False),
        ],
    )
    def test_options_of_a_compiled_module(self, how, graphs):
        """In place, and of the wrapper that torch.compile makes."""
        module = nn.Linear(3, 2)
        module.compile(**how)
        for compiled in (module, torch.compile(nn.Linear(3, 2), **how)):
            options = _torch_internals.compiler_options(compiled)
            assert options["triton.cudagraphs"] is graphs

    def test_options_of_others(self):
        """None without compilation, nothing from a backend that has none."""
        module = nn.Linear(3, 2)
        assert _torch_internals.compiler_options(module) is None
        module.compile(backend="eager")
        assert _torch_internals.compiler_options(module) == {}

    @pytest.mark.parametrize("forward", [len, lambda x: x])
    def test_a_forward_on_the_instance_that_is_not_compiled(self, forward):
        """A hook of accelerate's, say."""
        module = nn.Linear(3, 2)
        module.forward = forward
        assert _torch_internals.compiler_options(module) is None

    def test_a_compiled_function_that_tells_nothing(self):
        """As in another torch: compiled, and that is all that is known."""
        module = nn.Linear(3, 2)
        module._compiled_call_impl = lambda x: x
        assert _torch_internals.compiler_options(module) == {}

    def test_marks(self, trees, monkeypatch):
        """Torch counts them downwards."""
        monkeypatch.setattr(trees.MarkStepBox, "mark_step_counter", 0)
        trees.mark_step_begin()
        trees.mark_step_begin()
        assert _torch_internals.mark_counter() == 2

    def test_generation(self, monkeypatch):
        """Torch's number for a run of compiled code."""
        tracker = importlib.import_module("torch._dynamo.mutation_guard").GenerationTracker
        monkeypatch.setattr(tracker, "generation", 7)
        assert _torch_internals.generation() == 7

    def test_counters(self):
        """By the names under which torch counts."""
        counters = importlib.import_module("torch._dynamo.utils").counters
        graphs, skips = _torch_internals.compile_counters()
        counters["stats"]["unique_graphs"] += 2
        counters["inductor"]["cudagraph_skips"] += 3
        assert _torch_internals.compile_counters() == (graphs + 2, skips + 3)

    def test_nothing_was_captured(self):
        """Neither on a device that has no trees nor on one without an index."""
        assert _torch_internals.graph_tree(torch.device("cpu")) is None
        assert _torch_internals.graph_tree(torch.device("cuda", 97)) is None
        assert _torch_internals.capturing() is False

    def test_a_cuda_build_without_a_driver_is_not_asked(self, monkeypatch):
        """The usual torch on a machine without a GPU: asking for its stream raises."""

        def no_driver():
            raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", no_driver)
        assert _torch_internals.capturing() is False

    def test_trees(self, trees, monkeypatch):
        """State, pending backward and live outputs, under torch's names for them."""
        manager = object.__new__(trees.CUDAGraphTreeManager)
        manager.path_state = trees.ExecutionState.RECORDING
        manager.running_forwards_with_pending_backwards = True
        manager.current_node = type("Node", (), {"path_live_weakrefs": lambda _: [lambda: 5]})()
        container = type("Container", (), {"tree_manager": manager})()
        monkeypatch.setitem(trees.get_obj(trees.local, "tree_manager_containers"), 97, container)
        tree = _torch_internals.graph_tree(torch.device("cuda", 97))
        assert tree == ("recording", True, frozenset({5}))

    def test_names_of_the_states(self, trees):
        """Those that a phase is made of."""
        names = {state.name.lower() for state in trees.ExecutionState}
        assert names == {"none", "warmup", "recording", "execution"}

    def test_words_of_the_error(self, trees):
        """By which it is known, for outputs and for gradients."""
        tell = trees.CUDAGraphTreeManager.format_dealloc_msg
        for of_gradient in (False, True):
            message = tell(None, is_grad_output=of_gradient)
            assert _torch_internals.OVERWRITTEN in message

    def test_a_storage_that_can_be_read(self):
        """Asked without harm, also when it is gone."""
        tensor = torch.ones(2)
        reference = StorageWeakRef(tensor.untyped_storage())
        assert _torch_internals.is_overwritten(reference) is False
        del tensor
        assert reference.expired()
        assert _torch_internals.is_overwritten(reference) is False

    @pytest.mark.parametrize(
        ("error", "overwritten"),
        [(f"Error: it {_torch_internals.OVERWRITTEN}.", True), ("something else", False)],
    )
    def test_a_storage_that_torch_refuses_to_read(self, monkeypatch, error, overwritten):
        """By the error that torch raises for it."""

        class Refused:
            def data_ptr(self):
                raise RuntimeError(error)

        tell = staticmethod(lambda _: Refused())
        monkeypatch.setattr(torch.UntypedStorage, "_new_with_weak_ptr", tell)
        reference = StorageWeakRef(torch.ones(2).untyped_storage())
        assert _torch_internals.is_overwritten(reference) is overwritten

    def test_all_of_it_gone(self, trees, monkeypatch):
        """Unknown, and never an error."""
        monkeypatch.delattr(trees, "get_obj")
        monkeypatch.delattr(trees, "MarkStepBox")
        tracker = importlib.import_module("torch._dynamo.mutation_guard")
        monkeypatch.delattr(tracker, "GenerationTracker")
        monkeypatch.delattr(importlib.import_module("torch._dynamo.utils"), "counters")
        assert _torch_internals.graph_tree(torch.device("cuda", 0)) is None
        assert _torch_internals.mark_counter() == 0
        assert _torch_internals.generation() is None
        assert _torch_internals.compile_counters() == (0, 0)


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
            (torch.autograd.profiler, "_is_profiler_enabled"),
        )
        frame = sys._getframe()
        assert module.backward_pass() is None
        assert module.may_be_in_checkpoint() is True
        assert list(module.open_checkpoints(frame)) == []
        assert module.recomputed_checkpoint(frame) is None
        assert module.stops_recomputing(RuntimeError()) is False
        assert module.profiling() is False

    def test_eager_only(self, without):
        """The public way out of a graph is taken instead."""
        module = without((torch._C._dynamo.eval_frame, "set_code_exec_strategy"))

        def function():
            return 1

        assert module.eager_only("why")(function)() == 1
