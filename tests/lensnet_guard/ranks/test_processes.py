"""Processes: alive, ended, and waited for by nobody."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lensnet_guard.ranks import processes
from lensnet_guard.ranks.processes import Process, has_ended, this_process

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux")


def test_this_process_runs() -> None:
    """It is known by its place, number and start."""
    process = this_process()
    assert process.pid == os.getpid()
    assert process.place
    assert not has_ended(process)


def test_one_that_ended() -> None:
    """At once, though its parent has not waited for it, and afterwards."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    process = Process(this_process().place, child.pid, int(fields[19]))
    assert not has_ended(process)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert has_ended(process)
    child.communicate()
    assert has_ended(process)


def test_a_number_that_was_given_out_again() -> None:
    """Another process has it now."""
    assert has_ended(this_process()._replace(started=1))


def test_where_the_kernel_cannot_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known, and nobody is taken for ended."""
    here = this_process()
    monkeypatch.setattr(processes, "_PROC", tmp_path)
    assert this_process() == Process(0, os.getpid(), 0)
    (tmp_path / str(here.pid)).mkdir()
    (tmp_path / str(here.pid) / "stat").write_text("nothing")
    assert not has_ended(here)
