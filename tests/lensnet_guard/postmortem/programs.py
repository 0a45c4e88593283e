"""Small trainings as other people write them, to be observed, and run again under a contract.

Each is a function of a guard of its module. ``odd`` is what happens once, instead of a usual call.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

X = torch.ones(2, 4)


def times(odd, usual=1):
    """How often to call."""
    return {"twice": usual + 1, "never": 0}.get(odd, usual)


@contextlib.contextmanager
def oddly(odd, guard):
    """The state in which to call."""
    module = guard.module
    if odd == "in train mode":
        module.train()
    if odd == "after a change":
        with torch.no_grad():
            next(module.parameters()).add_(1)
    with torch.enable_grad() if odd == "with grad" else contextlib.nullcontext():
        yield
    if odd == "in train mode":
        module.eval()


def reference():
    """What DPO, KTO and GRPO call: frozen, and in eval mode."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval().requires_grad_(False)


class Training:
    """Micro-steps of a policy, and its optimizer."""

    def __init__(self, guard, odd=None):
        self.guard, self.odd = guard, odd
        self.policy = nn.Linear(4, 4)
        self.optimizer = torch.optim.SGD(self.policy.parameters(), lr=0.1)
        self.calls = 0

    def score(self, x=X):
        """The function that calls the reference."""
        self.calls += 1
        odd, scores = self.odd if self.calls == 3 else None, torch.zeros(2, 4)
        with oddly(odd, self.guard):
            for _ in range(times(odd)):
                scores = self.guard.module(x)
        return scores

    def backward(self, target):
        F.mse_loss(self.policy(X), target).backward()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


def dpo(guard, odd=None, steps=4):
    """The reference once per micro-step, without gradients; and in evaluation."""
    training = Training(guard, odd)
    with guard.context("training"):
        for step in range(steps):
            for micro_step in range(2):
                with guard.micro_step(step, micro_step), torch.no_grad():
                    target = training.score()
                training.backward(target)
            training.step()
    with guard.context("inference"):
        guard.module(X)


class KTO(Training):
    """A trainer that calls its reference twice: for the pairs, and for the KL."""

    def pairs(self):
        return self.score(), self.kl()

    def kl(self):
        with torch.no_grad():
            return self.guard.module(X * 2)


def kto(guard, odd=None):
    """Two calls in each micro-step, from two functions."""
    training = KTO(guard, odd)
    with guard.context("training"):
        for step in range(4):
            with guard.micro_step(step), torch.no_grad():
                training.pairs()


def kto_of_one_function(guard, odd=None):
    """Two calls in each micro-step, from one."""
    training = Training(guard, odd)
    with guard.context("training"):
        for step in range(4):
            with guard.micro_step(step), torch.no_grad():
                training.score()
                training.score(X * 2)


def grpo(guard, odd=None):
    """In chunks in the first micro-step of a generation batch, and not at all in the others."""
    training = Training(guard, odd)
    with guard.context("training"):
        for generation in range(3):
            with guard.window("generation"):
                for micro_step in range(3):
                    with guard.micro_step(generation, micro_step), torch.no_grad():
                        if micro_step == 0:
                            for chunk in X.chunk(2):
                                training.score(chunk)


def opened(guard, odd=None):
    """In a scope that is opened in code, from one to two times."""
    training = Training(guard, odd)
    with guard.context("training"):
        for step in range(4):
            with guard.micro_step(step), guard.sanctioned("kl"), torch.no_grad():
                for _ in range(1 + (step == 1)):
                    training.score()


def unwatched(guard, odd=None):
    """With a window around each optimizer step, and no micro-steps."""
    training = Training(guard, odd)
    with guard.context("training"):
        for _ in range(4):
            with guard.window("step"), torch.no_grad():
                target = training.score()
            training.backward(target)
            training.step()


class EMA(Training):
    """A trainer that averages its weights after each optimizer step."""

    def average(self):
        self.calls += 1
        for _ in range(times(self.odd if self.calls == 2 else None)):
            self.guard.module.update_parameters(self.policy)


def ema(guard, odd=None):
    """Two micro-steps a step, and then the average takes the weights; it is run in evaluation."""
    training = EMA(guard, odd)
    with guard.context("training"):
        for step in range(3):
            with guard.window("step"):
                for micro_step in range(2):
                    with guard.micro_step(step, micro_step):
                        training.backward(X)
                training.step()
                training.average()
    with guard.context("inference"):
        guard.module(X)


def evaluation(guard, odd=None):
    """Only in evaluation."""
    training = Training(guard, odd)
    for step in range(3):
        with guard.context("training"), guard.micro_step(step):
            training.backward(X)
        with guard.context("inference"), torch.no_grad():
            training.score()


class OneModel:
    """A model with PEFT's adapters: with them it is the policy, without them the reference."""

    def __init__(self, guard):
        self.guard = guard
        self.optimizer = torch.optim.SGD(guard.module.parameters(), lr=0.1)

    def logits(self):
        return self.guard.module(input_ids=torch.arange(8).reshape(2, 4)).logits


def adapters(guard, odd=None):
    """Both of it in each micro-step."""
    training = OneModel(guard)
    with guard.context("training"):
        for step in range(3):
            with guard.micro_step(step):
                with guard.module.disable_adapter(), torch.no_grad():
                    with oddly(odd if step == 1 else None, guard):
                        target = training.logits()
                F.mse_loss(training.logits(), target.detach()).backward()
            training.optimizer.step()


def f(guard):
    return guard.module(X)


def g(guard):
    return guard.module(X)


def moving(guard):
    """Weights that move between the calls of two functions, and never before those of the first."""
    with guard.context("training"):
        for step in range(3):
            with guard.micro_step(step), torch.no_grad():
                f(guard)
                next(guard.module.parameters()).add_(1)
                g(guard)
