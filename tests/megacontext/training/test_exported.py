"""Weights apart from their run, and those that are shipped."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tests.megacontext.model.test_hf_language_model import config_of, save
from tests.megacontext.training.test_staged import SETTINGS

from megacontext import MCConfig, load_model, train
from megacontext.cli import main
from megacontext.model.gguf import SMOLLM2
from megacontext.training.exported import export, model_folder
from megacontext.training.pretrained import read_run
from megacontext.training.run_folder import RunFolder

pytest.importorskip("transformers")

SHORT = replace(SETTINGS, gist_steps=1, guess_steps=1, steps=1)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run in stages."""
    folder = tmp_path_factory.mktemp("exported")
    save("llama, tied", folder / "model")
    config = config_of(
        folder / "model", freeze_language_model=True, gists="weighted", lens_reads="tokens"
    )
    train(folder / "run", config, SHORT)
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> Path:
    """Its weights and losses."""
    return export(run_dir, run_dir.parent / "out")


class TestExport:
    def test_it_is_the_same_model(self, run_dir: Path, exported: Path) -> None:
        """Bit by bit, without the optimizer; losses are in one file."""
        ours, theirs = load_model(exported).state_dict(), load_model(run_dir).state_dict()
        assert all(ours[name].equal(theirs[name]) for name in theirs)
        names = sorted(str(p.relative_to(exported)) for p in exported.rglob("*") if p.is_file())
        assert names == [
            "config.json",
            "held_out/000000.npz",
            "kept/000000.npz",
            "weights.safetensors",
        ]
        kept = np.load(exported / "kept" / "000000.npz")
        assert len(kept["tokens"]) == len(kept["nll"]) == SHORT.kept_sequences

    def test_its_gists_and_losses_can_be_taken(self, exported: Path, tmp_path: Path) -> None:
        """By a run with another seed, which computes neither anew."""
        config = read_run(RunFolder(exported)).model
        seen: list[str] = []
        train(
            tmp_path / "run",
            replace(config, seed=1),
            replace(SHORT, gists_of=str(exported)),
            report=lambda report: seen.append(report.phase),
        )
        assert set(seen) == {"pre-training", "training"}
        ours, theirs = (load_model(p).gistnet.state_dict() for p in (tmp_path / "run", exported))
        assert all(ours[name].equal(theirs[name]) for name in theirs)

    def test_it_cannot_be_continued(self, exported: Path) -> None:
        """It has no state of a run; says what can be done."""
        with pytest.raises(ValueError) as raised:
            train(exported, resume=True)
        assert str(raised.value) == (
            f"{exported} holds the weights of a run and not its state, so it cannot be continued; "
            "train a new one, which can take its gists by --gists-of"
        )

    def test_damaged_weights_are_named(self, exported: Path, tmp_path: Path) -> None:
        """Whatever the library says of them."""
        shutil.copytree(exported, tmp_path / "out")
        weights = tmp_path / "out" / "weights.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
        with pytest.raises(ValueError, match=r"weights\.safetensors is damaged"):
            load_model(tmp_path / "out")

    def test_a_run_that_trained_its_language_model_is_refused(
        self, run_dir: Path, tmp_path: Path
    ) -> None:
        """Its weights are not small; nothing is written."""
        whole = replace(SHORT, gist_steps=0, guess_steps=0, kept_sequences=0, data="text", text=())
        train(tmp_path / "run", MCConfig(), replace(whole, steps=1, batch_size=2))
        with pytest.raises(ValueError, match="export is for runs beside a frozen one"):
            export(tmp_path / "run", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_failed_one_leaves_nothing(
        self, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A full disk, as the weights are written."""

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("megacontext.training.exported._write", full)
        with pytest.raises(OSError, match="No space"):
            export(run_dir, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_the_command(self, run_dir: Path, tmp_path: Path) -> None:
        """Says where it is, and how large."""
        out = tmp_path / "out"
        result = CliRunner().invoke(main, ["export", "--run-dir", str(run_dir), "--out", str(out)])
        assert result.exit_code == 0, result.output
        assert result.stdout.strip().startswith(f"{out}: 0.")
        again = CliRunner().invoke(main, ["export", "--run-dir", str(run_dir), "--out", str(out)])
        assert again.exit_code == 2
        assert "not an empty folder" in again.stderr or "holds a run already" in again.stderr


class TestModelFolder:
    @pytest.mark.parametrize(
        ("run_dir", "language_model", "said"),
        [
            (None, None, "give the --run-dir of a model that was trained, or --language-model"),
            (Path("run"), SMOLLM2, "and not both"),
            (None, "gpt2", "weights are shipped for smollm2 alone; for gpt2, train a run"),
        ],
    )
    def test_what_cannot_be_meant(
        self, run_dir: Path | None, language_model: str | None, said: str
    ) -> None:
        """Neither, both, or another."""
        with pytest.raises(ValueError, match=said):
            model_folder(run_dir, language_model)

    def test_what_is_shipped_is_small_and_whole(self) -> None:
        """Under 5 MB, with the losses that LensNet learned from, and a LensNet that has learned."""
        folder = RunFolder(model_folder(None, SMOLLM2))
        files = [path for path in folder.path.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < 5e6
        config = read_run(folder)
        assert config.model.language_model == SMOLLM2
        state = folder.load_checkpoint(torch.device("cpu"))
        assert state is not None
        names = {name.split(".")[0] for name in state["model"]}
        assert names == {"gistnet", "lensnet"}
        assert state["model"]["lensnet.linear.weight"].abs().sum() > 0
        kept = np.load(folder.kept / "000000.npz")
        assert len(kept["tokens"]) == config.settings.kept_sequences
