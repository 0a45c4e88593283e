"""Averages of weights as teachers: torch's, timm's and diffusers', guarded and of a guarded one.

A teacher is asked once per micro-step, and updated once per optimizer step, after it.
"""

import contextlib
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.lensnet_guard.plumbing.models import X, is_refused, named
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from lensnet_guard import (
    BudgetExceeded,
    BudgetUnmet,
    CallPolicy,
    NoContext,
    Scope,
    eval_mode,
    guard_module,
    guard_of,
    no_grad,
)

STEPS, ACCUMULATED = 3, 2


def from_torch(student):
    return AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.5)).eval()


def timm_averages():
    """The one file of timm, for the package needs a torchvision, which comes for GPUs only."""
    if (spec := importlib.util.find_spec("timm")) is None:
        pytest.skip("timm is not installed")
    path = Path(spec.origin).with_name("utils") / "model_ema.py"
    spec = importlib.util.spec_from_file_location("timm_model_ema", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def from_timm_3(student):
    return timm_averages().ModelEmaV3(student, decay=0.5).eval()


def from_timm_2(student):
    return timm_averages().ModelEmaV2(student, decay=0.5).eval()


class Shadowed(nn.Module):
    """A teacher that holds what diffusers averages: no module has the method to count otherwise."""

    def __init__(self, student):
        super().__init__()
        self.average = pytest.importorskip("diffusers.training_utils").EMAModel(
            student.parameters(), decay=0.5
        )
        self.module = make_student()

    def update(self, student):
        self.average.step(student.parameters())
        self.average.copy_to(self.module.parameters())

    def forward(self, x):
        return self.module(x)


KINDS = {
    "torch": (from_torch, "update_parameters"),
    "timm": (from_timm_3, "update"),
    "diffusers": (lambda student: Shadowed(student).eval(), "update"),
}


def make_student():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))


def guarded(teacher, method):
    policy = CallPolicy(
        {"soft": Scope(1, requires=(no_grad, eval_mode)), "update": Scope(1, per="step")},
        methods=(method,),
    )
    return guard_module(teacher, policy=policy, name="teacher")


class NoGuard:
    """What an unguarded program has in a guard's place."""

    def __getattr__(self, name):
        return lambda *_: contextlib.nullcontext()


def distil(teacher, student, method, guard, updates=1, ask=None):
    """A student that follows its own average; its losses, to the last bit.

    Args:
        updates: How often the average is updated in a step; more than once is once per micro-step.
        ask: What of it is called, if not the average itself.
    """
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    losses = []

    def update():
        with guard.sanctioned("update"):
            getattr(teacher, method)(student)

    for step in range(STEPS):
        with guard.window("step"):
            for n in range(ACCUMULATED):
                with guard.micro_step(step, n):
                    with torch.no_grad(), guard.sanctioned("soft"):
                        soft = (ask or teacher)(X * (n + 1))
                    loss = F.mse_loss(student(X * (n + 1)), soft + n + 1)
                    loss.backward()
                    if updates > 1:
                        update()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            if updates == 1:
                update()
    return losses


@pytest.mark.parametrize("kind", KINDS)
class TestTeachers:
    def make(self, kind):
        make, method = KINDS[kind]
        student = make_student()
        return make(student), student, method

    def test_trains_as_without_a_guard(self, kind):
        """Losses and weights of both, to the last bit."""
        teacher, student, method = self.make(kind)
        guard = guarded(teacher, method)
        with guard.context("training"):
            losses = distil(guard.module, student, method, guard)
        plain_teacher, plain, _ = self.make(kind)
        assert distil(plain_teacher, plain, method, NoGuard()) == losses
        assert losses[-1] != losses[0]
        for one, other in ((teacher, plain_teacher), (student, plain)):
            pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        assert guard.count("training", "soft") == STEPS * ACCUMULATED
        assert guard.count("training", "update") == STEPS
        assert guard.violation_count == 0

    def test_never_updated(self, kind):
        """Told as the first optimizer step ends."""
        teacher, student, method = self.make(kind)
        guard = guarded(teacher, method)
        with pytest.raises(BudgetUnmet) as caught, guard.context("training"):
            distil(guard.module, student, method, guard, updates=0)
        assert str(caught.value).startswith(
            "A window ended before the call budget of teacher was met: in 'step' update made 0 of "
            "1 calls."
        )
        assert guard.count("training", "soft") == ACCUMULATED

    def test_updated_in_every_micro_step(self, kind):
        """Told at the second update, before the average has moved again."""
        teacher, student, method = self.make(kind)
        guard = guarded(teacher, method)
        with pytest.raises(BudgetExceeded) as caught, guard.context("training"):
            distil(guard.module, student, method, guard, updates=ACCUMULATED)
        assert str(caught.value).startswith(
            f"teacher.{method} was called in training more often than its budget allows."
        )
        assert caught.value.record.caller.function == named("distil.<locals>.update")
        assert guard.count("training", "update") == 1


@pytest.mark.parametrize("make", [from_torch, from_timm_3, from_timm_2])
class TestCopiesOfAGuardedStudent:
    def test_has_a_guard_of_its_own_and_follows_it(self, make):
        """The copy is updated past any call, and called in a context of its own."""
        guard = guard_module(make_student(), policy=CallPolicy({"s": 1}), name="student")
        average = make(guard.module)
        update = getattr(average, "update_parameters", None) or average.update
        update(guard.module)
        with torch.no_grad():
            guard.module[2].bias += 1
        before = average.module[2].bias.clone()
        update(guard.module)
        assert not torch.equal(before, average.module[2].bias)
        own = guard_of(average.module)
        assert own is not guard
        assert own.name == "student (copy)"
        with pytest.raises(NoContext):
            average.module(X)
        with own.context("inference"):
            assert average.module(X).shape == (2, 2)
        assert guard.calls == ()

    def test_of_the_raw_module_is_refused_as_it_is_called(self, make):
        """As any copy that was made behind the guard's back; its weights can be read."""
        guard = guard_module(make_student(), name="student")
        average = make(guard.module.__wrapped__)
        with guard.context("inference"):
            assert is_refused(average.module, X)
        assert [record.reason for record in guard.violations] == ["BypassedGuard"]
        guard.uninstall()
        assert average.module(X).shape == (2, 2)


def test_what_diffusers_puts_into_a_guarded_student_and_takes_back():
    """store, copy_to and restore go through the proxy's parameters, and are no calls."""
    average = pytest.importorskip("diffusers.training_utils").EMAModel
    guard = guard_module(make_student(), policy=CallPolicy({"s": 1}))
    average = average(guard.module.parameters(), decay=0.5)
    trained = guard.module[0].weight.detach().clone()
    with torch.no_grad():
        guard.module[0].weight += 1
    for expected in (trained + 1, trained):
        average.store(guard.module.parameters())
        average.copy_to(guard.module.parameters())
        assert torch.equal(guard.module[0].weight, trained)
        average.restore(guard.module.parameters())
        assert torch.equal(guard.module[0].weight, trained + 1) or expected is trained
    assert guard.calls == ()


def test_the_statistics_of_a_guarded_average():
    """update_bn runs the average over the data: calls of inference, between the micro-steps."""
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    guard = guarded(AveragedModel(student), "update_parameters")
    with guard.context("inference"):
        update_bn([X, X], guard.module)
    assert guard.count("inference") == 2
    assert guard.module.module[1].num_batches_tracked == 2


class TestTimmVersion2:
    """Its average has no forward: what is called is the module inside, and `update`."""

    def make(self):
        policy = CallPolicy(
            {"soft": 1, "update": Scope(1, per="step")}, methods=("update",), parts=("module",)
        )
        student = make_student()
        return guard_module(from_timm_2(student), policy=policy, name="teacher"), student

    def test_a_teacher_without_a_forward_could_not_be_guarded(self):
        """Trained by its own average, with a call of the part in every micro-step."""
        guard, student = self.make()
        with guard.context("training"):
            losses = distil(guard.module, student, "update", guard, ask=guard.module.module)
        twin = make_student()
        plain = from_timm_2(twin)
        assert distil(plain, twin, "update", NoGuard(), ask=plain.module) == losses
        assert guard.count("training", "soft") == STEPS * ACCUMULATED
        assert guard.count("training", "update") == STEPS

    def test_behind_its_back(self):
        """An update of the raw average is a bypass."""
        guard, student = self.make()
        assert is_refused(guard.module.__wrapped__.update, student)
