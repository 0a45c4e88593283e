"""Observe mode raises nothing and changes nothing: all that enforce mode refuses, beside a twin.

Each deed is done to a module under an observing guard and to an unguarded twin of it, and gives the
same, bit for bit, now and in the module's next run; under an enforcing guard it raises.
"""

import asyncio
import contextlib
import gc
import warnings

import pytest
import torch
import torch.distributed as dist
from tests.lensnet_guard.boundary.deeds import (
    ALLOWED,
    DONE,
    RUN,
    Closed,
    Net,
    Subject,
    becomes_what_cannot_be_derived,
)
from tests.lensnet_guard.helpers import X
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from lensnet_guard import guard_module, guard_of
from lensnet_guard.boundary.armed_class import ArmedMeta


def same(one, other):
    """Whether two results are the same, bit for bit."""
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def observed(deed):
    """The subject of a deed under an observing guard, that did what an unguarded twin did."""
    subject, twin = Subject("observe"), Subject(None)
    expected = deed(twin)
    assert same(deed(subject), expected)
    if isinstance(subject.raw.blocks[0], nn.Module):
        with contextlib.suppress(StopIteration):
            assert same(subject.after(), twin.after())
        assert same(*([*m.state_dict().items()] for m in (subject.raw, twin.raw)))
    return subject


class TestNothingIsRaised:
    @pytest.mark.parametrize("name", RUN)
    @pytest.mark.filterwarnings("ignore:`torch.jit")
    def test_what_is_run(self, name):
        """Recorded as a violation, and it gives what it gives without a guard."""
        with pytest.raises(Exception, match=r"(?s)called|run|used|cannot|ended|returned"):
            RUN[name](Subject("enforce"))
        assert observed(RUN[name]).guard.violation_count > 0

    @pytest.mark.parametrize("name", DONE)
    @pytest.mark.filterwarnings("ignore:`torch.jit")
    def test_what_is_done(self, name, capsys):
        """Told once, on stderr where warnings are errors, and done as without a guard."""
        with pytest.raises(Exception, match=r"(?s)guarded"):
            DONE[name](Subject("enforce"))
        observed(DONE[name])
        told = [line for line in capsys.readouterr().err.splitlines() if "guarded" in line]
        assert told
        assert len(set(told)) == len(told)
        assert all(line.endswith("In observe mode it is let through") for line in told)

    @pytest.mark.parametrize("name", ALLOWED)
    def test_what_is_allowed(self, name):
        """It is no violation in any mode."""
        observed(ALLOWED[name])
        assert same(ALLOWED[name](Subject("enforce")), ALLOWED[name](Subject(None)))

    def test_a_part_of_which_no_class_can_be_derived(self, capsys):
        """It is left alone, now and when a part becomes one."""
        observed(becomes_what_cannot_be_derived)
        assert "runs of a Closed alone go unseen" in capsys.readouterr().err
        module = nn.Sequential(Closed())
        expected = module(X)
        guard = guard_module(module, mode="observe")
        with guard.context("inference"):
            assert torch.equal(guard.module(X), expected)

    @pytest.mark.filterwarnings("ignore:Deallocating Tensor that still has live:UserWarning")
    def test_fully_sharded(self, tmp_path):
        """FSDP changes classes: they are armed again, and train as those of an unguarded twin."""
        store = f"file://{tmp_path}/store"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        try:
            mesh, results = init_device_mesh("cpu", (1,)), []
            for mode in ("observe", None):
                subject = Subject(mode)
                for block in subject.raw.blocks:
                    fully_shard(block, mesh=mesh)
                fully_shard(subject.raw, mesh=mesh)
                optimizer = torch.optim.SGD(subject.module.parameters(), lr=0.1)
                with subject.train(), subject.guard.sanctioned("s"):
                    out = subject.module(X)
                out.sum().backward()
                optimizer.step()
                results.append((out, subject.after()))
                if mode:
                    assert isinstance(subject.module, FSDPModule)
                    assert subject.guard.violations == ()
                    subject.raw(X)
                    assert subject.guard.violation_count == 1
            assert same(*results)
        finally:
            dist.destroy_process_group()
            gc.collect()  # of what older torch warns of as it goes


class TestStaysOn:
    """What enforce mode refuses because it would take the tripwire off leaves it on, if it can."""

    @pytest.mark.parametrize(
        "name", ["a subclass", "parametrizations", "parametrizations, and back"]
    )
    def test_changed_classes(self, name):
        """Bypasses are seen as before."""
        subject = Subject("observe")
        ALLOWED[name](subject)
        subject.raw(X)
        subject.raw.blocks[0](X)
        assert [record.reason for record in subject.guard.violations] == ["BypassedGuard"] * 2
        subject.guard.uninstall()
        assert not any(isinstance(type(part), ArmedMeta) for part in subject.raw.modules())

    @pytest.mark.filterwarnings("ignore:`torch.jit")
    def test_steps_aside_for_a_script(self, capsys):
        """Runs of what was scripted are unseen from then on; calls of the proxy are counted."""
        subject = Subject("observe")
        torch.jit.script(subject.raw.blocks[0])
        assert type(subject.raw.blocks[0].linear) is nn.Linear
        subject.raw.blocks[0](X)
        subject.raw.blocks[1](X)
        assert subject.guard.violation_count == 1
        torch.jit.script(subject.module)
        subject.raw(X)
        with subject.infer():
            subject.module(X)
            subject.module.forward(X)
        assert (subject.guard.count(), subject.guard.violation_count) == (2, 1)
        assert guard_of(subject.module) is subject.guard


class TestTold:
    def test_warned_of_once(self):
        """By a warning, and not as often as it is done."""
        subject = Subject("observe")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for block in subject.raw.blocks:
                torch.jit.script(block)
        (warning,) = (one for one in caught if one.category is RuntimeWarning)
        assert str(warning.message) == (
            "lensnet_guard: Block is guarded by lensnet_guard and cannot be scripted: TorchScript "
            "would run it unguarded. Script it before it is guarded, or not at all. In observe "
            "mode it is let through"
        )

    def test_a_forward_that_goes_on_after_it_has_returned(self):
        """Its parts run outside of the call: recorded, and run."""

        class Streams(Net):
            def forward(self, x):
                for block in self.blocks:
                    x = block(x)
                    yield x

        class Awaits(Net):
            async def forward(self, x):
                await asyncio.sleep(0)
                return self.head(x)

        torch.manual_seed(0)
        streams, awaits = Streams(), Awaits()
        expected = [*streams(X), asyncio.run(awaits(X))]
        first, second = (guard_module(m, mode="observe") for m in (streams, awaits))
        with first.context("inference"), second.context("inference"):
            found = [*first.module(X), asyncio.run(second.module(X))]
        assert same(found, expected)
        assert (first.violation_count, second.violation_count) == (2, 1)

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda guard: guard.context("sideways").__enter__(),
            lambda guard: guard.sanctioned("unknown").__enter__(),
            lambda guard: guard.window("micro_step").__enter__(),
            lambda guard: guard.window("").__enter__(),
            lambda guard: guard.window(3).__enter__(),
            lambda guard: guard.micro_step("one").__enter__(),
            lambda guard: guard.carry(lambda: (yield)),
            lambda guard: guard.count(scope="unknown"),
            lambda guard: guard_module(guard.module),
        ],
    )
    def test_a_wrong_word_to_the_guard_itself(self, wrong):
        """Is an error of the caller's, in every mode."""
        with pytest.raises((ValueError, TypeError)):
            wrong(Subject("observe").guard)
