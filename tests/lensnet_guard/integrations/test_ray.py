"""Guarded modules in Ray actors: real worker processes, each with its contexts, counts and log."""

import asyncio
import contextlib
import re
import runpy
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from lensnet_guard import CallPolicy, NoContext, UnsanctionedCall, guard_module, guard_of, no_grad
from lensnet_guard.postmortem.analysis import analyse

ray = pytest.importorskip("ray", reason="Ray has no wheel for this Python")

ROOT = Path(__file__).parents[3]
WAIT = 240  # seconds, for a machine on which much else runs


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One for this module, alone on ports of its own choice, that writes to no home."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # the path of a socket is short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # or they starve where much else runs
        patch.delenv("RAY_ADDRESS", raising=False)
        try:
            ray.init(
                address="local",
                num_cpus=2,
                include_dashboard=False,
                log_to_driver=False,
                object_store_memory=80 * 2**20,
                _temp_dir=folder,
                _node_ip_address="127.0.0.1",
            )
            yield
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def said(monkeypatch, tmp_path, capsys):
    """What the example prints when it is broken; it logs to ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ray_critic.py", "--break-it"])
    runpy.run_path(str(ROOT / "examples" / "ray_critic.py"), run_name="__main__")
    return capsys.readouterr().out


class TestExample:
    def test_a_planted_call_arrives_with_the_actors_line(self, said, tmp_path):
        """At the driver as what it was in the actor, and in the one post-mortem of the folder."""
        steps = [line.partition(":")[0] for line in said.splitlines() if line.startswith("step")]
        assert steps == ["step 0", "step 1"]
        assert (
            "\ncritic was called in training outside its sanctioned scope.\n  called from" in said
        )
        assert "examples/ray_critic.py:" in said
        assert said.splitlines()[-1] == "calls: [3, 3]"
        log = tmp_path / "runs" / "ray"
        assert len(list(log.iterdir())) == 2  # each actor's own
        analysis = analyse([log])
        line = r"1 violation, the first UnsanctionedCall at \S*ray_critic\.py:\d+ in (\w+\.)?train"
        assert re.fullmatch(line, analysis.verdict)
        assert sorted(run.violation_count for run in analysis.runs) == [0, 1]
        assert [(run.micro_steps, run.training_calls) for run in analysis.runs] == [(3, 3)] * 2


class Stuck(nn.Linear):
    """A critic that one call is stuck in, when somebody sets its mark."""

    mark = None

    def forward(self, x):
        if self.mark is not None:
            Path(self.mark).touch()
            time.sleep(3_600)
        return super().forward(x)


def make_critic():
    """With a class of this module, which no worker can import, and a condition without a name."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    policy = CallPolicy({"values": 1}, requires=(no_grad, lambda call: None))
    return guard_module(Stuck(3, 1), policy=policy, name="critic").module


def raised(job):
    with pytest.raises(Exception) as caught:
        ray.get(job, timeout=WAIT)
    return caught.value


class TestActors:
    """Classes of a function are sent by value: a worker finds no tests to import."""

    def test_methods_that_run_in_several_threads_and_one_that_is_killed_in_a_call(self, tmp_path):
        """What the constructor has opened is not open there; the log has the call in flight."""

        class Threaded:
            def __init__(self, critic, log):
                self.critic, self.guard = critic, guard_of(critic)
                self.guard.start_log(log)
                self.open = contextlib.ExitStack()
                self.open.enter_context(self.guard.context("training"))
                self.both = threading.Barrier(2)

            def step(self, number):
                with self.guard.micro_step(number), self.guard.sanctioned("values"):
                    pass

            def train(self, number):
                with self.guard.context("training"), self.guard.micro_step(number) as micro_step:
                    self.both.wait()  # each in a micro-step of its own, at the same time
                    with torch.no_grad(), self.guard.sanctioned("values"):
                        self.critic(torch.ones(2, 3))
                    self.both.wait()
                return micro_step.calls

            def evaluate(self, mark):
                self.critic.mark = mark
                with self.guard.context("inference"):
                    self.critic(torch.ones(2, 3))

        cls = ray.remote(Threaded).options(max_concurrency=2, num_cpus=0)
        actor = cls.remote(make_critic(), tmp_path / "log")
        jobs = [actor.train.remote(number) for number in range(2)]
        assert ray.get(jobs, timeout=WAIT) == [{"values": 1}] * 2
        assert isinstance(raised(actor.step.remote(0)), NoContext)
        job, until = actor.evaluate.remote(str(tmp_path / "mark")), time.monotonic() + WAIT
        while not (tmp_path / "mark").exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        ray.kill(actor)
        assert isinstance(raised(job), ray.exceptions.ActorDiedError)
        while (analysis := analyse([tmp_path / "log"])).runs[0].running:
            assert time.monotonic() < until  # the signal is on its way
            time.sleep(0.05)
        assert analysis.verdict.startswith("crash in call 4 of critic, called from ")
        assert analysis.verdict.endswith("evaluate")

    def test_methods_that_are_coroutines(self):
        """Each runs in a task, with a context and a micro-step of its own."""

        class Async:
            def __init__(self, critic):
                self.critic, self.guard = critic, guard_of(critic)
                self.inside = 0

            async def train(self, number):
                with self.guard.context("training"), self.guard.micro_step(number) as micro_step:
                    self.inside += 1
                    while self.inside % 2:  # until the other one is in its micro-step
                        await asyncio.sleep(0)
                    with torch.no_grad(), self.guard.sanctioned("values"):
                        self.critic(torch.ones(2, 3))
                return micro_step.calls

            async def ask(self):
                with self.guard.context("training"):
                    return self.critic(torch.ones(2, 3))

        actor = ray.remote(Async).options(num_cpus=0).remote(make_critic())
        jobs = [actor.train.remote(number) for number in range(2)]
        assert ray.get(jobs, timeout=WAIT) == [{"values": 1}] * 2
        error = raised(actor.ask.remote())
        assert isinstance(error, UnsanctionedCall)
        assert error.record.caller.function.endswith("ask")
        assert "what to do   Remove the call" in str(error)
        ray.kill(actor)
