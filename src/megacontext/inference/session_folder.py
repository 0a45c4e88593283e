"""The folder of a session on disk: what a killed session needs to go on.

Beside the files of the tree (see `tree_store`) it holds ``session.json`` (sizes, settings, and a
fingerprint of the weights that made the gists), ``focus.json`` (the cut and what rests, as of the
last refocus) and ``lock``.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megacontext.allocators.rules import FocusRules
from megacontext.files import DamagedFileError, hold_lock, reading, replacing
from megacontext.inference.focus_state import FocusState

FORMAT = 2


class SessionFolder:
    """One session's folder, locked against other sessions until it is closed.

    Use `create` or `open`.

    Args:
        path: Of the folder, which is there.

    Attributes:
        path: The same.

    Raises:
        BlockingIOError: Another session is using it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        taken = f"another session is using {path}; end it, or choose another folder"
        self._lock = hold_lock(path / "lock", taken)

    @classmethod
    def create(cls, path: str | os.PathLike[str], about: Mapping[str, Any]) -> "SessionFolder":
        """Make the folder for a new session.

        Args:
            path: Of the folder.
            about: What `open` is to compare and to give back: ``model``, ``weights``, ``settings``.

        Returns:
            The folder, locked.

        Raises:
            FileExistsError: It holds a session already, or something else.
            OSError: It cannot be written.
        """
        folder = Path(path).absolute()
        require_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
        made = cls(folder)
        try:
            if (folder / "session.json").exists():  # by another process, before the lock
                raise FileExistsError(f"{folder} holds a session already: resume it")
            made._write("session.json", _about_json({"format": FORMAT, **about}))
        except BaseException:
            made.close()
            raise
        return made

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], about: Mapping[str, Any]
    ) -> tuple["SessionFolder", dict[str, Any]]:
        """Open the folder of a session that is to go on.

        Args:
            path: Of the folder.
            about: ``model`` and ``weights`` as they are now.

        Returns:
            The folder, locked, and the session's settings.

        Raises:
            FileNotFoundError: It holds no session.
            BlockingIOError: Another session is using it.
            ValueError: It was made with other sizes or weights, or is damaged.
        """
        folder = Path(path).absolute()
        require_session(folder)
        opened = cls(folder)
        try:
            saved = opened._read("session.json")
            if "format" in saved and saved["format"] not in (1, FORMAT):
                raise ValueError(
                    f"{folder} has format {saved['format']}, and this version reads 1 and {FORMAT}"
                )
            _compare(folder, saved, about)
            settings: dict[str, Any] = dict(saved["settings"])
            if saved["format"] != FORMAT:  # before the first level that format 1 does not know
                opened._write("session.json", _about_json(saved | {"format": FORMAT}))
        except BaseException:
            opened.close()
            raise
        return opened, settings

    def write_focus(self, focus: FocusState) -> None:
        """Replace the state of the focus; a kill at any moment leaves the old one or the new one.

        Args:
            focus: The new state.

        Raises:
            OSError: It cannot be written; the old one is kept.
        """
        state = orjson.dumps(focus.to_json(), option=orjson.OPT_SERIALIZE_NUMPY)
        self._write("focus.json", state)

    def read_focus(self, rules: FocusRules, tokens: int) -> FocusState | None:
        """Read the state of the focus.

        Args:
            rules: Of the session.
            tokens: Of the session's history now.

        Returns:
            The state; None before the first was written.

        Raises:
            ValueError: It is damaged, or of more tokens than there are.
        """
        path = self.path / "focus.json"
        if not path.exists():
            return None
        saved = self._read("focus.json")
        try:
            focus = FocusState.from_json(saved, rules)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); remove it, and the session will focus anew"
            ) from error
        if focus.tokens > tokens:
            raise ValueError(
                f"{self.path} is damaged: it was focused on {focus.tokens} tokens, and "
                f"tokens.bin has {tokens}; remove focus.json, and the session will "
                "focus anew on those"
            )
        return focus

    def close(self) -> None:
        """Let others in."""
        self._lock.release()

    def _write(self, name: str, data: bytes) -> None:
        with replacing(self.path / name, sync=False) as file:
            file.write(data)

    def _read(self, name: str) -> dict[str, Any]:
        path, hint = self.path / name, "put the original back"
        if name == "focus.json":
            hint = "remove it, and the session will focus anew"
        with reading(path, hint):
            content: Any = json.loads(path.read_bytes())
            if not isinstance(content, dict):
                raise ValueError("it is no object")
        return content


def require_free(folder: Path) -> None:
    """Make sure that a new session can begin in a folder.

    Args:
        folder: It need not be there.

    Raises:
        FileExistsError: It holds a session already, or something else.
    """
    if (folder / "session.json").exists():
        raise FileExistsError(f"{folder} holds a session already: resume it, or choose another")
    if folder.exists() and (not folder.is_dir() or _litter(folder)):
        raise FileExistsError(f"{folder} is not an empty folder; choose another")


def require_session(folder: Path) -> None:
    """Make sure that a folder holds a session.

    Args:
        folder: It need not be there.

    Raises:
        FileNotFoundError: It holds none.
    """
    if not (folder / "session.json").exists():
        raise FileNotFoundError(f"{folder} holds no session to resume: no session.json")


def _about_json(about: Mapping[str, Any]) -> bytes:
    """Write what a session is; thresholds may be infinite, which orjson would write as null."""
    return json.dumps(about, default=np.generic.item).encode()


def _compare(folder: Path, saved: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Refuse another model than the one that made the gists.

    Raises:
        ValueError: It is another; the message names what differs.
    """
    sizes, now = saved.get("model"), about["model"]
    if not isinstance(sizes, dict) or not isinstance(saved.get("settings"), dict):
        raise DamagedFileError(f"{folder / 'session.json'} is damaged; put the original back")
    other = [
        f"{name} {sizes.get(name)}, not {now[name]}" for name in now if sizes.get(name) != now[name]
    ]
    if other:
        raise ValueError(f"{folder} was made by a model with {'; '.join(other)}")
    if saved.get("weights") != about["weights"]:
        raise ValueError(
            f"{folder} was made with other weights of embedding and GistNet, so its gists mean "
            "nothing to this model; load the checkpoint that made it, or begin a new session"
        )


def _litter(folder: Path) -> bool:
    """Tell whether there is anything but what a session leaves that could not be begun."""
    return any(path.name not in ("lock", "session.json.tmp") for path in folder.iterdir())
