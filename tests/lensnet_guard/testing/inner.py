"""What an inner session of tests has shown."""

import textwrap

import pytest


def errors(result: pytest.RunResult) -> list[str]:
    """The lines that pytest shows of what was raised."""
    lines = [line[1:] for line in result.outlines if line.startswith("E   ")]
    return textwrap.dedent("\n".join(lines)).splitlines()
