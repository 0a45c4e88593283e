"""The verdict on a run, from what is left of its log."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lensnet_guard import guard_module, lensnet_guard
from lensnet_guard.postmortem import read_verdict


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Two training micro-steps and a call in inference."""
    guard = guard_module(nn.Linear(2, 2), name="critic")
    with lensnet_guard(guard.module, log=tmp_path):
        with guard.context("training"):
            for step in range(2):
                with guard.micro_step(step), guard.sanctioned("preference_scorer"):
                    guard.module(torch.ones(1, 2))
        with guard.context("inference"):
            guard.module(torch.ones(1, 2))
    return tmp_path / "lensnet.rank0.jsonl"


class TestReadVerdict:
    def test_a_clean_run(self, log: Path) -> None:
        """Calls by context, one line for people."""
        verdict = read_verdict(log.parent)
        assert str(verdict) == "2 micro-steps, 2 critic calls, 0 violations; 1 inference call"
        assert verdict.clean
        assert verdict.calls_per_micro_step == (1, 1)

    def test_a_log_that_stops_early_was_clean(self, log: Path) -> None:
        """A killed process, or a full disk, writes no run.end."""
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(lines[:-1]))
        verdict = read_verdict(log.parent)
        assert not verdict.clean
        assert str(verdict).endswith("; the log stops before the end of the run")

    def test_a_call_in_flight_is_told(self, log: Path) -> None:
        """Cut off between call.begin and the end of its micro-step, with a torn line."""
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(lines[:2]) + lines[2][:20])
        verdict = read_verdict(log.parent)
        assert str(verdict).startswith(
            "0 micro-steps, 0 critic calls, 0 violations; 1 cut-off call; 1 unreadable line"
        )

    def test_a_micro_step_that_was_interrupted_counted_as_one_without_its_call(
        self, tmp_path: Path
    ) -> None:
        """And made a resumed run fail. What an exception breaks off is no whole micro-step."""
        guard = guard_module(nn.Linear(2, 2), name="critic")
        for interrupted in (True, False):
            with lensnet_guard(guard.module, log=tmp_path), guard.context("training"):
                with guard.micro_step(0), guard.sanctioned("preference_scorer"):
                    guard.module(torch.ones(1, 2))
                with pytest.raises(KeyboardInterrupt), guard.micro_step(1):
                    if interrupted:
                        raise KeyboardInterrupt
                    with guard.sanctioned("preference_scorer"):
                        guard.module(torch.ones(1, 2))
                    raise KeyboardInterrupt
        verdict = read_verdict(tmp_path)
        assert verdict.clean
        assert verdict.calls_per_micro_step == (1, 1)
        assert verdict.micro_steps == 2

    def test_no_log(self, tmp_path: Path) -> None:
        """The message names the folder."""
        with pytest.raises(FileNotFoundError, match=r"no lensnet\.rank\*\.jsonl in"):
            read_verdict(tmp_path)


class TestCaller:
    def test_the_caller_of_a_call_deep_in_containers_was_a_frame_of_torch(self) -> None:
        """The stack goes on until it leaves torch."""
        guard = guard_module(nn.Linear(2, 2))
        model: nn.Module = nn.Sequential(guard.module)
        for _ in range(20):
            model = nn.Sequential(model)
        with guard.context("inference"):
            model(torch.ones(1, 2))
        assert guard.calls[0].caller.file == __file__
