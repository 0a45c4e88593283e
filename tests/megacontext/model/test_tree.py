"""The tree and its gather: an entry is the gist of exactly the tokens that it covers."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megacontext import GistNet, LanguageModel, MegaContextTree, TrainingWCVariationAllocator
from megacontext.allocators.cut import Geometry, lod0_tail
from megacontext.model.matching import NO_TOKEN
from megacontext.model.working_context import NO_LABEL

K = 4


def make_gistnet() -> GistNet:
    torch.manual_seed(1)
    gistnet = GistNet(8)
    torch.nn.init.normal_(gistnet.mlp[2].weight)  # so that the MLP's part shows
    return gistnet


def make_tree(tokens: Tensor, lengths: list[int] | None = None) -> MegaContextTree:
    torch.manual_seed(2)
    embedding = torch.nn.Embedding(50, 8)
    return MegaContextTree.build(
        tokens, embedding(tokens), make_gistnet(), block_size=K, max_lod=2, lengths=lengths
    )


class TestLevels:
    def test_each_level_is_a_kth_of_the_one_below(self) -> None:
        """Blocks at the end that are not full have no gist."""
        tree = make_tree(torch.zeros(2, 39, dtype=torch.int64))
        assert tree.levels.shape == (2, 39 + 9 + 2, 8)
        assert tree.lengths == (39, 39)

    def test_gistnet_makes_each_level_once(self) -> None:
        """For the whole batch at once, and all levels in one call: LOD1 is in use as LOD2 is made.

        Two calls without gradients would write to the same memory under CUDA graphs.
        """
        gistnet, calls, gists = make_gistnet(), [], []
        gistnet.register_forward_hook(lambda _, __, levels: calls.append(list(levels.shape)))
        gistnet.norm.register_forward_hook(lambda _, args, __: gists.append(list(args[0].shape)))
        tokens = torch.zeros(3, 32, dtype=torch.int64)
        MegaContextTree.build(tokens, torch.zeros(3, 32, 8), gistnet, block_size=K, max_lod=2)
        assert calls == [[3, 32 + 8 + 2, 8]]
        assert gists == [[3, 8, 8], [3, 2, 8]]


class TestFocusView:
    def test_it_has_what_stands_below_each_entry(self) -> None:
        """Of two histories, one shorter and padded: children of LOD2 are gists, without tokens."""
        tokens = torch.arange(2 * 40).view(2, 40) % 50
        tree = make_tree(tokens, lengths=[40, 26])
        cuts = [
            Geometry(K, 2, 8, window).coarse_cut(0, length)
            for length, window in ((40, 13), (26, None))
        ]
        query = 8
        view = tree.focus_view(cuts, query)
        entries = tree.working_context([[cut] for cut in cuts])
        assert view.entries.embeddings.equal(entries.embeddings)
        width = max(map(len, cuts))
        assert view.children is not None
        assert view.tokens is not None
        assert view.child_tokens is not None
        assert view.children.shape == (2, width - query, K, 8)
        offsets = (0, 40, 40 + 10)
        for row, cut in enumerate(cuts):
            pads = width - len(cut)
            assert (view.child_tokens[row, :pads] == NO_TOKEN).all()
            for place, (start, lod) in enumerate(zip(cut.positions, cut.lods, strict=True), pads):
                of_token = tokens[row, start] if lod == 0 else NO_TOKEN
                assert view.tokens[row, place] == of_token
                if place >= width - query or lod == 0:
                    continue
                first = offsets[lod - 1] + start // K ** (lod - 1)
                below = tree.levels[row, first : first + K]
                assert view.children[row, place].equal(below)
                expected = (
                    tokens[row, start : start + K] if lod == 1 else torch.full((K,), NO_TOKEN)
                )
                assert view.child_tokens[row, place].equal(expected)
        assert {int(lod) for lod in cuts[0].lods} == {0, 1, 2}

    def test_nothing_but_entries_where_nothing_else_is_read(self) -> None:
        """As it was for a LensNet that reads entries."""
        view = make_tree(torch.zeros(1, 24, dtype=torch.int64)).focus_view(
            [Geometry(K, 2, 8).coarse_cut(0, 24)], None
        )
        assert (view.tokens, view.children, view.child_tokens) == (None, None, None)
        assert len(view.lensnet_inputs()) == 5


class TestWorkingContext:
    @settings(max_examples=2_000)
    @given(num_tokens=st.integers(1, 120), recent=st.integers(0, 20), seed=st.integers(0, 999))
    def test_every_entry_is_the_gist_of_its_own_tokens(
        self, num_tokens: int, recent: int, seed: int
    ) -> None:
        """DESIGN's mistake: 96 % of collapses were not aligned, so a gist stood for others."""
        generator = torch.Generator().manual_seed(seed)
        tree = make_tree(torch.randint(0, 50, (2, num_tokens), generator=generator))
        allocator = TrainingWCVariationAllocator(K, 2, 0.3, recent, seed)
        length = allocator.reachable_length(num_tokens, num_tokens // 2)
        cuts = [[allocator.sample(num_tokens, length) for _ in range(2)] for _ in range(2)]
        context = tree.working_context(cuts)
        gistnet = make_gistnet()
        history = torch.arange(2).repeat_interleave(2)[:, None].expand(4, length)
        for lod in range(3):
            at = context.lods == lod
            tokens = context.starts[at][:, None] + torch.arange(K**lod)
            expected = tree.levels[history[at][:, None], tokens]  # from the tokens alone
            for _ in range(lod):
                expected = gistnet.gist(expected.unflatten(1, (-1, K)))
            torch.testing.assert_close(context.embeddings[at], expected.squeeze(1))

    def test_the_label_of_an_entry_is_the_token_after_its_span(self) -> None:
        """DESIGN's mistake: labels were not shifted, and aligned by slot instead of position."""
        tokens = torch.arange(40).repeat(2, 1)
        cut = TrainingWCVariationAllocator(K, 2, 0.5, 4, 0).sample(40, 19)
        context = make_tree(tokens).working_context([[cut], [cut]])
        assert (context.labels[:, :-1] == (context.starts + context.spans)[:, :-1]).all()
        assert (context.labels[:, -1] == NO_LABEL).all()
        assert (context.spans == K**context.lods).all()

    def test_shorter_cuts_are_padded_on_the_left(self) -> None:
        """Pads have no label; a dense batch has no pad mask at all."""
        tree = make_tree(torch.arange(12).repeat(2, 1), lengths=[12, 5])
        context = tree.working_context([[lod0_tail(12, 6, K)], [lod0_tail(5, 6, K)]])
        assert context.pad_mask is not None
        assert context.pad_mask.tolist() == [[False] * 6, [True] + [False] * 5]
        assert context.labels.tolist() == [
            [7, 8, 9, 10, 11, NO_LABEL],
            [NO_LABEL, 1, 2, 3, 4, NO_LABEL],
        ]
        assert tree.working_context([[lod0_tail(5, 5, K)]] * 2).pad_mask is None

    def test_gradients_reach_gistnet_and_the_embedding(self) -> None:
        """Through the one gather."""
        model, gistnet = LanguageModel(50, 8, 1, 2), make_gistnet()
        tokens = torch.randint(0, 50, (1, 40))
        tree = MegaContextTree.build(tokens, model.embed(tokens), gistnet, block_size=K, max_lod=2)
        cut = TrainingWCVariationAllocator(K, 2, 1.0, 4, 0).sample(40, 40 - 15 - 3)
        tree.working_context([[cut]]).embeddings.square().sum().backward()
        assert model.embedding.weight.grad is not None
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gistnet.mlp.parameters())

    @pytest.mark.parametrize("max_lod", [1, 2])
    def test_the_gather_is_one_index_select(self, max_lod: int) -> None:
        """However many variants: the device sees one kernel for all embeddings."""
        tokens = torch.randint(0, 50, (2, 64))
        tree = MegaContextTree.build(
            tokens, torch.randn(2, 64, 8), make_gistnet(), block_size=K, max_lod=max_lod
        )
        allocator = TrainingWCVariationAllocator(K, max_lod, 0.2, 4, 0)
        cuts = [[allocator.sample(64, 40) for _ in range(5)] for _ in range(2)]
        with torch.profiler.profile() as profile:
            tree.working_context(cuts)
        calls = {event.key: event.count for event in profile.key_averages()}
        assert calls["aten::index_select"] == 1

    def test_variants_share_the_level_table(self) -> None:
        """All floats that a gather allocates are its output: no copy of the levels per variant."""
        allocator = TrainingWCVariationAllocator(K, 2, 0.3, 8)
        tree = make_tree(torch.zeros(2, 200, dtype=torch.int64))
        cuts = [[allocator.sample(200, 50) for _ in range(5)] for _ in range(2)]
        made: list[Tensor] = []

        class Made(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
            ) -> Any:
                result = func(*args, **(kwargs or {}))
                made.extend(t for t in tree_leaves(result) if t.is_floating_point())
                return result

        with Made():
            context = tree.working_context(cuts)
        shared = tree.levels.untyped_storage().data_ptr()
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in made}
        assert storages.pop(shared) == tree.levels.nbytes
        assert list(storages.values()) == [context.embeddings.nbytes]
