"""CUDA graphs on a machine without: a backend that writes every output to the same buffer."""

import contextlib
import copy
import importlib
import json
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from tests.lensnet_guard.helpers import X
from torch import nn

from lensnet_guard import LensNetHazard, guard_module
from lensnet_guard._torch_internals import GraphTree
from lensnet_guard.boundary import hazards
from lensnet_guard.postmortem import analyse
from lensnet_guard.postmortem.report import render_report


@pytest.fixture
def guard(graphed_guard):
    """In inference, where calls are free."""
    with graphed_guard.context("inference"):
        yield graphed_guard


class TestHazard:
    def test_the_backend_overwrites(self, guard):
        """The premise: the first result changes under the caller's hands."""
        with torch.no_grad(), pytest.warns(LensNetHazard):
            first = guard.module(X)
            before = first.clone()
            guard.module(2 * X)
        assert not torch.equal(first, before)

    def test_an_output_that_is_in_use(self, guard):
        """Both calls are named, with file and line."""
        with torch.no_grad(), pytest.warns(LensNetHazard) as caught:
            kept = guard.module(X)
            guard.module(2 * X)
        (warning,) = (w for w in caught if w.category is LensNetHazard)
        assert warning.filename == __file__  # the line of the second call
        pattern = (
            r"critic: an output of call 1 at \S+test_hazards\.py:\d+ in \S+ is still in use as "
            r"call 2 at \S+test_hazards\.py:\d+ in \S+ starts without grad\. The module is "
            r"compiled with CUDA graphs, so the second call writes over it\. Copy what is still "
            r"needed, or put both calls into one batch\n"
            r"  explained by lensnet-guard explain overwritten-graph-outputs"
        )
        assert re.fullmatch(pattern, str(warning.message))
        assert kept.shape == (2, 2)

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_a_compiled_forward_on_the_instance_was_not_seen(self, when):
        """`model.forward = torch.compile(model.forward)`, as recipes have it."""
        module = nn.Linear(3, 2)
        compiled = torch.compile(module.forward, backend="eager")
        compiled.get_compiler_config = lambda: {"triton.cudagraphs": True}
        if when == "before":
            module.forward = compiled
        guard = guard_module(module)
        if when == "after":
            module.forward = compiled
        with guard.context("inference"), torch.no_grad(), pytest.warns(LensNetHazard):
            kept = guard.module(X)
            guard.module(2 * X)
        assert kept.shape == (2, 2)
        assert [call.compiled.cuda_graphs for call in guard.calls] == [True, True]

    def test_a_view_of_an_output(self, guard):
        """It is the memory that counts."""
        with torch.no_grad(), pytest.warns(LensNetHazard):
            part = guard.module(X)[0]
            guard.module(2 * X)
        assert part.shape == (2,)

    def test_an_output_that_was_dropped(self, guard):
        """Nobody can read it any more."""
        with torch.no_grad():
            for _ in range(3):
                guard.module(X).sum().item()
        # The earlier ones are forgotten, without a warning.
        assert len(guard._admission.execution.compiled._outputs) == 1

    def test_calls_with_grad(self, guard):
        """Torch keeps outputs apart that wait for a backward."""
        first = guard.module(X)
        second = guard.module(2 * X)
        (first.sum() + second.sum()).backward()
        assert len(guard._admission.execution.compiled._outputs) == 2  # both in use, and no warning

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_after_a_mark(self, guard):
        """The user has said that a new step begins."""
        with torch.no_grad():
            kept = guard.module(X)
            torch.compiler.cudagraph_mark_step_begin()
            guard.module(2 * X)
        assert kept is not None

    def test_a_mark_does_not_save_the_output_of_the_same_step(self, graphed_guard):
        """It lets the second call write over the first one's output, also one with grad."""
        with graphed_guard.context("inference"), graphed_guard.micro_step(3):
            with pytest.warns(LensNetHazard) as caught:
                torch.compiler.cudagraph_mark_step_begin()
                kept = graphed_guard.module(X)
                torch.compiler.cudagraph_mark_step_begin()
                graphed_guard.module(2 * X)
        (warning,) = (w for w in caught if w.category is LensNetHazard)
        assert re.fullmatch(
            r"critic: an output of call 1 at \S+:\d+ in \S+ is still in use as call 2 at "
            r"\S+:\d+ in \S+ starts after a mark in the same micro-step\. The module is compiled "
            r"with CUDA graphs, and cudagraph_mark_step_begin lets the second call write over it\. "
            r"Copy what is still needed, put both calls into one batch, or mark where the "
            r"micro-step begins only\n"
            r"  explained by lensnet-guard explain overwritten-graph-outputs",
            str(warning.message),
        )
        assert kept.shape == (2, 2)

    def test_marks_between_steps(self, graphed_guard):
        """What is left of the last step when the next one begins was meant to go."""
        kept = []
        with graphed_guard.context("inference"):
            for step in range(3):
                torch.compiler.cudagraph_mark_step_begin()
                with graphed_guard.micro_step(step):
                    kept = [graphed_guard.module(X), kept]
        assert len(graphed_guard.calls) == 3  # and a warning would have been an error

    def test_calls_after_one_mark(self, graphed_guard):
        """Until the next mark torch keeps their outputs apart."""
        with torch.no_grad(), graphed_guard.context("inference"), graphed_guard.micro_step():
            torch.compiler.cudagraph_mark_step_begin()
            kept = [graphed_guard.module(X), graphed_guard.module(2 * X)]
        assert len(kept) == 2

    @pytest.mark.parametrize("where", ["in the options", "in the configuration", "in the graphs"])
    def test_outputs_that_torch_copies(self, guard, monkeypatch, where):
        """`cudagraph_trees_generation_cloning="user_visible"`, since torch 2.14: no hazard."""
        option = "cudagraph_trees_generation_cloning"
        if where == "in the options":
            options = {"triton.cudagraphs": True, f"triton.{option}": "user_visible"}
            monkeypatch.setattr(hazards, "compiler_options", lambda _: options)
        with torch.no_grad():
            kept = guard.module(X)
            if where == "in the graphs":
                live = frozenset(
                    s.cdata for s in guard._admission.execution.compiled._outputs[0].storages
                )
                tree = GraphTree("execution", False, live, cloned=True)
                monkeypatch.setattr(hazards, "graph_tree", lambda _: tree)
            elif where == "in the configuration":
                config = SimpleNamespace(triton=SimpleNamespace(**{option: "user_visible"}))
                monkeypatch.setitem(sys.modules, "torch._inductor.config", config)
            guard.module(2 * X)
        assert kept is not None
        assert not guard._admission.execution.compiled._written

    def test_a_module_without_cuda_graphs(self):
        """Eager or compiled otherwise, every call has memory of its own."""
        for compile_it in (lambda m: None, lambda m: m.compile(backend="eager")):
            torch._dynamo.reset()
            module = nn.Linear(3, 2)
            compile_it(module)
            guard = guard_module(module)
            with torch.no_grad(), guard.context("inference"):
                kept = [guard.module(X) for _ in range(3)]
            assert len(kept) == 3

    def test_as_an_error(self, guard):
        """On request the second call does not run."""
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error", LensNetHazard)
            kept = guard.module(X)
            before = copy.deepcopy(kept)
            with pytest.raises(LensNetHazard):
                guard.module(2 * X)
        assert torch.equal(kept, before)
        assert not guard._admission.inside.here

    def test_in_the_log(self, guard, tmp_path):
        """And in the post-mortem, which names both lines."""
        guard.start_log(tmp_path)
        with torch.no_grad(), pytest.warns(LensNetHazard):
            kept = guard.module(X)
            guard.module(2 * X)
        guard.end_log()
        analysis = analyse([tmp_path])
        (hazard,) = analysis.runs[0].hazards.kept
        page = "".join(render_report(analysis, {}, tmp_path))
        assert f'<li class="remark">{hazard}</li>' in page
        assert re.fullmatch(
            r"call 2 at \S+:\d+ in \S+ wrote over an output of call 1 at \S+:\d+ in \S+ that was "
            r"in use",
            hazard,
        )
        assert kept is not None


class TestBlame:
    ERROR = (
        "Error: accessing tensor output of CUDAGraphs that has been overwritten by a subsequent "
        "run. Stack trace: unknown"
    )
    WHERE = r"\S+test_hazards\.py:\d+ in (?:TestBlame\.)?overwritten"

    def test_torchs_error_gets_both_calls(self, guard):
        """Torch names the producer at most, the guard also the call that wrote over it."""
        with (
            pytest.raises(RuntimeError) as caught,
            pytest.warns(LensNetHazard),
            torch.no_grad(),
            guard.context("inference"),
        ):
            kept = guard.module(X)
            guard.module(2 * X)
            raise RuntimeError(self.ERROR)
        (note,) = caught.value.__notes__
        assert re.fullmatch(
            r"lensnet_guard: the output of call 1 of critic at \S+:\d+ in \S+ was overwritten by "
            r"call 2 at \S+:\d+ in \S+\n"
            r"  explained by lensnet-guard explain overwritten-graph-outputs",
            note,
        )
        assert kept is not None

    @pytest.fixture
    def overwritten(self, guard, tmp_path):
        """A log of a run that ended in torch's error."""
        guard.start_log(tmp_path)
        with (
            pytest.raises(RuntimeError),
            pytest.warns(LensNetHazard),
            torch.no_grad(),
            guard.context("inference"),
        ):
            kept = guard.module(X)
            guard.module(2 * X)
            raise RuntimeError(self.ERROR)
        assert kept is not None
        guard.end_log()
        return tmp_path

    def test_in_the_log(self, overwritten):
        """A line with both calls and torch's own words."""
        lines = (overwritten / "lensnet.rank0.jsonl").read_text().splitlines()
        (line,) = (e for e in map(json.loads, lines) if e["event"] == "overwritten")
        assert (line["seq"], line["earlier_seq"], line["module"]) == (2, 1, "critic")
        assert (line["exception.type"], line["exception.message"]) == ("RuntimeError", self.ERROR)
        assert re.fullmatch(self.WHERE, line["at"])
        assert re.fullmatch(self.WHERE, line["earlier_at"])
        assert line["at"] != line["earlier_at"]

    def test_is_the_verdict_on_a_recorded_log(self, overwritten):
        """In a process without the guard: from the folder to both lines with one command."""
        command = [sys.executable, "-m", "lensnet_guard", "postmortem", str(overwritten)]
        printed = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert printed.returncode == 1
        assert re.fullmatch(
            rf"verdict: the output of call 1 at {self.WHERE} was overwritten by "
            rf"call 2 at {self.WHERE}",
            printed.stdout.splitlines()[0],
        )
        told = "(lensnet-guard explain overwritten-graph-outputs): 1\n"
        assert f"outputs overwritten {told}" in printed.stdout
        assert f"CUDA graph hazards {told}" in printed.stdout

    def test_on_the_page(self, overwritten):
        """With the verdict, and the hazard beside it."""
        analysis = analyse([overwritten])
        page = "".join(render_report(analysis, {}, overwritten))
        assert f'<li class="remark">{analysis.verdict}</li>' in page
        assert "<h3>Outputs overwritten (lensnet-guard explain overwritten-" in page

    def test_torch_tells_which_output_it_is(self, guard, monkeypatch):
        """Of two that were written over, the one that torch refuses to read is blamed."""
        with torch.no_grad(), pytest.warns(LensNetHazard), pytest.raises(RuntimeError) as caught:
            with guard.context("inference"):
                kept = [guard.module(X), guard.module(2 * X), guard.module(3 * X)]
                (_, first), (second, by) = guard._admission.execution.compiled._written
                refused = {storage.cdata for storage in second.storages}
                monkeypatch.setattr(
                    hazards, "is_overwritten", lambda o: getattr(o, "cdata", None) in refused
                )
                raise RuntimeError(self.ERROR)
        (note,) = caught.value.__notes__
        assert note.startswith("lensnet_guard: the output of call 2 of critic at ")
        assert (len(kept), first.seq, by.seq) == (3, 2, 3)

    def test_torch_does_not_tell(self, guard):
        """Then it may be any of them, and each is named."""
        with torch.no_grad(), pytest.warns(LensNetHazard), pytest.raises(RuntimeError) as caught:
            with guard.context("inference"):
                kept = [guard.module(X), guard.module(2 * X), guard.module(3 * X)]
                raise RuntimeError(self.ERROR)
        numbers = [re.findall(r"call (\d+)", note) for note in caught.value.__notes__]
        assert numbers == [["1", "2"], ["2", "3"]]
        assert len(kept) == 3

    @pytest.mark.parametrize("read", [lambda kept: kept, lambda kept: kept[0]], ids=["it", "view"])
    def test_torch_took_the_storage_and_nobody_was_blamed(self, guard, read):
        """As it does on a GPU with a tensor that it writes over: whoever holds it is told."""
        with torch.no_grad(), pytest.warns(LensNetHazard), pytest.raises(RuntimeError) as caught:
            with guard.context("inference"):
                output = guard.module(X)
                kept = read(output)
                guard.module(2 * X)
                output.set_()
                raise RuntimeError(self.ERROR)
        (note,) = caught.value.__notes__
        assert re.findall(r"call (\d+)", note) == ["1", "2"]
        assert kept is not None

    def test_an_output_that_was_dropped_is_not_blamed(self, guard):
        """Nobody can have read it."""
        with torch.no_grad(), pytest.warns(LensNetHazard), pytest.raises(RuntimeError) as caught:
            with guard.context("inference"):
                kept = guard.module(X)
                guard.module(2 * X)
                del kept
                raise RuntimeError(self.ERROR)
        assert not hasattr(caught.value, "__notes__")

    def test_an_overwritten_gradient_is_blamed_on_no_call(self, guard, tmp_path):
        """Torch 2.14 says so; a backward pass made it, and no call that gave out an output."""
        error = self.ERROR.replace("tensor output", "gradient tensor output")
        guard.start_log(tmp_path)
        with torch.no_grad(), pytest.warns(LensNetHazard), pytest.raises(RuntimeError) as caught:
            with guard.context("inference"):
                kept = guard.module(X)
                guard.module(2 * X)
                raise RuntimeError(error)
        guard.end_log()
        assert caught.value.__notes__[0] == (
            "lensnet_guard: what was overwritten is a gradient, made by a backward pass, and no "
            "output of a call of critic"
        )
        assert not any("was overwritten by call" in note for note in caught.value.__notes__)
        assert '"event":"overwritten"' not in (tmp_path / "lensnet.rank0.jsonl").read_text()
        assert kept is not None

    def test_other_errors_are_left_alone(self, guard):
        """The guard does not guess."""
        with pytest.raises(RuntimeError) as caught, guard.context("inference"):
            raise RuntimeError("something else")
        assert not hasattr(caught.value, "__notes__")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler, on import
class TestOnCuda:
    def test_the_real_error(self):
        """`mode="reduce-overhead"`: torch raises, and the note names both lines."""
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        module = nn.Linear(3, 2).cuda()
        module.compile(mode="reduce-overhead")
        guard = guard_module(module)
        x = X.cuda()
        with (
            pytest.raises(RuntimeError, match="overwritten by a subsequent run") as caught,
            pytest.warns(LensNetHazard),
            guard.context("inference"),
            torch.no_grad(),
        ):
            for _ in range(3):
                kept = guard.module(x)
                guard.module(2 * x)
                kept.sum().item()
        assert any("was overwritten by call" in note for note in caught.value.__notes__)

    @pytest.mark.parametrize("compiled_with", ["the option", "a mark"])
    def test_what_is_copied_and_what_a_mark_overwrites(self, compiled_with):
        """The option of torch 2.14 keeps an output as it is; a second mark in a step does not."""
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        option = "cudagraph_trees_generation_cloning"
        cloned = compiled_with == "the option"
        if cloned and not hasattr(importlib.import_module("torch._inductor.config").triton, option):
            pytest.skip("needs torch 2.14")
        module = nn.Linear(3, 2).cuda()
        options = {"triton.cudagraphs": True}
        module.compile(options=options | ({f"triton.{option}": "user_visible"} if cloned else {}))
        guard, x = guard_module(module), X.cuda()
        warned = contextlib.nullcontext() if cloned else pytest.warns(LensNetHazard)
        with warned, torch.no_grad(), guard.context("inference"):
            for step in range(3):
                with guard.micro_step(step):
                    kept = guard.module(x)
                    expected = kept.clone()
                    if not cloned:
                        torch.compiler.cudagraph_mark_step_begin()
                    guard.module(2 * x)
                    if cloned:
                        assert torch.equal(kept, expected)
