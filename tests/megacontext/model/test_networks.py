"""GistNet, LensNet and the language model: shapes, masks and what they may look at."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.megacontext.conftest import TEXT_MODEL
from torch import Tensor

from lensnet_guard import CallPolicy, guard_module
from megacontext import GistNet, LanguageModel, LensNet, MCController
from megacontext.allocators.cut import lod0_tail
from megacontext.model import networks
from megacontext.model.gistnet import WeightedGistNet
from megacontext.model.language_model import Seen


def entries(batch: int, width: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lods = torch.arange(width).flip(0).clamp(max=2).expand(batch, width)
    spans = 4**lods
    return {
        "embeddings": torch.randn(batch, width, 16, generator=generator),
        "starts": spans.cumsum(1) - spans,
        "spans": spans,
        "lods": lods,
    }


def padded(of: dict[str, Tensor], pads: int) -> dict[str, Tensor]:
    """The same entries behind pads that hold garbage."""
    batch = of["starts"].shape[0]
    garbage = {"embeddings": torch.full((batch, pads, 16), 1e3)}
    for name in ("starts", "spans", "lods"):
        garbage[name] = torch.ones(batch, pads, dtype=torch.int64)
    out = {name: torch.cat([garbage[name], of[name]], dim=1) for name in of}
    pad_mask = torch.zeros(batch, out["starts"].shape[1], dtype=torch.bool)
    pad_mask[:, :pads] = True
    return out | {"pad_mask": pad_mask}


def lensnet() -> LensNet:
    torch.manual_seed(0)
    return LensNet(16, num_layers=2, num_heads=2, max_lod=2)


class TestGistNet:
    def test_shape_and_start_as_the_scaled_sum(self) -> None:
        """[..., K, D] to [..., D]; before training it keeps the children's variance."""
        children = torch.randn(2, 3, 4, 16)
        torch.testing.assert_close(GistNet(16).gist(children), children.sum(-2) / 2)

    def test_the_order_of_the_children_does_not_matter(self) -> None:
        """A gist is no concatenation."""
        gistnet = GistNet(16)
        torch.nn.init.normal_(gistnet.mlp[2].weight)
        children = torch.randn(5, 4, 16)
        torch.testing.assert_close(gistnet.gist(children), gistnet.gist(children.flip(1)))


class TestWeightedGistNet:
    def test_a_gist_begins_short_and_without_the_mean(self) -> None:
        """The scaled sum of what distinguishes the children, a fifth of it."""
        centre = torch.full((16,), 3.0)
        children = torch.randn(2, 3, 4, 16) + centre
        gist = WeightedGistNet(16, centre).gist(children)
        torch.testing.assert_close(gist, 0.2 * (children - centre).sum(-2) / 2)

    def test_gists_of_gists_have_no_mean_to_take_off(self) -> None:
        """Level by level, as a tree makes them; the order of children does not matter."""
        torch.manual_seed(0)
        gistnet = WeightedGistNet(16, torch.full((16,), 3.0))
        for part in (gistnet.weigh[2], gistnet.mlp[2]):
            torch.nn.init.normal_(part.weight)
        tokens = torch.randn(1, 16, 16) + 3
        levels = gistnet(tokens, 4, 2)
        lod1 = gistnet.gist(tokens.view(1, 4, 4, 16).flip(2))
        torch.testing.assert_close(levels[:, 16:20], lod1)
        torch.testing.assert_close(levels[:, 20:], gistnet.gist(lod1[:, None], of_tokens=False))
        assert not torch.allclose(levels[:, 20:], gistnet.gist(lod1[:, None]))


class TestLensNet:
    def test_scores_are_signed_and_bounded(self) -> None:
        """[B, E] in [-1, 1]."""
        scores = lensnet()(**entries(3, 7))
        assert scores.shape == (3, 7)
        assert scores.abs().max() <= 1
        assert scores.min() < 0 < scores.max()

    def test_it_looks_both_ways(self) -> None:
        """A gist's score depends on the entries after it."""
        view = entries(1, 7)
        changed = view | {"embeddings": view["embeddings"].clone()}
        changed["embeddings"][:, -1] += 1
        assert (lensnet()(**view)[:, 0] != lensnet()(**changed)[:, 0]).all()

    def test_causal_it_looks_back_only(self) -> None:
        """For the ablation: then the query comes too late for the history."""
        torch.manual_seed(0)
        causal = LensNet(16, num_layers=2, num_heads=2, max_lod=2, causal=True)
        view = entries(1, 7)
        changed = view | {"embeddings": view["embeddings"].clone()}
        changed["embeddings"][:, -1] += 1
        difference = causal(**view) - causal(**changed)
        assert difference[:, :-1].eq(0).all()
        assert (difference[:, -1] != 0).all()

    def test_it_begins_by_comparing_content(self) -> None:
        """Queries equal keys, so an entry attends most to what resembles it, wherever that is."""
        for block in lensnet().blocks:
            query, key, value = block.qkv.weight.chunk(3)
            assert query.equal(key)
            assert not query.equal(value)

    def test_pads_change_no_score(self) -> None:
        """And score 0 themselves."""
        view = entries(2, 7)
        scores = lensnet()(**padded(view, 5))
        torch.testing.assert_close(scores[:, 5:], lensnet()(**view))
        assert scores[:, :5].eq(0).all()

    def test_batch_mates_change_no_score(self) -> None:
        """DESIGN's mistake: positions were normalised by the maximum over the batch."""
        short = entries(1, 7)
        mate = {name: value.clone() for name, value in entries(1, 7, seed=9).items()}
        mate["starts"] += 1_000_000
        both = {name: torch.cat([short[name], mate[name]]) for name in short}
        torch.testing.assert_close(lensnet()(**both)[:1], lensnet()(**short))


class TestLanguageModel:
    def model(self) -> LanguageModel:
        torch.manual_seed(0)
        return LanguageModel(vocab_size=11, d_model=16, num_layers=2, num_heads=2)

    def logits(self, of: dict[str, Tensor]) -> Tensor:
        out: Tensor = self.model()(of["embeddings"], of["starts"], of["spans"], of.get("pad_mask"))
        return out

    def test_it_looks_back_only(self) -> None:
        """Changing an entry changes no logits before it."""
        context = entries(2, 7)
        changed = context | {"embeddings": context["embeddings"].clone()}
        changed["embeddings"][:, 4] += 1
        difference = (self.logits(context) - self.logits(changed)).abs().amax((0, 2))
        assert difference[:4].eq(0).all()
        assert (difference[4:] > 0).all()

    def test_pads_change_no_logits(self) -> None:
        """Left pads are masked; their own rows stay finite."""
        context = entries(2, 7)
        logits = self.logits(padded(context, 3))
        torch.testing.assert_close(logits[:, 3:], self.logits(context))
        assert logits.isfinite().all()

    def test_an_entry_knows_what_came_right_before_it(self) -> None:
        """Before any attention; a pad is nothing, and so is what is before the first entry."""
        model, context = self.model(), entries(2, 7)
        for block in model.blocks:
            torch.nn.init.zeros_(block.attention_out.weight)
        with torch.no_grad():
            before = model(context["embeddings"], context["starts"], context["spans"])
            changed = context["embeddings"].clone()
            changed[:, 3] += 1
            after = model(changed, context["starts"], context["spans"])
        moved = (before != after).any(-1).all(0)
        assert moved.tolist() == [False, False, False, True, True, False, False]

    def test_the_head_is_tied_to_the_embedding(self) -> None:
        """No second vocabulary matrix."""
        shapes = [tuple(p.shape) for p in self.model().parameters()]
        assert shapes.count((11, 16)) == 1


class TestRecompute:
    """Activation checkpoints of the language model's blocks."""

    @staticmethod
    def step(model: LanguageModel, reads: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Gradients of a step, and the bytes that autograd held for it."""
        held: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        inputs = [reads["embeddings"], reads["starts"], reads["spans"]]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(*inputs, reads.get("pad_mask"))
        model.zero_grad()
        logits.logsumexp(-1).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]), sum(held.values())

    @pytest.mark.parametrize("pads", [0, 3])
    def test_same_gradients_for_less_memory(self, pads: int) -> None:
        """Bit by bit; what is held of blocks is gone."""
        torch.manual_seed(0)
        model = LanguageModel(50, 16, num_layers=3, num_heads=2)
        reads = padded(entries(2, 30), pads) if pads else entries(2, 30)
        expected, held = self.step(model, reads)
        model.recompute = True
        gradients, held_of_recompute = self.step(model, reads)
        assert torch.equal(gradients, expected)
        assert held_of_recompute < held / 2

    def test_a_guarded_language_model_is_called_once(self) -> None:
        """Its blocks run again in backward, when no scope is open: no call, and no bypass."""
        model = LanguageModel(50, 16, num_layers=2, num_heads=2)
        model.recompute = True
        guard = guard_module(model, policy=CallPolicy({"training": 1}))
        reads = entries(2, 30)
        with guard.context("training"), guard.micro_step(0):
            with guard.sanctioned("training"):
                logits = guard.module(reads["embeddings"], reads["starts"], reads["spans"])
            logits.sum().backward()
        assert guard.count("training") == 1
        assert guard.violations == ()


class TestSeen:
    """What was read need not be read again."""

    width = 12

    def model(self) -> LanguageModel:
        torch.manual_seed(0)
        return LanguageModel(vocab_size=11, d_model=16, num_layers=2, num_heads=2)

    @settings(max_examples=30)
    @given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 2))
    def test_in_pieces_the_logits_are_those_of_the_whole(
        self, pieces: list[int], batch: int
    ) -> None:
        """However it is cut up."""
        context, model = entries(batch, self.width), self.model()
        expected = model(context["embeddings"], context["starts"], context["spans"])
        seen, at, logits = Seen(2, self.width), 0, []
        for size in (*pieces, self.width):
            piece = [context[n][:, at : at + size] for n in ("embeddings", "starts", "spans")]
            if piece[0].shape[1]:
                logits.append(model(*piece, None, seen))
            at = min(at + size, self.width)
        assert seen.length == self.width
        torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-5, rtol=1e-4)

    def test_what_it_has_no_room_for_is_refused(self) -> None:
        """It was made for so many entries."""
        context, seen = entries(1, 5), Seen(2, 4)
        with pytest.raises(ValueError, match="5 entries do not fit a cache with room for 4"):
            self.model()(context["embeddings"], context["starts"], context["spans"], None, seen)

    def test_pads_are_refused(self) -> None:
        """They would be remembered as entries."""
        context = padded(entries(1, 5), 2)
        arguments = [context[n] for n in ("embeddings", "starts", "spans", "pad_mask")]
        with pytest.raises(ValueError, match="one after another must not be padded"):
            self.model()(*arguments, Seen(2, 9))

    def test_only_differences_of_positions_matter(self) -> None:
        """So sessions count from the first covered token; near 2**24 float32 loses the angles."""
        context, model = entries(1, 7), self.model()
        near = model(context["embeddings"], context["starts"], context["spans"])
        shifted = model(context["embeddings"], context["starts"] + 1_000, context["spans"])
        torch.testing.assert_close(near, shifted, atol=1e-4, rtol=1e-3)
        far = model(context["embeddings"], context["starts"] + 2**25, context["spans"])
        assert (near - far).abs().max() > 10 * (near - shifted).abs().max()


class TestAtOnce:
    def test_validation_with_a_large_vocabulary_read_all_rows_at_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """32 rows of 1,024 with 49,152 words make 6.4 GB of logits; in parts, losses are equal."""
        mc = MCController(TEXT_MODEL)
        tokens = torch.randint(0, 256, (5, 40), generator=torch.Generator().manual_seed(0))
        labelled = torch.zeros(5, 40, dtype=torch.bool)
        labelled[0, 3:5] = labelled[1, 7] = labelled[4, 9:30] = True  # two rows count nothing
        read: list[int] = []
        mc.language_model.register_forward_pre_hook(lambda _, x: read.append(len(x[0])))

        def losses() -> list[Tensor]:
            tree = mc.build_tree(tokens)
            context = tree.working_context([[lod0_tail(40, 40, 4)], [lod0_tail(40, 30, 4)]] * 2)
            of_all = mc.full_detail_loss(tokens), mc.full_detail_loss(tokens, labelled)
            return [*of_all, mc.token_nll(context)]

        whole = losses()
        with torch.no_grad():
            assert all(a.equal(b) for a, b in zip(whole, losses(), strict=True))
            assert read == [5, 5, 4] * 2
            inside = 8 * 40 * mc.config.d_model  # more than logits, with so few words
            monkeypatch.setattr(networks, "_NUMBERS", 2 * max(40 * 256, inside))
            parts = losses()
        assert read[6:] == [2, 2, 1, 2, 2, 1, 2, 2]
        torch.testing.assert_close(parts, whole)
        losses()
        assert read[14:] == [5, 5, 4]  # what is learned from is read once
