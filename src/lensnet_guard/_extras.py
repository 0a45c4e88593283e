"""Libraries that come with an extra of the installation, and what to say where they are missing."""

import sys
from importlib.util import find_spec

_COMMAND = ("click", "rich")
LIBRARIES = {"cli": _COMMAND, "megacontext": ("numpy", "matplotlib", "filelock", *_COMMAND)}


def require(extra: str, program: str) -> None:
    """Make sure that all libraries of an extra are installed; none of them is imported.

    Args:
        extra: One of `LIBRARIES`.
        program: What needs them, for the message.

    Raises:
        ModuleNotFoundError: Some are missing. The message says what to install.
    """
    missing = [name for name in LIBRARIES[extra] if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f'{program} needs {", ".join(missing)}: pip install "lensnet-guard[{extra}]"',
            name=missing[0],
        )


def require_or_exit(extra: str, program: str, *, code: int) -> None:
    """Do as `require` does, but end the process with one line where something is missing.

    Raises:
        SystemExit: Some libraries are missing; it has the given code.
    """
    try:
        require(extra, program)
    except ModuleNotFoundError as missing:
        print(missing, file=sys.stderr)
        sys.exit(code)
