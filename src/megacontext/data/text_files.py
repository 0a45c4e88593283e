"""Which files are text to read, by name and path; nothing is read here."""

import sysconfig
from collections.abc import Sequence
from pathlib import Path

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


def text_files(paths: Sequence[Path]) -> dict[Path, str]:
    """Find the files of a text.

    Args:
        paths: Files, or folders whose files are meant but for hidden ones and Python's caches; none
            for the standard library's sources.

    Returns:
        The name of each file, in order: its path within the folder that was given.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: There are no files; or a path is a pipe or a device.
    """
    return _given(paths) if paths else _standard_library()


def _standard_library() -> dict[Path, str]:
    root = Path(sysconfig.get_path("stdlib"))
    inside = {path: path.relative_to(root) for path in sorted(root.rglob("*.py"))}
    return {
        path: name.as_posix()
        for path, name in inside.items()
        if not _NOT_LIBRARY.intersection(name.parts)
    }


def _given(paths: Sequence[Path]) -> dict[Path, str]:
    files: dict[Path, str] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file())
            names = {p: p.relative_to(path) for p in inside}
            found = {p: name.as_posix() for p, name in names.items() if not _is_litter(name)}
        elif path.is_file():
            found = {path: path.name}
        elif path.exists():
            raise ValueError(
                f"{path} is no file and no folder, and a resumed run must read its text again: "
                "save it as a file"
            )
        else:
            raise FileNotFoundError(f"no such text file or folder: {path}")
        for file, name in found.items():
            files.setdefault(file.resolve(), name)  # one that is given twice is read once
    if not files:
        raise ValueError(
            f"there are no files in {', '.join(map(str, paths))}: hidden ones, and folders behind "
            "links, are not read; give others, or what the links lead to"
        )
    return files


def _is_litter(path: Path) -> bool:
    """Tell whether this is hidden or Python's cache: that is no text, and changes by itself."""
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)
