"""Fixtures of the guard's suite: a module that can be watched, its guard, and a real subprocess."""

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lensnet_guard import CallPolicy, Guard, guard_module


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
