"""Processes that really die: what they leave on disk names the call that was in flight."""

import json
import os
import re
import signal
import sys

import pytest

from lensnet_guard.postmortem.analysis import analyse

SHOWS_NOTES = sys.version_info >= (3, 11)  # Python 3.10 keeps an exception's, and prints none

# A process that has imported torch forks the victims, each of which logs to a folder of its own.
ZYGOTE = """
import faulthandler, json, os, random, signal, sys, time
import torch
from torch import nn
from lensnet_guard import guard_module

class Victim(nn.Module):
    def __init__(self, dies_at=None, how=None):
        super().__init__()
        self.linear, self.runs, self.dies_at, self.how = nn.Linear(3, 2), 0, dies_at, how

    def forward(self, x):
        self.runs += 1
        if self.runs == self.dies_at:
            self.how()
        time.sleep(random.random() / 500)
        return self.linear(x)

def train(folder, module, steps=10_000, pipe=None):
    guard = guard_module(module, log=folder, name="victim")
    with guard.context("training"):
        for step in range(steps):
            with guard.micro_step(step), guard.sanctioned("preference_scorer"):
                guard.module(torch.ones(1, 3))
            if pipe is not None:
                os.write(pipe, b".")
    guard.end_log()

def fork(run):
    child = os.fork()
    if child == 0:
        sys.stderr = open(os.devnull, "w")
        try:
            run()
        finally:
            os._exit(1)
    return child
"""

KILLED_AT_RANDOM = (
    ZYGOTE
    + """
random.seed(int(sys.argv[1]))
done = []
for number in range(50):
    reading, writing = os.pipe()
    child = fork(lambda: train(f"run{number}", Victim(), pipe=writing))
    os.close(writing)
    os.read(reading, 1)  # it is training
    time.sleep(random.random() / 15)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    completed = 1
    while more := os.read(reading, 65536):
        completed += len(more)
    os.close(reading)
    done.append(completed)
print(json.dumps(done))
"""
)

DEATHS = {
    "SIGKILL": "lambda: os.kill(os.getpid(), signal.SIGKILL)",
    "SIGSEGV": "faulthandler._sigsegv",
    "abort": "os.abort",
    "os._exit": "lambda: os._exit(7)",
}


class TestKilled:
    def test_fifty_times_at_random_moments(self, run_python, tmp_path):
        """Every completed call is on disk, and the one in flight, with stack, shapes, context."""
        result = run_python(KILLED_AT_RANDOM, 20261123)
        assert result.returncode == 0, result.stderr
        in_flight = 0
        for number, completed in enumerate(json.loads(result.stdout)):
            analysis = analyse([tmp_path / f"run{number}"])
            (run,) = analysis.runs
            assert run.died
            # The step whose dot was not written any more may be complete all the same.
            assert run.training_calls - len(run.in_flight) in (completed, completed + 1)
            assert run.unreadable.count == (run.torn_at is not None)
            assert analysis.exit_code == 1
            for call in run.in_flight:
                in_flight += 1
                assert (call.context, call.scope) == ("training", "preference_scorer")
                assert (call.step, call.inputs) == (call.seq - 1, ("float32[1, 3] cpu",))
                assert re.search(r"script\.py:\d+ in train$", call.caller)
                assert analysis.verdict == (
                    f"crash in call {call.seq} of victim, called from {call.caller}"
                )
        assert in_flight > 10  # the victim spends most of its time inside

    @pytest.mark.parametrize("how", DEATHS)
    def test_by_its_own_hand(self, run_python, tmp_path, how):
        """Inside the forward, in the third call."""
        run_python(
            ZYGOTE + f'os.waitpid(fork(lambda: train("run", Victim(3, {DEATHS[how]}))), 0)\n'
        )
        (run,) = analyse([tmp_path / "run"]).runs
        (call,) = run.in_flight
        assert (call.seq, call.step, run.training_calls, run.micro_steps) == (3, 2, 3, 2)
        assert run.died

    def test_an_unhandled_exception(self, run_python, tmp_path):
        """The log ends in order, the exception names it, and the call's end says what it raised."""
        result = run_python(ZYGOTE + 'train("run", Victim(3, lambda: 1 / 0))\n')
        assert result.returncode == 1
        assert "ZeroDivisionError: division by zero" in result.stderr
        note = "lensnet_guard: the calls of victim are in run/lensnet.rank0.jsonl"
        assert (note in result.stderr) == SHOWS_NOTES
        (run,) = analyse([tmp_path / "run"]).runs
        assert (run.ended, run.in_flight, run.training_calls) == (True, [], 3)

    def test_a_violation_names_the_log_too(self, run_python, tmp_path):
        """For elastic launchers as well, whose error file is made from the traceback."""
        result = run_python(
            """
            import torch
            from torch import nn
            from torch.distributed.elastic.multiprocessing.errors import record
            from lensnet_guard import guard_module

            @record
            def main():
                guard_module(nn.Linear(3, 2), log="run").module(torch.ones(1, 3))

            main()
            """,
            TORCHELASTIC_ERROR_FILE=str(tmp_path / "error.json"),
        )
        assert "NoContext" in result.stderr
        error = json.loads((tmp_path / "error.json").read_text())
        note = "lensnet_guard: the calls of Linear are in run/lensnet.rank0.jsonl"
        assert (note in error["message"]["extraInfo"]["py_callstack"]) == SHOWS_NOTES


class TestStillRunning:
    def test_is_no_crash(self, tmp_path):
        """A log that a live process holds may stop anywhere."""
        from torch import nn

        from lensnet_guard import guard_module

        guard = guard_module(nn.Linear(3, 2), log=tmp_path)
        analysis = analyse([tmp_path])
        assert (analysis.verdict, analysis.exit_code) == ("still running, clean so far", 0)
        guard.end_log()
        assert analyse([tmp_path]).verdict == "clean"


class TestForks:
    def test_a_crash_was_called_running_while_a_child_lived(self, run_python, tmp_path):
        """The child inherits the file, and with it the lock by which a writer is known."""
        run_python(
            ZYGOTE
            + """
def die():
    child = os.fork()
    if child == 0:
        os.closerange(0, 3)  # or whoever reads our output waits for this child
        time.sleep(60)
        os._exit(0)
    open("child", "w").write(str(child))
    os.kill(os.getpid(), signal.SIGKILL)

os.waitpid(fork(lambda: train("run", Victim(2, die))), 0)
"""
        )
        try:
            analysis = analyse([tmp_path / "run"])
        finally:
            os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
        assert analysis.verdict.startswith("crash in call 2 of victim")

    def test_a_worker_that_ended_in_order_was_called_dead(self, run_python, tmp_path):
        """Multiprocessing leaves by os._exit, without a last line."""
        run_python(
            ZYGOTE
            + """
import multiprocessing
guard = guard_module(nn.Linear(3, 2), log="run")

def work():
    with guard.context("inference"):
        guard.module(torch.ones(1, 3))

worker = multiprocessing.get_context("fork").Process(target=work)
worker.start()
worker.join()
work()
guard.end_log()
"""
        )
        analysis = analyse([tmp_path / "run"])
        assert analysis.verdict == "clean"
        assert [run.inference_calls for run in analysis.runs] == [1, 1]


class TestDisks:
    def test_a_file_that_may_grow_no_further(self, run_python, tmp_path):
        """As under a quota: enforcement goes on, the loss is counted and told."""
        result = run_python(
            ZYGOTE
            + """
import resource, warnings
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from lensnet_guard import NoContext
guard = guard_module(Victim(), log="run")
with guard.context("inference"):
    for _ in range(50):
        guard.module(torch.ones(1, 3))
try:
    guard.module(torch.ones(1, 3))
except NoContext:
    print("refused", guard.count())
guard.end_log()
"""
        )
        assert result.stdout == "refused 50\n", result.stderr
        assert "log lines could not be written" in result.stderr
        assert (tmp_path / "run" / "lensnet.rank0.jsonl").stat().st_size <= 20_000
        (run,) = analyse([tmp_path / "run"]).runs
        assert 0 < run.inference_calls < 50

    def test_a_folder_that_cannot_be_made(self, run_python, tmp_path):
        """Read-only or a file in its place: one warning, and the contract holds."""
        (tmp_path / "run").write_text("not a folder")
        result = run_python(
            ZYGOTE
            + """
from lensnet_guard import NoContext
guard = guard_module(Victim(), log="run")
try:
    guard.module(torch.ones(1, 3))
except NoContext:
    print("refused")
"""
        )
        assert result.stdout == "refused\n"
        assert result.stderr.count(f"cannot write the log in {tmp_path / 'run'}") == 1
