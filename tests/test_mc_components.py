"""The plan's regression suite: in training, LensNet runs once per micro-step, and nowhere else."""

import ast
import contextlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from tests.megacontext.conftest import SMALL
from torch import Tensor

import megacontext
from lensnet_guard import (
    BudgetExceeded,
    CallRecord,
    ContextSwitchRefused,
    Guard,
    NoContext,
    UnsanctionedCall,
)
from megacontext import MCConfig, MCController, SessionConfig, TrainingWCVariationAllocator
from megacontext.inference.session import Session

AssertCalls = Callable[..., AbstractContextManager[Sequence[CallRecord]]]

CONFIG = MCConfig(**SMALL)


@pytest.fixture
def mc() -> MCController:
    return MCController(CONFIG)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 64, (3, 96), generator=torch.Generator().manual_seed(0))


def score_a_variant(mc: MCController, tokens: Tensor) -> Tensor:
    """What the old allocator did: ask LensNet about a working context."""
    wc = mc.build_variants(mc.build_tree(tokens)).working_context
    scores: Tensor = mc.lensnet(wc.embeddings, wc.starts, wc.spans, wc.lods)
    return scores


@pytest.fixture
def forwards(mc: MCController) -> list[int]:
    """Grows whenever LensNet's forward really runs: the module's own word, not the guard's."""
    ran: list[int] = []
    mc.lensnet.register_forward_pre_hook(lambda *_: ran.append(1))
    return ran


class TestVariantsNeverScore:
    def test_variants_built_in_training_invoke_lensnet_zero_times(
        self, mc: MCController, tokens: Tensor, assert_lensnet_calls: AssertCalls
    ) -> None:
        """Tree, baseline and random variants, by the training allocator alone."""
        with mc.context("training"), assert_lensnet_calls(n=0):
            for _ in range(5):
                mc.build_variants(mc.build_tree(tokens))

    def test_the_collapse_hits_the_exact_target_without_lensnet(
        self, mc: MCController, assert_lensnet_calls: AssertCalls
    ) -> None:
        """100 seeds of the controller's one way to the training allocator."""
        with mc.context("training"), assert_lensnet_calls(n=0):
            for _ in range(100):
                cut = mc._collapse_wc_randomly(96)
                assert len(cut) == CONFIG.train_wc_length
                cut.check(0, 96, recent_tokens=CONFIG.recent_tokens)

    def test_the_training_allocator_has_no_handle_on_lensnet(self) -> None:
        """It is made of integers: no argument and no attribute can hold a network."""
        parameters = inspect.signature(TrainingWCVariationAllocator).parameters
        assert set(parameters) == {
            "block_size",
            "max_lod",
            "lod2_probability",
            "recent_tokens",
            "seed",
        }
        held = vars(TrainingWCVariationAllocator()).values()
        assert not any(isinstance(value, torch.nn.Module) for value in held)

    def test_the_target_is_hit_where_the_public_implementation_never_did(self) -> None:
        """DESIGN's mistake: 200 of 200 seeds missed when (N - W) mod (K - 1) was not zero."""
        for num_tokens in range(80, 97):
            mc = MCController(CONFIG)
            tokens = torch.zeros(1, num_tokens, dtype=torch.int64)
            context = mc.build_variants(mc.build_tree(tokens)).working_context
            assert context.starts.shape[1] == CONFIG.train_wc_length
            assert context.pad_mask is None


class TestOneCallPerMicroStep:
    def test_one_process_batch_invokes_lensnet_exactly_once(
        self,
        mc: MCController,
        tokens: Tensor,
        assert_lensnet_calls: AssertCalls,
        forwards: list[int],
    ) -> None:
        """As one batch for all sequences, in the sanctioned scope."""
        with mc.context("training"), assert_lensnet_calls(n=1) as calls:
            mc.process_batch(tokens, step=7, micro_step=2)
        (call,) = calls
        assert (call.context, call.scope) == ("training", "preference_scorer")
        assert (call.step, call.micro_step, call.verdict) == (7, 2, "allow")
        assert call.inputs[0].startswith("float32[3, ")
        assert call.caller.function.endswith("MCController.learn_preferences")
        assert forwards == [1]  # the module's own word for it

    def test_a_training_loop_calls_once_per_micro_step(
        self,
        mc: MCController,
        tokens: Tensor,
        assert_lensnet_calls: AssertCalls,
        lensnet_guard: Callable[..., Guard],
    ) -> None:
        """With gradient accumulation, backward and optimizer steps."""
        optimizer = torch.optim.AdamW(mc.parameters())
        guard = lensnet_guard(mc)
        expected = assert_lensnet_calls(n=6, context="training", scope="preference_scorer")
        with mc.context("training"), expected as calls, assert_lensnet_calls(n=6):
            for step in range(3):
                for micro_step in range(2):
                    with assert_lensnet_calls(n=1, guard=guard):
                        result = mc.process_batch(tokens, step=step, micro_step=micro_step)
                        result.loss.backward()
                    assert result.metrics["lensnet_calls"] == 1
                optimizer.step()
                optimizer.zero_grad()
        assert [(c.step, c.micro_step) for c in calls] == [
            (step, micro_step) for step in range(3) for micro_step in range(2)
        ]
        assert guard.violations == ()

    def test_process_batch_declares_training_when_nobody_has(
        self, mc: MCController, tokens: Tensor, assert_lensnet_calls: AssertCalls
    ) -> None:
        """And leaves the context as it found it."""
        with assert_lensnet_calls(n=1, context="training"):
            mc.process_batch(tokens)
        assert mc.guard.current_context is None

    @pytest.mark.lensnet_calls(exact=1)
    def test_lensnet_is_trained(self, mc: MCController, tokens: Tensor) -> None:
        """DESIGN's mistake: the invariant was 'fixed' by a constant zero loss without LensNet."""
        result = mc.process_batch(tokens)
        result.loss.backward()
        gradients = {n: p.grad for n, p in mc.lensnet.named_parameters()}
        assert all(g is not None and g.isfinite().all() for g in gradients.values())
        assert sum(float(g.norm()) for g in gradients.values() if g is not None) > 0
        assert float(result.metrics["lens_loss"]) > 0

    def test_descent_on_the_lens_loss_raises_agreement(
        self, mc: MCController, tokens: Tensor
    ) -> None:
        """On one fixed set of variants LensNet learns to order the pairs as their losses do."""
        optimizer = torch.optim.AdamW(mc.lensnet.parameters(), lr=3e-3)
        state = mc.allocator.drawn
        agreement = []
        for _ in range(60):
            mc.allocator.drawn = state
            result = mc.process_batch(tokens)
            optimizer.zero_grad()
            result.lens_loss.backward()
            optimizer.step()
            agreement.append(float(result.metrics["preference_agreement"]))
        assert agreement[-1] > max(agreement[0], 0.85)


class TestAnyOtherTrainingCallIsRefused:
    def test_a_call_from_an_allocator_helper_raises_and_does_not_run(
        self, mc: MCController, tokens: Tensor, forwards: list[int]
    ) -> None:
        """DESIGN's mistake: the refusal came after the forward had run."""
        with mc.context("training"), pytest.raises(UnsanctionedCall) as raised:
            score_a_variant(mc, tokens)
        assert raised.value.record.caller.function == "score_a_variant"
        assert forwards == []

    def test_a_direct_call_is_counted_and_refused(
        self, mc: MCController, tokens: Tensor, lensnet_calls: Sequence[CallRecord]
    ) -> None:
        """DESIGN's mistake: controller.lensnet(wc) was neither."""
        mc.process_batch(tokens)
        with pytest.raises(NoContext):
            score_a_variant(mc, tokens)
        assert [call.verdict for call in lensnet_calls] == ["allow", "refuse"]

    def test_a_second_call_inside_the_step_breaks_the_step(
        self,
        mc: MCController,
        tokens: Tensor,
        assert_lensnet_calls: AssertCalls,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A helper that process_batch calls while the micro-step is open."""
        build_variants = MCController.build_variants

        def scoring_helper(self: MCController, tree: megacontext.MegaContextTree) -> object:
            variants = build_variants(self, tree)
            wc = variants.working_context
            self.lensnet(wc.embeddings, wc.starts, wc.spans, wc.lods)
            return variants

        monkeypatch.setattr(MCController, "build_variants", scoring_helper)
        with pytest.raises(UnsanctionedCall) as raised, assert_lensnet_calls(n=1) as calls:
            mc.process_batch(tokens, step=4)
        assert raised.value.record.step == 4
        assert raised.value.record.caller.function.endswith("scoring_helper")
        assert [call.verdict for call in calls] == ["refuse"]

    def test_a_helper_that_hides_its_call_still_breaks_the_step(
        self,
        mc: MCController,
        tokens: Tensor,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """`except Exception: pass` around it does not help: the micro-step raises at its end."""
        build_variants = MCController.build_variants

        def hiding_helper(self: MCController, tree: megacontext.MegaContextTree) -> object:
            variants = build_variants(self, tree)
            wc = variants.working_context
            with contextlib.suppress(Exception):  # the bug under test
                self.lensnet(wc.embeddings, wc.starts, wc.spans, wc.lods)
            with contextlib.suppress(Exception), self.context("inference"):  # and a cleverer one
                self.lensnet(wc.embeddings, wc.starts, wc.spans, wc.lods)
            return variants

        monkeypatch.setattr(MCController, "build_variants", hiding_helper)
        with pytest.raises(UnsanctionedCall):
            mc.process_batch(tokens)
        reasons = [record.reason for record in mc.guard.violations]
        assert reasons == [UnsanctionedCall.__name__, ContextSwitchRefused.__name__]

    def test_scoring_twice_in_the_scope_exceeds_the_budget(
        self, mc: MCController, tokens: Tensor
    ) -> None:
        """One batch, not one call per variant."""
        wc = mc.build_variants(mc.build_tree(tokens)).working_context

        def score_each() -> None:
            with mc.context("training"), mc.guard.sanctioned("preference_scorer"):
                for _ in range(2):
                    mc.lensnet(wc.embeddings, wc.starts, wc.spans, wc.lods)

        with pytest.raises(BudgetExceeded):
            score_each()


class TestInference:
    def test_inference_runs_lensnet_through_the_allocator(
        self,
        mc: MCController,
        tokens: Tensor,
        assert_lensnet_calls: AssertCalls,
        forwards: list[int],
    ) -> None:
        """The plan's last test; the guard's records say who called, and in which context."""
        expected = assert_lensnet_calls(n=4, context="inference")
        with expected as calls:
            mc.begin_inference_session(tokens[0], settings=SessionConfig(refocus_interval=8))
            mc.inference_step(tokens[1, :16])
        assert mc.inference_report().lensnet_calls == len(forwards) == 4
        for call in calls:
            assert call.caller.file.endswith("megacontext/inference/focus.py")
            assert call.caller.function.endswith("FocusAllocator.refocus")
            assert (call.scope, call.verdict) == (None, "allow")
        assert mc.guard.current_context is None

    def test_the_focus_allocator_is_refused_in_training(
        self, mc: MCController, tokens: Tensor, assert_lensnet_calls: AssertCalls
    ) -> None:
        """A session that exists already too: LensNet is not even asked."""
        mc.begin_inference_session(tokens[0])
        with mc.context("training"), assert_lensnet_calls(n=0):
            with pytest.raises(RuntimeError, match="cannot be used in training context"):
                mc.inference_step(tokens[1])
            with pytest.raises(RuntimeError, match="cannot be used in training context"):
                mc.begin_inference_session(tokens[1])
            with pytest.raises(RuntimeError, match="made in training context"):
                Session(mc, SessionConfig())


class TestCodeBase:
    """What the sources themselves say."""

    sources = sorted(Path(megacontext.__file__).parent.rglob("*.py"))

    def test_the_only_training_call_in_the_code_base_is_the_scorers(self) -> None:
        """`lensnet(...)` stands once in `with self.guard.sanctioned(...)`, else in inference."""
        calls = {
            (path.name, node.lineno)
            for path in self.sources
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "lensnet"
        }
        (scope,) = self.inside("guard.sanctioned(")
        inference = set().union(*self.inside("context('inference')"))
        (training,) = calls - inference
        assert training[0] == "controller.py"
        assert training in scope

    def inside(self, opened: str) -> list[set[tuple[str, int]]]:
        """The lines of every with statement that opens this."""
        return [
            {(path.name, line) for line in range(node.lineno, (node.end_lineno or 0) + 1)}
            for path in self.sources
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.With) and any(opened in ast.unparse(i) for i in node.items)
        ]

    def test_no_cudagraph_work_arounds(self) -> None:
        """No cudagraph_mark_step_begin, no defensive clone, no compiler escape hatch."""
        names = {
            node.attr
            for path in self.sources
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute)
        }
        assert len(self.sources) > 15
        assert not names & {"cudagraph_mark_step_begin", "clone", "compiler", "disable"}
