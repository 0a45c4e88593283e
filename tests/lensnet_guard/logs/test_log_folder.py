"""Where a log is written: its files, disks that refuse, directories that change."""

import json
import os
import threading
import warnings

import pytest
from tests.lensnet_guard.helpers import FILE, SCOPE, events, read

from lensnet_guard import (
    BudgetExceeded,
    guard_module,
    lensnet_guard,
)
from lensnet_guard.logs import log_file


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
        monkeypatch.setattr("lensnet_guard.boundary.keeper.get_spawning_popen", lambda: True)
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
