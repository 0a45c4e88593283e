"""Records: who called, with what, and that nothing is kept alive by them."""

# Blocks that end with an error are what is tested here, so `with` statements nest and do much.

import contextlib
import copy
import gc
import json
import os
import pickle
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from lensnet_guard import guard_module
from lensnet_guard.calls import record as record_module
from lensnet_guard.calls.record import (
    CallRecord,
    Frame,
    capture_stack,
    describe_inputs,
)
from lensnet_guard.logs.history import CALL_FRAMES, RING_RECORDS, VIOLATION_FRAMES

HERE = os.path.abspath(__file__)
needs_co_qualname = pytest.mark.skipif(sys.version_info < (3, 11), reason="co_qualname is 3.11+")


@pytest.fixture
def lens():
    guard = guard_module(nn.Linear(3, 2))
    with guard.context("inference"):
        yield guard


def inputs_of(*args, **kwargs):
    """The text of the inputs, in the way that a record gives it."""
    record = CallRecord(
        *(1, 1, "m", "call", "allow", None, None, None, None, None, "t", True),
        _inputs=describe_inputs(args, kwargs),
    )
    return record.inputs


class TestAttributes:
    def test_of_a_training_call(self, guard, x, in_thread):
        """Each public attribute says what was true when the call was made."""
        with (
            guard.context("training"),
            guard.micro_step(7, 3),
            guard.sanctioned("preference_scorer"),
        ):
            in_thread(guard.carry(guard.module), x, name="scoring")
        (record,) = guard.calls
        assert (record.seq, record.module, record.kind) == (1, "Scorer", "call")
        assert (record.verdict, record.reason) == ("allow", None)
        assert (record.context, record.scope) == ("training", "preference_scorer")
        assert (record.step, record.micro_step) == (7, 3)
        assert (record.thread, record.grad_enabled) == ("scoring", True)
        assert record.inputs == ("float32[4, 3] cpu",)
        assert record.outcome == "returned"
        assert record.duration_ms > 0

    def test_of_an_inference_call(self, lens, x):
        """Outside any micro-step step and scope are None; no_grad shows."""
        with torch.no_grad():
            lens.module(x)
        (record,) = lens.calls
        assert (record.context, record.scope) == ("inference", None)
        assert (record.step, record.micro_step) == (None, None)
        assert record.grad_enabled is False

    def test_of_a_refused_call(self, guard, x):
        """A refused call has a reason, no duration, and never an outcome of the module."""
        with guard.context("training"), pytest.raises(Exception, match="outside its sanctioned"):
            guard.module(x)
        (record,) = guard.calls
        assert (record.kind, record.verdict) == ("call", "refuse")
        assert record.reason == "UnsanctionedCall"
        assert (record.outcome, record.duration_ms) == ("refused", None)

    def test_of_a_running_call(self, scorer, guard, x):
        """While the module runs, outcome and duration are not known."""
        seen = []
        scorer.inside = lambda: seen.append((guard.calls[0].outcome, guard.calls[0].duration_ms))
        with guard.context("inference"):
            guard.module(x)
        assert seen == [(None, None)]

    def test_kind_of_what_is_no_call(self, guard):
        """An unmet budget and a refused switch have kinds of their own."""
        with guard.context("training"):
            with pytest.raises(Exception, match="ended before"), guard.micro_step():
                pass
            with pytest.raises(Exception, match="cannot change"), guard.micro_step():
                guard.context("inference").__enter__()
        assert [r.kind for r in guard.violations] == ["micro_step", "context"]
        assert guard.calls == ()

    def test_seq_counts_everything_in_order(self, guard, x):
        """Allowed, refused and other records share one numbering from 1."""
        with guard.context("inference"):
            guard.module(x)
        with pytest.raises(Exception, match="neither"):
            guard.module(x)
        with guard.context("inference"):
            guard.module(x)
        assert [r.seq for r in guard.calls] == [1, 2, 3]
        assert [r.seq for r in guard.violations] == [2]

    def test_repr_is_short(self, lens, x):
        """The repr leaves stack and inputs out."""
        lens.module(x)
        assert "_stack" not in repr(lens.calls[0])
        assert "_inputs" not in repr(lens.calls[0])

    def test_records_are_compared_by_identity(self, lens, x):
        """Two equal-looking calls are two calls."""
        lens.module(x)
        record = lens.calls[0]
        assert record != copy.copy(record)
        assert len({record, copy.copy(record)}) == 2


class TestInputs:
    @pytest.mark.parametrize(
        ("args", "kwargs", "text"),
        [
            ((torch.zeros(2, 31, 64),), {}, ("float32[2, 31, 64] cpu",)),
            ((torch.zeros((), dtype=torch.bool),), {}, ("bool[] cpu",)),
            ((torch.empty(0, 3, dtype=torch.bfloat16),), {}, ("bfloat16[0, 3] cpu",)),
            ((torch.empty(10**9, 10**9, device="meta"),), {}, (f"float32[{10**9}, {10**9}] meta",)),
            ((nn.Parameter(torch.zeros(1)),), {}, ("float32[1] cpu",)),
            ((), {"x": torch.zeros(1), "mask": None}, ("x=float32[1] cpu", "mask=NoneType")),
            ((1, 2.5, "secret", b"secret", None), {}, ("int", "float", "str", "bytes", "NoneType")),
            (([torch.zeros(1), 2],), {}, ("(float32[1] cpu, int)",)),
            (([],), {"also": ()}, ("()", "also=()")),
            (((torch.zeros(1), [3, ["deep"]]),), {}, ("(float32[1] cpu, (int, list))",)),
            (({"a": torch.zeros(1), 2: {"b": 3}},), {}, ("(a=float32[1] cpu, 2=(b=int))",)),
            ((list(range(10_000)),), {}, ("(int, int, int, int, int, int, int, int)",)),
            ((object(),), {}, ("object",)),
            ((), {}, ()),
        ],
    )
    def test_text(self, args, kwargs, text):
        """Shape, dtype and device of tensors, types of all else, two levels deep."""
        assert inputs_of(*args, **kwargs) == text

    def test_self_containing_list_and_dict(self):
        """A structure that contains itself is described without end."""
        endless, loop = [1], {}
        endless.append(endless)
        loop["me"] = loop
        assert inputs_of(endless, loop) == ("(int, (int, list))", "(me=(me=dict))")

    def test_sparse_and_nested_tensors(self):
        """Layouts without a plain shape are named by their type at least."""
        sparse = torch.eye(3).to_sparse()
        assert inputs_of(sparse) == ("float32[3, 3] cpu",)
        with pytest.warns(UserWarning, match="nested"):
            nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
        assert inputs_of(nested) == ("Tensor",)

    def test_a_tensor_as_a_key_showed_its_values(self):
        """Keys that are neither strings nor numbers are described by their type."""
        (text,) = inputs_of({torch.tensor([1234.0]): 1, ("a", 7): 2, 3: 4})
        assert text == "(Tensor=int, tuple=int, 3=int)"

    def test_are_those_at_the_time_of_the_call(self, lens, x):
        """A list that is changed afterwards changes no record."""

        class Last(nn.Module):
            def forward(self, xs):
                return xs.pop()

        guard = guard_module(Last())
        with guard.context("inference"):
            guard.module([x, x])
        assert guard.calls[0].inputs == ("(float32[4, 3] cpu, float32[4, 3] cpu)",)


class TestNothingIsKeptAlive:
    def test_allowed_call(self, lens, x):
        """Neither inputs nor outputs outlive their owners because of a record."""
        given = x * 2
        result = lens.module(given)
        watched = [weakref.ref(given), weakref.ref(result)]
        del given, result
        gc.collect()
        assert [ref() for ref in watched] == [None, None]
        assert len(lens.calls) == 1

    def test_refused_call(self, guard, x):
        """After the exception is gone, so are the arguments of the refused call."""

        def refused():
            given = x * 2
            with contextlib.suppress(Exception):
                guard.module(given, pair=[given, {"again": given}])
            return weakref.ref(given)

        ref = refused()
        gc.collect()
        assert ref() is None
        assert len(guard.violations) == 1

    def test_locals_of_the_callers(self, lens, x):
        """A record holds code, no frame: what the callers held is free when they return."""

        def call():
            local = torch.zeros(5)
            lens.module(x)
            return weakref.ref(local)

        ref = call()
        gc.collect()
        assert ref() is None

    def test_micro_step_given_as_a_tensor(self, guard, x):
        """A step that came as a tensor was kept in every record; now it is an int there."""
        step = torch.tensor(3)
        with guard.context("inference"), guard.micro_step(step, torch.tensor(1)):
            guard.module(x)
        (record,) = guard.calls
        assert (type(record.step), record.step, record.micro_step) == (int, 3, 1)


class TestRing:
    def test_holds_the_newest_records_while_counts_stay_exact(self, x):
        """The ring is bounded, count() and violation_count are not."""
        guard = guard_module(nn.Identity(), mode="observe")
        with guard.context("inference"):
            for _ in range(RING_RECORDS + 100):
                guard.module(x)
        assert guard.count() == RING_RECORDS + 100
        assert [guard.calls[0].seq, guard.calls[-1].seq] == [101, RING_RECORDS + 100]
        assert len(guard.calls) == RING_RECORDS
        for _ in range(RING_RECORDS + 5):
            guard.module(x)
        assert guard.violation_count == RING_RECORDS + 5
        assert len(guard.violations) == len(guard.calls) == RING_RECORDS
        assert guard.count() == RING_RECORDS + 100


class TestStack:
    def test_is_innermost_first(self, lens, x):
        """The frame that made the call comes first, then whoever called it."""

        def inner():
            lens.module(x)

        def outer():
            inner()

        outer()
        frames = lens.calls[0].stack()
        names = [frame.function.rpartition(".")[2] for frame in frames[:3]]
        assert names == ["inner", "outer", "test_is_innermost_first"]
        assert [frame.file for frame in frames[:3]] == [HERE] * 3
        lines = [inner.__code__.co_firstlineno + 1, outer.__code__.co_firstlineno + 1]
        assert [frame.line for frame in frames[:2]] == lines

    def test_line_of_each_call(self, lens, x):
        """Calls from one function are told apart by their lines, also in a multi-line call."""
        lens.module(x)
        lens.module(
            x,
        )
        first, second = (record.caller.line for record in lens.calls)
        assert second == first + 1

    def test_depth_is_bounded(self, lens, guard, x):
        """Deep recursion costs no more than the frames that are kept."""

        def dive(depth, fn):
            return dive(depth - 1, fn) if depth else fn()

        dive(200, lambda: lens.module(x))
        assert len(lens.calls[0].stack()) == CALL_FRAMES
        with contextlib.suppress(Exception):
            dive(200, lambda: guard.module(x))
        assert len(guard.violations[0].stack()) == VIOLATION_FRAMES

    def test_function_without_a_file(self, lens, x):
        """Code made by exec is named as Python names it, with a line and no invented path."""
        exec("\nlens.module(x)", {"lens": lens, "x": x})
        assert lens.calls[0].caller[:2] == ("<string>", 2)

    def test_no_python_frame_at_all(self, lens):
        """Without any frame the caller is unknown, not an error."""
        record = CallRecord(1, 1, "m", "call", "allow", None, None, None, None, None, "t", True)
        assert capture_stack(None, 8) == ()
        assert record.stack() == []
        assert record.caller == Frame("<unknown>", 0, "<unknown>")
        assert str(record.caller) == "<unknown>:0 in <unknown>"

    def test_frame_text_is_relative_to_the_working_directory(self, monkeypatch, tmp_path):
        """Below the working directory the path is relative, elsewhere absolute."""
        monkeypatch.chdir(tmp_path)
        inside = Frame(os.path.join(os.getcwd(), "a", "b.py"), 3, "f")
        assert str(inside) == f"{Path('a', 'b.py')}:3 in f"
        assert str(Frame("/elsewhere/b.py", 3, "f")) == "/elsewhere/b.py:3 in f"

    def test_frame_text_without_a_working_directory(self, monkeypatch, tmp_path):
        """A working directory that was deleted makes no text fail."""
        gone = tmp_path / "gone"
        gone.mkdir()
        monkeypatch.chdir(gone)
        gone.rmdir()
        assert str(Frame("/elsewhere/b.py", 3, "f")) == "/elsewhere/b.py:3 in f"


class TestCaller:
    def caller_is_here(self, record, function):
        caller = record.caller
        return (caller.file, caller.function.rpartition(".")[2]) == (HERE, function)

    def test_through_sequential(self, lens, x):
        """Torch's own containers stand between, and are not the caller."""
        nn.Sequential(nn.Identity(), nn.Sequential(lens.module))(x)
        (record,) = lens.calls
        assert self.caller_is_here(record, "test_through_sequential")
        assert record.stack()[0].file.startswith(os.path.dirname(torch.__file__))

    def test_through_a_wrapping_parent(self, lens, x):
        """A DDP-like parent written by the user is the caller, since its forward makes the call."""

        class Wrapper(nn.Module):
            def __init__(self, module):
                super().__init__()
                self.module = module

            def forward(self, *args):
                return self.module(*args)

        Wrapper(lens.module)(x)
        assert self.caller_is_here(lens.calls[0], "forward")

    def test_through_functional_call(self, lens, x):
        """torch.func's machinery is skipped."""
        parent = nn.Sequential(lens.module)
        torch.func.functional_call(parent, dict(parent.named_parameters()), (x,))
        assert self.caller_is_here(lens.calls[0], "test_through_functional_call")

    def test_of_a_block_in_an_exit_stack(self, guard):
        """A budget that is found unmet by an ExitStack is the fault of the stack's owner."""
        with pytest.raises(Exception, match="ended before"), contextlib.ExitStack() as stack:
            stack.enter_context(guard.context("training"))
            stack.enter_context(guard.micro_step())
        assert self.caller_is_here(guard.violations[0], "test_of_a_block_in_an_exit_stack")

    def test_of_a_carried_function(self, lens, x):
        """guard.carry stands between, and is not the caller."""
        lens.carry(lambda: lens.module(x))()
        assert self.caller_is_here(lens.calls[0], "<lambda>")
        lens.carry(lens.module)(x)
        assert self.caller_is_here(lens.calls[1], "test_of_a_carried_function")

    def test_of_map(self, lens, x):
        """A call made by C code belongs to the Python function that runs it."""
        list(map(lens.module, [x]))
        assert self.caller_is_here(lens.calls[0], "test_of_map")

    def test_when_everything_is_internal(self, lens, x, monkeypatch):
        """With no frame outside, the innermost one is the caller."""
        monkeypatch.setattr(record_module, "_INTERNAL_PATHS", ("",))
        lens.module(x)
        assert lens.calls[0].caller == lens.calls[0].stack()[0]


class TestPickling:
    def test_keeps_everything_as_text(self, guard, x):
        """A pickled record has the same attributes, inputs, caller and stack."""
        with guard.context("inference"):
            guard.module(x, mask=None)
        (record,) = guard.calls
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            loaded = pickle.loads(pickle.dumps(record, protocol))
            assert repr(loaded) == repr(record)
            assert loaded.inputs == record.inputs == ("float32[4, 3] cpu", "mask=NoneType")
            assert loaded.stack() == record.stack()
            assert loaded.caller == record.caller
            assert loaded.to_log() == record.to_log()

    def test_twice(self, lens, x):
        """A record that came out of a pickle can go into one."""
        lens.module(x)
        once = pickle.loads(pickle.dumps(lens.calls[0]))
        twice = pickle.loads(pickle.dumps(once))
        assert twice.stack() == lens.calls[0].stack()
        assert copy.deepcopy(twice).inputs == lens.calls[0].inputs


class TestStrangeInputs:
    def test_a_log_broke_symbolic_tracing(self, scorer, x, tmp_path):
        """A symbolic shape cannot be hashed, and was."""
        from torch.fx.experimental.proxy_tensor import make_fx

        guard = guard_module(scorer, log=tmp_path)
        with guard.context("inference"):
            make_fx(guard.module, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)
        guard.end_log()
        assert guard.calls[0].inputs[0].startswith("float32[s")

    def test_a_tensor_that_tells_nothing(self, lens):
        """A subclass whose shape raises is named by its type, and called."""

        class Secret(torch.Tensor):
            @property
            def shape(self):
                raise AttributeError("secret")

        lens.module(torch.ones(1, 3).as_subclass(Secret))
        assert lens.calls[0].inputs == ("Secret",)


class TestToLog:
    def test_fields(self, lens, x):
        """Every public attribute under its own name, frames by their OpenTelemetry names."""
        lens.module(x)
        (record,) = lens.calls
        fields = json.loads(json.dumps(record.to_log()))
        assert list(fields) == [
            *("seq", "guard", "module", "kind", "verdict", "reason", "context", "scope", "step"),
            *("micro_step", "thread", "grad_enabled", "duration_ms", "outcome", "recompute_of"),
            *("compiled", "method", "inputs", "caller", "stack"),
        ]
        assert fields["stack"][0] == {
            "code.file.path": HERE,
            "code.line.number": record.caller.line,
            "code.function.name": record.caller.function,
        }
        assert len(fields["stack"]) == len(record.stack())
