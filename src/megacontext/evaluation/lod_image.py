"""Working contexts as a picture without a plotting library: a strip each, its LOD by colour."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megacontext.allocators.cut import Cut

LOD_COLOURS = {-1: "#e8e8e8", 0: "#1b6ca8", 1: "#f0a202", 2: "#b3312c"}  # -1: not held
MOST_STRIPS = 8
_STRIP_PIXELS, _GAP_PIXELS, _TOKEN_PIXELS = 12, 3, 2


def named_strips(cuts: Sequence[Sequence[Cut]]) -> list[tuple[str, Cut]]:
    """Pick the first `MOST_STRIPS` working contexts of a micro-step, and what to call them.

    Args:
        cuts: Of all of them, ``[B][1 + V]``, the baseline first.

    Returns:
        Names and cuts.
    """
    return [
        ("baseline" if v == 0 else f"variant {v}", cut)
        for of_history in cuts
        for v, cut in enumerate(of_history)
    ][:MOST_STRIPS]


def lod_image(cuts: Sequence[Sequence[Cut]]) -> NDArray[np.uint8]:
    """Draw the working contexts of `named_strips`, one below the other; oldest token left.

    Args:
        cuts: Of all of them, ``[B][1 + V]``, the baseline first.

    Returns:
        RGB, uint8 ``[height, width, 3]``.
    """
    shown = [cut for _, cut in named_strips(cuts)]
    tokens = max(int(cut.ends[-1]) for cut in shown)
    lods = np.stack([cut.token_lods(tokens) for cut in shown])
    palette = np.array([list(bytes.fromhex(c[1:])) for c in LOD_COLOURS.values()], dtype=np.uint8)
    strips = palette[lods + 1][:, None].repeat(_STRIP_PIXELS, axis=1)
    white = np.full((len(shown), _GAP_PIXELS, tokens, 3), 255, dtype=np.uint8)
    rows = np.concatenate([strips, white], axis=1).reshape(-1, tokens, 3)[:-_GAP_PIXELS]
    image: NDArray[np.uint8] = rows.repeat(_TOKEN_PIXELS, axis=1)
    return image
