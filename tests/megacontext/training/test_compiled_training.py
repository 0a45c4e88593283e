"""Training under torch.compile: losses as in eager, no recompile, CUDA graphs, no work-arounds.

`benchmarks/gpu_smoke.py` is the long form of this.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.megacontext.conftest import small_settings, weights
from torch import Tensor, nn
from torch._dynamo.utils import counters

from megacontext import MCConfig, MCController, TrainConfig, train
from megacontext.training.optimization import new_optimizer, own_gradients, update
from megacontext.training.run_folder import RunFolder
from megacontext.training.train_result import StepReport

# Importing inductor, and tracing, warn of torch's own old ways.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning:torch", "ignore:The .grad attribute"
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


@pytest.fixture
def settings() -> TrainConfig:
    return small_settings(
        lm_steps=2, lm_batch_size=3, accumulation=2, log_interval=1, checkpoint_interval=50
    )


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace, guard and differentiate as ever, but leave out a minute of C++ compiler."""
    compile_module = nn.Module.compile

    def traced(module: nn.Module, *, dynamic: bool, mode: str = "default") -> None:
        compile_module(module, backend="aot_eager", dynamic=dynamic)

    monkeypatch.setattr(nn.Module, "compile", traced)


def assert_rows_are_close(first: Path, second: Path) -> None:
    """Every loss of every logged step to 1e-3; of agreement, one pair that is a tie may differ."""
    for one, other in zip(
        RunFolder(first).read_metrics(), RunFolder(second).read_metrics(), strict=True
    ):
        assert one.keys() == other.keys()
        for name in ("loss", "lm_loss", "lens_loss", "validation_loss"):
            assert one[name] == pytest.approx(other[name], rel=1e-3)


@pytest.mark.usefixtures("without_inductor")
class TestTraining:
    def test_nothing_is_compiled_again_after_the_first_step(
        self, tmp_path: Path, model: MCConfig, settings: TrainConfig
    ) -> None:
        """Language model alone, micro-steps, validations: each network once for each, no more."""
        compiled: list[int] = []

        def forbid_more(report: StepReport) -> None:
            compiled.append(counters["stats"]["unique_graphs"])
            if report.phase == "training":  # after a step and a validation
                torch.compiler.set_stance("fail_on_recompile")

        settings = dataclasses.replace(settings, compile=True)
        train(tmp_path / "compiled", model, settings, report=forbid_more)
        # The language model alone; then it in training and two validations, and GistNet and
        # LensNet in training and one. Torch's limit is 8 for each network.
        assert compiled[0] == 1
        assert set(compiled[2:]) == {1 + 3 + 2 + 2}
        assert dict(counters["graph_break"]) == {}
        train(tmp_path / "eager", model, dataclasses.replace(settings, compile=False))
        assert_rows_are_close(tmp_path / "compiled", tmp_path / "eager")
        # And the checkpoint does not tell: the names of the weights are plain.
        assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "eager").keys()

    def test_in_bfloat16(
        self,
        tmp_path: Path,
        model: MCConfig,
        settings: TrainConfig,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Both at once, as on a GPU, without a recompile."""
        settings = dataclasses.replace(settings, compile=True, bf16=True, lm_steps=0, steps=3)
        autocast: list[bool] = []
        language_model = MCController.logits

        def noting(mc: MCController, *args: Any) -> Tensor:
            with mc.autocast():
                autocast.append(torch.is_autocast_enabled("cpu"))
            return language_model(mc, *args)

        monkeypatch.setattr(MCController, "logits", noting)
        stance = iter([lambda: torch.compiler.set_stance("fail_on_recompile")])
        train(tmp_path / "run", model, settings, report=lambda _: next(stance, lambda: None)())
        assert set(autocast) == {True}
        assert all((row["loss"] or 99) < 9 for row in RunFolder(tmp_path / "run").read_metrics())


class TestModes:
    def test_who_gets_cuda_graphs(self, mc: MCController, monkeypatch: pytest.MonkeyPatch) -> None:
        """LensNet and GistNet; nobody gets dynamic shapes."""
        asked: dict[str, dict[str, Any]] = {}

        def note(module: nn.Module, **options: Any) -> None:
            asked[type(module).__name__] = options

        monkeypatch.setattr(nn.Module, "compile", note)
        mc.compile_networks()
        assert sorted(o.get("mode", "default") for o in asked.values()) == [
            "default",
            "reduce-overhead",
            "reduce-overhead",
        ]
        assert asked["LanguageModel"] == {"dynamic": False}
        assert asked["GistNet"] == {"mode": "reduce-overhead", "dynamic": False}


class TestInductor:
    def test_it_gives_the_gradients_of_eager(self, config: MCConfig, tokens: Tensor) -> None:
        """What is compiled for this machine, over two micro-steps that add up.

        In float32 both round differently: losses agree to 1e-4, gradients to 1e-3 of their norm.
        """
        results = []
        for compiled in (False, True):
            mc = MCController(config)
            own_gradients(mc.parameters())
            if compiled:
                mc.compile_networks()
            losses = []
            for micro_step in range(2):
                result = mc.process_batch(tokens, micro_step=micro_step)
                result.loss.backward()
                losses.append(result.loss.detach())
                assert (mc.guard.calls[-1].compiled is not None) == compiled
            results.append((torch.stack(losses), [p.grad for p in mc.parameters()]))
        (eager, gradients), (inductor, found) = results
        torch.testing.assert_close(inductor, eager, rtol=1e-4, atol=1e-4)
        for expected, gradient in zip(gradients, found, strict=True):
            assert expected is not None
            assert gradient is not None
            assert (gradient - expected).norm() <= 1e-3 * expected.norm() + 1e-5


class TestGradientBuffers:
    """Under CUDA graphs the first backward's output must not become the gradient."""

    @pytest.mark.parametrize("lm_steps", [0, 2])
    def test_backward_adds_to_the_trainers_own_buffers(
        self,
        tmp_path: Path,
        model: MCConfig,
        settings: TrainConfig,
        monkeypatch: pytest.MonkeyPatch,
        lm_steps: int,
    ) -> None:
        """From the very first micro-step on they are the same tensors, at the same addresses."""
        before: list[list[int | None]] = []
        process_batch = MCController.process_batch

        def noting(mc: MCController, *args: Any, **options: Any) -> Any:
            before.append([None if p.grad is None else p.grad.data_ptr() for p in mc.parameters()])
            return process_batch(mc, *args, **options)

        monkeypatch.setattr(MCController, "process_batch", noting)
        train(tmp_path / "run", model, dataclasses.replace(settings, lm_steps=lm_steps))
        assert len(before) == 12
        assert None not in before[0]
        assert all(pointers == before[0] for pointers in before)

    def test_the_first_backward_adds_in_place(self, mc: MCController, tokens: Tensor) -> None:
        """Zeros plus the gradient: its value is the same, its memory the trainer's."""
        mc.process_batch(tokens).loss.backward()
        expected = [p.grad for p in mc.parameters()]
        again = MCController(mc.config)
        own_gradients(again.parameters())
        buffers = [p.grad for p in again.parameters()]
        again.process_batch(tokens).loss.backward()
        for parameter, buffer, gradient in zip(again.parameters(), buffers, expected, strict=True):
            assert parameter.grad is buffer
            torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0)

    def test_a_step_zeroes_them_and_keeps_them(self) -> None:
        """And a parameter without one is left alone: no weight decay while it is not trained."""
        trained, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        optimizer = new_optimizer([([trained, other], 0.1)])
        own_gradients([trained])
        buffer = trained.grad
        trained.sum().backward()
        update(optimizer, rate=0.5, clip_norm=1.0)
        assert trained.grad is buffer
        assert trained.grad.eq(0).all()
        assert (trained < 0.96).all()
        assert other.grad is None
        assert other.eq(1).all()
        assert [group["lr"] for group in optimizer.param_groups] == [0.05]
        assert optimizer.defaults["fused"] is True


class OneMemory:
    """What CUDA graphs do to outputs of GistNet and LensNet, at its worst and on any machine.

    Each call that no backward is pending for turns all that both have given out so far to nan.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given_out: list[Tensor] = []
        self.pending = False
        self.overwritten = 0
        backward = torch.autograd.backward

        def noting(*args: Any) -> None:
            backward(*args)
            self.pending = False

        monkeypatch.setattr(torch.autograd, "backward", noting)
        monkeypatch.setattr(MCController, "compile_networks", lambda mc: self.install(mc))

    def install(self, mc: MCController) -> None:
        for network in (mc.gistnet, mc.lensnet):
            network.register_forward_pre_hook(self.begin)
            network.register_forward_hook(self.end)

    def begin(self, *_: object) -> None:
        if not self.pending:
            for output in self.given_out:
                output.data.fill_(float("nan"))
            self.overwritten += len(self.given_out)
            self.given_out.clear()

    def end(self, _: object, __: object, output: Tensor) -> None:
        self.given_out.append(output)
        self.pending |= torch.is_grad_enabled()


def test_nothing_reads_what_a_later_call_has_overwritten(
    tmp_path: Path, model: MCConfig, settings: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In micro-steps and validations: the numbers are those of outputs that live for ever."""
    train(tmp_path / "plain", model, settings)
    memory = OneMemory(monkeypatch)
    train(tmp_path / "run", model, dataclasses.replace(settings, compile=True))
    assert memory.overwritten > 30
    metrics = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("plain", "run")]
    assert metrics[0] == metrics[1]
    assert "nan" not in metrics[0].lower()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnCuda:
    """Real CUDA graphs."""

    @pytest.mark.filterwarnings("error::lensnet_guard.LensNetHazard")
    def test_training_equals_eager(
        self, tmp_path: Path, model: MCConfig, settings: TrainConfig
    ) -> None:
        """With accumulation and validations in between; no graph is skipped, none recompiled."""
        settings = dataclasses.replace(settings, device="cuda", steps=12)
        train(tmp_path / "eager", model, settings)

        def forbid_more(report: StepReport) -> None:
            if report.phase == "training":
                torch.compiler.set_stance("fail_on_recompile")

        train(
            tmp_path / "compiled",
            model,
            dataclasses.replace(settings, compile=True),
            report=forbid_more,
        )
        assert counters["inductor"]["cudagraph_skips"] == 0
        assert_rows_are_close(tmp_path / "compiled", tmp_path / "eager")

    def test_micro_steps_are_replayed(self, config: MCConfig, tokens: Tensor) -> None:
        """After warm-up and recording LensNet's calls are replays, validations in between or not.

        And what accumulates is the sum of the micro-steps' gradients, as in eager.
        """
        gradients = []
        for compiled in (False, True):
            mc = MCController(config).cuda()
            own_gradients(mc.parameters())
            if compiled:
                mc.compile_networks()
            for step in range(6):
                for p in mc.parameters():
                    assert p.grad is not None
                    p.grad.zero_()
                mc.allocator = config.new_allocator()  # the same variants in every step
                for micro_step in range(2):
                    result = mc.process_batch(tokens.cuda(), step=step, micro_step=micro_step)
                    result.loss.backward()
                mc.held_out_agreement(tokens.cuda())
            gradients.append([p.grad for p in mc.parameters()])
        phases = [c.compiled.phase for c in mc.guard.calls if c.compiled is not None]
        assert phases[-3:] == ["replay"] * 3
        for eager, found in zip(*gradients, strict=True):
            assert eager is not None
            assert found is not None
            assert (found - eager).norm() <= 1e-2 * eager.norm() + 1e-4
