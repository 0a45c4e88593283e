"""The log: what stands in it, and that it is there when a process dies."""

import copy
import gc
import io
import json
import os
import socket
import sys
import threading
import warnings
import weakref

import pytest
import structlog
import torch
from torch import nn

from lensnet_guard import (
    BudgetExceeded,
    NoContext,
    guard_module,
    guard_of,
    lensnet_guard,
)
from lensnet_guard.logs import log_file
from lensnet_guard.logs.run_log import RunLog

SCOPE = "preference_scorer"
FILE = "lensnet.rank0.jsonl"
RECORD_FIELDS = [
    *("seq", "guard", "module", "kind", "verdict", "reason", "context", "scope", "step"),
    *("micro_step", "thread", "grad_enabled", "duration_ms", "outcome", "recompute_of"),
    *("compiled", "inputs", "caller", "stack"),
]


def read(path):
    """The lines of a log file, each of which must be one JSON object."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(lines):
    return [line["event"] for line in lines]


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
        assert set(lines[1]) == {*RECORD_FIELDS, "event", "timestamp", "message"}
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


class TestFiles:
    def test_two_guards_one_folder(self, make_scorer, x, tmp_path):
        """Each guard writes a file of its own, however many share a folder."""
        guards = [guard_module(make_scorer(), log=tmp_path, name=f"m{n}") for n in range(3)]
        for guard in guards:
            with guard.context("inference"):
                guard.module(x)
        names = [FILE, *(f"lensnet.rank0.pid{os.getpid()}{n}.jsonl" for n in ("", ".2"))]
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
        for guard, name in zip(guards, names, strict=True):
            lines = read(tmp_path / name)
            assert {line["module"] for line in lines} == {guard.name}
            assert events(lines) == ["run.begin", "call.begin", "call.end"]

    def test_fork_gets_its_own_file(self, run_python, tmp_path):
        """A forked worker writes beside its parent, never into the parent's file."""
        result = run_python(
            """
            import os, torch
            from torch import nn
            from lensnet_guard import guard_module

            guard = guard_module(nn.Linear(3, 2), log="log")
            with guard.context("inference"):
                guard.module(torch.ones(1, 3))
                child = os.fork()
                if child == 0:
                    guard.module(torch.ones(1, 3))
                    guard.end_log()
                    os._exit(0)
                os.waitpid(child, 0)
                silent = os.fork()
                if silent == 0:
                    guard.end_log()
                    os._exit(0)
                os.waitpid(silent, 0)
                guard.module(torch.ones(1, 3))
            guard.end_log()
            print(child)
            """
        )
        assert result.returncode == 0, result.stderr
        child = int(result.stdout)
        names = [FILE, f"lensnet.rank0.pid{child}.jsonl"]
        assert sorted(path.name for path in (tmp_path / "log").iterdir()) == sorted(names)
        parents, childs = (read(tmp_path / "log" / name) for name in names)
        call = ["call.begin", "call.end"]
        assert events(parents) == ["run.begin", *call, *call, "run.end"]
        assert events(childs) == ["run.begin", *call, "run.end"]
        assert childs[0]["process.pid"] == child != parents[0]["process.pid"]
        assert (parents[-1]["calls"], childs[-1]["calls"]) == (2, 1)

    @pytest.mark.parametrize("use", ["guard.module(torch.ones(1, 3))", "pass"])
    def test_fork_while_another_thread_writes_hung(self, run_python, tmp_path, use):
        """A forked worker does not wait for a lock whose holder exists in its parent only."""
        result = run_python(
            f"""
            import os, signal, threading, torch
            from torch import nn
            from lensnet_guard import guard_module

            guard = guard_module(nn.Linear(3, 2), log="log")
            writing, done = threading.Event(), threading.Event()

            def write():
                with guard._history.log._lock:
                    writing.set()
                    done.wait()

            thread = threading.Thread(target=write)
            thread.start()
            writing.wait()
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                with guard.context("inference"):
                    {use}
                guard.end_log()
                os._exit(0)
            _, status = os.waitpid(child, 0)
            done.set()
            thread.join()
            print(status)
            """
        )
        assert result.stdout == "0\n", result.stderr

    def test_many_threads_write_whole_lines(self, guard, x, tmp_path):
        """Lines of eight threads do not mix."""
        guard.start_log(tmp_path)

        def work():
            for _ in range(25):
                guard.module(x)

        with guard.context("inference"):
            threads = [threading.Thread(target=guard.carry(work)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        guard.end_log()
        lines = read(tmp_path / FILE)
        assert len(lines) == 2 + 400
        begun = [line["seq"] for line in lines if line["event"] == "call.begin"]
        assert sorted(begun) == list(range(1, 201))
        assert lines[-1]["calls"] == 200

    @pytest.mark.parametrize("folder", [3, b"bytes", True, ["a"]])
    def test_folder_that_is_no_path(self, scorer, folder):
        """A wrong type is a mistake of the caller, not a lost log."""
        with pytest.raises(TypeError) as caught:
            guard_module(scorer, log=folder)
        assert str(caught.value) == f"log must be a folder's path, not {folder!r}"

    def test_second_log(self, scorer, tmp_path):
        """One guard has one log at a time."""
        guard = guard_module(scorer, log=tmp_path / "one")
        with pytest.raises(ValueError) as caught:
            guard.start_log(tmp_path / "two")
        assert str(caught.value) == f"Scorer already logs to {tmp_path / 'one'}"
        guard.end_log()
        guard.start_log(tmp_path / "two")
        guard.end_log()
        guard.end_log()
        assert events(read(tmp_path / "two" / FILE)) == ["run.begin", "run.end"]

    def test_off_writes_nothing(self, scorer, x, tmp_path):
        """In mode off not even the folder is made."""
        with lensnet_guard(scorer, mode="off", log=tmp_path / "a") as guard:
            guard.module(x)
        guard_module(scorer, mode="off", log=tmp_path / "b")
        assert list(tmp_path.iterdir()) == []


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


class TestLogThatCannotBeWritten:
    def enforced(self, guard, x):
        """The guard allows and refuses as if there was a log."""
        with guard.context("training"), pytest.raises(BudgetExceeded):
            with guard.sanctioned(SCOPE):
                guard.module(x)
                guard.module(x)
        assert (guard.count(), guard.violation_count, len(guard.calls)) == (1, 1, 2)

    def test_folder_that_cannot_be_made(self, scorer, x, tmp_path):
        """One warning at the start, one count at the end, and enforcement goes on."""
        (tmp_path / "file").write_text("")
        folder = tmp_path / "file" / "log"
        with pytest.warns(RuntimeWarning) as caught:
            guard = guard_module(scorer, log=folder)
            self.enforced(guard, x)
        (warning,) = caught
        assert str(warning.message) == (
            f"lensnet_guard: cannot write the log in {folder}: [Errno 20] Not a directory: "
            f"'{folder}'. Enforcement and the ring buffer go on; lost lines are counted."
        )
        with pytest.warns(RuntimeWarning) as caught:
            guard.end_log()
        (warning,) = caught
        assert str(warning.message) == (
            f"lensnet_guard: 5 log lines could not be written to {folder}, or are gone from it; "
            "enforcement was not affected"
        )

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
    def test_disk_full(self, scorer, x, tmp_path):
        """A full disk is told of once, its lost lines are counted and told at the end."""
        (tmp_path / FILE).symlink_to("/dev/full")
        with pytest.warns(RuntimeWarning, match="No space left on device") as caught:
            guard = guard_module(scorer, log=tmp_path)
            self.enforced(guard, x)
        assert len(caught) == 1
        with pytest.warns(RuntimeWarning, match="^lensnet_guard: 6 log lines could not be written"):
            guard.end_log()

    def test_disk_that_fills_up_and_is_freed(self, run_python, tmp_path):
        """Lines are lost while the disk is full, a half one is ended, and run.end tells of them."""
        result = run_python(
            """
            import os, resource, signal, warnings, torch
            from torch import nn
            from lensnet_guard import guard_module

            warnings.simplefilter("always")
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            guard = guard_module(nn.Linear(3, 2), log="log")
            size = os.path.getsize("log/lensnet.rank0.jsonl")
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            with guard.context("inference"):
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))
                for _ in range(3):
                    guard.module(torch.ones(1, 3))
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
                guard.module(torch.ones(1, 3))
            guard.end_log()
            """
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr.count(f"cannot write the log in {tmp_path / 'log'}") == 1
        assert result.stderr.count(f"6 log lines could not be written to {tmp_path}/log/") == 1
        lines = (tmp_path / "log" / FILE).read_text().splitlines()
        assert len(lines[1]) == 100
        whole = [json.loads(line) for line in [lines[0], *lines[2:]]]
        assert events(whole) == ["run.begin", "call.begin", "call.end", "run.end"]
        assert (whole[1]["seq"], whole[-1]["lost_lines"], whole[-1]["calls"]) == (4, 6, 4)

    def test_violation_was_forgotten_when_its_warning_was_an_error(
        self, make_scorer, x, tmp_path, monkeypatch
    ):
        """With warnings as errors, a failing log hides no violation from its micro-step."""
        monkeypatch.setattr(
            log_file, "LOOK_S", 3_600.0
        )  # or it would find that the file is another
        guard = guard_module(make_scorer(), log=tmp_path)
        os.close(guard._history.log._file._fd)
        guard._history.log._file._fd = os.open(os.devnull, os.O_RDONLY)
        with guard.context("training"), pytest.raises(BudgetExceeded):
            with guard.sanctioned(SCOPE) as ledger:
                ledger.spend(SCOPE, None)
                ledger._spent[SCOPE].clear()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    guard.module(x)
                guard._history.log._file._warned = False
                with pytest.raises(RuntimeWarning, match="Bad file descriptor"):
                    guard.module(x)
        with pytest.warns(RuntimeWarning, match="could not be written"):
            guard.end_log()


class TestAnotherWorkingDirectory:
    """A relative folder is the one where the log began, whatever the process changes to."""

    @pytest.fixture
    def moved_guard(self, scorer, tmp_path, monkeypatch):
        """A guard that logs to ``began/runs/42``, in a process that is in ``other`` by now."""
        for name in ("began", "other"):
            (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / "began")
        guard = guard_module(scorer, log=os.path.join("runs", "42"))
        monkeypatch.chdir(tmp_path / "other")
        yield guard
        guard.end_log()
        assert list((tmp_path / "other").iterdir()) == []

    def test_the_path_led_to_another_place(self, moved_guard, x, tmp_path):
        """What `log_path`, notes on exceptions and `start_log` say can be opened."""
        path = tmp_path / "began" / "runs" / "42" / FILE
        assert moved_guard.log_path == path
        with moved_guard.context("inference"):
            moved_guard.module(x)
        assert events(read(path)) == ["run.begin", "call.begin", "call.end"]
        with pytest.raises(ValueError, match=f"already logs to {path.parent}"):
            moved_guard.start_log("elsewhere")

    def test_segments_could_not_be_set_aside(self, moved_guard, x, tmp_path, monkeypatch):
        """A full file is renamed beside the new one, and nothing is lost."""
        monkeypatch.setattr(log_file, "SEGMENT_BYTES", 1_000)
        with moved_guard.context("inference"):
            for _ in range(3):
                moved_guard.module(x)
        assert moved_guard._history.log.lost_lines == 0
        files = {path.name for path in (tmp_path / "began" / "runs" / "42").iterdir()}
        assert {FILE, "lensnet.rank0.seg00001.jsonl"} < files

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
    def test_a_fork_began_a_folder_of_its_own(self, moved_guard, x, tmp_path):
        """It logs beside its parent."""
        child = os.fork()
        if child == 0:
            with moved_guard.context("inference"):
                moved_guard.module(x)
            os._exit(0)
        os.waitpid(child, 0)
        files = {path.name for path in (tmp_path / "began" / "runs" / "42").iterdir()}
        assert files == {FILE, f"lensnet.rank0.pid{child}.jsonl"}

    def test_a_pickle_took_the_name_along(self, moved_guard, tmp_path, monkeypatch):
        """What a spawned worker is sent is the folder, not a name that means another one there."""
        monkeypatch.setattr("lensnet_guard.guard.get_spawning_popen", lambda: True)
        folder, parent = moved_guard.module.__reduce_ex__(4)[1][0]
        assert (folder, parent) == (tmp_path / "began" / "runs" / "42", os.getpid())

    def test_evidence(self, scorer, x, tmp_path, monkeypatch):
        """What is written after the fact goes where it was asked for."""
        monkeypatch.chdir(tmp_path)
        guard = guard_module(scorer)
        with guard.context("inference"):
            guard.module(x)
        assert guard.evidence("run") == tmp_path / "run" / FILE

    def test_a_directory_that_is_gone(self, run_python, tmp_path):
        """There a relative folder cannot be made: that is told, and enforcement goes on."""
        result = run_python(
            """
            import os, torch
            from torch import nn
            from lensnet_guard import NoContext, guard_module

            os.mkdir("here")
            os.chdir("here")
            os.rmdir("../here")
            guard = guard_module(nn.Linear(3, 2), log="log")
            try:
                guard.module(torch.ones(1, 3))
            except NoContext:
                print("refused", guard.log_path)
            """
        )
        assert result.stdout == "refused None\n", result.stderr
        assert "lensnet_guard: cannot write the log in log: [Errno 2] No such" in result.stderr


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
