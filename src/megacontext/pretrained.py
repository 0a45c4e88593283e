"""A model from the run folder that it was trained in, on a device that works."""

import os

import torch

from megacontext.config import MCConfig
from megacontext.controller import MCController
from megacontext.run_folder import RunFolder


def load_model(run_dir: str | os.PathLike[str], device: torch.device | str = "cpu") -> MCController:
    """The controller of a run, with the weights of its newest checkpoint.

    Raises:
        FileNotFoundError: the folder holds no run, or no checkpoint yet.
        ValueError: the configuration or the checkpoint is damaged.
    """
    folder = RunFolder(run_dir)
    mc = MCController(MCConfig(**folder.read_config()["model"])).to(device)
    state = folder.load_checkpoint(torch.device(device))
    if state is None:
        raise FileNotFoundError(f"{folder.path} has no checkpoint yet; train it first")
    mc.load_state_dict(state["model"])
    return mc


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
