"""Sessions of tests inside a test."""

import pytest

from lensnet_guard.logs.sinks import remove_from_all
from lensnet_guard.testing.plugin_session import TALLY

PREAMBLE = """
import contextlib, os, threading
import pytest, torch
from torch import nn
from lensnet_guard import *

X = torch.ones(2, 3)

def new(**keywords):
    return guard_module(nn.Linear(3, 2), name="critic", **keywords)

def call(guard, times=1):
    with guard.context("inference"):
        for _ in range(times):
            guard.module(X)

def sneaky(guard):
    with contextlib.suppress(Exception):
        guard.module(X)
"""


@pytest.fixture(autouse=True)
def _apart(request: pytest.FixtureRequest) -> None:
    """What the inner sessions do in this process is not this session's."""
    remove_from_all(request.node.stash[TALLY])


@pytest.fixture
def run(pytester: pytest.Pytester):
    """Run tests written after a preamble; in this process unless told otherwise."""

    def run(tests: str, *arguments: str, subprocess: bool = False) -> pytest.RunResult:
        lines = tests.splitlines()
        indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
        body = "\n".join(line[indent:] for line in lines)
        pytester.makepyfile(test_it=PREAMBLE + body)
        how = pytester.runpytest_subprocess if subprocess else pytester.runpytest_inprocess
        return how("-p", "no:cacheprovider", *arguments)

    return run
