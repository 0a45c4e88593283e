"""A module with parts, and one with its forward on the instance, to be called behind the guard."""

import pickle

from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return self.linear(x).relu()


class Lens(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.extras = nn.ModuleDict({"norm": nn.LayerNorm(3)})

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.extras["norm"](x)

    @property
    def runs(self):
        return sum(block.runs for block in self.blocks)


class Forwarding(nn.Module):
    """Sets its attributes on the module inside, as Lightning Fabric's wrapper does."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside
        self.__dict__["ready"] = True

    def __setattr__(self, name, value):
        if "ready" in self.__dict__:
            setattr(self.inside, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, x):
        return self.inside(x)


def guard_free(lens):
    return pickle.loads(pickle.dumps(lens))
