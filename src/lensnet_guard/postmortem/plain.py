"""Findings as JSON-ready values."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def plain(found: Any) -> Any:
    """Return findings as JSON-ready values, of which some are left out where they say nothing."""
    if is_dataclass(found) and not isinstance(found, type):
        told = {f.name: f.metadata.get("told") for f in fields(found)}
        values = {name: getattr(found, name) for name, when in told.items() if when != "never"}
        return {n: plain(value) for n, value in values.items() if value or not told[n]}
    if isinstance(found, Mapping):
        return {name: plain(value) for name, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [plain(value) for value in found]
    return found
