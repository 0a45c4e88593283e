"""Settings for trainings of other libraries: no state of one test in the next."""

import gc
import os
from collections.abc import Iterator

import pytest


@pytest.fixture
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate keeps device and precision in singletons, and tells them in the environment."""
    state = pytest.importorskip("accelerate.state")
    before = dict(os.environ)
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="module")
def still_heap() -> Iterator[None]:
    """Each training of transformers collects garbage twice, among a million objects of imports."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def trl_models(tmp_path_factory):
    """Where small random models and their tokenizer are saved, for trainers of TRL."""
    from tests.lensnet_guard.integrations.trl_kit import save_models

    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def make(trl_models, tmp_path):
    """What makes a trainer of TRL: ``make("dpo", beta=0.1)``."""
    from tests.lensnet_guard.integrations.trl_kit import Kit

    return Kit(trl_models, tmp_path / "training").make
