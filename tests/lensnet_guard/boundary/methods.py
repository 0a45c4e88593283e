"""A module with methods of every kind that run it."""

import asyncio

import torch
from torch import nn


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(x)

    def generate(self, x, steps=2):
        """Run the module as often as it is asked to."""
        for _ in range(steps):
            x = self(x)
        return x


class Net(Base):
    def generate(self, x, steps=2):
        """Run the module once more."""
        return super().generate(self.forward(x), steps)

    generate.flag = "kept"

    as_torch_does = nn.Module._call_impl

    def by_parts(self, x):
        return self.linear(x)

    def recursive(self, x, depth):
        return self.recursive(self(x), depth - 1) if depth else x

    def me(self):
        return self

    def fails(self, x):
        self(x)
        raise ZeroDivisionError

    def in_thread(self, run, x):
        return run(self, x)

    def stream(self, x):
        while x is not None:
            x = yield self(x)
        return "over"

    def streams(self, x):
        """Return a generator, which runs the module when it is asked to."""
        return self.stream(x)

    async def agenerate(self, x, steps=2):
        for _ in range(steps):
            await asyncio.sleep(0)
            x = self(x)
        return x

    async def gathered(self, x):
        return await asyncio.gather(self.agenerate(x, 1), self.agenerate(x, 1))

    async def astream(self, x):
        while x is not None:
            x = yield self(x)

    @torch.no_grad()
    def without_grad(self, x):
        return self(x)

    @property
    def size(self):
        return self.linear.in_features

    @staticmethod
    def scale(x):
        return 2 * x

    @classmethod
    def make(cls):
        return cls()
