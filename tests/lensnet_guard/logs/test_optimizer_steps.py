"""Torch's optimizer steps, numbered while a log observes, and not a moment longer."""

import gc

import pytest
import torch
from tests.lensnet_guard.helpers import FILE, X, read
from torch import nn
from torch.optim import optimizer as torchs

from lensnet_guard import guard_module
from lensnet_guard.logs import optimizer_steps
from lensnet_guard.logs.run_log import RunLog


class Watcher:
    """Somebody who wants to know."""


def hooks():
    return len(torchs._global_optimizer_post_hooks)


def optimizers(number=1, **settings):
    return [
        torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1, **settings) for _ in range(number)
    ]


def steps(*those):
    """How many steps were taken as these optimizers stepped, one after the other."""
    before = optimizer_steps.taken()
    for one in those:
        one.step()
    return optimizer_steps.taken() - before


@pytest.fixture
def watched():
    watcher = Watcher()
    no_more = optimizer_steps.watch(watcher)
    yield watcher
    no_more()


class TestNumbers:
    def test_steps_of_one(self, watched):
        """Each is one."""
        (one,) = optimizers()
        assert steps(one, one, one) == 3

    def test_a_round_of_several_is_one_step(self, watched):
        """Actor and critic, or one optimizer for each parameter."""
        a, b, c = optimizers(3)
        assert steps(a, b, c, a, b, c) == 2

    def test_the_one_that_steps_most_counts(self, watched):
        """Five steps of a discriminator for each of the generator."""
        critic, generator = optimizers(2)
        assert steps(*[*[critic] * 5, generator] * 2) == 10

    def test_one_that_takes_the_place_of_another(self, watched):
        """The second training of a process began with a step that did not count."""
        (one,) = optimizers()
        before = steps(one)
        del one
        gc.collect()
        (other,) = optimizers()
        assert before + steps(other, other) == 3

    def test_who_watches_anew_begins_anew(self):
        """The first step of a second training was taken for another optimizer's of the first."""
        one, other = optimizers(2)
        first, second = Watcher(), Watcher()
        no_more = optimizer_steps.watch(first)
        assert steps(one) == 1
        no_more()
        no_more = optimizer_steps.watch(second)
        assert steps(other, other) == 2
        no_more()

    def test_nothing_while_nobody_watches(self):
        """The number stays where it is."""
        assert steps(*optimizers(2)) == 0


class TestHook:
    def test_is_there_once(self):
        """However many logs watch; gone when the last has closed, or is gone."""
        before, watchers = hooks(), [Watcher(), Watcher()]
        ends = [optimizer_steps.watch(watcher) for watcher in watchers]
        assert hooks() == before + 1
        ends[0]()
        ends[0]()
        assert hooks() == before + 1
        del watchers
        gc.collect()
        assert hooks() == before

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # dynamo's own
    def test_changes_nothing_of_a_compiled_step(self, watched):
        """No more graphs, no other breaks, the same weights; and such a step is not counted."""
        found = {}
        for name in ("watched", "not watched"):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            torch.manual_seed(0)
            module = nn.Linear(3, 2)
            optimizer = torch.optim.SGD(module.parameters(), lr=torch.tensor(0.1))
            step = torch.compile(optimizer.step, backend="eager")
            before = optimizer_steps.taken()
            for _ in range(2):
                module(X).sum().backward()
                step()
            assert optimizer_steps.taken() == before
            counters = torch._dynamo.utils.counters
            told = dict(counters["stats"]), sum(counters["graph_break"].values())
            found[name] = (*told, module.weight.tolist())
            if name == "watched":
                torchs._global_optimizer_post_hooks.clear()
        torch._dynamo.reset()
        assert found["watched"] == found["not watched"]


class TestLog:
    def run(self, folder, mode):
        module = nn.Linear(3, 2)
        guard = guard_module(module, mode=mode, log=folder)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        with guard.context("inference"):
            for _ in range(2):
                guard.module(X).sum().backward()
                optimizer.step()
        there = hooks()
        guard.end_log()
        return read(folder / FILE), there

    def test_says_how_many_were_before_each_call(self, tmp_path):
        """From 0 in each log, and in its last line how many there were."""
        before = hooks()
        for folder in ("first", "second"):
            lines, there = self.run(tmp_path / folder, "observe")
            told = [line.get("optimizer_step") for line in lines]
            assert told == [None, 0, None, 1, None, 2]
            assert (there, hooks()) == (before + 1, before)

    def test_says_nothing_in_enforce_mode(self, tmp_path):
        """Nor is there a hook."""
        before = hooks()
        lines, there = self.run(tmp_path, "enforce")
        assert not any("optimizer_step" in line for line in lines)
        assert there == before

    def test_from_memory_says_nothing(self, tmp_path):
        """It is written when all steps have been taken."""
        log = RunLog(tmp_path, {"module": "m", "mode": "observe", "from_memory": True})
        log.close()
        assert "optimizer_step" not in read(tmp_path / FILE)[-1]

    def test_a_log_that_nobody_closes(self, tmp_path):
        """Its guard is gone, and so is the hook."""
        before = hooks()
        guard_module(nn.Linear(3, 2), mode="observe", log=tmp_path)
        gc.collect()
        assert hooks() == before
