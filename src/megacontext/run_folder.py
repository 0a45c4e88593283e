"""The files of a run, each written so that a kill at any moment loses nothing.

A run folder holds ``config.json``, ``metrics.jsonl`` (a line per logged step), ``checkpoint.pt``
(the newest), ``lensnet.rank0.jsonl`` (the guard's log), ``overview.png`` and, where it was asked
for, ``profile.json.gz`` and ``tensorboard``, a folder of event files. The folder ``language_model``
has all of a given language model but its weights, which are in the checkpoint.
"""

import json
import math
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None  # type: ignore[assignment]


class RunFolder:
    """One run's folder.

    Args:
        path: the folder; nothing is created before `create`. One that is relative stays where it is
            now, whatever directory the process changes to.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoint = self.path / "checkpoint.pt"
        self.overview = self.path / "overview.png"
        self.profile = self.path / "profile.json.gz"
        self.tensorboard = self.path / "tensorboard"
        self.language_model = self.path / "language_model"

    def require_new(self) -> None:
        """Make sure that a new run can begin here.

        Raises:
            FileExistsError: the folder holds a run already, or something else.
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
            language_model: files to keep a copy of in its folder ``language_model``.

        Raises:
            FileExistsError: as for `require_new`.
        """
        self.require_new()
        self.path.mkdir(parents=True, exist_ok=True)
        if language_model:
            self.language_model.mkdir()
        for file in language_model:
            shutil.copyfile(file, self.language_model / file.name)
        write_atomically(self.config, json.dumps(config, indent=2).encode() + b"\n")

    def read_config(self) -> dict[str, Any]:
        """The configuration of the run.

        Raises:
            FileNotFoundError: there is no run.
        """
        if not self.config.exists():
            raise FileNotFoundError(f"{self.path} holds no run to resume: no {self.config.name}")
        try:
            config: dict[str, Any] = json.loads(self.config.read_text())
            for part in ("model", "train", "source"):
                dict(config[part])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.config} is damaged ({error}), so the run cannot be resumed; "
                "put the original back, or start a new run"
            ) from error
        return config

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in this folder at the same time.

        Raises:
            BlockingIOError: one does already.
        """
        with self.config.open() as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise BlockingIOError(
                        f"another process is training in {self.path}; wait for it, or choose "
                        "another --run-dir"
                    ) from None
            yield

    def append_metrics(self, row: Mapping[str, float | int]) -> None:
        """Append one line; what is undefined (nan) becomes null."""
        finite = {k: None if not math.isfinite(v) else v for k, v in row.items()}
        with self.metrics.open("a") as file:
            file.write(json.dumps(finite) + "\n")

    def read_metrics(self) -> list[dict[str, float | None]]:
        """All complete lines, in order."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def drop_metrics_after(self, step: int) -> None:
        """Forget the lines of steps that a resumed run will do again."""
        rows = [row for row in self.read_metrics() if (row["step"] or 0) <= step]
        write_atomically(self.metrics, "".join(json.dumps(r) + "\n" for r in rows).encode())

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint; a kill at any moment leaves the old one or the new one."""
        temporary = self.checkpoint.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.checkpoint)

    def load_checkpoint(self, device: torch.device) -> dict[str, Any] | None:
        """The newest checkpoint; None when the run was killed before its first.

        Raises:
            ValueError: it cannot be read, or it is gone although the run has metrics.
        """
        if not self.checkpoint.exists():
            if self.read_metrics():
                raise ValueError(f"{self.checkpoint} is missing, so the run cannot be resumed")
            return None
        try:
            state: dict[str, Any] = torch.load(
                self.checkpoint, map_location=device, weights_only=True
            )
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{self.checkpoint} is damaged, so the run cannot be resumed; start a new one"
            ) from error
        return state


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
