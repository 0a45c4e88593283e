"""One run on several processes: real ones, started by torchrun."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from tests.megacontext.conftest import SMALL, TEXT, arguments, small_settings, weights
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from megacontext import MCConfig, MCController, TrainConfig
from megacontext.training.distributed import DataParallel, World, device_name
from megacontext.training.run_folder import RunFolder
from megacontext.training.sources import load_source
from megacontext.training.trainer import Trainer

RUN = arguments(
    **{name: size for name, size in SMALL.items() if name != "vocab_size"}
    | {"lm_layers": 2, "train_wc_length": 54, "text": TEXT[0], "lm_steps": 4, "steps": 6}
    | {"log_interval": 2, "checkpoint_interval": 3, "batch_size": 3, "accumulation": 4}
)


def megacontext_train(
    run_dir: Path, options: list[str], *, processes: int = 1, code: int = 0
) -> "subprocess.CompletedProcess[str]":
    """The command, as a user runs it."""
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", f"--nproc-per-node={processes}", "-m"]
    done = subprocess.run(
        [*command, "megacontext", "train", "--run-dir", str(run_dir), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that one process makes."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    megacontext_train(run_dir, RUN)
    return run_dir


class TestSameRun:
    @pytest.mark.parametrize("how", [[], ["--shard"]], ids=["ddp", "fsdp2"])
    def test_two_processes_make_the_run_that_one_makes(
        self, tmp_path: Path, alone: Path, how: list[str]
    ) -> None:
        """Metrics of every logged step and the weights at the end; float32 sums in another order.

        Two micro-steps for each process, of which the first one's gradients do not travel.
        """
        run_dir = tmp_path / "run"
        done = megacontext_train(run_dir, [*RUN, *how], processes=2)
        assert "24 micro-steps, 24 LensNet calls, 0 violations" in done.stdout
        assert done.stdout.count("held-out loss") == 1, "the first process alone tells"
        assert "lensnet.rank0.jsonl lensnet.rank1.jsonl" in done.stdout
        assert "warn" not in done.stderr.lower()
        ours, theirs = (RunFolder(path).read_metrics() for path in (run_dir, alone))
        assert ours == [pytest.approx(row, rel=1e-4, abs=1e-4) for row in theirs]
        for name, tensor in weights(alone).items():
            torch.testing.assert_close(weights(run_dir)[name], tensor, rtol=1e-3, atol=1e-4)
        steps = [
            (line["step"], line["micro_step"])
            for line in map(json.loads, (run_dir / "lensnet.rank1.jsonl").read_text().splitlines())
            if line["event"] == "micro_step.end"
        ]
        assert steps == [(step, micro_step) for step in range(6) for micro_step in range(2)]

    def test_a_run_goes_on_with_another_number_of_processes(
        self, tmp_path: Path, alone: Path
    ) -> None:
        """Two sharded processes end after step 4, one goes on from step 3, to the same weights."""
        run_dir = tmp_path / "run"
        saved = json.loads((alone / "config.json").read_text())
        script = tmp_path / "stopped.py"
        script.write_text(
            f"""
from megacontext import MCConfig, TrainConfig, train

def stop(report):
    if report.phase == "training" and report.step == 4:
        raise SystemExit("enough")

settings = TrainConfig.from_json({saved["train"] | {"shard": True}!r})
train({str(run_dir)!r}, MCConfig.from_json({saved["model"]!r}), settings, report=stop)
"""
        )
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
        done = subprocess.run(
            [*command, str(script)], capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 1
        assert "rank 1 ends, because rank 0 stopped: SystemExit: enough" in done.stderr
        (run_dir / "config.json").write_text(json.dumps(saved))  # without shard
        # Which torchrun may have ended before its last line; no rank 1 will take its place.
        (run_dir / "lensnet.rank1.jsonl").unlink()
        megacontext_train(run_dir, ["--resume"])
        for name, tensor in weights(alone).items():
            torch.testing.assert_close(weights(run_dir)[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """torch.distributed with this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
class TestAddingUp:
    """Gradients of all micro-steps but the last stay where they are."""

    def test_ddp(self, mc: MCController, tokens: Tensor) -> None:
        """By no_sync, which holds in forward and backward, and ends with the micro-step."""
        call = DataParallel(mc, World(0, 2), shard=False)
        call.train(mc)
        synced = []
        for last in (False, True):
            with call.adding_up(last=last):
                synced.append(call._module.require_backward_grad_sync)
                torch.autograd.backward(call(mc.process_batch, tokens).loss)
        assert synced == [False, True]

    def test_a_validation_let_the_next_gradients_travel(
        self, tmp_path: Path, model: MCConfig
    ) -> None:
        """DDP prepares for the backward of every forward with gradients, and none came."""
        settings = small_settings()
        source = load_source(settings, model)
        folder = RunFolder(tmp_path / "run")
        trainer = Trainer(model, settings, source, folder, torch.device("cpu"), World(0, 2))
        trainer.call.train(trainer.mc)
        ddp = trainer.call._module
        prepared: list[bool] = []
        ddp.reducer = Mock(wraps=ddp.reducer, prepare_for_backward=lambda *_: prepared.append(True))
        trainer.validation_loss()
        trainer.validation_agreement()
        assert prepared == []

    def test_fsdp2(self, mc: MCController, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is told before each micro-step."""
        told: list[bool] = []
        tell = FSDPModule.set_requires_gradient_sync
        monkeypatch.setattr(
            FSDPModule,
            "set_requires_gradient_sync",
            lambda module, last: (told.append(last), tell(module, last)),
        )
        call = DataParallel(mc, World(0, 2), shard=True)
        for last in (False, True):
            with call.adding_up(last=last):
                torch.autograd.backward(call(mc.process_batch, tokens).loss)
        assert told == [False, True]
        assert all(isinstance(parameter.grad, DTensor) for parameter in mc.parameters())

    def test_the_language_model_alone_waits_for_no_other_network(
        self, mc: MCController, tokens: Tensor
    ) -> None:
        """DDP would wait for gradients of LensNet, which there are none of."""
        call = DataParallel(mc, World(0, 2), shard=False)
        call.train(mc.language_model)
        for _ in range(2):  # the second forward complains of what the first backward left out
            torch.autograd.backward(call(mc.full_detail_loss, tokens))
        assert all(parameter.grad is None for parameter in mc.lensnet.parameters())


class TestRefusals:
    def test_what_cannot_be_shared_is_refused_before_anything_is_written(
        self, tmp_path: Path
    ) -> None:
        """By every process, without a traceback; nobody waits for anybody."""
        done = megacontext_train(
            tmp_path / "run", [*RUN, "--accumulation", "3"], processes=2, code=1
        )
        assert "Error: accumulation is 3, which 2 processes cannot share equally; make it a" in (
            re.sub(r"\s+", " ", done.stderr)
        )
        assert re.search(r'File ".*megacontext/.*\.py"', done.stderr) is None
        assert not (tmp_path / "run").exists()

    def test_a_folder_with_a_run_is_refused(self, alone: Path) -> None:
        """As by one process."""
        before = (alone / "checkpoint.pt").read_bytes()
        done = megacontext_train(alone, RUN, processes=2, code=1)
        assert "holds a run already" in re.sub(r"\s+", " ", done.stderr)
        assert (alone / "checkpoint.pt").read_bytes() == before

    def test_one_cuda_device_for_several(self) -> None:
        """Each has one of its own."""
        with pytest.raises(ValueError, match="2 processes cannot share cuda:0: give the device as"):
            World(0, 2).check(TrainConfig(device="cuda:0", accumulation=2))

    def test_shard_alone(self) -> None:
        """It says how several processes are started."""
        with pytest.raises(ValueError, match=r"shard needs more than one process: start them with"):
            World().check(TrainConfig(shard=True))

    def test_shares_of_the_language_models_batches(self) -> None:
        """Only where it is trained alone."""
        World(0, 3).check(TrainConfig(accumulation=3))
        with pytest.raises(ValueError, match="lm_batch_size is 32, which 3 processes cannot"):
            World(0, 3).check(TrainConfig(accumulation=3, lm_steps=1))

    def test_compile_and_shard(self) -> None:
        """They exclude each other."""
        with pytest.raises(ValueError, match="compile and shard cannot be combined"):
            TrainConfig(compile=True, shard=True)


class TestDevices:
    def test_each_process_has_the_device_that_torchrun_means(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Unless the user names one."""
        assert device_name("cuda") == "cuda"
        monkeypatch.setenv("LOCAL_RANK", "3")
        assert device_name("cuda") == "cuda:3"
        assert device_name("cuda:1") == "cuda:1"
        assert device_name("cpu") == "cpu"
