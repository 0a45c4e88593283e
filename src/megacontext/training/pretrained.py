"""A model from the run folder that it was trained in, on a device that works."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megacontext.config import MCConfig, check_removed
from megacontext.controller import MCController
from megacontext.files import reading
from megacontext.model.frozen import weights_sha256
from megacontext.model.gguf import SMOLLM2
from megacontext.training.run_folder import ADVICE, RunFolder
from megacontext.training.train_config import TrainConfig


@dataclass(frozen=True)
class SavedRun:
    """What the ``config.json`` of a run says.

    Attributes:
        model: Sizes, as the run was begun.
        settings: How it is trained, likewise.
        source: Description of what it reads.
        language_model_sha256: Of the weights of a language model that is frozen; else None.
    """

    model: MCConfig
    settings: TrainConfig
    source: dict[str, Any]
    language_model_sha256: str | None


def read_run(folder: RunFolder) -> SavedRun:
    """Read what a run is.

    Args:
        folder: Of the run.

    Returns:
        What its configuration says.

    Raises:
        FileNotFoundError: The folder holds no run.
        DamagedFileError: Its configuration cannot be read, or makes no run.
        ValueError: It was begun with an option that there is no more.
    """
    saved = folder.read_config()
    check_removed(saved["model"])
    with reading(folder.config, ADVICE):
        settings = TrainConfig.from_json(saved["train"])
        return SavedRun(
            MCConfig.from_json(saved["model"]),
            settings,
            saved["source"],
            saved.get("language_model_sha256"),
        )


def load_model(run_dir: str | os.PathLike[str], device: torch.device | str = "cpu") -> MCController:
    """Load the controller of a run, with the weights of its newest checkpoint.

    Args:
        run_dir: The run folder.
        device: Where the weights are to be.

    Returns:
        The controller.

    Raises:
        FileNotFoundError: The folder holds no run, or no checkpoint yet.
        DamagedFileError: The configuration or the checkpoint is damaged.
        ValueError: The run was begun with an option that there is no more, or the language model
            beside which it was trained has other weights now.
        ImportError: Its language model is one of transformers, which is not installed.
    """
    folder = RunFolder(run_dir)
    saved = read_run(folder)
    mc = MCController(saved_model(folder, saved.model)).to(device)
    check_same_language_model(folder, saved, mc)
    state = folder.load_checkpoint(torch.device(device))
    if state is None:
        raise FileNotFoundError(f"{folder.path} has no checkpoint yet; train it first")
    with reading(folder.checkpoint, ADVICE):
        mc.learned.load_state_dict(state["model"])
    return mc


def saved_model(folder: RunFolder, model: MCConfig) -> MCConfig:
    """Return a run's model as it is to be made again before a checkpoint is loaded.

    A language model that was given is made from the run's own copy of its sizes: where it came from
    may be gone. One that is frozen is loaded from there, for the checkpoint has none of its
    weights.

    Args:
        folder: Of the run.
        model: As the run was begun.

    Returns:
        The configuration.

    Raises:
        FileNotFoundError: A model that is frozen is gone; says where it was.
    """
    if model.freeze_language_model:
        path = model.language_model
        if path != SMOLLM2 and not Path(path).exists():
            raise FileNotFoundError(
                f"the language model of {folder.path} was frozen, so its weights are in no "
                f"checkpoint, and {path} is gone: put it back, or write into {folder.config} where "
                "it is now"
            )
        return model
    if not model.language_model or not folder.checkpoint.exists():
        return model
    return replace(model, language_model=str(folder.language_model / "config.json"))


def check_same_language_model(folder: RunFolder, saved: SavedRun, mc: MCController) -> None:
    """Refuse other weights of a frozen language model than those that a run was trained beside.

    Args:
        folder: Of the run.
        saved: What its configuration says.
        mc: As it was made of that.

    Raises:
        ValueError: They are others.
    """
    if saved.language_model_sha256 not in (None, weights_sha256(mc.language_model)):
        raise ValueError(
            f"the language model {saved.model.language_model} has other weights than when "
            f"{folder.path} was begun (their sha256 differs), so what was trained beside it means "
            "nothing to it; put the model of then back"
        )


def usable_device(name: str) -> torch.device:
    """Find a device by its name.

    Args:
        name: As torch calls it.

    Returns:
        The device.

    Raises:
        ValueError: It cannot be used here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {error}") from error
    return device
