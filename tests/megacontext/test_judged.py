"""Micro-steps on known losses: LensNet alone is called; GistNet's are of the language model."""

from dataclasses import replace

import pytest
import torch
from tests.megacontext.model.test_hf_language_model import config_of, save
from torch import Tensor

from lensnet_guard import UnsanctionedCall, guard_of
from megacontext import MCConfig, MCController
from megacontext.judged import Judged, gist_loss, judged_agreement, process_judged
from megacontext.preference import make_pairs, preference_loss

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> MCConfig:
    path = tmp_path_factory.mktemp("llama") / "model"
    save("llama, tied", path)
    return config_of(path, freeze_language_model=True, gists="weighted", lens_reads="tokens")


@pytest.fixture
def mc(llama: MCConfig) -> MCController:
    return MCController(llama)


@pytest.fixture
def judged() -> Judged:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (3, 96), generator=generator)
    held = torch.rand(3, 5, 20, generator=generator) < 0.3
    return Judged(tokens, torch.randn(3, 5, generator=generator), held)


def gradients(network: torch.nn.Module) -> list[Tensor]:
    return [p.grad for p in network.parameters() if p.grad is not None]


class TestProcessJudged:
    @pytest.mark.parametrize("reads", ["tokens", "entries"])
    def test_lensnet_is_called_once_and_learns_alone(
        self, llama: MCConfig, judged: Judged, reads: str
    ) -> None:
        """The language model is not called; neither it nor GistNet has gradients."""
        mc = MCController(replace(llama, lens_reads=reads))
        with mc.context("training"):
            result = process_judged(mc, judged, step=7, micro_step=1)
            torch.autograd.backward(result.loss)
        assert result.metrics["lensnet_calls"] == 1
        assert mc.guard.count("training") == mc.guard.count("training", "preference_scorer") == 1
        assert (mc.guard.calls[-1].step, mc.guard.calls[-1].micro_step) == (7, 1)
        guard = guard_of(mc.language_model)
        assert guard is not None
        assert guard.calls == ()
        assert gradients(mc.gistnet) == gradients(mc.language_model) == []
        assert len(gradients(mc.lensnet)) == len([*mc.lensnet.parameters()])
        assert max(float(g.abs().max()) for g in gradients(mc.lensnet)) > 0

    def test_its_loss_is_that_of_the_pairs(self, mc: MCController, judged: Judged) -> None:
        """Of what was said of variants, on the view that sessions see."""
        result = process_judged(mc, judged)
        with torch.no_grad(), mc.context("inference"):
            cut = mc.config.geometry.focus_view(96, mc.config.horizon_tokens)
            view = mc.build_tree(judged.tokens).focus_view([cut] * 3, mc.config.query_tokens)
            scores = mc.lensnet(*view.lensnet_inputs())
            held = torch.cat([judged.held, torch.zeros(3, 5, 8, dtype=torch.bool)], dim=-1)
            pairs = make_pairs(judged.nll, held, gists=view.entries.lods > 0)
            expected = preference_loss(
                scores,
                pairs,
                temperature=mc.config.temperature,
                advantage_scale=mc.config.advantage_scale,
            )
        torch.testing.assert_close(result.loss, expected)
        assert result.metrics["lens_loss"].equal(result.loss.detach())  # type: ignore[union-attr]
        agreement = judged_agreement(mc, judged)
        torch.testing.assert_close(agreement, result.metrics["preference_agreement"])
        assert mc.guard.count("inference") == 2

    def test_the_frozen_language_model_may_not_be_called_in_it(
        self, mc: MCController, judged: Judged, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It knows nothing of LensNet; LensNet is not called then."""
        build_tree = mc.build_tree

        def peeking(tokens: Tensor) -> object:
            starts = torch.arange(tokens.shape[1]).expand_as(tokens)
            mc.logits(mc.language_model.embed(tokens), starts, torch.ones_like(starts))
            return build_tree(tokens)

        monkeypatch.setattr(mc, "build_tree", peeking)
        with mc.context("training"), pytest.raises(UnsanctionedCall, match="HFLanguageModel"):
            process_judged(mc, judged)
        assert mc.guard.count("training") == 0

    def test_a_view_that_does_not_fit(self, llama: MCConfig, judged: Judged) -> None:
        """Says what it has; LensNet is not called."""
        mc = MCController(replace(llama, focus_window=25))
        with pytest.raises(ValueError) as raised:
            process_judged(mc, judged)
        assert str(raised.value) == (
            "variants are judged by which of 20 blocks they hold, and the focus view has 16 at "
            "LOD1; widen focus_window, or make sequences of another length"
        )
        assert mc.guard.calls == ()

    def test_in_inference_it_is_refused(self, mc: MCController, judged: Judged) -> None:
        """It would not be training."""
        with mc.context("inference"), pytest.raises(RuntimeError, match="inference"):
            process_judged(mc, judged)


class TestGistLoss:
    def test_gistnet_alone_gets_gradients(self, mc: MCController, judged: Judged) -> None:
        """By one call of the language model, and none of LensNet."""
        with mc.context("training"):
            torch.autograd.backward(gist_loss(mc, judged.tokens))
        found = gradients(mc.gistnet)
        assert len(found) == len([*mc.gistnet.parameters()])
        assert max(float(g.abs().max()) for g in found) > 0
        assert gradients(mc.lensnet) == gradients(mc.language_model) == []
        assert mc.guard.calls == ()
        guard = guard_of(mc.language_model)
        assert guard is not None
        assert guard.count("training") == guard.count("training", "variants") == 1

    def test_it_is_the_mean_over_labels_of_random_variants(
        self, mc: MCController, judged: Judged
    ) -> None:
        """Without the baseline, in which there is no gist to learn from."""
        labelled = torch.rand(3, 96, generator=torch.Generator().manual_seed(1)) < 0.5
        found = gist_loss(mc, judged.tokens, labelled)
        mc.allocator.drawn = 0
        with torch.no_grad(), mc.context("inference"):
            variants = mc.build_variants(mc.build_tree(judged.tokens, labelled=labelled))
            nll = mc.token_nll(variants.working_context)
        number = 1 + mc.config.num_variants
        rows = [row for row in range(3 * number) if row % number]
        labels = variants.working_context.labels[rows] >= 0
        torch.testing.assert_close(found, nll[rows].sum() / labels.sum())

    def test_lensnet_may_not_be_called(
        self, mc: MCController, judged: Judged, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing would learn from it."""
        build_variants = mc.build_variants

        def peeking(tree: object) -> object:
            cut = mc.config.geometry.focus_view(96, mc.config.horizon_tokens)
            view = tree.focus_view([cut] * 3, mc.config.query_tokens)  # type: ignore[attr-defined]
            mc.lensnet(*view.lensnet_inputs())
            return build_variants(tree)  # type: ignore[arg-type]

        monkeypatch.setattr(mc, "build_variants", peeking)
        with mc.context("training"), pytest.raises(UnsanctionedCall):
            gist_loss(mc, judged.tokens)

    def test_a_language_model_that_is_not_frozen(self, config: MCConfig, tokens: Tensor) -> None:
        """Is not guarded, and would learn too."""
        with pytest.raises(RuntimeError) as raised:
            gist_loss(MCController(config), tokens)
        assert str(raised.value) == (
            "only a frozen language model has micro-steps of its own; set freeze_language_model, "
            "or train it with process_batch"
        )


def test_where_it_goes(judged: Judged) -> None:
    """All three tensors to the device."""
    there = judged.to(torch.device("meta"))
    assert {t.device.type for t in (there.tokens, there.nll, there.held)} == {"meta"}
