"""A working context as one line of a terminal: what it holds in detail, and what not."""

import string

import numpy as np
from rich.text import Text

from megacontext.allocators.cut import Cut

# What is coarser is its level, as a digit; no int64 position has a level beyond these.
_DEEPER = "3456789" + string.ascii_letters + "*"
_CHARACTERS, _ASCII = "█▒░" + _DEEPER, "#+." + _DEEPER
_STYLES = ("bright_blue", "yellow", "red", "magenta")
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
        strip.append(characters[lod], _STYLES[min(lod, 3)])
    return strip


def focus_legend(each: int, max_lod: int = 2, *, ascii_only: bool = False) -> Text:
    """Say what the characters of a strip mean.

    Args:
        each: Tokens of a character.
        max_lod: The highest level of detail that there is.
        ascii_only: For a terminal that has no others.

    Returns:
        The line.
    """
    legend = Text(f"each character is {each:,} token{'s' * (each > 1)}:")
    characters = _ASCII if ascii_only else _CHARACTERS
    for character, style, name in zip(characters, _STYLES, _NAMES, strict=False):
        legend.append("  ").append(character, style).append(f" {name}")
    if max_lod > 2:
        deeper = characters[3] if max_lod == 3 else f"{characters[3]}-{characters[max_lod]}"
        legend.append("  ").append(deeper, _STYLES[3]).append(" gists of those")
    return legend


def tokens_per_character(cut: Cut, width: int) -> int:
    """Count the tokens that a character of a strip of this width stands for."""
    return int(-(-(cut.ends[-1] - cut.positions[0]) // width))
