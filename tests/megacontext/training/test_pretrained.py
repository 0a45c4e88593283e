"""A trained model comes back from its run folder; what cannot is refused."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from megacontext import MCConfig, MCController
from megacontext.files import DamagedFileError
from megacontext.training.pretrained import load_model, read_run, usable_device
from megacontext.training.run_folder import RunFolder


class TestLoadModel:
    def test_the_weights_of_the_newest_checkpoint(self, tmp_path: Path, config: MCConfig) -> None:
        """And LensNet is guarded, as always."""
        folder = RunFolder(tmp_path / "run")
        folder.create({"model": asdict(config), "train": {}, "source": {}})
        mc = MCController(config)
        mc.language_model.norm.weight.data.fill_(3.0)
        folder.save_checkpoint({"model": mc.state_dict()})
        loaded = load_model(tmp_path / "run")
        assert loaded.language_model.norm.weight.eq(3).all()
        assert loaded.guard.mode == "enforce"

    def test_a_run_without_a_checkpoint(self, tmp_path: Path, config: MCConfig) -> None:
        """It was killed before its first."""
        RunFolder(tmp_path / "run").create({"model": asdict(config), "train": {}, "source": {}})
        with pytest.raises(FileNotFoundError) as raised:
            load_model(tmp_path / "run")
        assert str(raised.value) == f"{tmp_path / 'run'} has no checkpoint yet; train it first"

    @pytest.mark.parametrize("state", [{}, {"model": {}}, [1]])
    def test_a_checkpoint_of_something_else(
        self, tmp_path: Path, config: MCConfig, state: object
    ) -> None:
        """Is named, and what to do."""
        folder = RunFolder(tmp_path / "run")
        folder.create({"model": asdict(config), "train": {}, "source": {}})
        torch.save(state, folder.checkpoint)
        with pytest.raises(DamagedFileError, match=r"checkpoint\.pt is damaged \(.*put the orig"):
            load_model(tmp_path / "run")

    @pytest.mark.parametrize("part", ["model", "train"])
    def test_a_configuration_that_makes_no_run(
        self, tmp_path: Path, config: MCConfig, part: str
    ) -> None:
        """Its fields are unknown, or their values: the file is named, not the class alone."""
        saved = {"model": asdict(config), "train": {}, "source": {}} | {part: {"wide": 1}}
        folder = RunFolder(tmp_path / "run")
        folder.create(saved)
        with pytest.raises(DamagedFileError) as raised:
            read_run(folder)
        assert str(raised.value).startswith(f"{folder.config} is damaged (")
        assert "unexpected keyword argument 'wide'" in str(raised.value)


class TestUsableDevice:
    def test_what_works(self) -> None:
        """A CPU does, everywhere."""
        assert usable_device("cpu") == torch.device("cpu")

    def test_what_does_not(self) -> None:
        """Named, with torch's reason."""
        with pytest.raises(ValueError, match="device 'abacus' cannot be used here: "):
            usable_device("abacus")
