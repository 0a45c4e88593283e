"""What a record tells of compilation and CUDA graphs, field by field, and from the log."""

import json
import re

import pytest
import torch
from tests.lensnet_guard.helpers import X
from torch import nn

from lensnet_guard import guard_module
from lensnet_guard._torch_internals import GraphTree
from lensnet_guard.boundary import hazards
from lensnet_guard.calls.compiled import CompileState
from lensnet_guard.postmortem import analyse

FIELDS = [
    *("cuda_graphs", "capturing", "generation", "marks", "pending_backward", "new_inputs"),
    *("live_outputs", "phase", "graphs_compiled", "cuda_graphs_skipped"),
]


@pytest.fixture
def call(graphed_guard):
    """Make a call without grad; its state comes back, and its output with ``keep``."""
    kept = []

    def call(x=X, *, keep=False):
        with torch.no_grad(), graphed_guard.context("inference"):
            output = graphed_guard.module(x)
        if keep:
            kept.append(output)
        return graphed_guard.calls[-1].compiled

    return call


@pytest.fixture
def tree(monkeypatch):
    """What torch would tell of its graphs on a GPU."""

    def tell(phase="none", *, pending_backward=False, live=()):
        told = GraphTree(phase, pending_backward, frozenset(live))
        monkeypatch.setattr(hazards, "graph_tree", lambda _: told)

    return tell


class TestFields:
    def test_of_a_module_that_is_not_compiled(self):
        """There is nothing to tell."""
        guard = guard_module(nn.Linear(3, 2))
        with guard.context("inference"):
            guard.module(X)
        assert guard.calls[0].compiled is None

    def test_cuda_graphs(self, call):
        """From the options that the module was compiled with."""
        assert call().cuda_graphs is True

    def test_compiled_without_cuda_graphs(self):
        """It is told all the same, but for what only CUDA graphs have."""
        torch._dynamo.reset()
        module = nn.Linear(3, 2)
        module.compile(backend="eager")
        guard = guard_module(module)
        with guard.context("inference"):
            kept = [guard.module(X), guard.module(X)]
        first, second = (record.compiled for record in guard.calls)
        assert (first.cuda_graphs, first.graphs_compiled, second.graphs_compiled) == (False, 1, 0)
        assert (second.live_outputs, second.pending_backward, second.phase) == ((), None, None)
        assert len(kept) == 2

    def test_capturing(self, call, monkeypatch):
        """A graph of the caller's own is being captured."""
        assert call().capturing is False
        monkeypatch.setattr(hazards, "capturing", lambda: True)
        assert call().capturing is True

    def test_a_module_that_is_captured_and_not_compiled(self, monkeypatch):
        """No replay of the call will be seen: the record says so."""
        monkeypatch.setattr(hazards, "capturing", lambda: True)
        guard = guard_module(nn.Linear(3, 2))
        with guard.context("inference"):
            guard.module(X)
        state = guard.calls[0].compiled
        assert (state.capturing, state.cuda_graphs) == (True, False)

    def test_generation(self, call):
        """A number that grows with every compiled call."""
        numbers = [call().generation for _ in range(3)]
        assert numbers == sorted(set(numbers))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_marks(self, call):
        """Counted from the first."""
        before = call().marks
        torch.compiler.cudagraph_mark_step_begin()
        torch.compiler.cudagraph_mark_step_begin()
        assert (before, call().marks) == (0, 2)

    def test_pending_backward(self, call, tree):
        """As torch tells it, unknown where it tells nothing."""
        assert call().pending_backward is None
        for pending in (True, False):
            tree(pending_backward=pending)
            assert call().pending_backward is pending

    def test_a_backward_that_is_pending_keeps_outputs(self, call, tree, graphed_guard):
        """Torch overwrites nothing until then: no hazard, and the output stays in use."""
        with torch.no_grad(), graphed_guard.context("inference"):
            kept = graphed_guard.module(X)
        (output,) = graphed_guard._admission.execution.compiled._outputs
        tree(pending_backward=True, live={output.storages[0].cdata})
        assert call().live_outputs == (1,)
        assert kept is not None

    def test_live_outputs(self, call):
        """The calls whose outputs somebody holds, and no others."""
        call()
        call(keep=True)
        with pytest.warns(hazards.LensNetHazard):
            assert call().live_outputs == (2,)

    def test_live_outputs_as_torch_tells(self, call, tree):
        """It holds outputs of recorded graphs itself, and knows whether anybody else does."""
        call(keep=True)
        tree("recording")
        assert call().live_outputs == ()

    def test_new_inputs(self, call):
        """Shapes, dtypes and devices that no earlier call had."""
        inputs = (X, X, X[:1], X.double().float(), X[:1])
        assert [call(x).new_inputs for x in inputs] == [True, False, True, False, False]

    @pytest.mark.parametrize(
        ("torchs", "phase"),
        [("warmup", "warmup"), ("recording", "recording"), ("execution", "replay"), ("none", None)],
    )
    def test_phase(self, call, tree, torchs, phase):
        """What torch's graphs did in the call."""
        tree(torchs)
        assert call().phase == phase

    def test_graphs_compiled(self, call):
        """One for the first call, and one more for inputs that do not fit it."""
        assert [call(x).graphs_compiled for x in (X, X, X[:1], X)] == [1, 0, 1, 0]

    def test_cuda_graphs_skipped(self, call, graphed_guard, monkeypatch):
        """Functions for which torch gave up CUDA graphs in this call."""
        module = graphed_guard.module.__wrapped__
        run = module._compiled_call_impl

        def give_up(x):
            torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] += 1  # as torch does
            return run(x)

        before = call().cuda_graphs_skipped
        give_up.get_compiler_config = run.get_compiler_config
        monkeypatch.setattr(module, "_compiled_call_impl", give_up)
        assert (before, call().cuda_graphs_skipped, call().cuda_graphs_skipped) == (0, 1, 1)

    def test_a_call_that_raised(self, graphed_guard):
        """What it compiled before is told too."""
        with pytest.raises(RuntimeError), graphed_guard.context("inference"):
            graphed_guard.module(torch.ones(2, 4))
        assert graphed_guard.calls[0].compiled.graphs_compiled == 0

    def test_counters_that_were_reset_meanwhile(self, monkeypatch):
        """`torch._dynamo.reset` sets them to zero: no negative numbers."""
        state = CompileState(*(True, False, 1, 0, None, True), _counters=(5, 5))
        monkeypatch.setattr("lensnet_guard.calls.compiled.compile_counters", lambda: (0, 0))
        state.end(None)
        assert (state.graphs_compiled, state.cuda_graphs_skipped) == (0, 0)


class TestInTheLog:
    @pytest.fixture
    def log(self, graphed_guard, call, tree, tmp_path):
        """Two calls, the second with other inputs while the first one's output is in use."""
        graphed_guard.start_log(tmp_path)
        call(keep=True)
        tree("recording", pending_backward=True, live=_cdata(graphed_guard))
        call(X[:1])
        graphed_guard.end_log()
        return tmp_path / "lensnet.rank0.jsonl"

    def test_every_field_is_written(self, log):
        """As the call begins, and with what is known at its end."""
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        begins = [line["compiled"] for line in lines if line["event"] == "call.begin"]
        ends = [line["compiled"] for line in lines if line["event"] == "call.end"]
        assert all(list(told) == FIELDS for told in (*begins, *ends))
        begin, end = begins[1], ends[1]
        assert (begin["live_outputs"], begin["pending_backward"]) == ([1], True)
        assert (begin["phase"], begin["graphs_compiled"], begin["cuda_graphs_skipped"]) == (
            *(None, None),
            None,
        )
        assert (end["phase"], end["graphs_compiled"], end["cuda_graphs_skipped"]) == (
            *("recording", 1),
            0,
        )

    def test_the_post_mortem_reads_it(self, log):
        """Phases are counted, and calls that compiled are named with their inputs."""
        (run,) = analyse([log]).runs
        assert run.phases == {"recording": 1}
        assert [note.partition(" at ")[0] for note in run.compilations.kept] == ["call 1", "call 2"]
        what = "call compiled 1 graph; inputs float32[1, 3] cpu"
        assert re.search(rf" in (call\.<locals>\.)?{re.escape(what)}$", run.compilations.kept[1])

    def test_a_call_in_flight_says_what_torch_was_doing(self, log):
        """A crash in a CUDA graph leaves the state that it began with."""
        lines = log.read_text().splitlines(keepends=True)
        cut = next(n for n, line in enumerate(lines) if '"seq":2' in line and "call.end" in line)
        log.write_text("".join(lines[:cut]))
        (call,) = analyse([log]).runs[0].in_flight
        generation = json.loads(lines[cut])["compiled"]["generation"]
        assert call.compiled == (
            f"compiled with CUDA graphs, generation {generation}, a backward was pending, the "
            "first inputs of these shapes, outputs in use of call 1"
        )


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler, on import
class TestOnCuda:
    """The same fields from real CUDA graphs."""

    @pytest.fixture
    def guard(self):
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        torch._dynamo.reset()
        torch._inductor.cudagraph_trees.reset_cudagraph_trees()
        module = nn.Linear(3, 2).cuda()
        module.compile(mode="reduce-overhead")
        guard = guard_module(module)
        with guard.context("inference"):
            yield guard
        torch._dynamo.reset()

    def test_phases(self, guard):
        """First warm-up, then recording, then replays; each call a new generation."""
        with torch.no_grad():
            for _ in range(4):
                guard.module(X.cuda()).sum().item()
        states = [record.compiled for record in guard.calls]
        assert [state.phase for state in states] == ["warmup", "recording", "replay", "replay"]
        assert [state.graphs_compiled for state in states] == [1, 0, 0, 0]
        assert all(state.cuda_graphs and not state.capturing for state in states)
        assert all(state.live_outputs == () for state in states)
        assert len({state.generation for state in states}) == 4

    def test_pending_backward(self, guard):
        """From the forward until its backward."""
        pending = []
        for _ in range(3):
            loss = guard.module(X.cuda()).sum()
            guard.module(X.cuda())
            pending.append(guard.calls[-1].compiled.pending_backward)
            loss.backward()
            guard.module.zero_grad()  # or the next backward adds to memory of the graph's
        assert pending[-1] is True

    def test_live_outputs_of_replays(self, guard):
        """Also when torch has recorded the graph, and holds the output itself."""
        with torch.no_grad():
            for _ in range(4):
                guard.module(X.cuda()).sum().item()
            kept = guard.module(X.cuda())
            with pytest.warns(hazards.LensNetHazard):
                guard.module(X.cuda())
        assert guard.calls[-1].compiled.live_outputs == (5,)
        assert kept is not None

    def test_a_graph_of_the_callers_own(self, guard):
        """The call is captured once, and the replay is no call."""
        guard = guard_module(nn.Linear(3, 2).cuda())
        x, graph = X.cuda(), torch.cuda.CUDAGraph()
        with guard.context("inference"), torch.no_grad():
            guard.module(x)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                guard.module(x)
            graph.replay()
        before, captured = (record.compiled for record in guard.calls)
        assert before is None
        assert (captured.capturing, captured.cuda_graphs) == (True, False)


def _cdata(guard):
    return {
        storage.cdata
        for output in guard._admission.execution.compiled._outputs
        for storage in output.storages
    }
