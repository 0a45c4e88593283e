"""Every guarded call is a range in the trace of a torch profiler, whatever the module."""

import json
from contextlib import contextmanager

import pytest
import torch
from tests.lensnet_guard.helpers import SCOPE, X
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from lensnet_guard import guard_module
from lensnet_guard.boundary.profiling import in_range, range_name

# What torch 2.11 says of the first profile of a process.
pytestmark = pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")


@pytest.fixture
def traced(tmp_path):
    """``with traced(name) as spans:`` profiles; then ``spans()`` tells who began and ended when."""

    @contextmanager
    def trace(**how):
        path = tmp_path / "trace.json"
        with profile(activities=[ProfilerActivity.CPU], **how) as profiler:
            yield lambda: [
                (event["name"], event["ts"], event["ts"] + event["dur"])
                for event in sorted(json.loads(path.read_text())["traceEvents"], key=_begin)
                if event.get("cat") in ("user_annotation", "cpu_op")
            ]
        profiler.export_chrome_trace(str(path))

    return trace


def _begin(event):
    return event["ts"]


def ranges(spans, module="Scorer"):
    return [name for name, *_ in spans() if name.startswith(f"{module} ")]


class TestRange:
    def test_each_call_has_one(self, guard, traced):
        """With its number in the guard's records, and its scope or context."""
        with traced() as spans:
            with guard.context("training"):
                for step in range(2):
                    with guard.micro_step(step), guard.sanctioned(SCOPE):
                        guard.module(X)
            with guard.context("inference"):
                guard.module(X)
        assert ranges(spans) == [
            "Scorer call 1 (preference_scorer)",
            "Scorer call 2 (preference_scorer)",
            "Scorer call 3 (inference)",
        ]
        assert ranges(spans) == [range_name(record) for record in guard.calls]

    def test_it_goes_by_the_name_of_the_guard(self, traced):
        """Any module's."""
        guard = guard_module(nn.Tanh(), name="critic")
        with traced() as spans, guard.context("inference"):
            guard.module(X)
        assert ranges(spans, "critic") == ["critic call 1 (inference)"]

    def test_what_the_module_runs_lies_in_it(self, guard, traced):
        """And what is run before and after does not."""
        with traced() as spans, guard.context("inference"):
            torch.sin(guard.module(torch.cos(X)))
        at = {name: (begin, end) for name, begin, end in spans()}
        begin, end = at["Scorer call 1 (inference)"]
        assert begin <= at["aten::linear"][0] < at["aten::linear"][1] <= end
        assert at["aten::cos"][1] <= begin
        assert at["aten::sin"][0] >= end

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_recompute_names_its_call(self, guard, traced, reentrant):
        """Also where it is stopped early."""
        x = torch.ones(2, 3, requires_grad=True)
        with traced() as spans, guard.context("training"), guard.sanctioned(SCOPE):
            checkpoint(guard.module, x, use_reentrant=reentrant).sum().backward()
        assert ranges(spans) == [
            "Scorer call 1 (preference_scorer)",
            "Scorer recompute of call 1",
        ]

    def test_a_violation_that_is_only_observed_says_which(self, scorer, traced):
        """For the module ran."""
        guard = guard_module(scorer, mode="observe")
        with traced() as spans:
            guard.module(X)
            with guard.context("training"):
                guard.module(X)
                scorer(X)
        assert ranges(spans) == [
            "Scorer call 1 (NoContext)",
            "Scorer call 2 (UnsanctionedCall)",
            "Scorer bypass 3 (BypassedGuard)",
        ]

    def test_it_ends_where_the_module_raises(self, guard, scorer, traced):
        """What comes next does not lie in it."""

        def fail():
            raise ZeroDivisionError

        scorer.inside = fail
        with traced() as spans, guard.context("inference"):
            with pytest.raises(ZeroDivisionError) as raised:
                guard.module(X)
            torch.cos(X)
        assert raised.tb is not None  # whose frames hold all that might end the range by its death
        at = {name: (begin, end) for name, begin, end in spans()}
        assert at["Scorer call 1 (inference)"][1] <= at["aten::cos"][0]

    def test_in_a_thread_that_is_profiled(self, guard, traced, in_thread):
        """As ``profile_all_threads`` does; torch's flag in C++ stays down then."""
        every = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        with traced(experimental_config=every) as spans, guard.context("inference"):
            in_thread(guard.carry(guard.module), X)
        assert ranges(spans) == ["Scorer call 1 (inference)"]


class TestNone:
    def test_without_a_profiler(self, guard):
        """Nothing is put around the run, before a profile and after it."""
        with guard.context("inference"):
            guard.module(X)
        (record,) = guard.calls
        assert in_range(record, print) is print
        with profile(activities=[ProfilerActivity.CPU]):
            assert in_range(record, print) is not print
        assert in_range(record, print) is print

    @pytest.mark.filterwarnings("ignore:`torch.jit")
    def test_in_a_traced_graph(self, guard, traced):
        """A name with a number in it made torch.jit.trace refuse its own graph."""
        with traced() as spans, guard.context("inference"):
            graph = torch.jit.trace(guard.module, (X,))
        assert "record_function" not in str(graph.inlined_graph)
        # The check of the trace traces once more, and then runs the module as it is.
        assert ranges(spans) == ["Scorer call 3 (inference)"]

    def test_a_name_is_no_reason_to_compile_again(self, traced):
        """Each call's is another, and the compiled code does not see it."""
        torch._dynamo.reset()
        backend = CompileCounterWithBackend("eager")
        module = nn.Linear(3, 2)
        module.compile(backend=backend)
        guard = guard_module(module)
        with guard.context("inference"):
            guard.module(X)
            with traced() as spans:
                for _ in range(12):
                    guard.module(X)
        assert len(ranges(spans, "Linear")) == 12
        assert backend.frame_count == 1
