"""Ablations: real trainings that differ in one thing, evaluated alike."""

import dataclasses
from itertools import islice
from pathlib import Path

import pytest

from megacontext.evaluation.ways import LENSNET
from megacontext.training.ablation import ABLATIONS, ablate
from megacontext.training.presets import SETTINGS
from megacontext.training.pretrained import read_run
from megacontext.training.run_folder import RunFolder

MODEL, SETTINGS_ = SETTINGS["recall"]
TINY = dataclasses.replace(MODEL, d_model=16, num_heads=2, lm_layers=1, lens_layers=1)
SHORT = dataclasses.replace(SETTINGS_, lm_steps=1, lm_batch_size=2, steps=1, batch_size=2)


class TestAblate:
    def test_each_is_trained_with_its_change(self, tmp_path: Path) -> None:
        """All of them run, keep the invariant, and finished ones are not trained again."""
        results = list(ablate(TINY, SHORT, tmp_path, sequences=4, seed=1))
        assert [result.name for result in results] == [a.name for a in ABLATIONS]
        losses = {}
        for ablation in ABLATIONS:
            folder = RunFolder(ablation.folder(tmp_path))
            saved = read_run(folder)
            for part, changes in (
                (saved.model, ablation.model),
                (saved.settings, ablation.settings),
            ):
                assert changes.items() <= vars(part).items()
            (row,) = folder.read_metrics()
            assert row["lensnet_calls"] == 1
            losses[ablation.name] = row["lens_loss"]
        assert len(set(losses.values())) >= len(ABLATIONS) - 1
        (again,) = islice(ablate(TINY, SHORT, tmp_path, sequences=4, seed=1), 1)
        assert again.evaluation.nll[LENSNET].tolist() == results[0].evaluation.nll[LENSNET].tolist()

    def test_folders_are_plain_names(self) -> None:
        """No two alike, nothing that a shell would mind."""
        names = [ablation.folder(Path()).name for ablation in ABLATIONS]
        assert len(set(names)) == len(names)
        assert all(set(n) <= set("abcdefghijklmnopqrstuvwxyzLN013-") for n in names)


@pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda a: a.name)
def test_an_ablation_changes_fields_that_exist(ablation: object) -> None:
    """And to another value than the recipe has."""
    for config, changes in ((MODEL, ablation.model), (SETTINGS_, ablation.settings)):  # type: ignore[attr-defined]
        for name, value in changes.items():
            assert getattr(config, name) != value
