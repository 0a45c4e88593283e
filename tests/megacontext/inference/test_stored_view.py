"""What LensNet reads in a session is what it reads of the same history in training."""

import numpy as np
import pytest
import torch
from tests.megacontext.inference.test_tree_store import K, make_store, networks, some_tokens

from megacontext import MegaContextTree
from megacontext.allocators.cut import Cut, Geometry
from megacontext.inference.stored_view import view_of_store


class TestViewOfStore:
    @pytest.mark.parametrize(("tokens", "window"), [(40, 20), (43, None), (7, None)])
    def test_it_is_that_of_the_tree(self, tokens: int, window: int | None) -> None:
        """Entries, tokens and children; also where all of it is query."""
        ids, store = some_tokens(tokens), make_store()
        model, gistnet = networks()
        with torch.no_grad():
            store.append(ids)
            history = torch.from_numpy(ids)[None]
            tree = MegaContextTree.build(
                history, model.embed(history), gistnet, block_size=K, max_lod=2
            )
            cut = Geometry(K, 2, 8, window).coarse_cut(0, tokens)
            found, expected = view_of_store(store, cut, 8), tree.focus_view([cut], 8)
        inputs = zip(found.lensnet_inputs(), expected.lensnet_inputs(), strict=True)
        for ours, theirs in inputs:
            torch.testing.assert_close(ours, theirs)

    def test_a_deep_one_has_gists_below_its_gists(self) -> None:
        """Of LOD3: embeddings of LOD2, and no tokens."""
        store = make_store(max_lod=3)
        with torch.no_grad():
            store.append(some_tokens(K**3 + 8))
            cut = Geometry(K, 3, 8, 9).coarse_cut(0, K**3 + 8)
            assert cut.lods.tolist() == [3] + 8 * [0]
            view = view_of_store(store, cut, 8)
            lod2 = store.gather(Cut(np.array([0, 16, 32, 48]), np.array([2, 2, 2, 2]), K))
        assert view.children is not None
        assert view.child_tokens is not None
        assert view.children[0].equal(lod2)
        assert view.child_tokens.tolist() == [[[-1] * K]]
