"""The versions of all that a guard works with, read without importing any of it."""

import platform
from importlib import metadata

DISTRIBUTIONS = (
    "torch",
    "wrapt",
    "structlog",
    "orjson",
    "numpy",
    "lightning",
    "accelerate",
    "transformers",
    "peft",
    "trl",
)


def versions() -> dict[str, str | None]:
    """Versions by name, None for what is not installed."""
    return {
        "lensnet-guard": _version("lensnet-guard"),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        **{name: _version(name) for name in DISTRIBUTIONS},
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
