"""Metrics out: TensorBoard and sinks of one's own, between steps and never inside a call."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from tests.megacontext.conftest import TEXT, TEXT_MODEL, checkpoint, small_settings, weights

from lensnet_guard import UnsanctionedCall
from megacontext import MCController, train
from megacontext.allocators.cut import lod0_tail
from megacontext.cli import main
from megacontext.evaluation.lod_image import LOD_COLOURS, lod_image
from megacontext.training.metric_sinks import MetricSinkError
from megacontext.training.run_folder import RunFolder

# tensorboard's own protobuf files and torch's writer warn of old ways.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(tensorboard|google)")

SETTINGS = small_settings()


@pytest.fixture(autouse=True)
def _no_overview(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than all the rest."""
    monkeypatch.setattr("megacontext.evaluation.overview.draw_overview", lambda *_: None)


class Kept:
    """A sink that keeps what it is told, and can do something more."""

    def __init__(self, also: Any = lambda step: None) -> None:
        self.rows: list[tuple[int, dict[str, float], NDArray[np.uint8]]] = []
        self._also = also

    def write(self, step: int, metrics: Mapping[str, float], strips: NDArray[np.uint8]) -> None:
        self.rows.append((step, dict(metrics), strips))
        self._also(step)

    @property
    def steps(self) -> list[int]:
        return [step for step, _, _ in self.rows]


def controllers(monkeypatch: pytest.MonkeyPatch) -> list[MCController]:
    """All that are made from now on."""
    made: list[MCController] = []
    init = MCController.__init__

    def remembers(self: MCController, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(MCController, "__init__", remembers)
    return made


class TestSinks:
    def test_they_are_told_what_metrics_jsonl_is(self, tmp_path: Path) -> None:
        """The lines of the file, without what is undefined, and the LODs as a picture."""
        first, second = Kept(), Kept()
        train(tmp_path / "run", TEXT_MODEL, SETTINGS, sinks=[first, second])
        rows = RunFolder(tmp_path / "run").read_metrics()
        for sink in (first, second):
            told = [{"step": step, **metrics} for step, metrics, _ in sink.rows]
            assert told == [{k: v for k, v in r.items() if v is not None} for r in rows]
        image = first.rows[-1][2]
        assert image.dtype == np.uint8
        assert image.shape == (8 * 15 - 3, 2 * 96, 3)  # 2 sequences of 4 working contexts

    def test_they_change_nothing(self, tmp_path: Path) -> None:
        """Not the weights."""
        train(tmp_path / "with", TEXT_MODEL, SETTINGS, sinks=[Kept()])
        train(tmp_path / "without", TEXT_MODEL, SETTINGS)
        first, second = weights(tmp_path / "with"), weights(tmp_path / "without")
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_no_micro_step_and_no_call_is_open_when_they_are_told(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A switch of context would be refused in the one, and a call in flight in the log."""
        made = controllers(monkeypatch)

        def look(step: int) -> None:
            guard = made[0].guard
            assert guard.current_context == "training"
            with guard.context("inference"):
                pass
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            events = [line["event"] for line in lines]
            assert events.count("call.begin") == events.count("call.end") >= step
            assert guard.count("training", "preference_scorer") == step

        log = tmp_path / "run" / "lensnet.rank0.jsonl"
        sink = Kept(look)
        train(tmp_path / "run", TEXT_MODEL, SETTINGS, sinks=[sink])
        assert sink.steps == [2, 4, 6]

    def test_one_that_calls_lensnet_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As anything else that does; the violation is not wrapped."""
        made = controllers(monkeypatch)
        entry = torch.zeros(1, 1, dtype=torch.int64)
        call = Kept(lambda _: made[0].lensnet(torch.zeros(1, 1, 32), entry, entry + 1, entry))
        with pytest.raises(UnsanctionedCall):
            train(tmp_path / "run", TEXT_MODEL, SETTINGS, sinks=[call])

    def test_one_that_fails_loses_no_step(self, tmp_path: Path) -> None:
        """The run is saved at that step, and goes on bit by bit."""

        def fails(step: int) -> None:
            if step == 4:
                raise ConnectionError("no route to host")

        with pytest.raises(MetricSinkError) as raised:
            train(tmp_path / "cut", TEXT_MODEL, SETTINGS, sinks=[Kept(fails)])
        assert str(raised.value) == (
            "the metric sink Kept failed at step 4 (ConnectionError: no route to host); the run is "
            f"saved at that step in {tmp_path / 'cut'}: continue it with --resume"
        )
        assert isinstance(raised.value.__cause__, ConnectionError)
        saved = checkpoint(tmp_path / "cut")
        assert saved["step"] == 4
        again = Kept()
        train(tmp_path / "cut", resume=True, sinks=[again])
        assert again.steps == [6]
        train(tmp_path / "whole", TEXT_MODEL, SETTINGS)
        first, second = weights(tmp_path / "cut"), weights(tmp_path / "whole")
        assert all(torch.equal(first[name], second[name]) for name in first)
        metrics = [(tmp_path / d / "metrics.jsonl").read_text() for d in ("cut", "whole")]
        assert metrics[0] == metrics[1]


def events(run_dir: Path) -> Any:
    """What TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0}).Reload()


class TestTensorBoard:
    def test_scalars_and_strips_of_every_logged_step(self, tmp_path: Path) -> None:
        """From the command line; the metrics are those of the file, in float32."""
        arguments = f"--text {TEXT[0]} --steps 4 --log-interval 2 --batch-size 2 --d-model 16"
        command = ["train", "--run-dir", str(tmp_path / "run"), "--tensorboard"]
        result = CliRunner().invoke(main, [*command, *arguments.split(), "--lm-layers", "1"])
        assert result.exit_code == 0, result.output
        shown = events(tmp_path / "run")
        rows = RunFolder(tmp_path / "run").read_metrics()
        names = {n for row in rows for n, v in row.items() if v is not None} - {"step"}
        assert set(shown.Tags()["scalars"]) == names
        for name in names:
            expected = {row["step"]: row[name] for row in rows if row[name] is not None}
            found = {event.step: event.value for event in shown.Scalars(name)}
            assert found == pytest.approx(expected, rel=1e-6)
        assert [image.step for image in shown.Images("lods")] == [2, 4]
        image = shown.Images("lods")[0]
        assert (image.height, image.width) == (8 * 15 - 3, 2 * 384)
        assert image.encoded_image_string.startswith(b"\x89PNG")

    def test_a_resumed_run_shows_no_step_twice(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Cut off after step 4 with the checkpoint of step 3, and it needs no option again."""
        settings = dataclasses.replace(SETTINGS, tensorboard=True)
        process_batch, calls = MCController.process_batch, iter(range(100))

        def dies(self: MCController, *args: Any, **kwargs: Any) -> Any:
            if next(calls) == 5:
                raise KeyboardInterrupt
            return process_batch(self, *args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(MCController, "process_batch", dies)
            train(tmp_path / "run", TEXT_MODEL, settings)
        assert [event.step for event in events(tmp_path / "run").Scalars("loss")] == [2, 4]
        train(tmp_path / "run", resume=True)
        shown = events(tmp_path / "run")
        assert [event.step for event in shown.Scalars("loss")] == [2, 4, 6]
        assert [image.step for image in shown.Images("lods")] == [2, 4, 6]

    def test_its_files_are_closed_when_a_run_breaks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By whatever: here another sink."""
        from torch.utils.tensorboard import SummaryWriter

        closed: list[str] = []
        close = SummaryWriter.close

        def remembers(self: Any) -> None:
            closed.append(self.get_logdir())
            close(self)

        monkeypatch.setattr(SummaryWriter, "close", remembers)

        def fails(step: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            settings = dataclasses.replace(SETTINGS, tensorboard=True)
            train(tmp_path / "run", TEXT_MODEL, settings, sinks=[Kept(fails)])
        assert closed == [str(tmp_path / "run" / "tensorboard")]

    def test_without_the_library(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before the folder is made; the extra is named, on the command line too."""
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        settings = dataclasses.replace(SETTINGS, tensorboard=True)
        with pytest.raises(ImportError) as raised:
            train(tmp_path / "run", TEXT_MODEL, settings)
        assert str(raised.value) == (
            "TensorBoard's event files need the library tensorboard, which cannot be imported "
            "(import of torch.utils.tensorboard halted; None in sys.modules): "
            'pip install "lensnet-guard[tensorboard]"'
        )
        assert not (tmp_path / "run").exists()
        command = ["train", "--run-dir", str(tmp_path / "run"), "--text", *TEXT, "--tensorboard"]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 3
        assert "lensnet-guard[tensorboard]" in " ".join(result.stderr.split())


class TestLodImage:
    def test_each_token_has_the_colour_of_its_lod(self) -> None:
        """What is not held is grey, and white is between the strips."""
        cuts = [[lod0_tail(8, 8, 4), lod0_tail(8, 3, 4)]]
        image = lod_image(cuts)
        assert image.shape == (12 + 3 + 12, 16, 3)
        blue, grey = (list(bytes.fromhex(LOD_COLOURS[lod][1:])) for lod in (0, -1))
        assert (image[:12] == blue).all()
        assert (image[12:15] == 255).all()
        assert (image[15:, :10] == grey).all()
        assert (image[15:, 10:] == blue).all()
