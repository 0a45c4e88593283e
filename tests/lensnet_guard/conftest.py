"""Fixtures of the guard's suite: a module that can be watched, its guard, and a real subprocess."""

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lensnet_guard import CallPolicy, Guard, guard_module, untested


class Scorer(nn.Module):
    """A small real module; ``runs`` counts its forwards, ``inside`` is called within each."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.runs = 0
        self.inside: Callable[[], object] | None = None

    def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        self.runs += 1
        if self.inside is not None:
            self.inside()
        return self.linear(x)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the shell sets, tests start without a mode and as rank 0."""
    monkeypatch.delenv("LENSNET_GUARD", raising=False)
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test made the guard say of torch, another may make it say again."""
    monkeypatch.setattr(untested, "_told", set())


@pytest.fixture
def x() -> torch.Tensor:
    return torch.ones(4, 3)


@pytest.fixture
def make_scorer() -> Callable[[], Scorer]:
    return Scorer


@pytest.fixture
def scorer() -> Scorer:
    return Scorer()


@pytest.fixture
def guard(scorer: Scorer) -> Guard:
    return guard_module(scorer)


@pytest.fixture
def make_guard() -> Callable[..., Guard]:
    """A guard with the given scopes, on a fresh `Scorer`."""

    def make(*, callers: dict[str, int] | None = None, mode: Any = None, **scopes: int) -> Guard:
        policy = CallPolicy(scopes, callers or {}) if scopes or callers else None
        return guard_module(Scorer(), policy=policy, mode=mode)

    return make


class OneBuffer:
    """What CUDA graphs do to outputs: each graph writes to memory of its own, call after call."""

    def __call__(self, graph: nn.Module, _: object) -> Callable[..., Any]:
        buffers: list[Any] = []

        def run(*inputs: torch.Tensor) -> Any:
            outputs = graph(*inputs)
            if torch.is_grad_enabled():
                return outputs
            if not buffers:
                buffers.extend(output.numpy().copy() for output in outputs)
            for buffer, output in zip(buffers, outputs, strict=True):
                buffer[:] = output.numpy()
            # A storage of its own for every call, as torch makes them, over the same memory.
            return tuple(map(torch.from_numpy, buffers))

        return run


@pytest.fixture
def graphed_guard() -> Iterator[Guard]:
    """Of a module that is compiled with what looks like CUDA graphs, on any machine."""
    torch._dynamo.reset()
    if (trees := sys.modules.get("torch._inductor.cudagraph_trees")) is not None:
        trees.MarkStepBox.mark_step_counter = 0  # or no call would overwrite any more
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    module.compile(backend=OneBuffer())
    # Torch tells the configuration of inductor only; with reduce-overhead it says this.
    module._compiled_call_impl.get_compiler_config = lambda: {"triton.cudagraphs": True}
    yield guard_module(module, name="critic")
    torch._dynamo.reset()


@pytest.fixture
def in_thread() -> Callable[..., Any]:
    """Run a function in a fresh thread; give back its result, or raise what it raised."""

    def run(fn: Callable[..., Any], *args: Any, name: str | None = None) -> Any:
        outcome: list[Any] = []

        def target() -> None:
            try:
                outcome.append((fn(*args), None))
            except BaseException as error:
                outcome.append((None, error))

        thread = threading.Thread(target=target, name=name)
        thread.start()
        thread.join(timeout=30)
        result, error = outcome[0]
        if error is not None:
            raise error
        return result

    return run


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script in a fresh interpreter, in ``tmp_path``."""

    def run(code: str, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "script.py"
        script.write_text(textwrap.dedent(code))
        return subprocess.run(
            [sys.executable, str(script), *map(str, args)],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run
