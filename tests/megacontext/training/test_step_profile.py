"""Traces of training steps, read back from the file."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.megacontext.conftest import small_settings, weights
from torch.profiler import record_function

from megacontext import MCConfig, MCController, TrainConfig, train
from megacontext.training.step_profile import step_profile


@pytest.fixture
def settings() -> TrainConfig:
    return small_settings(steps=9, accumulation=2, log_interval=10, checkpoint_interval=50)


def ranges(path: Path) -> list[dict[str, Any]]:
    """The ranges of a trace that have a name of ours, by their begin."""
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    named = [e for e in events if e.get("cat") == "user_annotation" and "Step" not in e["name"]]
    return sorted(named, key=lambda e: float(e["ts"]))


def names(path: Path) -> list[str]:
    return [event["name"] for event in ranges(path) if "#" not in event["name"]]


def make_steps(path: Path, steps: int) -> None:
    with step_profile(path, steps, cuda=False) as end_step:
        for step in range(steps):
            with record_function(f"body {step}"):
                pass
            end_step()


class TestTraining:
    def test_every_lensnet_call_of_the_profiled_steps_is_in_it(
        self, tmp_path: Path, model: MCConfig, settings: TrainConfig
    ) -> None:
        """Of the sixth to eighth step, by their numbers in the log, each in its micro-step."""
        result = train(tmp_path / "run", model, settings, profile=True)
        assert result.profile == tmp_path / "run" / "profile.json.gz"
        calls = [f"LensNet call {number} (preference_scorer)" for number in range(11, 17)]
        expected = [
            name
            for first in (0, 2, 4)
            for call in calls[first : first + 2]
            for name in ("process_batch", call, "backward")
        ]
        for at in (6, 13, 20):
            expected.insert(at, "optimizer")
        assert names(result.profile) == expected
        spans = [
            (e["ts"], e["ts"] + e["dur"]) for e in ranges(result.profile) if "#" not in e["name"]
        ]
        for number, name in enumerate(expected):
            if name.startswith("LensNet"):
                outer, inner, after = spans[number - 1 : number + 2]
                assert outer[0] <= inner[0] < inner[1] <= outer[1] <= after[0]

    def test_it_is_no_setting_and_changes_no_weight(
        self, tmp_path: Path, model: MCConfig, settings: TrainConfig
    ) -> None:
        """The folder of a profiled run differs by one file."""
        plain, profiled = tmp_path / "plain", tmp_path / "profiled"
        assert train(plain, model, settings).profile is None
        train(profiled, model, settings, profile=True)
        assert {p.name for p in profiled.iterdir()} - {p.name for p in plain.iterdir()} == {
            "profile.json.gz"
        }
        for name in ("config.json", "metrics.jsonl"):
            assert (profiled / name).read_text() == (plain / name).read_text()
        first, second = weights(plain), weights(profiled)
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_the_rest_of_a_run(
        self,
        tmp_path: Path,
        model: MCConfig,
        settings: TrainConfig,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Cut off in its second step, it is resumed with a profile; then nothing is left of it."""
        process_batch = MCController.process_batch

        def dies(self: MCController, *args: Any, step: int, **more: Any) -> object:
            if step == 1:
                raise KeyboardInterrupt
            return process_batch(self, *args, step=step, **more)

        with monkeypatch.context() as patch:
            patch.setattr(MCController, "process_batch", dies)
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / "run", model, settings)
        result = train(tmp_path / "run", resume=True, profile=True)
        assert result.profile is not None
        assert names(result.profile).count("optimizer") == 3
        before = result.profile.read_bytes()
        assert train(tmp_path / "run", resume=True, profile=True).profile is None
        assert result.profile.read_bytes() == before

    def test_phases_cost_nothing_without_it(
        self,
        tmp_path: Path,
        model: MCConfig,
        settings: TrainConfig,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Ranges are not even made."""
        monkeypatch.delattr("megacontext.training.loop.record_function")
        with pytest.raises(NameError):
            train(tmp_path / "profiled", model, settings, profile=True)
        train(tmp_path / "plain", model, settings)

    @pytest.mark.gpu
    def test_kernels(self, tmp_path: Path, model: MCConfig) -> None:
        """What runs on the device is in the trace too."""
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        settings = small_settings(steps=9, device="cuda")
        result = train(tmp_path / "run", model, settings, profile=True)
        assert result.profile is not None
        with gzip.open(result.profile) as file:
            events = json.load(file)["traceEvents"]
        assert any(event.get("cat") == "kernel" for event in events)


class TestFewSteps:
    @pytest.mark.parametrize(
        ("steps", "profiled"),
        [(1, [0]), (2, [0, 1]), (4, [1, 2, 3]), (8, [5, 6, 7]), (9, [5, 6, 7]), (20, [5, 6, 7])],
    )
    def test_there_is_always_a_trace(self, tmp_path: Path, steps: int, profiled: list[int]) -> None:
        """The warm-up gives way first."""
        make_steps(tmp_path / "profile.json.gz", steps)
        assert names(tmp_path / "profile.json.gz") == [f"body {step}" for step in profiled]

    def test_of_no_steps_there_is_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No file and no profiler; so does a run go that was not asked for one."""
        monkeypatch.delattr("megacontext.training.step_profile.profile")
        with pytest.raises(NameError):
            make_steps(tmp_path / "profile.json.gz", 1)
        make_steps(tmp_path / "profile.json.gz", 0)
        assert list(tmp_path.iterdir()) == []


class TestInterrupted:
    def test_what_there_is_is_kept(self, tmp_path: Path) -> None:
        """And the profiler stops."""
        path = tmp_path / "profile.json.gz"
        with pytest.raises(KeyboardInterrupt), step_profile(path, 2, cuda=False) as end_step:
            with record_function("body 0"):
                pass
            end_step()
            raise KeyboardInterrupt
        assert names(path) == ["body 0"]
        make_steps(path, 1)  # which could not be profiled inside another profile

    def test_in_the_middle_of_writing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The old trace is still whole; where there was none, there is none."""

        def killed(_: int) -> None:
            raise KeyboardInterrupt

        first, second = tmp_path / "first.json.gz", tmp_path / "second.json.gz"
        make_steps(first, 2)
        monkeypatch.setattr(os, "fsync", killed)
        for path in (first, second):
            with pytest.raises(KeyboardInterrupt):
                make_steps(path, 1)
        assert names(first) == ["body 0", "body 1"]
        assert not second.exists()
