"""The log: what stands in it, and that it is there when a process dies."""

import copy
import gc
import io
import json
import os
import socket
import sys
import threading
import weakref

import pytest
import structlog
import torch
from tests.lensnet_guard.helpers import FILE, SCOPE, events, read
from torch import nn

from lensnet_guard import (
    BudgetExceeded,
    NoContext,
    guard_module,
    guard_of,
    lensnet_guard,
)
from lensnet_guard.logs.run_log import RunLog

RECORD_FIELDS = [
    *("seq", "guard", "module", "kind", "verdict", "reason", "context", "scope", "step"),
    *("micro_step", "thread", "grad_enabled", "duration_ms", "outcome", "recompute_of"),
    *("compiled", "method", "inputs", "caller", "stack"),
]


class TestEvents:
    def test_a_clean_run(self, scorer, x, tmp_path):
        """Every event of a run stands in its order, with its fields."""
        with lensnet_guard(scorer, log=tmp_path / "run") as guard, guard.context("training"):
            with guard.micro_step(4, 2), guard.sanctioned(SCOPE):
                guard.module(x)
        begin, call, end, micro_step, last = read(tmp_path / "run" / FILE)
        (record,) = guard.calls
        for line in (begin, call, end, micro_step, last):
            assert isinstance(line.pop("timestamp"), float)
        assert list(call) == [*RECORD_FIELDS, "event"]
        assert call == {
            "event": "call.begin",
            **json.loads(json.dumps(record.to_log())),
            "duration_ms": None,
            "outcome": None,
        }
        assert end == {
            **{
                "event": "call.end",
                "guard": record.guard,
                "seq": 1,
                "outcome": "returned",
                "module": "Scorer",
            },
            "duration_ms": record.duration_ms,
        }
        assert micro_step == {
            **{"event": "micro_step.end", "module": "Scorer", "context": "training", "step": 4},
            **{"micro_step": 2, "calls": {SCOPE: 1}, "due": {SCOPE: 1}, "violations": 0},
            "raised": None,
        }
        assert last == {
            **{"event": "run.end", "module": "Scorer", "verdict": "clean"},
            **{"calls": 1, "violations": 0, "lost_lines": 0},
        }

    def test_run_begin(self, scorer, tmp_path, monkeypatch):
        """The first line says who runs what, where, in which versions."""
        monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "é\udc80"])
        guard_module(scorer, log=tmp_path, name="critic").end_log()
        line = read(tmp_path / FILE)[0]
        assert line["event"] == "run.begin"
        assert line["schema_version"] == 1
        assert (line["module"], line["mode"]) == ("critic", "enforce")
        assert line["policy"] == {
            "scopes": {SCOPE: 1},
            "sanctioned_callers": {},
            "shared_submodules": [],
        }
        assert line["host.name"] == socket.gethostname()
        assert line["process.pid"] == os.getpid()
        assert line["process.command_args"] == ["train.py", "--lr", "é\udc80"]
        assert line["rank"] == "0"
        assert set(line["versions"]) == {"python", "lensnet-guard", "torch", "wrapt", "structlog"}
        assert line["versions"]["torch"] == torch.__version__

    def test_violation(self, guard, x, tmp_path):
        """A refused call is one line with its message, and no call.begin."""
        guard.start_log(tmp_path)
        with pytest.raises(NoContext) as caught:
            guard.module(x)
        guard.end_log()
        lines = read(tmp_path / FILE)
        assert events(lines) == ["run.begin", "violation", "run.end"]
        assert lines[1]["message"] == str(caught.value)
        assert [lines[1][key] for key in ("verdict", "reason")] == ["refuse", "NoContext"]
        assert set(lines[1]) == {*RECORD_FIELDS, "event", "timestamp", "message", "mistake"}
        assert lines[1]["mistake"] == caught.value.mistake == "called-from-elsewhere"
        assert lines[2]["verdict"] == "violations"

    def test_violation_is_on_disk_before_it_is_raised(self, guard, x, tmp_path):
        """Whoever catches a violation finds it in the log already, its micro-step's end after."""
        guard.start_log(tmp_path)
        with guard.context("training"), pytest.raises(BudgetExceeded), guard.micro_step():
            with guard.sanctioned(SCOPE):
                guard.module(x)
                with pytest.raises(BudgetExceeded):
                    guard.module(x)
                assert events(read(tmp_path / FILE))[-1] == "violation"
        line = read(tmp_path / FILE)[-1]
        assert (line["event"], line["calls"], line["violations"]) == (
            *("micro_step.end", {SCOPE: 1}, 1),
        )

    def test_module_that_raises(self, scorer, guard, x, tmp_path):
        """The end of a call that failed says so."""

        def fail():
            raise KeyboardInterrupt

        scorer.inside = fail
        guard.start_log(tmp_path)
        with guard.context("inference"), pytest.raises(KeyboardInterrupt):
            guard.module(x)
        assert read(tmp_path / FILE)[-1]["outcome"] == "raised KeyboardInterrupt"

    def test_observed_call(self, make_guard, x, tmp_path):
        """In observe mode a refused call is told as a violation and runs as a call."""
        guard = make_guard(mode="observe")
        guard.start_log(tmp_path)
        guard.module(x)
        guard.end_log()
        lines = read(tmp_path / FILE)
        assert events(lines) == ["run.begin", "violation", "call.begin", "call.end", "run.end"]
        assert {line["seq"] for line in lines[1:4]} == {1}
        assert lines[2]["verdict"] == "refuse"
        assert (lines[4]["calls"], lines[4]["violations"]) == (0, 1)

    def test_micro_step_end_of_observed_violations_said_none(self, make_guard, x, tmp_path):
        """The micro-step counts the violations that it saw, in observe mode too."""
        guard = make_guard(mode="observe")
        guard.start_log(tmp_path)
        with guard.context("training"), guard.micro_step():
            guard.module(x)
        line = read(tmp_path / FILE)[-1]
        assert (line["event"], line["violations"]) == ("micro_step.end", 2)

    def test_micro_step_end_in_another_thread_lost_its_context(self, guard, in_thread, tmp_path):
        """The context is the one that the micro-step was opened in."""
        guard.start_log(tmp_path)

        def generate():
            with guard.context("inference"), guard.micro_step(3):
                yield

        generator = generate()
        next(generator)
        in_thread(generator.close)
        line = read(tmp_path / FILE)[-1]
        assert (line["event"], line["context"], line["step"]) == ("micro_step.end", "inference", 3)

    def test_frames(self, guard, x, tmp_path):
        """Stacks stand innermost first under the OpenTelemetry names."""
        guard.start_log(tmp_path)
        with guard.context("inference"):
            guard.module(x)
        stack = read(tmp_path / FILE)[1]["stack"]
        assert stack[0]["code.file.path"] == os.path.abspath(__file__)
        assert stack[0]["code.function.name"].endswith("test_frames")
        assert stack[0]["code.line.number"] == guard.calls[0].caller.line
        assert all(
            set(f) == {"code.file.path", "code.line.number", "code.function.name"} for f in stack
        )

    def test_no_tensor_values(self, guard, tmp_path):
        """Values of arguments never reach the file, wherever they hide."""
        secret = 86420.5
        x = torch.full((4, 3), secret)
        guard.start_log(tmp_path)
        with guard.context("inference"), guard.micro_step(torch.tensor(5)):
            guard.module(x, a=[x], b={"k": x}, c=x[0], d={x[0, 0]: 1}, e=str(secret), f=secret)
        with pytest.raises(NoContext):
            guard.module(x, a=[x])
        guard.end_log()
        text = (tmp_path / FILE).read_text()
        assert "86420" not in text
        assert "tensor(" not in text
        assert "float32[4, 3] cpu" in text

    def test_text_of_any_alphabet(self, x, tmp_path):
        """Names in any alphabet, with quotes and newlines, stay one line of valid JSON."""
        name = 'a"b\n評価\udc80'
        guard = guard_module(nn.Linear(3, 2), name=name, log=tmp_path)
        with guard.context("inference"):
            guard.module(x)
        guard.end_log()
        assert {line["module"] for line in read(tmp_path / FILE)} == {name}

    def test_rank_names_the_file(self, scorer, tmp_path, monkeypatch):
        """One file per rank, as torchrun numbers them."""
        monkeypatch.setenv("RANK", "3")
        guard_module(scorer, log=tmp_path).end_log()
        assert read(tmp_path / "lensnet.rank3.jsonl")[0]["rank"] == "3"


class TestWrittenThrough:
    def test_call_begin_is_on_disk_before_the_module_runs(self, scorer, guard, x, tmp_path):
        """From inside forward, the file holds the call in flight, stack and all."""
        seen = []
        scorer.inside = lambda: seen.extend(read(tmp_path / FILE))
        guard.start_log(tmp_path)
        with guard.context("inference"):
            guard.module(x)
        assert events(seen) == ["run.begin", "call.begin"]
        assert seen[1]["stack"][0]["code.file.path"] == os.path.abspath(__file__)
        assert events(read(tmp_path / FILE)) == ["run.begin", "call.begin", "call.end"]

    @pytest.mark.parametrize("death", ["os.kill(os.getpid(), signal.SIGKILL)", "os.abort()"])
    def test_a_process_that_dies_inside_forward(self, run_python, tmp_path, death):
        """The call that killed the process is the last line, begun and never ended."""
        result = run_python(
            f"""
            import os, signal, torch
            from torch import nn
            from lensnet_guard import lensnet_guard

            class Deadly(nn.Module):
                def forward(self, x):
                    {death}

            with lensnet_guard(Deadly(), log="log") as guard, guard.context("training"):
                with guard.micro_step(12, 1), guard.sanctioned("preference_scorer"):
                    guard.module(torch.ones(2, 3))
            """
        )
        assert result.returncode < 0, result.stderr
        lines = read(tmp_path / "log" / FILE)
        assert events(lines) == ["run.begin", "call.begin"]
        call = lines[-1]
        assert (call["step"], call["scope"], call["outcome"]) == (12, SCOPE, None)
        assert call["inputs"] == ["float32[2, 3] cpu"]
        assert call["stack"][0] == {
            "code.file.path": str(tmp_path / "script.py"),
            "code.line.number": 12,
            "code.function.name": "<module>",
        }

    def test_a_new_run_after_a_torn_line(self, scorer, tmp_path):
        """A half line that a dying disk left behind does not spoil the lines after it."""
        file = tmp_path / FILE
        file.write_bytes(b'{"event":"run.begin"}\n{"event":"call.be')
        guard_module(scorer, log=tmp_path).end_log()
        lines = file.read_text().splitlines()
        assert lines[:2] == ['{"event":"run.begin"}', '{"event":"call.be']
        assert events([json.loads(line) for line in lines[2:]]) == ["run.begin", "run.end"]

    def test_a_new_run_appends(self, scorer, tmp_path):
        """A second run in the same folder goes on in the same file, without an empty line."""
        for _ in range(2):
            guard_module(scorer, log=tmp_path).uninstall()
        assert events(read(tmp_path / FILE)) == ["run.begin", "run.end"] * 2

    def test_exit_without_an_end(self, run_python, tmp_path):
        """A guard that nobody ends by hand writes run.end when the interpreter exits."""
        result = run_python(
            """
            import torch
            from torch import nn
            from lensnet_guard import guard_module

            guard = guard_module(nn.Linear(3, 2), log="log")
            with guard.context("inference"):
                guard.module(torch.ones(1, 3))
            """
        )
        assert result.returncode == 0, result.stderr
        lines = read(tmp_path / "log" / FILE)
        assert events(lines) == ["run.begin", "call.begin", "call.end", "run.end"]
        assert lines[-1]["calls"] == 1


class TestLifetime:
    def test_a_logging_guard_was_never_collected(self, make_scorer, x, tmp_path):
        """The log does not keep the module's weights alive; it ends with its guard."""
        guard = guard_module(make_scorer(), log=tmp_path)
        with guard.context("inference"):
            guard.module(x)
        ref = weakref.ref(guard.module.__wrapped__)
        del guard
        gc.collect()
        assert ref() is None
        assert events(read(tmp_path / FILE))[-1] == "run.end"

    def test_a_copy_writes_to_the_same_log(self, make_scorer, x, tmp_path):
        """A copy's calls stand in the log by the copy's name, also without the original."""
        guard = guard_module(make_scorer(), log=tmp_path)
        copied = copy.deepcopy(guard.module)
        del guard
        gc.collect()
        with guard_of(copied).context("inference"):
            copied(x)
        guard_of(copied).end_log()
        lines = read(tmp_path / FILE)
        assert events(lines) == ["run.begin", "call.begin", "call.end", "run.end"]
        assert lines[1]["module"] == "Scorer (copy)"
        assert lines[3]["calls"] == 1

    def test_a_copy_that_outlives_the_log(self, scorer, x, tmp_path):
        """After the block its log is closed for copies too: they go on, and may start another."""
        with lensnet_guard(scorer, log=tmp_path / "a") as guard:
            copied = guard_of(copy.deepcopy(guard.module))
        with copied.context("inference"):
            copied.module(x)
        assert events(read(tmp_path / "a" / FILE)) == ["run.begin", "run.end"]
        copied.start_log(tmp_path / "b")
        copied.end_log()
        assert events(read(tmp_path / "b" / FILE)) == ["run.begin", "run.end"]

    def test_a_copy_that_ended_closed_the_log_of_its_original(self, scorer, x, tmp_path):
        """It only leaves it; whoever started the log ends it."""
        guard = guard_module(scorer, log=tmp_path)
        guard_of(copy.deepcopy(guard.module)).uninstall()
        with guard.context("inference"):
            guard.module(x)
        guard.end_log()
        assert events(read(tmp_path / FILE)) == ["run.begin", "call.begin", "call.end", "run.end"]

    def test_run_end_counted_what_was_before_the_log(self, guard, x, tmp_path):
        """The last line sums up its own file, not what the guard saw before."""
        with pytest.raises(NoContext):
            guard.module(x)
        with guard.context("inference"):
            guard.module(x)
            guard.start_log(tmp_path)
            guard.module(x)
        guard.end_log()
        line = read(tmp_path / FILE)[-1]
        assert (line["verdict"], line["calls"], line["violations"]) == ("clean", 1, 0)

    def test_a_line_written_while_the_file_closes(self, tmp_path, monkeypatch):
        """Once the file is closed its number may be another file's, which must stay clean."""
        log = RunLog(tmp_path / "log", {"module": "m"})
        victim = tmp_path / "victim"
        close = os.close

        def close_and_reuse(fd):
            close(fd)
            monkeypatch.undo()
            assert os.open(victim, os.O_WRONLY | os.O_CREAT) == fd
            log.write("call.end")
            close(fd)

        monkeypatch.setattr(os, "close", close_and_reuse)
        log.close()
        assert victim.read_bytes() == b""

    def test_a_call_from_inside_a_write_hung(self, tmp_path, monkeypatch):
        """A finalizer or signal handler that runs while a line is written may write its own."""
        log = RunLog(tmp_path, {"module": "m"})
        write = os.write

        def write_and_more(fd, data):
            monkeypatch.undo()
            log.write("inner")
            return write(fd, data)

        monkeypatch.setattr(os, "write", write_and_more)
        worker = threading.Thread(target=log.write, args=("outer",), daemon=True)
        worker.start()
        worker.join(timeout=10)
        assert not worker.is_alive()
        log.close()
        assert events(read(tmp_path / FILE)) == ["run.begin", "inner", "outer", "run.end"]


class TestUsersStructlog:
    def test_is_neither_read_nor_changed(self, scorer, x, tmp_path):
        """A global configuration that would fail, or filter, changes nothing and is not changed."""

        def fail(*_):
            raise AssertionError("the user's processor ran")

        before = structlog.get_config()
        was_configured = structlog.is_configured()
        out = io.StringIO()
        try:
            structlog.configure(
                processors=[fail],
                wrapper_class=structlog.make_filtering_bound_logger(50),
                logger_factory=structlog.PrintLoggerFactory(out),
                cache_logger_on_first_use=True,
            )
            mine = structlog.get_config()
            guard = guard_module(scorer, log=tmp_path)
            with guard.context("inference"), structlog.contextvars.bound_contextvars(user=1):
                guard.module(x)
            guard.end_log()
            assert structlog.get_config() == mine
        finally:
            structlog.reset_defaults()
            if was_configured:
                structlog.configure(**before)
        lines = read(tmp_path / FILE)
        assert events(lines) == ["run.begin", "call.begin", "call.end", "run.end"]
        assert not any("user" in line for line in lines)
        assert out.getvalue() == ""
