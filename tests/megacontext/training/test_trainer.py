"""The trainer: real runs on real text; resumed runs continue bit by bit; kills lose nothing."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.megacontext.conftest import TEXT, checkpoint, weights

from lensnet_guard import UnsanctionedCall
from lensnet_guard.postmortem import read_verdict
from megacontext import MCConfig, MCController, TrainConfig, train
from megacontext.training.optimization import update
from megacontext.training.run_folder import RunFolder
from megacontext.training.train_result import StepReport, TrainingStopped


class TestRun:
    def test_the_run_folder_is_complete(
        self, tmp_path: Path, model: MCConfig, settings: TrainConfig
    ) -> None:
        """Configuration, metrics, log, checkpoint, picture, lock; and nothing else."""
        result = train(tmp_path / "run", model, settings)
        assert sorted(path.name for path in result.run_dir.iterdir()) == [
            "checkpoint.pt",
            "config.json",
            "lensnet.rank0.jsonl",
            "lock",
            "metrics.jsonl",
            "overview.png",
        ]
        assert (result.run_dir / "overview.png").read_bytes().startswith(b"\x89PNG")
        rows = RunFolder(result.run_dir).read_metrics()
        assert [row["step"] for row in rows] == [2, 4, 6]
        assert all(row["lensnet_calls"] == 1 for row in rows)

    def test_validation_asks_lensnet_about_the_same_sequences_every_time(
        self,
        tmp_path: Path,
        model: MCConfig,
        settings: TrainConfig,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Held-out ones; what is undefined is null in the metrics."""
        asked: list[torch.Tensor] = []

        def undefined(self: MCController, tokens: torch.Tensor, labelled: None) -> torch.Tensor:
            asked.append(tokens)
            return torch.tensor(float("nan") if len(asked) == 2 else 0.75)

        monkeypatch.setattr(MCController, "held_out_agreement", undefined)
        train(tmp_path / "run", model, settings)
        rows = RunFolder(tmp_path / "run").read_metrics()
        assert [row["validation_agreement"] for row in rows] == [0.75, None, 0.75]
        assert asked[0].shape == (16, model.sequence_tokens)
        assert all(tokens.equal(asked[0]) for tokens in asked)

    def test_how_often_it_is_validated_changes_nothing(
        self, tmp_path: Path, model: MCConfig, settings: TrainConfig
    ) -> None:
        """Validation draws from no random sequence of the training."""
        often = dataclasses.replace(settings, log_interval=1)
        train(tmp_path / "often", model, often)
        train(tmp_path / "seldom", model, settings)
        first, second = weights(tmp_path / "often"), weights(tmp_path / "seldom")
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_the_verdict_is_computed_from_the_log_file(
        self, tmp_path: Path, model: MCConfig, settings: TrainConfig
    ) -> None:
        """A line that is taken out of the log is missing from the verdict."""
        result = train(tmp_path / "run", model, settings)
        assert str(result.verdict) == (
            "12 micro-steps, 12 LensNet calls, 0 violations; 3 inference calls"
        )
        assert result.verdict.clean
        assert result.verdict.calls_per_micro_step == (1,) * 12
        log = result.run_dir / "lensnet.rank0.jsonl"
        lines = log.read_text().splitlines(keepends=True)
        lines.remove(next(line for line in lines if '"call.begin"' in line))
        log.write_text("".join(lines))
        assert str(read_verdict(result.run_dir)).startswith("12 micro-steps, 11 LensNet calls")

    def test_it_learns(self, tmp_path: Path, model: MCConfig) -> None:
        """The loss on held-out text falls well below that of an untrained model."""
        result = train(tmp_path / "run", model, TrainConfig(text=TEXT, steps=40, log_interval=10))
        losses = [row["validation_loss"] for row in RunFolder(result.run_dir).read_metrics()]
        assert None not in losses
        assert result.validation_loss == losses[-1]
        assert losses[-1] < losses[0] - 1  # type: ignore[operator]


class TestResume:
    def test_a_resumed_run_continues_bit_by_bit(
        self,
        tmp_path: Path,
        model: MCConfig,
        settings: TrainConfig,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Cut off after step 4 with the checkpoint of step 3: same weights, same metrics."""
        whole = train(tmp_path / "whole", model, settings)
        process_batch = MCController.process_batch
        calls = iter(range(100))

        def dies(self: MCController, *args: object, **kwargs: object) -> object:
            if next(calls) == 9:
                raise KeyboardInterrupt
            return process_batch(self, *args, **kwargs)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(MCController, "process_batch", dies)
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / "cut", model, settings)
        assert [row["step"] for row in RunFolder(tmp_path / "cut").read_metrics()] == [2, 4]
        resumed = train(tmp_path / "cut", resume=True)
        first, second = weights(whole.run_dir), weights(resumed.run_dir)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        metrics = [(d / "metrics.jsonl").read_text() for d in (whole.run_dir, resumed.run_dir)]
        assert metrics[0] == metrics[1]

    def test_a_killed_run_resumes(self, tmp_path: Path) -> None:
        """SIGKILL in the middle: the log is readable, the checkpoint whole, the end the same."""
        options = "--steps 40 --batch-size 2 --accumulation 1 --d-model 16 --lm-layers 1"
        command = [sys.executable, "-m", "megacontext", "train", "--text", *TEXT, *options.split()]
        command += ["--checkpoint-interval", "5", "--log-interval", "5", "--run-dir"]
        victim = subprocess.Popen([*command, str(tmp_path / "cut")], stdout=subprocess.DEVNULL)
        folder = RunFolder(tmp_path / "cut")
        while len(folder.read_metrics()) < 2 and victim.poll() is None:
            time.sleep(0.02)
        os.kill(victim.pid, signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL
        at_death = read_verdict(folder.path)
        assert at_death.calls == at_death.micro_steps >= 10
        assert at_death.violations == 0
        assert not at_death.ended
        resume = [sys.executable, "-m", "megacontext", "train", "--run-dir", str(folder.path)]
        subprocess.run([*resume, "--resume"], check=True, stdout=subprocess.DEVNULL)
        at_end = read_verdict(folder.path)
        assert at_end.clean
        assert set(at_end.calls_per_micro_step) == {1}
        subprocess.run([*command, str(tmp_path / "whole")], check=True, stdout=subprocess.DEVNULL)
        first, second = weights(folder.path), weights(tmp_path / "whole")
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_a_finished_run_has_nothing_left_to_do(
        self, tmp_path: Path, model: MCConfig, settings: TrainConfig
    ) -> None:
        """Resuming it gives the same result again."""
        first = train(tmp_path / "run", model, settings)
        again = train(tmp_path / "run", resume=True)
        assert again.metrics == first.metrics
        assert again.verdict.micro_steps == first.verdict.micro_steps

    def test_a_run_begun_before_a_setting_was_there(
        self, tmp_path: Path, model: MCConfig, settings: TrainConfig
    ) -> None:
        """Takes what it is by default."""
        train(tmp_path / "run", model, settings)
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        assert (config["train"].pop("compile"), config["train"].pop("bf16")) == (False, False)
        (tmp_path / "run" / "config.json").write_text(json.dumps(config))
        assert train(tmp_path / "run", resume=True).verdict.clean

    def test_changed_text_is_refused(
        self, tmp_path: Path, model: MCConfig, settings: TrainConfig
    ) -> None:
        """The same run on other data would be another run."""
        train(tmp_path / "run", model, settings)
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        config["source"]["sha256"] = "0" * 64
        (tmp_path / "run" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"the text has changed since .* was begun"):
            train(tmp_path / "run", resume=True)


class TestStop:
    @pytest.mark.parametrize(("asked", "step"), [(1, 0), (2, 1), (5, 4)])
    def test_a_run_that_is_stopped_goes_on_bit_by_bit(
        self, tmp_path: Path, model: MCConfig, settings: TrainConfig, asked: int, step: int
    ) -> None:
        """It has a checkpoint of the step it was stopped after, and its log has an end."""
        answers = iter(range(1, 100))
        with pytest.raises(TrainingStopped) as raised:
            train(tmp_path / "cut", model, settings, stop=lambda: next(answers) >= asked)
        assert str(raised.value) == f"stopped after step {step}, and saved in {tmp_path / 'cut'}"
        state = checkpoint(tmp_path / "cut")
        assert state["step"] == step
        assert read_verdict(tmp_path / "cut").ended
        train(tmp_path / "cut", resume=True)
        train(tmp_path / "whole", model, settings)
        first, second = weights(tmp_path / "cut"), weights(tmp_path / "whole")
        assert all(torch.equal(first[name], second[name]) for name in second)
        rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("cut", "whole")]
        assert rows[0] == rows[1]

    def test_after_the_last_step_there_is_nothing_to_stop(
        self, tmp_path: Path, model: MCConfig, settings: TrainConfig
    ) -> None:
        """The run is whole."""
        answers = iter(range(1, 100))
        result = train(tmp_path / "run", model, settings, stop=lambda: next(answers) > 6)
        assert result.verdict.clean
        assert next(answers) == 8

    def test_while_the_language_model_learns_alone(
        self, tmp_path: Path, model: MCConfig, settings: TrainConfig
    ) -> None:
        """It is saved there."""
        settings = dataclasses.replace(settings, lm_steps=4, lm_batch_size=2)
        answers = iter(range(1, 100))
        with pytest.raises(TrainingStopped, match="stopped after step 2, and saved in"):
            train(tmp_path / "cut", model, settings, stop=lambda: next(answers) == 3)
        state = checkpoint(tmp_path / "cut")
        assert (state["lm_step"], state["step"]) == (2, 0)


class TestLanguageModelAlone:
    def test_lensnet_is_not_called_and_not_trained(
        self, tmp_path: Path, model: MCConfig, settings: TrainConfig
    ) -> None:
        """Neither is GistNet; the language model is, and the invariant counts micro-steps only."""
        untrained = MCController(model).state_dict()
        settings = dataclasses.replace(settings, lm_steps=3, lm_batch_size=2, steps=1)
        seen: list[StepReport] = []
        result = train(tmp_path / "run", model, settings, report=seen.append)
        assert str(result.verdict) == (
            "2 micro-steps, 2 LensNet calls, 0 violations; 1 inference call"
        )
        assert [(r.phase, r.step, r.steps) for r in seen] == [
            ("language model", 2, 3),
            ("language model", 3, 3),
            ("training", 1, 1),
        ]
        assert untrained.keys() == weights(tmp_path / "run").keys()

    def test_a_run_killed_in_it_goes_on_there(
        self, tmp_path: Path, model: MCConfig, settings: TrainConfig
    ) -> None:
        """With equal weights in the end."""
        settings = dataclasses.replace(settings, lm_steps=5, lm_batch_size=2, steps=1)

        def stop(report: StepReport) -> None:
            if report.step == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", model, settings, report=stop)
        saved = checkpoint(tmp_path / "cut")
        assert (saved["lm_step"], saved["step"]) == (3, 0)
        lens = {k: v for k, v in saved["model"].items() if k.startswith("lensnet")}
        untrained = MCController(model).state_dict()
        assert all(v.equal(untrained[k]) for k, v in lens.items())
        train(tmp_path / "cut", resume=True)
        train(tmp_path / "whole", model, settings)
        cut, whole = weights(tmp_path / "cut"), weights(tmp_path / "whole")
        assert all(cut[name].equal(whole[name]) for name in whole)


class TestRecall:
    def test_a_model_that_does_not_fit_is_refused(self, tmp_path: Path, model: MCConfig) -> None:
        """Before the folder is made."""
        settings = TrainConfig(data="recall")
        with pytest.raises(ValueError) as raised:
            train(tmp_path / "run", model, settings)
        assert str(raised.value) == (
            "the answers of recall take 6 tokens, so horizon_tokens must be that, not 8"
        )
        small = dataclasses.replace(model, horizon_tokens=6, vocab_size=40)
        with pytest.raises(ValueError) as raised:
            train(tmp_path / "run", small, settings)
        assert str(raised.value) == (
            "tokens of recall are below 48, so vocab_size must be at least that, not 40"
        )
        short = dataclasses.replace(model, horizon_tokens=6, sequence_tokens=48)
        with pytest.raises(ValueError, match="sequences of 48 tokens have no room for"):
            train(tmp_path / "run", short, settings)
        assert not (tmp_path / "run").exists()

    def test_text_and_recall_are_refused_together(self) -> None:
        """One of them would be ignored."""
        with pytest.raises(ValueError, match="leave out the text"):
            TrainConfig(data="recall", text=("notes.txt",))
        with pytest.raises(
            ValueError,
            match="one of text, files, reuse, needles, mqar, recall, mixed, not 'wiki'",
        ):
            TrainConfig(data="wiki")


class TestDivergence:
    def test_a_diverged_run_replaced_its_checkpoint(
        self, tmp_path: Path, model: MCConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It stops, says so, and keeps the last checkpoint of a finite model."""
        monkeypatch.setattr(
            MCController, "full_detail_loss", lambda self, tokens: torch.tensor(0.0)
        )
        settings = TrainConfig(text=TEXT, steps=9, batch_size=2, learning_rate=1e30, warmup_steps=0)
        with pytest.raises(FloatingPointError, match="no longer finite at step 9"):
            train(tmp_path / "run", model, settings)
        assert all(w.isfinite().all() for w in weights(tmp_path / "run").values())

    @pytest.mark.parametrize("phase", ["language model", "training"])
    def test_weights_that_are_not_finite_replaced_the_checkpoint(
        self, tmp_path: Path, model: MCConfig, monkeypatch: pytest.MonkeyPatch, phase: str
    ) -> None:
        """The losses, taken before the update, still looked fine."""
        updates = 0

        def spoil(optimizer: torch.optim.AdamW, rate: float, clip_norm: float) -> None:
            nonlocal updates
            updates += 1
            if updates == 4:
                optimizer.param_groups[0]["params"][0].grad.fill_(math.inf)
            update(optimizer, rate, clip_norm)

        alone = phase == "language model"
        module = "trainer" if alone else "loop"
        monkeypatch.setattr(f"megacontext.training.{module}.update", spoil)
        settings = TrainConfig(
            text=TEXT,
            lm_steps=6 if alone else 0,
            steps=6,
            batch_size=2,
            checkpoint_interval=2,
            log_interval=50,
        )
        with pytest.raises(FloatingPointError, match="no longer finite at step 4; the last check"):
            train(tmp_path / "run", model, settings)
        assert all(w.isfinite().all() for w in weights(tmp_path / "run").values())
        state = checkpoint(tmp_path / "run")
        assert state["lm_step" if alone else "step"] == 2


class TestRefusals:
    def test_bad_settings_leave_no_folder(self, tmp_path: Path, model: MCConfig) -> None:
        """Everything is checked before the first file is written."""
        for settings, message in (
            (TrainConfig(text=("nowhere",)), "no such text file"),
            (TrainConfig(text=TEXT, device="abacus"), "device 'abacus' cannot be used here"),
        ):
            with pytest.raises((ValueError, OSError), match=message):
                train(tmp_path / "run", model, settings)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"steps": 0}, "steps must be positive, not 0"),
            ({"learning_rate": -1.0}, "learning_rate must be positive, not -1.0"),
            ({"warmup_steps": -1}, "warmup_steps must not be negative, but is -1"),
            ({"batch_size": 2.5}, "batch_size must be an int, not 2.5"),
        ],
    )
    def test_settings_that_cannot_train(self, values: dict[str, object], message: str) -> None:
        """By name and value."""
        with pytest.raises((ValueError, TypeError)) as raised:
            TrainConfig(**values)  # type: ignore[arg-type]
        assert str(raised.value) == message

    def test_a_violation_ends_the_run_and_is_in_its_log(
        self,
        tmp_path: Path,
        model: MCConfig,
        settings: TrainConfig,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The step is not finished, and the checkpoint before it is kept."""
        process_batch = MCController.process_batch

        def with_a_peek(
            self: MCController, tokens: torch.Tensor, step: int, **more: object
        ) -> object:
            result = process_batch(self, tokens, step=step, **more)  # type: ignore[arg-type]
            if step == 4:
                wc = result.variants.working_context
                self.lensnet(wc.embeddings, wc.starts, wc.spans, wc.lods)
            return result

        monkeypatch.setattr(MCController, "process_batch", with_a_peek)
        with pytest.raises(UnsanctionedCall):
            train(tmp_path / "run", model, settings)
        verdict = read_verdict(tmp_path / "run")
        assert str(verdict) == ("9 micro-steps, 9 LensNet calls, 1 violation; 2 inference calls")
        saved = checkpoint(tmp_path / "run")
        assert saved["step"] == 3
