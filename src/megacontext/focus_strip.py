"""A working context as one line of a terminal: what it holds in detail, and what not."""

import numpy as np
from rich.text import Text

from megacontext.cut import Cut

_NOT_HELD = ("·", "bright_black")
_LODS = (("█", "bright_blue"), ("▒", "yellow"), ("░", "red"))
_NAMES = ("LOD0, tokens", "LOD1, gists", "LOD2, gists of gists")


def focus_strip(cut: Cut, num_tokens: int, width: int) -> Text:
    """The finest level of detail at which each stretch of the history is held, oldest first.

    Args:
        width: at most so many characters, each for as many tokens.
    """
    each = max(-(-num_tokens // width), 1)
    begins = np.arange(0, num_tokens, each)
    entries = np.searchsorted(cut.ends, begins, side="right")
    until = np.searchsorted(cut.positions, begins + each, side="left")
    strip = Text(no_wrap=True, end="")
    for first, last in zip(entries.tolist(), until.tolist(), strict=True):
        within = cut.lods[first:last]
        strip.append(*(_LODS[int(within.min())] if len(within) else _NOT_HELD))
    return strip


def focus_legend(num_tokens: int, width: int) -> Text:
    """What the characters of a strip mean."""
    each = max(-(-num_tokens // width), 1)
    legend = Text(f"each character is {each:,} token{'s' * (each > 1)}: ")
    for (character, style), name in zip(_LODS, _NAMES, strict=True):
        legend.append(character, style).append(f" {name}  ")
    return legend.append(*_NOT_HELD).append(" not held")
