"""The files of a run, each written so that a kill at any moment loses nothing.

A run folder holds ``config.json``, ``metrics.jsonl`` (a line per logged step), ``checkpoint.pt``
(the newest), ``lensnet.rank0.jsonl`` (the guard's log), ``overview.png``, ``lock`` and, where it
was asked for, ``profile.json.gz`` and ``tensorboard``, a folder of event files. The folder
``language_model`` has all of a given language model but its weights, which are in the checkpoint;
where they are frozen they stay where they came from, and ``config.json`` has their SHA-256.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megacontext.files import (
    DamagedFileError,
    cannot_write,
    hold_lock,
    reading,
    replacing,
    write_atomically,
)

ADVICE = "put the original back, or start a new run"


class RunFolder:
    """One run's folder.

    Args:
        path: Of the folder; nothing is created before `create`. One that is relative stays where it
            is now, whatever directory the process changes to.

    Attributes:
        path: The same, absolute.
        config: What the run is.
        metrics: A line per logged step.
        checkpoint: The newest.
        weights: Those alone, in a folder that `training.exported` made of a run's.
        kept: Folder of losses that LensNet learns from, where they were kept.
        held_out: Folder of losses that it is only judged by, likewise.
        overview: The picture.
        profile: The trace, where one was taken.
        tensorboard: Folder of event files, where they were asked for.
        language_model: Folder of what is kept of a language model that was given.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoint = self.path / "checkpoint.pt"
        self.weights = self.path / "weights.safetensors"
        self.kept, self.held_out = self.path / "kept", self.path / "held_out"
        self.overview = self.path / "overview.png"
        self.profile = self.path / "profile.json.gz"
        self.tensorboard = self.path / "tensorboard"
        self.language_model = self.path / "language_model"

    def require_new(self) -> None:
        """Make sure that a new run can begin here.

        Raises:
            FileExistsError: The folder holds a run already, or something else.
        """
        if self.config.exists():
            raise FileExistsError(
                f"{self.path} holds a run already: continue it with --resume, "
                "or choose another --run-dir"
            )
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise FileExistsError(f"{self.path} is not an empty folder; choose another --run-dir")

    def create(self, config: Mapping[str, Any], language_model: Sequence[Path] = ()) -> None:
        """Make the folder for a new run.

        Args:
            config: What the run is.
            language_model: Files to keep a copy of in its folder ``language_model``.

        Raises:
            FileExistsError: The folder holds a run already, or something else.
            OSError: It cannot be written; nothing of it is left then.
        """
        self.require_new()
        new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            if language_model:
                self.language_model.mkdir()
            for file in language_model:
                shutil.copyfile(file, self.language_model / file.name)
            write_atomically(self.config, json.dumps(config, indent=2).encode() + b"\n")
        except BaseException:
            shutil.rmtree(self.language_model, ignore_errors=True)
            if new:
                with suppress(OSError):
                    self.path.rmdir()
            raise

    def require_run(self) -> None:
        """Make sure that there is a run.

        Raises:
            FileNotFoundError: There is none.
        """
        if not self.config.exists():
            raise FileNotFoundError(f"{self.path} holds no run to resume: no {self.config.name}")

    def read_config(self) -> dict[str, Any]:
        """Read the configuration of the run.

        Returns:
            Its parts ``model``, ``train`` and ``source``.

        Raises:
            FileNotFoundError: There is no run.
            DamagedFileError: It cannot be read.
        """
        self.require_run()
        with reading(self.config, ADVICE):
            config: dict[str, Any] = json.loads(self.config.read_bytes())
            for part in ("model", "train", "source"):
                dict(config[part])
        return config

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in this folder at the same time.

        Raises:
            BlockingIOError: One does already.
        """
        taken = (
            f"another process is training in {self.path}; wait for it, or choose another --run-dir"
        )
        with hold_lock(self.path / "lock", taken):
            yield

    def append_metrics(self, row: Mapping[str, float | int]) -> None:
        """Append one line; what is undefined (nan) becomes null.

        Args:
            row: By name, with the step.

        Raises:
            OSError: It cannot be written; named.
        """
        finite = {k: None if not math.isfinite(v) else v for k, v in row.items()}
        try:
            with self.metrics.open("a") as file:
                file.write(json.dumps(finite) + "\n")
        except OSError as error:
            raise cannot_write(self.metrics, error, "the lines before are kept") from error

    def read_metrics(self) -> list[dict[str, float | None]]:
        """Read all complete lines, in order.

        Returns:
            The rows.

        Raises:
            DamagedFileError: One of them is no row of metrics; says which.
        """
        if not self.metrics.exists():
            return []
        rows = []
        for number, line in enumerate(self.metrics.read_bytes().split(b"\n")[:-1], 1):
            with reading(f"line {number} of {self.metrics}", "take that line out"):
                rows.append(_row(line))
        return rows

    def drop_metrics_after(self, step: int) -> None:
        """Forget the lines of steps that a resumed run will do again.

        Args:
            step: The last whose line stays.

        Raises:
            DamagedFileError: The file cannot be read; it is as it was.
            OSError: It cannot be written; it is as it was.
        """
        rows = [row for row in self.read_metrics() if (row["step"] or 0) <= step]
        write_atomically(self.metrics, "".join(json.dumps(r) + "\n" for r in rows).encode())

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint; whatever happens leaves the old one or the new one.

        Args:
            state: Of the run.

        Raises:
            OSError: It cannot be written; the old one is kept.
        """
        with replacing(self.checkpoint) as file:
            torch.save(dict(state), file)

    def save_overview(self, draw: Callable[[BinaryIO], None]) -> None:
        """Replace the picture; whatever happens leaves the old one or the new one.

        Args:
            draw: Writes it to a file that it is given.

        Raises:
            OSError: It cannot be written; the old one is kept.
        """
        with replacing(self.overview) as file:
            draw(file)

    def load_checkpoint(self, device: torch.device) -> dict[str, Any] | None:
        """Load the newest checkpoint.

        Args:
            device: Where its tensors are to be.

        Returns:
            The state, of exported weights only ``model``; None when the run was killed before its
            first checkpoint.

        Raises:
            DamagedFileError: It cannot be read, or it is gone although the run has metrics.
        """
        if self.weights.exists():
            from safetensors.torch import load_file  # of an extra, where most need none

            with reading(self.weights, ADVICE):
                return {"model": load_file(self.weights, device=str(device))}
        if not self.checkpoint.exists():
            if self.read_metrics():
                raise DamagedFileError(f"{self.checkpoint} is missing; {ADVICE}")
            return None
        with reading(self.checkpoint, ADVICE):
            state: dict[str, Any] = torch.load(
                self.checkpoint, map_location=device, weights_only=True
            )
        return state


class ReadOnlyFolder(RunFolder):
    """The folder for a process that only takes part in the run: what would write does nothing."""

    def create(self, config: Mapping[str, Any], language_model: Sequence[Path] = ()) -> None:
        """Do nothing: the first process makes it."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Do nothing: the first process locks it."""
        yield

    def append_metrics(self, row: Mapping[str, float | int]) -> None:
        """Do nothing: the first process appends them."""

    def drop_metrics_after(self, step: int) -> None:
        """Do nothing: the first process drops them."""

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Do nothing: the first process saves it."""

    def save_overview(self, draw: Callable[[BinaryIO], None]) -> None:
        """Do nothing: the first process draws it."""


def _row(line: bytes) -> dict[str, float | None]:
    """Read a line of metrics.

    Raises:
        ValueError: It is none.
    """
    row: Any = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError("it is no object with a step")
    for name, value in row.items():
        if not (value is None or isinstance(value, (int, float))):
            raise ValueError(f"{name} is no number")
    return row
