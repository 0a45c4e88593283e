"""Modules and helpers of the plumbing tests."""

import io
import sys

import torch
from torch import nn

from lensnet_guard import (
    BypassedGuard,
)

SCOPE = "preference_scorer"
X = torch.tensor([[1.0, 2.0, -1.0], [0.5, -1.0, 3.0]])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return self.linear(x).tanh()


class Critic(nn.Module):
    """The guarded module of these tests."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Model(nn.Module):
    """A model that holds a critic, guarded or not, behind a layer of its own."""

    def __init__(self, critic):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.critic = critic

    def forward(self, x):
        return self.critic(self.body(x))


class Tied(nn.Module):
    """A critic that reads a language model's own embedding."""

    def __init__(self, emb):
        super().__init__()
        self.emb = emb
        self.head = nn.Linear(3, 2)

    def forward(self, tokens):
        return self.head(self.emb(tokens))


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.emb.weight

    def forward(self, tokens):
        return self.out(self.emb(tokens))


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight


def train(guard, model):
    """One training step on one sanctioned call; whether every parameter has moved."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with guard.context("training"), guard.sanctioned(SCOPE):
        loss = model(X).square().sum()
    loss.backward()
    optimizer.step()
    after = [parameter.detach() for parameter in model.parameters()]
    assert guard.violations == ()
    return not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def only_call(guard):
    """The function that made the one recorded call."""
    (record,) = guard.calls
    assert (record.kind, record.verdict, record.outcome) == ("call", "allow", "returned")
    assert "/plumbing/" in record.caller.file
    return record.caller.function


def named(qualname):
    """A function's name as a frame tells it, in Python 3.10 without the class."""
    return qualname if sys.version_info >= (3, 11) else qualname.rpartition(".")[2]


def is_refused(run, *args):
    try:
        run(*args)
    except BypassedGuard:
        return True
    return False


def saved_and_loaded(thing, **options):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, **options)
