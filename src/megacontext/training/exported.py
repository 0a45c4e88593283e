"""Trained weights apart from their run: small enough to ship, and with what LensNet learned from.

An exported folder is a run folder whose weights are in a file of safetensors: whatever reads a
model from a run reads it from there, but it cannot be trained further.
"""

import shutil
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import torch

from megacontext.files import replacing
from megacontext.model.gguf import SMOLLM2
from megacontext.training.kept import merge
from megacontext.training.pretrained import load_model, read_run
from megacontext.training.run_folder import RunFolder


def export(run_dir: Path, out: Path) -> Path:
    """Write the weights that a run has trained, and the losses that were kept for it.

    Args:
        run_dir: Folder of the run; its language model must have been frozen.
        out: A folder, new or empty.

    Returns:
        The folder.

    Raises:
        FileExistsError: ``out`` holds something.
        FileNotFoundError: There is no run, or no checkpoint yet.
        ValueError: The run trained its language model, so that its weights are not small.
        OSError: It cannot be written; nothing of it is left.
    """
    folder, into = RunFolder(run_dir), RunFolder(out)
    if not read_run(folder).model.freeze_language_model:
        raise ValueError(
            f"{folder.path} trained its language model, whose weights belong to what it learned; "
            "export is for runs beside a frozen one"
        )
    into.require_new()
    learned = load_model(run_dir).learned
    new = not into.path.exists()
    into.path.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(folder.config, into.config)
        for losses, merged in ((folder.kept, into.kept), (folder.held_out, into.held_out)):
            if losses.exists():
                merge(losses, merged)
        _write(learned, into.weights)
    except BaseException:
        for path in (into.kept, into.held_out):
            shutil.rmtree(path, ignore_errors=True)
        into.config.unlink(missing_ok=True)
        if new:
            into.path.rmdir()
        raise
    return into.path


def model_folder(run_dir: Path | None, language_model: str | None) -> Path:
    """Find the folder of a model: of a run, or the exported one that this package ships.

    Args:
        run_dir: Folder of the run; None for what is shipped.
        language_model: For which it is shipped, as ``MCConfig.language_model``.

    Returns:
        The folder.

    Raises:
        ValueError: None or both are given, or nothing is shipped for that language model.
    """
    if (run_dir is None) == (language_model is None):
        raise ValueError(
            f"give the --run-dir of a model that was trained, or --language-model {SMOLLM2}, and "
            "not both"
        )
    if run_dir is not None:
        return run_dir
    if language_model != SMOLLM2:
        raise ValueError(
            f"weights are shipped for {SMOLLM2} alone; for {language_model}, train a run and give "
            "its folder"
        )
    return Path(str(files("megacontext"))) / "weights" / SMOLLM2


def _write(learned: torch.nn.Module, path: Path) -> None:
    from safetensors.torch import save

    tensors = {name: t.detach().cpu().contiguous() for name, t in learned.state_dict().items()}
    with replacing(path) as file:
        shutil.copyfileobj(BytesIO(save(tensors)), file)
