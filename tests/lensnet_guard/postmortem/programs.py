"""Small trainings as other people write them, to be observed, and run again under a contract.

Each is a function of a guard of its module. ``odd`` is what to do once, instead of a usual call.
"""

import torch
import torch.nn.functional as F
from torch import nn

X = torch.ones(2, 4)


def plainly(call, _):
    """No odd call: each is as usual."""
    return call()


def twice(call, _):
    """Once, one call more."""
    call()
    return call()


def never(*_):
    """Once, no call."""
    return torch.zeros(2, 4)


def in_train_mode(call, guard):
    """Once, with dropout."""
    guard.module.train()
    try:
        return call()
    finally:
        guard.module.eval()


def with_grad(call, _):
    """Once, with gradients."""
    with torch.enable_grad():
        return call()


def after_a_change(call, guard):
    """Once, with other weights."""
    with torch.no_grad():
        next(guard.module.parameters()).add_(1)
    return call()


def reference():
    """What DPO, KTO and GRPO call: frozen, and in eval mode."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval().requires_grad_(False)


class Training:
    """Micro-steps of a policy, and its optimizer."""

    def __init__(self, guard, odd=plainly):
        self.guard, self.odd = guard, odd
        self.policy = nn.Linear(4, 4)
        self.optimizer = torch.optim.SGD(self.policy.parameters(), lr=0.1)
        self.calls = 0

    def score(self, x=X):
        """The function that calls the reference."""
        self.calls += 1
        odd = self.odd if self.calls == 3 else plainly
        return odd(lambda: self.guard.module(x), self.guard)

    def backward(self, target):
        F.mse_loss(self.policy(X), target).backward()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


def dpo(guard, odd=plainly, steps=4):
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


def kto(guard, odd=plainly):
    """Two calls in each micro-step, from two functions."""
    training = KTO(guard, odd)
    with guard.context("training"):
        for step in range(4):
            with guard.micro_step(step), torch.no_grad():
                training.pairs()


def kto_of_one_function(guard, odd=plainly):
    """Two calls in each micro-step, from one."""
    training = Training(guard, odd)
    with guard.context("training"):
        for step in range(4):
            with guard.micro_step(step), torch.no_grad():
                training.score()
                training.score(X * 2)


def grpo(guard, odd=plainly):
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


def opened(guard, odd=plainly):
    """In a scope that is opened in code, from one to two times."""
    training = Training(guard, odd)
    with guard.context("training"):
        for step in range(4):
            with guard.micro_step(step), guard.sanctioned("kl"), torch.no_grad():
                for _ in range(1 + (step == 1)):
                    training.score()


def unwatched(guard, odd=plainly):
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
        odd = self.odd if self.calls == 2 else plainly
        odd(lambda: self.guard.module.update_parameters(self.policy), self.guard)


def ema(guard, odd=plainly):
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


def evaluation(guard, odd=plainly):
    """Only in evaluation."""
    training = Training(guard, odd)
    for step in range(3):
        with guard.context("training"), guard.micro_step(step):
            training.backward(X)
        with guard.context("inference"), torch.no_grad():
            training.score()


def adapters(guard, odd=plainly):
    """One model with PEFT's adapters: with them it is the policy, without them the reference."""
    ids = torch.arange(8).reshape(2, 4)
    optimizer = torch.optim.SGD(guard.module.parameters(), lr=0.1)

    def logits():
        return guard.module(input_ids=ids).logits

    with guard.context("training"):
        for step in range(3):
            with guard.micro_step(step):
                with guard.module.disable_adapter(), torch.no_grad():
                    target = (odd if step == 1 else plainly)(logits, guard)
                F.mse_loss(logits(), target).backward()
            optimizer.step()


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
