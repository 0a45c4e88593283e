"""Settings: each is a model and a training that fit each other and their data."""

import pytest

from megacontext.training.presets import SETTINGS
from megacontext.training.sources import load_source


class TestSettings:
    @pytest.mark.parametrize("name", SETTINGS)
    def test_they_fit_their_data(self, name: str) -> None:
        """Vocabulary and horizon are checked as in a run."""
        model, settings = SETTINGS[name]
        source = load_source(settings, model)
        assert source.vocab_size == model.vocab_size
