"""A working context as one line of a terminal: what it holds in detail, and what not."""

import numpy as np
from rich.text import Text

from megacontext.allocators.cut import Cut

_CHARACTERS, _ASCII = "█▒░", "#+."
_STYLES = ("bright_blue", "yellow", "red")
_NAMES = ("LOD0, tokens", "LOD1, gists", "LOD2, gists of gists")


def focus_strip(cut: Cut, width: int, *, ascii_only: bool = False) -> Text:
    """Draw the finest level of detail in each stretch of what is covered, oldest first.

    Args:
        cut: Of the working context.
        width: At most so many characters, each for as many tokens.
        ascii_only: For a terminal that has no others.

    Returns:
        The line.
    """
    characters = _ASCII if ascii_only else _CHARACTERS
    each = tokens_per_character(cut, width)
    begins = np.arange(cut.positions[0], cut.ends[-1], each)
    first = np.searchsorted(cut.ends, begins, side="right").tolist()
    until = np.searchsorted(cut.positions, begins + each, side="left").tolist()
    strip = Text(no_wrap=True)
    for begin, end in zip(first, until, strict=True):
        lod = int(cut.lods[begin:end].min())
        strip.append(characters[lod], _STYLES[lod])
    return strip


def focus_legend(each: int, *, ascii_only: bool = False) -> Text:
    """Say what the characters of a strip mean.

    Args:
        each: Tokens of a character.
        ascii_only: For a terminal that has no others.

    Returns:
        The line.
    """
    legend = Text(f"each character is {each:,} token{'s' * (each > 1)}:")
    characters = _ASCII if ascii_only else _CHARACTERS
    for character, style, name in zip(characters, _STYLES, _NAMES, strict=True):
        legend.append("  ").append(character, style).append(f" {name}")
    return legend


def tokens_per_character(cut: Cut, width: int) -> int:
    """Count the tokens that a character of a strip of this width stands for."""
    return int(-(-(cut.ends[-1] - cut.positions[0]) // width))
