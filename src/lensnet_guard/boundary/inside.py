"""Whether the running thread is inside an admitted run of a module."""

import threading
from typing import Any

# What torch prints where a guarded module stands in the way of a full graph.
EAGER = (
    "a module guarded by lensnet_guard is called in Python, so that every call is counted. Compile "
    "the module itself before it is guarded (module.compile(); guard_module(module)) and leave "
    "fullgraph=True out around its callers: they run with one graph break"
)


class Inside(threading.local):
    """Whether the running thread is inside an admitted run of the module.

    A thread-local and no context variable: torch.compile can read it in a traced forward, and
    guards on its value, so that a compiled module is checked too, without a graph break.

    Attributes:
        here: Whether it is.
        running: What stood on the instance in the forward's place as that run began; None where
            nothing did.
    """

    def __init__(self) -> None:  # runs once in every thread
        # Attributes of the object, not of the class: for one of the class torch.compile would
        # not notice that it is hidden later by one of the object.
        self.here = False
        self.running: Any = None
