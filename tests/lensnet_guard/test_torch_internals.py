"""Every private name of torch that the guard reads is still there, and its absence does no harm."""

import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from lensnet_guard import (
    CallPolicy,
    ConditionUnmet,
    UntestedTorch,
    _torch_internals,
    frozen,
    guard_module,
)
from lensnet_guard.calls import frozen as frozen_module


class TestStillThere:
    """Fails when a new torch has moved something: then the guard knows less."""

    @pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")  # torch 2.11
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
        with pytest.warns(UntestedTorch, match="how a module is compiled"):
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
        manager.current_node = node = SimpleNamespace(path_live_weakrefs=lambda: [lambda: 5])
        container = type("Container", (), {"tree_manager": manager})()
        monkeypatch.setitem(trees.get_obj(trees.local, "tree_manager_containers"), 97, container)
        tree = _torch_internals.graph_tree(torch.device("cuda", 97))
        assert tree == ("recording", True, frozenset({5}), False)
        node._path_from_root = [SimpleNamespace(user_visible_output_idxs=frozenset({0}))]
        assert _torch_internals.graph_tree(torch.device("cuda", 97)).cloned is True

    def test_name_of_the_option_that_copies_outputs(self):
        """In the configuration and in the options of a module, since torch 2.14."""
        module = nn.Linear(3, 2)
        module.compile(mode="reduce-overhead")
        known = "triton.cudagraph_trees_generation_cloning"
        since = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
        assert (known in _torch_internals.compiler_options(module)) is since
        assert _torch_internals.clones_outputs({}, None) is False
        assert _torch_internals.clones_outputs({known: "user_visible"}, None) is True

    def test_names_of_the_states(self, trees):
        """Those that a phase is made of."""
        names = {state.name.lower() for state in trees.ExecutionState}
        assert names == {"none", "warmup", "recording", "execution"}

    def test_words_of_the_error(self, trees):
        """By which it is known, for outputs and for gradients."""
        tell = trees.CUDAGraphTreeManager.format_dealloc_msg
        told = [tell(None)]
        if "is_grad_output" in inspect.signature(tell).parameters:  # since torch 2.14
            told.append(tell(None, is_grad_output=True))
        assert all(_torch_internals.OVERWRITTEN in message for message in told)
        assert ["gradient" in message for message in told] == [False, True][: len(told)]

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
        for ask, unknown, loss in (
            (lambda: _torch_internals.graph_tree(torch.device("cuda", 0)), None, "CUDA graphs do"),
            (_torch_internals.mark_counter, 0, "steps of CUDA graphs are marked"),
            (_torch_internals.generation, None, "the number of a compiled call"),
            (_torch_internals.compile_counters, (0, 0), "which call compiles anew"),
        ):
            with pytest.warns(UntestedTorch, match=f"cannot tell .*{loss}.* All else is checked"):
                assert ask() == unknown
            assert ask() == unknown  # told once


class TestGone:
    """A torch without a private name: the guard falls back to knowing less, and stays safe."""

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

    def test_eager_only(self, without):
        """The public way out of a graph is taken instead."""
        module = without((torch._C._dynamo.eval_frame, "set_code_exec_strategy"))

        def function():
            return 1

        assert module.eager_only("why")(function)() == 1


class TestModules:
    """What a module is made of, and who has written to it."""

    def test_is_what_torch_tells(self):
        """By its public names, where it has some."""
        module = nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2))
        parameters, buffers, parts = _torch_internals.holders(module[1])
        assert parameters == dict(module[1].named_parameters())
        assert buffers == dict(module[1].named_buffers())
        assert parts == {}
        assert _torch_internals.submodules(module) == dict(module.named_children())
        before = _torch_internals.writes_to(module[0].weight)
        with torch.no_grad():
            module[0].weight.zero_()
        assert _torch_internals.writes_to(module[0].weight) == before + 1

    def test_a_module_that_keeps_them_elsewhere(self):
        """Is told as unknown."""
        module = nn.Linear(3, 2)
        del module.__dict__["_buffers"]
        assert _torch_internals.holders(module) is None

    def test_without_the_dict_of_submodules(self):
        """The public way finds the same."""
        module = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
        assert _torch_internals._named_children(module) == _torch_internals.submodules(module)

    def test_without_the_counter(self, monkeypatch):
        """`frozen` sees no writes in place any more, stops no training, and says so once."""
        monkeypatch.setattr(frozen_module, "writes_to", _torch_internals._unknown_writes)
        module = nn.Linear(3, 2)
        policy = CallPolicy({"kl": (0, None)}, requires=(frozen,))
        guard = guard_module(module, policy=policy)
        calls = 0
        with pytest.raises(ConditionUnmet, match="the parameter weight was replaced"):
            with guard.context("training"), guard.sanctioned("kl"):
                with pytest.warns(UntestedTorch, match="cannot tell whether a tensor was written"):
                    guard.module(torch.ones(3))
                with torch.no_grad():
                    module.weight.zero_()
                guard.module(torch.ones(3))
                calls = guard.count()
                module.weight = nn.Parameter(torch.ones(2, 3))
                guard.module(torch.ones(3))
        assert calls == 2
