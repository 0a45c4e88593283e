"""What a program can do to a guarded module that enforce mode refuses, each as a function."""

import contextlib
import copy
import threading
from unittest import mock

import torch
from tests.lensnet_guard.helpers import X
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from lensnet_guard import CallPolicy, Scope, guard_module


def always_wrong(call):
    return "it is wrong" if call.context == "training" else None


def cannot_answer(call):
    raise ZeroDivisionError


POLICY = CallPolicy(
    {
        "s": 1,
        "ema": Scope(1, per="step"),
        "strict": Scope((0, 9), requires=(always_wrong,)),
        "broken": Scope((0, 9), requires=(cannot_answer,)),
        "result": Scope((0, 9), ensures=(always_wrong,)),
    },
    methods=("update",),
    parts=("head",),
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(x).tanh()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def update(self, x):
        with torch.no_grad():
            self.head.bias.add_(x.sum())
        return self.head(x)


class Merged(Block):
    """What a block becomes for a while."""

    def forward(self, x):
        return super().forward(x) + 1


class Plain:
    """A class that is no module, and has its layout."""

    def __call__(self, x):
        return x + 1


class NoGuard:
    """What an unguarded program has in a guard's place."""

    def __getattr__(self, name):
        return lambda *_: contextlib.nullcontext()


class Subject:
    """A module, guarded or not, as a deed finds it."""

    def __init__(self, mode):
        torch.manual_seed(0)
        self.raw = Net()
        self.guard = guard_module(self.raw, policy=POLICY, mode=mode) if mode else NoGuard()
        self.module = self.guard.module if mode else self.raw

    def train(self):
        return self.guard.context("training")

    def infer(self):
        return self.guard.context("inference")

    def after(self):
        """What the module computes when the deed is done."""
        with self.infer(), torch.no_grad():
            return self.module(X)


# Calls, scopes, windows, contexts -----------------------------------------------------------------


def no_context(s):
    return s.module(X), s.module.forward(X)


def unsanctioned(s):
    with s.train():
        return s.module(X)


def too_often(s):
    with s.train(), s.guard.sanctioned("s"):
        return s.module(X), s.module(X)


def too_few(s):
    with s.train(), s.guard.micro_step(0):
        return X


def swallowed(s):
    with s.train(), s.guard.sanctioned("s"):
        out = s.module(X)
        with contextlib.suppress(Exception):
            out = out + s.module(X)
        return out if s.guard else None


def re_entered(s):
    out, once = [], []

    def hook(*_):
        if not once:
            once.append(1)
            out.append(s.module(X))

    handle = s.raw.head.register_forward_hook(hook)
    with s.infer():
        out.append(s.module(X))
    handle.remove()
    return out


def condition(name):
    def deed(s):
        with s.train(), s.guard.sanctioned(name):
            return s.module(X)

    return deed


def context_switch(s):
    with s.train(), s.guard.micro_step(0):
        with s.guard.sanctioned("s"):
            out = s.module(X)
        with s.infer():
            return out, s.module(X)


def nested_micro_step(s):
    with s.train(), s.guard.micro_step(0):
        with s.guard.sanctioned("s"):
            out = s.module(X)
        with s.guard.micro_step(1), s.guard.sanctioned("s"):
            return out, s.module(X)


def micro_step_in_no_context(s):
    with s.guard.micro_step(0):
        return X


def sanctioned_in_no_context(s):
    with s.guard.sanctioned("s"):
        return s.module(X)


def window_twice(s):
    with s.train(), s.guard.window("step"), s.guard.window("step"):
        with s.guard.sanctioned("ema"):
            return s.module(X)


def no_window(s):
    with s.train(), s.guard.sanctioned("ema"):
        return s.module(X)


def in_a_thread(s):
    out = []

    def run():
        with contextlib.suppress(Exception):  # it comes out again when the next micro-step ends
            out.append(s.module(X))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    with s.train(), s.guard.sanctioned("s"):
        out.append(s.module(X))
    return out


CALLS = [
    *(no_context, unsanctioned, too_often, too_few, swallowed, re_entered, context_switch),
    *(nested_micro_step, micro_step_in_no_context, sanctioned_in_no_context, window_twice),
    *(no_window, in_a_thread),
]
CONDITIONS = {name: condition(name) for name in ("strict", "broken", "result")}

# Runs behind the proxy ----------------------------------------------------------------------------


def compiled_wrapper(s):
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(s.raw, backend="eager")(X)


BYPASSES = {
    "the module": lambda s: s.raw(X),
    "its forward": lambda s: s.raw.forward(X),
    "_call_impl": lambda s: s.raw._call_impl(X),
    "a part": lambda s: s.raw.blocks[0](X),
    "a part's forward": lambda s: s.raw.blocks[0].linear.forward(X),
    "a part that is a call": lambda s: s.module.head(X),
    "a method that is a call": lambda s: s.module.update(X),
    "a method behind the proxy": lambda s: s.raw.update(X),
    "a method of a part by hand": lambda s: type(s.raw).update(s.raw, X),
    "functional_call": lambda s: torch.func.functional_call(s.raw, {"head.bias": torch.ones(2)}, X),
    "vmap": lambda s: torch.func.vmap(s.raw)(X),
    "a deep copy": lambda s: copy.deepcopy(s.raw)(X),
    "a copy of a part": lambda s: copy.deepcopy(s.raw.blocks[1])(X),
    "a shallow copy": lambda s: copy.copy(s.raw)(X),
    "a trace": lambda s: torch.jit.trace(s.raw, (X,))(X),
    "a compiled wrapper": compiled_wrapper,
    "in an export": lambda s: torch.export.export(s.raw, (X,), strict=False).module()(X),
}

RUN = {deed.__name__: deed for deed in CALLS} | CONDITIONS | BYPASSES

# What is done to the module -----------------------------------------------------------------------


def wraps_the_guards_forward(s):
    cls = type(s.raw.blocks[0])
    function = vars(cls)["forward"]

    def timed(self, x):
        return function(self, x) + 1

    cls.forward = timed
    out = s.after()
    others = Block.forward(s.raw.blocks[0], X), Block().forward(torch.zeros(2, 3)).shape
    cls.forward = function
    return out, *others


def wraps_the_guards_call(s):
    cls = type(s.raw)
    function = cls.__call__

    def timed(self, x):
        return function(self, x) + 1

    return called_by(s, timed, function)


def wraps_it_hidden(s):
    cls = type(s.raw)
    kept = mock.Mock(run=cls.__call__)  # as a global would keep it

    def timed(self, x):
        return kept.run(self, x) + 1

    return called_by(s, timed, kept.run)


def called_by(s, timed, function):
    cls = type(s.raw)
    cls.__call__ = timed
    out = s.after(), Net()(torch.zeros(2, 3)).shape
    cls.__call__ = function
    return out


def becomes_no_module(s):
    block = s.raw.blocks[0]
    with s.infer():
        before = s.module(X)
    block.__class__ = Plain
    return before, Plain.__call__(block, X), type(block) is Plain


def becomes_what_cannot_be_derived(s):
    block = s.raw.blocks[0]
    block.__class__ = Closed
    return s.after(), isinstance(block, Closed)


class NoSubclasses(type):
    def mro(cls):
        if len(cls.__bases__) > 1:
            raise RuntimeError("no subclasses")
        return super().mro()


class Closed(Block, metaclass=NoSubclasses):
    pass


def subclassed(s):
    class Wider(type(s.raw.blocks[0])):
        def forward(self, x):
            return super().forward(x) + 1

    s.raw.blocks[0].__class__ = Wider
    return s.after(), Wider().forward(torch.zeros(2, 3)).shape, Wider.__bases__ == (Block,)


def subclassed_by_call(s):
    cls = type(s.raw.head)
    s.raw.head.__class__ = type("Wider", (cls,), {"forward": lambda self, x: x.sum() * self.bias})
    return s.after()


def weight_norm(s):
    torch.manual_seed(1)
    parametrizations.weight_norm(s.raw.head)
    parametrizations.orthogonal(s.raw.blocks[0].linear)
    return s.after(), sorted(s.raw.state_dict())


def parametrized_and_back(s):
    torch.manual_seed(1)
    parametrizations.orthogonal(s.raw.head)
    out = s.after()
    parametrize.remove_parametrizations(s.raw.head, "weight")
    return out, s.after(), isinstance(s.raw.head.weight, nn.Parameter), type(s.raw.head).__name__


def scripted(target):
    def deed(s):
        return torch.jit.script(target(s))(X)

    return deed


class Owner(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x) + 1


def scripted_owner(s):
    owner = Owner(s.module)
    out = torch.jit.script(owner)(X)
    return out, owner(X), len(list(owner.parameters()))


DONE = {
    "a wrapper around the guard's forward": wraps_the_guards_forward,
    "a wrapper around the guard's call": wraps_the_guards_call,
    "a class that is no module": becomes_no_module,
    "the proxy scripted": scripted(lambda s: s.module),
    "the raw module scripted": scripted(lambda s: s.raw),
    "a part scripted": scripted(lambda s: s.raw.blocks[0].linear),
    "an owner scripted": scripted_owner,
}

# What enforce mode does not refuse, and does without a guard's trace in the results.


def replaced_forward(s):
    original = s.module.forward
    s.module.forward = lambda x: original(x) + 1
    out = s.after()
    s.module.forward = original
    s.raw.blocks[0].forward = lambda x: x - 1
    return out, s.after()


def other_class(s):
    s.raw.blocks[0].__class__ = Merged
    return s.after()


def swapped(s):
    s.module.head = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        s.module.head.weight.fill_(0.5)
    s.raw.blocks[1] = nn.Identity()
    return s.after()


def patched(s):
    with mock.patch.object(type(s.raw), "forward", lambda self, x: x + 1):
        return s.after()


ALLOWED = {
    "a replaced forward": replaced_forward,
    "another class": other_class,
    "a subclass": subclassed,
    "a subclass by a call": subclassed_by_call,
    "parametrizations": weight_norm,
    "parametrizations, and back": parametrized_and_back,
    "swapped submodules": swapped,
    "a patched class": patched,
    "a hidden wrapper around the guard's call": wraps_it_hidden,
}
