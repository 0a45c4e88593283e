"""MCController: from tokens to losses. That LensNet is called once is in test_mc_components."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tests.megacontext.conftest import RefuseWaiting
from torch import Tensor

from lensnet_guard import BudgetUnmet, CallPolicy, ContextSwitchRefused, guard_module
from megacontext import LensNet, MCConfig, MCController, Recipe
from megacontext.data.source import Batch
from megacontext.model.working_context import NO_LABEL


def ragged(tokens: Tensor, lengths: list[int]) -> Tensor:
    """A pad mask that leaves the last ``lengths`` tokens of each sequence."""
    width = tokens.shape[1]
    return torch.arange(width) < width - torch.tensor(lengths)[:, None]


@pytest.mark.lensnet_calls(exact=0)
class TestBuildTree:
    def test_the_oldest_tokens_go_until_the_target_is_reachable(self, mc: MCController) -> None:
        """(N - W) mod (K - 1): of 95 tokens, 47 above the target, 2 go at K = 4."""
        tokens = torch.arange(64).repeat(2)[:95][None]
        tree = mc.build_tree(tokens)
        assert tree.lengths == (93,)
        assert torch.equal(tree.tokens, tokens[:, 2:])

    def test_shorter_sequences_start_at_their_first_token(self, mc: MCController) -> None:
        """Whatever stands in the pads is not in the tree of what is kept."""
        tokens = torch.arange(1, 61).repeat(2, 1)
        tree = mc.build_tree(tokens, ragged(tokens, [60, 20]))
        assert tree.lengths == (60, 20)
        assert tree.tokens[1, :20].tolist() == list(range(41, 61))


@pytest.mark.lensnet_calls(exact=0)
class TestBuildVariants:
    def test_a_baseline_and_random_cuts_of_exactly_the_target(
        self, mc: MCController, tokens: Tensor
    ) -> None:
        """Dense: no padding at all; the variants cover every kept token, the baseline the tail."""
        tree = mc.build_tree(tokens)
        variants = mc.build_variants(tree)
        config = mc.config
        assert variants.working_context.pad_mask is None
        shape = (len(tokens) * 4, config.train_wc_length, config.d_model)
        assert variants.working_context.embeddings.shape == shape
        for baseline, *random_cuts in variants.cuts:
            baseline.check(96 - 48, 96, recent_tokens=48)
            assert len(random_cuts) == config.num_variants
            for cut in random_cuts:
                cut.check(0, 96, recent_tokens=config.recent_tokens)
                assert len(cut) == config.train_wc_length

    def test_same_seed_same_variants(self, config: MCConfig, tokens: Tensor) -> None:
        """And weights: a controller is a function of its configuration."""
        first, second = MCController(config), MCController(config)
        assert torch.equal(
            first.build_variants(first.build_tree(tokens)).working_context.embeddings,
            second.build_variants(second.build_tree(tokens)).working_context.embeddings,
        )

    def test_building_a_controller_leaves_the_users_random_state(self, config: MCConfig) -> None:
        """The seed of the configuration is its own business."""
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        MCController(config)
        assert torch.rand(1) == expected


class TestProcessBatch:
    def test_the_loss_is_the_sum_of_its_parts(self, mc: MCController, tokens: Tensor) -> None:
        """And everything in it is a finite scalar."""
        result = mc.process_batch(tokens)
        assert torch.equal(result.loss, result.lm_loss + result.lens_loss)
        assert result.loss.shape == ()
        assert result.loss.isfinite()

    def test_all_metrics_of_the_design(self, mc: MCController, tokens: Tensor) -> None:
        """By their known names; no host value but the count of calls."""
        metrics = mc.process_batch(tokens).metrics
        assert set(metrics) == {
            "adv_delta_mean",
            "adv_delta_p95",
            "adv_delta_std",
            "preference_corr",
            "preference_agreement",
            "policy_score_abs_mean",
            "policy_score_std_mean",
            "lod_loss/0",
            "lod_loss/1",
            "lod_loss/2",
            "lm_loss",
            "lens_loss",
            "lensnet_calls",
        }
        assert metrics.pop("lensnet_calls") == 1
        assert all(isinstance(m, Tensor) and not m.requires_grad for m in metrics.values())

    def test_lod_losses_are_the_means_by_the_lod_that_predicts(
        self, mc: MCController, tokens: Tensor
    ) -> None:
        """Weighted by their entries they make the language-model loss."""
        result = mc.process_batch(tokens)
        context = result.variants.working_context
        labelled = context.labels != NO_LABEL
        total = sum(
            float(result.metrics[f"lod_loss/{lod}"]) * int(((context.lods == lod) & labelled).sum())
            for lod in range(3)
        )
        assert total / int(labelled.sum()) == pytest.approx(float(result.metrics["lm_loss"]))

    def test_each_loss_trains_its_own_network(self, mc: MCController, tokens: Tensor) -> None:
        """The preference loss reaches LensNet alone, the other one everything else."""
        lens = set(mc.lensnet.parameters())
        others = [p for p in mc.parameters() if p not in lens]
        mc.process_batch(tokens).lens_loss.backward()
        assert all(p.grad is not None and p.grad.norm() > 0 for p in _of_blocks(lens))
        assert all(p.grad is None for p in others)
        mc.zero_grad()
        mc.process_batch(tokens).lm_loss.backward()
        assert all(p.grad is None for p in lens)
        assert all(p.grad is not None for p in others)

    def test_the_view_never_sees_the_horizon(self, mc: MCController, tokens: Tensor) -> None:
        """LensNet's input does not depend on the tokens that it is judged by."""
        seen: list[Tensor] = []
        mc.lensnet.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        state = mc.allocator.drawn
        mc.process_batch(tokens)
        changed = tokens.clone()
        changed[:, -mc.config.horizon_tokens :] = 0
        mc.allocator.drawn = state
        mc.process_batch(changed)
        assert torch.equal(seen[0], seen[1])
        assert seen[0].shape[1] == 20 + 8  # 80 tokens of history as gists, 8 recent ones

    @pytest.mark.lensnet_calls(exact=4, context="training", scope="preference_scorer")
    def test_ragged_batches_score_as_their_sequences_alone(self, mc: MCController) -> None:
        """A pad, or another sample of the batch, changes no score."""
        scores: list[Tensor] = []
        mc.lensnet.register_forward_hook(lambda _, __, out: scores.append(out.detach()))
        tokens = torch.randint(0, 64, (3, 96))
        lengths = [96, 60, 30]
        mc.process_batch(tokens, pad_mask=ragged(tokens, lengths))
        for row, length in enumerate(lengths):
            mc.process_batch(tokens[row : row + 1, 96 - length :])
            alone = scores.pop()
            together = scores[0][row, -alone.shape[1] :]
            torch.testing.assert_close(together, alone[0])
            assert scores[0][row, : -alone.shape[1]].eq(0).all()

    def test_what_stands_in_the_pads_does_not_matter(self, config: MCConfig) -> None:
        """Losses are those of the tokens alone."""
        tokens = torch.randint(0, 64, (2, 96))
        mask = ragged(tokens, [40, 96])
        garbage = tokens.masked_fill(mask, 63)
        losses = [MCController(config).process_batch(t, pad_mask=mask) for t in (tokens, garbage)]
        assert torch.equal(losses[0].loss, losses[1].loss)

    def test_variants_are_compared_on_the_same_tokens(
        self, mc: MCController, tokens: Tensor
    ) -> None:
        """The horizon: its tokens are predicted by every variant, and only they count."""
        result = mc.process_batch(tokens)
        context = result.variants.working_context
        ends = context.starts + context.spans
        counted = (ends >= 96 - mc.config.horizon_tokens) & (context.labels != NO_LABEL)
        predicted = ends[counted].view(len(ends), -1)
        assert predicted.tolist() == [list(range(88, 96))] * len(ends)

    def test_a_language_model_that_knows_the_answer_makes_no_difference_between_variants(
        self, mc: MCController, tokens: Tensor
    ) -> None:
        """With a constant output all advantages are zero up to rounding, and so is the loss."""
        with torch.no_grad():
            mc.language_model.norm.weight.zero_()
        result = mc.process_batch(tokens)
        assert float(result.metrics["adv_delta_mean"]) < 1e-4


class TestBadInput:
    @pytest.mark.parametrize(
        ("tokens", "error", "message"),
        [
            ([[1, 2]], TypeError, "tokens must be an int64 tensor, not list"),
            (torch.zeros(2, 96), TypeError, "tokens must be an int64 tensor, not torch.float32"),
            (
                torch.zeros(96, dtype=torch.int64),
                ValueError,
                "tokens must be [B, T] with B ≥ 1, not [96]",
            ),
            (
                torch.zeros(0, 96, dtype=torch.int64),
                ValueError,
                "tokens must be [B, T] with B ≥ 1, not [0, 96]",
            ),
            (
                torch.zeros(2, 8, dtype=torch.int64),
                ValueError,
                "sequence 0 has 8 tokens; at least 9 are needed, one more than horizon_tokens",
            ),
            (
                torch.zeros(2, 97, dtype=torch.int64),
                ValueError,
                "the batch is 97 tokens long, longer than sequence_tokens 96",
            ),
            (
                torch.full((2, 96), 64),
                ValueError,
                "tokens must lie in [0, 64), but run from 64 to 64",
            ),
            (
                torch.full((2, 96), -1),
                ValueError,
                "tokens must lie in [0, 64), but run from -1 to -1",
            ),
        ],
    )
    @pytest.mark.lensnet_calls(exact=1)
    def test_batches_that_are_none(
        self, mc: MCController, tokens: Tensor, error: type[Exception], message: str
    ) -> None:
        """Refused before anything is built, and the controller works on afterwards."""
        with pytest.raises(error) as raised:
            mc.process_batch(tokens)
        assert str(raised.value) == message
        assert mc.guard.current_context is None
        assert mc.process_batch(torch.zeros(1, 96, dtype=torch.int64)).loss.isfinite()

    @pytest.mark.lensnet_calls(exact=0)
    def test_pad_masks_that_are_none(self, mc: MCController, tokens: Tensor) -> None:
        """Wrong shape or type, or pads that are not on the left."""
        with pytest.raises(ValueError, match=r"pad_mask must be bool \[3, 96\], not torch.bool"):
            mc.process_batch(tokens, pad_mask=torch.zeros(3, 95, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"not torch\.int64"):
            mc.process_batch(tokens, pad_mask=torch.zeros(3, 96, dtype=torch.int64))
        right = ragged(tokens, [96, 50, 40]).flip(1)
        with pytest.raises(ValueError, match="pad_mask must be True on the left of each sequence"):
            mc.process_batch(tokens, pad_mask=right)

    @pytest.mark.lensnet_calls(exact=0)
    def test_inference_context(self, mc: MCController, tokens: Tensor) -> None:
        """process_batch trains."""
        with (
            mc.context("inference"),
            pytest.raises(RuntimeError, match="process_batch trains and cannot run in inference"),
        ):
            mc.process_batch(tokens)

    def test_a_lost_guard_is_noticed(self, mc: MCController, tokens: Tensor) -> None:
        """Somebody put a raw LensNet in its place: refused, not trained without a guard."""
        mc.lensnet = LensNet(32, 1, 2, 2)
        with pytest.raises(RuntimeError, match=r"mc\.lensnet is no longer guarded"):
            mc.process_batch(tokens)
        mc.lensnet = guard_module(mc.lensnet, policy=CallPolicy()).module
        assert mc.process_batch(tokens).loss.isfinite()


class TestRecompute:
    @pytest.mark.lensnet_calls(exact=2)
    def test_a_recomputing_language_model_changes_nothing(
        self, config: MCConfig, tokens: Tensor
    ) -> None:
        """Same gradients, and still one call of LensNet, which is not recomputed."""
        gradients = []
        for recompute in (False, True):
            mc = MCController(config)
            mc.language_model.recompute = recompute
            with mc.context("training"):
                torch.autograd.backward(mc.process_batch(tokens).loss)
            gradients.append(torch.cat([p.grad.flatten() for p in mc.parameters()]))
            assert [record.kind for record in mc.guard.calls] == ["call"]
        assert torch.equal(*gradients)


class TestNoWaiting:
    """A micro-step queues its work on the device and reads nothing back."""

    @pytest.mark.parametrize(
        "recipe", [Recipe(), Recipe(scored="variant"), Recipe(judged="all")], ids=str
    )
    def test_process_batch_reads_nothing_from_the_device(
        self, config: MCConfig, tokens: Tensor, recipe: Recipe
    ) -> None:
        """No ``item()``, no ``nonzero``: with all tokens, with some labelled, with ragged rows."""
        mc = MCController(replace(config, recipe=recipe))
        labelled = torch.rand(tokens.shape) > 0.5
        with RefuseWaiting():
            for options in (
                {},
                {"labelled": labelled},
                {"pad_mask": ragged(tokens, [96, 70, 50])},
            ):
                result = mc.process_batch(tokens, **options)
                torch.autograd.backward(result.loss)
        assert result.loss.isfinite()

    @pytest.mark.parametrize(
        "read", [float, bool, lambda x: x[x > 0], lambda x: x.masked_select(x > 0), torch.nonzero]
    )
    def test_what_reads_would_be_noticed(self, read: Callable[[Tensor], object]) -> None:
        """The test above can fail."""
        with RefuseWaiting(), pytest.raises(AssertionError, match="the host waits"):
            read(torch.ones(1))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    @pytest.mark.lensnet_calls(exact=3)
    def test_cuda_never_waits(self, config: MCConfig, tokens: Tensor) -> None:
        """Torch's own check of the real thing; the first step warms up."""
        mc = MCController(config).cuda()
        labelled = torch.rand(tokens.shape) > 0.5
        try:
            for mode in ("default", "error", "error"):
                torch.cuda.set_sync_debug_mode(mode)
                batch = Batch(tokens, labelled).to(torch.device("cuda"))
                result = mc.process_batch(batch.tokens, labelled=batch.labelled)
                torch.autograd.backward(result.loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert result.loss.isfinite()


class TestPlumbing:
    def test_state_dict_has_plain_keys_and_loads(self, mc: MCController, tokens: Tensor) -> None:
        """The guard leaves no trace in a checkpoint."""
        other = MCController(MCConfig(**{**vars(mc.config), "seed": 5}))
        other.load_state_dict(mc.state_dict())
        assert all("wrapped" not in key and "guard" not in key for key in mc.state_dict())
        assert "lensnet.head.weight" in mc.state_dict()
        assert torch.equal(other.full_detail_loss(tokens), mc.full_detail_loss(tokens))

    def test_moving_the_controller_keeps_the_guard(self, mc: MCController) -> None:
        """.to(), .double() and .eval() work in place on the guarded LensNet."""
        guard = mc.guard
        assert mc.to("cpu").double().eval().guard is guard
        assert mc.lensnet.head.weight.dtype == torch.float64

    def test_bfloat16_could_not_compute_its_quantile(
        self, mc: MCController, tokens: Tensor
    ) -> None:
        """A model in half precision takes the same step."""
        assert mc.to(torch.bfloat16).process_batch(tokens).loss.isfinite()

    def test_process_batch_runs_in_double_precision(self, mc: MCController, tokens: Tensor) -> None:
        """Nothing in the step is tied to float32."""
        assert mc.double().process_batch(tokens).loss.dtype == torch.float64

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_cuda_gives_the_losses_of_the_cpu(self, config: MCConfig, tokens: Tensor) -> None:
        """Within the tolerance of other kernels."""
        on_cpu = MCController(config).process_batch(tokens)
        on_gpu = MCController(config).cuda().process_batch(tokens.cuda())
        torch.testing.assert_close(on_gpu.loss.cpu(), on_cpu.loss, atol=1e-3, rtol=1e-3)


def _of_blocks(parameters: set[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """All but biases that a zero-mean gradient may leave untouched, and LODs that no entry has."""
    return [p for p in parameters if p.dim() > 1]


class TestLabelled:
    def test_only_labelled_tokens_count(self, mc: MCController, tokens: Tensor) -> None:
        """In the language model's loss and in what variants are judged by."""
        labelled = torch.zeros_like(tokens, dtype=torch.bool)
        labelled[:, [20, 90, 95]] = True
        result = mc.process_batch(tokens, labelled=labelled)
        labels = result.variants.working_context.labels
        kept = labels != NO_LABEL
        assert kept.any(1).all()
        # 90 and 95 follow LOD0 entries of every variant; 20 follows an entry of some.
        assert set(kept.sum(1).tolist()) <= {2, 3}
        assert torch.equal(labels[:, -2].view(3, -1)[:, 0], tokens[:, 95])

    def test_full_detail_loss_is_the_mean_over_labelled_tokens(
        self, mc: MCController, tokens: Tensor
    ) -> None:
        """Of two labels it is the mean of each alone, and not that of all."""

        def loss(*at: int) -> float:
            labelled = torch.zeros_like(tokens, dtype=torch.bool)
            labelled[:, list(at)] = True
            return mc.full_detail_loss(tokens, labelled).item()

        assert loss(50, 95) == pytest.approx((loss(50) + loss(95)) / 2, rel=1e-5)
        assert loss(50) != pytest.approx(mc.full_detail_loss(tokens).item(), rel=1e-3)


class TestAblations:
    def test_variants_can_be_scored_one_by_one(self, config: MCConfig, tokens: Tensor) -> None:
        """The plain recipe: still one batched call, and LensNet still learns from it."""
        mc = MCController(replace(config, recipe=Recipe(scored="variant")))
        result = mc.process_batch(tokens)
        (call,) = mc.guard.calls
        assert call.inputs[0] == f"float32[{3 * 4}, 48, 32] cpu"
        result.loss.backward()
        assert any(p.grad.abs().sum() > 0 for p in mc.lensnet.parameters())  # type: ignore[union-attr]

    def test_variants_can_be_judged_by_all_their_tokens(
        self, config: MCConfig, tokens: Tensor
    ) -> None:
        """Other advantages, the same language model loss."""
        horizon = MCController(config).process_batch(tokens)
        everything = MCController(replace(config, recipe=Recipe(judged="all"))).process_batch(
            tokens
        )
        assert torch.equal(horizon.lm_loss, everything.lm_loss)
        assert everything.metrics["adv_delta_mean"] > horizon.metrics["adv_delta_mean"]


class TestHeldOutAgreement:
    """What validation asks of LensNet."""

    def test_it_is_that_of_a_micro_step(self, config: MCConfig, tokens: Tensor) -> None:
        """Of the same sequences and variants; there is no second way to compare."""
        trained = MCController(config).process_batch(tokens).metrics["preference_agreement"]
        agreement = MCController(config).held_out_agreement(tokens)
        assert torch.equal(agreement, torch.as_tensor(trained))
        assert not agreement.requires_grad

    def test_it_draws_nothing_from_the_training_allocator(
        self, mc: MCController, tokens: Tensor
    ) -> None:
        """So that a run validated more often has the same variants; nor do its own change."""
        before = mc.allocator.drawn
        with mc.context("training"):
            first, second = mc.held_out_agreement(tokens), mc.held_out_agreement(tokens)
        assert mc.allocator.drawn == before
        assert torch.equal(first, second)

    def test_it_is_one_call_in_inference_context(self, mc: MCController, tokens: Tensor) -> None:
        """Between micro-steps, and never inside one."""
        with mc.context("training"):
            mc.held_out_agreement(tokens)
            (call,) = mc.guard.calls
            assert (call.context, call.grad_enabled) == ("inference", False)
            with pytest.raises(BudgetUnmet), mc.guard.micro_step(0):
                pass
        with pytest.raises(ContextSwitchRefused), mc.context("training"):
            with mc.guard.micro_step(1):
                mc.held_out_agreement(tokens)

    def test_it_is_undefined_where_nothing_is_preferred(
        self, mc: MCController, tokens: Tensor
    ) -> None:
        """nan, as in training: no gist of the view is held by one variant only."""
        mc.config = replace(mc.config, lod2_probability=0.0)
        short = tokens[:, :48]  # as long as a working context: every variant is the baseline
        assert mc.held_out_agreement(short).isnan()


class TestBfloat16:
    """Autocast of the forward passes, and of nothing else."""

    def test_the_networks_run_in_it_and_the_losses_do_not(
        self, config: MCConfig, tokens: Tensor
    ) -> None:
        """Log-softmax, pairs and preference loss are computed from float32."""
        mc = MCController(config, bf16=True)
        ran: dict[str, torch.dtype] = {}
        for name in ("language_model", "lensnet", "gistnet.mlp"):
            mc.get_submodule(name).register_forward_hook(
                lambda _, __, out, name=name: ran.update({name: out.dtype})  # type: ignore[misc]
            )
        result = mc.process_batch(tokens)
        assert ran == dict.fromkeys(ran, torch.bfloat16)
        assert len(ran) == 3
        assert result.variants.working_context.embeddings.dtype == torch.float32
        metrics = [m for m in result.metrics.values() if isinstance(m, Tensor)]
        for value in (result.loss, result.lm_loss, result.lens_loss, *metrics):
            assert value.dtype == torch.float32
        result.loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in mc.parameters())  # type: ignore[union-attr]

    def test_the_loss_is_the_softmax_of_what_the_model_gave_out(
        self, config: MCConfig, tokens: Tensor
    ) -> None:
        """Not rounded once more: bfloat16 keeps two to three digits."""
        mc = MCController(config, bf16=True)
        logits: list[Tensor] = []
        mc.language_model.register_forward_hook(lambda _, __, out: logits.append(out))
        loss = mc.full_detail_loss(tokens)
        expected = torch.nn.functional.cross_entropy(
            logits[0].double()[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)

    def test_it_is_close_to_float32(self, config: MCConfig, tokens: Tensor) -> None:
        """And not the same."""
        exact = MCController(config).process_batch(tokens)
        rounded = MCController(config, bf16=True).process_batch(tokens)
        assert rounded.lm_loss.item() == pytest.approx(exact.lm_loss.item(), rel=1e-2)
        assert not torch.equal(rounded.lm_loss, exact.lm_loss)
        mc = MCController(config, bf16=True)
        assert 0 <= float(mc.held_out_agreement(tokens)) <= 1
