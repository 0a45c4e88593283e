"""A model from the run folder that it was trained in, on a device that works."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from megacontext.config import MCConfig
from megacontext.controller import MCController
from megacontext.run_folder import RunFolder


def load_model(run_dir: str | os.PathLike[str], device: torch.device | str = "cpu") -> MCController:
    """The controller of a run, with the weights of its newest checkpoint.

    Raises:
        FileNotFoundError: the folder holds no run, or no checkpoint yet.
        ValueError: the configuration or the checkpoint is damaged.
        ImportError: its language model is one of transformers, which is not installed.
    """
    folder = RunFolder(run_dir)
    mc = MCController(saved_model(folder, folder.read_config())).to(device)
    state = folder.load_checkpoint(torch.device(device))
    if state is None:
        raise FileNotFoundError(f"{folder.path} has no checkpoint yet; train it first")
    mc.load_state_dict(state["model"])
    return mc


def saved_model(folder: RunFolder, saved: Mapping[str, Any]) -> MCConfig:
    """The configuration of a run's model, as it is to be made again before a checkpoint is loaded.

    A language model that was given is made from the run's own copy of its sizes: where it came from
    may be gone.

    Args:
        saved: the run's ``config.json``.
    """
    model = MCConfig(**saved["model"])
    if not model.language_model or not folder.checkpoint.exists():
        return model
    return replace(model, language_model=str(folder.language_model / "config.json"))


def usable_device(name: str) -> torch.device:
    """A device by its name.

    Raises:
        ValueError: it cannot be used here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {error}") from error
    return device
