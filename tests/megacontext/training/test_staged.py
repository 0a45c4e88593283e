"""Stages beside a frozen language model: real runs, killed, stopped, shared by two processes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.megacontext.conftest import checkpoint, small_settings, weights
from tests.megacontext.model.test_hf_language_model import config_of, save
from torch import Tensor, nn

import megacontext
from lensnet_guard.postmortem import read_verdict
from megacontext import MCConfig, MCController, TrainConfig, TrainResult, load_model, train
from megacontext.files import DamagedFileError
from megacontext.training import staged
from megacontext.training.distributed import World
from megacontext.training.run_folder import RunFolder
from megacontext.training.sources import load_source
from megacontext.training.train_result import StepReport, TrainingStopped

pytest.importorskip("transformers")

SETTINGS = small_settings(
    data="files",
    text=(str(Path(megacontext.__file__).parent / "training"),),
    gist_steps=4,
    gist_batch_size=4,
    kept_sequences=8,
    guess_steps=4,
    steps=4,
    accumulation=2,
    checkpoint_interval=2,
    learning_rate=1e-2,
    lens_learning_rate=1e-2,
    warmup_steps=1,
)
STAGES = ("gists", "pre-training", "losses of variants", "training")
# How often whether to stop was asked by then: after step 3, before the sixth of six files.
ASKED = {"gists": 4, "pre-training": 8, "losses of variants": 15, "training": 18}


@dataclass
class Whole:
    """A run that nothing interrupted, and what was seen of it."""

    config: MCConfig
    run_dir: Path
    result: TrainResult
    seen: list[StepReport] = field(default_factory=list)
    gistnet: list[tuple[str, Tensor]] = field(default_factory=list)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> MCConfig:
    """A small llama that is frozen, and networks that fit it."""
    path = tmp_path_factory.mktemp("llama") / "model"
    save("llama, tied", path)
    return config_of(
        path, freeze_language_model=True, gists="weighted", lens_reads="tokens", num_variants=1
    )


@pytest.fixture(scope="module")
def whole(config: MCConfig, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The run that the others are compared with."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    seen: list[StepReport] = []
    gistnet: list[tuple[str, Tensor]] = []
    update = staged.StagedTrainer.make_micro_steps

    def noting(trainer: Any, *how: Any) -> None:
        gistnet.append(("before", flat(trainer.mc.gistnet)))
        update(trainer, *how)
        gistnet.append(("after", flat(trainer.mc.gistnet)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staged.StagedTrainer, "make_micro_steps", noting)
        result = train(run_dir, config, SETTINGS, report=seen.append)
    return Whole(config, run_dir, result, seen, gistnet)


def flat(network: nn.Module) -> Tensor:
    """All that it is made of."""
    return torch.cat([t.detach().flatten() for t in network.state_dict().values()])


def losses(run_dir: Path) -> dict[str, dict[str, Any]]:
    """What the files of losses hold, by their names."""
    return {
        f"{path.parent.name}/{path.name}": dict(np.load(path))
        for path in sorted([*run_dir.glob("kept/*"), *run_dir.glob("held_out/*")])
    }


def bytes_of(run_dir: Path) -> dict[str, bytes]:
    """Metrics, and the arrays of losses."""
    files = {
        f"{name}/{array}": value.tobytes()
        for name, arrays in losses(run_dir).items()
        for array, value in arrays.items()
    }
    return files | {"metrics": (run_dir / "metrics.jsonl").read_bytes()}


def assert_same_end(run_dir: Path, whole: Whole) -> None:
    """Bit by bit: weights, optimizer, metrics, kept losses."""
    ours, theirs = checkpoint(run_dir), checkpoint(whole.run_dir)
    assert ours["model"].keys() == theirs["model"].keys()
    assert all(ours["model"][name].equal(theirs["model"][name]) for name in ours["model"])
    assert str(ours["optimizer"]) == str(theirs["optimizer"])
    assert bytes_of(run_dir) == bytes_of(whole.run_dir)


class TestWholeRun:
    def test_the_phases_in_their_order(self, whole: Whole) -> None:
        """Each to its end; LensNet is called once a micro-step of its own and in no other."""
        assert [(r.phase, r.step, r.steps) for r in whole.seen] == [
            ("gists", 2, 4),
            ("gists", 4, 4),
            ("pre-training", 2, 4),
            ("pre-training", 4, 4),
            *[("losses of variants", 4 * n, 24) for n in range(1, 7)],
            ("training", 2, 4),
            ("training", 4, 4),
        ]
        assert str(read_verdict(whole.run_dir)) == (
            "16 micro-steps, 16 LateInteractionLensNet calls, 0 violations; 2 inference calls"
        )
        assert set(whole.result.verdict.calls_per_micro_step) == {1}

    def test_what_each_phase_tells(self, whole: Whole) -> None:
        """The metrics that the folder keeps are of the last one alone."""
        metrics = {r.phase: r.metrics for r in whole.seen}
        assert metrics["gists"].keys() == {"lm_loss"}
        assert {"loss", "lens_loss", "preference_agreement"} <= metrics["pre-training"].keys()
        assert "lm_loss" not in metrics["pre-training"]
        assert metrics["losses of variants"] == {}
        rows = RunFolder(whole.run_dir).read_metrics()
        assert [row["step"] for row in rows] == [2, 4]
        assert all({"validation_loss", "validation_agreement"} <= row.keys() for row in rows)
        assert rows[0]["validation_loss"] == rows[1]["validation_loss"]

    def test_gistnet_stays_once_its_stage_is_over(self, whole: Whole) -> None:
        """Bit by bit, in every step after it; in its own it has moved, as LensNet has later."""
        assert len(whole.gistnet) == 2 * (4 + 4)
        ended = whole.gistnet[0][1]
        assert all(weight.equal(ended) for _, weight in whole.gistnet)
        mc = MCController(whole.config)
        assert not ended.equal(flat(mc.gistnet))
        first, last = mc.learned.state_dict(), weights(whole.run_dir)
        moved = {name for name in last if not last[name].equal(first[name])}
        assert {name.split(".")[0] for name in moved} == {"gistnet", "lensnet"}

    def test_lensnet_stays_while_gistnet_learns(self, config: MCConfig, tmp_path: Path) -> None:
        """It has neither gradients nor a decay in that stage."""
        answers = iter(range(100))
        with pytest.raises(TrainingStopped):
            train(tmp_path / "run", config, SETTINGS, stop=lambda: next(answers) == 4)
        first, last = MCController(config).learned.state_dict(), weights(tmp_path / "run")
        moved = {name.split(".")[0] for name in last if not last[name].equal(first[name])}
        assert moved == {"gistnet"}

    def test_every_sequence_once_before_any_comes_again(self, whole: Whole) -> None:
        """In another order each time."""
        trainer = staged.StagedTrainer.__new__(staged.StagedTrainer)
        trainer.settings, trainer.mc = replace(SETTINGS, batch_size=6), load_model(whole.run_dir)
        trainer.source = load_source(SETTINGS, trainer.mc.config)
        trainer.folder = RunFolder(whole.run_dir)
        known = {tuple(row): n for n, row in enumerate(trainer._kept.tokens.tolist())}
        drawn: list[int] = []
        trainer._of_lensnet = (
            lambda judged, *_: drawn.extend(  # type: ignore[method-assign]
                known[tuple(row)]
                for row in judged.tokens.tolist()[:3]  # the others are new
            )
        )
        for number in range(8):
            trainer._kept_micro_step(number, 0, 0)
        rounds = [drawn[first : first + 8] for first in (0, 8, 16)]
        assert [sorted(numbers) for numbers in rounds] == [[*range(8)]] * 3
        assert rounds[0] != rounds[1] != rounds[2]


SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch._dynamo
import torch.distributed as dist
from megacontext import MCConfig, MCController, TrainConfig, train

def dies(run_dir, model, settings, asked):
    def stop():
        nonlocal asked
        asked -= 1
        if not asked:
            os.kill(os.getpid(), signal.SIGKILL)
    train(run_dir, MCConfig.from_json(model), TrainConfig.from_json(settings), stop=stop)

runs = json.loads(Path(sys.argv[1]).read_text())
MCController(MCConfig.from_json(runs[0][1]))  # so that libraries are imported once for all
def shares(folder, rank):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, settings = MCConfig.from_json(runs[0][1]), TrainConfig.from_json(runs[0][2])
    train(folder + "/shared", model, settings)
    dist.destroy_process_group()
    os._exit(0)

for run in runs:
    child = os.fork()
    if not child:
        dies(*run)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, run
for rank in (0, 1):
    if not os.fork():
        shares(sys.argv[2], rank)
assert [os.wait()[1] for _ in "01"] == [0, 0]
"""


@pytest.fixture(scope="module")
def killed(config: MCConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run for each stage, killed in it by SIGKILL, after more steps than it had saved.

    And one that two processes shared: to start them beside those saves half a minute.
    """
    folder = tmp_path_factory.mktemp("killed")
    runs = {stage: folder / stage.replace(" ", "_") for stage in STAGES}
    works = [(str(runs[s]), asdict(config), asdict(SETTINGS), ASKED[s]) for s in STAGES]
    (folder / "runs.json").write_text(json.dumps(works))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder / "runs.json"), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return runs | {"shared": folder / "shared"}


class TestInterrupted:
    @pytest.mark.parametrize("stage", STAGES)
    def test_killed_it_goes_on_to_the_same_end(
        self, killed: dict[str, Path], whole: Whole, stage: str
    ) -> None:
        """By SIGKILL in each stage; nothing that was kept is computed again."""
        run_dir = killed[stage]
        state = checkpoint(run_dir)
        at = {"gists": (2, 0, 0), "training": (4, 4, 2), "pre-training": (4, 2, 0)}
        counts = tuple(state[name] for name in ("gist_step", "guess_step", "step"))
        assert counts == at.get(stage, (4, 4, 0))
        kept = {path: path.stat().st_mtime_ns for path in run_dir.glob("*/*.npz")}
        assert len(kept) == {"losses of variants": 5, "training": 6}.get(stage, 0)
        train(run_dir, resume=True)
        assert_same_end(run_dir, whole)
        assert all(path.stat().st_mtime_ns == time for path, time in kept.items())

    @pytest.mark.parametrize("stage", STAGES)
    def test_stopped_it_is_saved_and_goes_on(
        self, config: MCConfig, whole: Whole, tmp_path: Path, stage: str
    ) -> None:
        """Asked to in each stage."""
        asked = iter(range(1, 100))
        with pytest.raises(TrainingStopped) as raised:
            train(tmp_path / "run", config, SETTINGS, stop=lambda: next(asked) == ASKED[stage])
        step = {"losses of variants": 4}.get(stage, 3)
        assert str(raised.value) == f"stopped after step {step}, and saved in {tmp_path / 'run'}"
        kept = {"losses of variants": 5, "training": 6}.get(stage, 0)
        assert len([*(tmp_path / "run").glob("*/*.npz")]) == kept
        train(tmp_path / "run", resume=True)
        assert_same_end(tmp_path / "run", whole)

    def test_a_kept_file_that_was_removed_is_computed_again(
        self, whole: Whole, tmp_path: Path
    ) -> None:
        """To the same losses, and no other file is touched; one that is damaged is named."""
        run_dir = shutil.copytree(whole.run_dir, tmp_path / "run")
        state = checkpoint(run_dir)
        RunFolder(run_dir).save_checkpoint(state | {"step": 2})  # as long as there are steps left
        removed, damaged = run_dir / "kept" / "000001.npz", run_dir / "held_out" / "000002.npz"
        removed.unlink()
        damaged.write_bytes(damaged.read_bytes()[:-100])
        with pytest.raises(DamagedFileError) as raised:
            train(run_dir, resume=True)
        assert str(raised.value).startswith(f"{damaged} is damaged (")
        assert str(raised.value).endswith("); remove it, and it is computed again")
        damaged.unlink()
        train(run_dir, resume=True)
        ours, theirs = losses(run_dir), losses(whole.run_dir)
        assert ours.keys() == theirs.keys()
        assert all(
            np.array_equal(ours[name][array], value)
            for name, arrays in theirs.items()
            for array, value in arrays.items()
        )


class TestProcesses:
    def test_two_keep_the_losses_of_one(self, killed: dict[str, Path], whole: Whole) -> None:
        """Same sequences, same variants, losses up to float noise; and so are the weights."""
        shared = killed["shared"]
        assert (shared / "lensnet.rank1.jsonl").exists()
        ours, theirs = losses(shared), losses(whole.run_dir)
        assert ours.keys() == theirs.keys()
        for name, arrays in theirs.items():
            assert np.array_equal(ours[name]["tokens"], arrays["tokens"])
            assert np.array_equal(ours[name]["held"], arrays["held"])
            np.testing.assert_allclose(ours[name]["nll"], arrays["nll"], rtol=1e-4)
        assert len({str(arrays["made_by"]) for arrays in ours.values()}) == 1
        for name, weight in weights(whole.run_dir).items():
            torch.testing.assert_close(weights(shared)[name], weight, rtol=1e-2, atol=1e-3)

    def test_what_they_cannot_share(self) -> None:
        """One of them would have no sequence of GistNet's."""
        with pytest.raises(ValueError) as raised:
            World(size=2).check(replace(SETTINGS, gist_batch_size=3))
        assert str(raised.value) == (
            "gist_batch_size is 3, which 2 processes cannot share equally; make it a multiple of 2"
        )
        World(size=2).check(replace(SETTINGS, gist_batch_size=3, gist_steps=0))


class TestCompiled:
    @pytest.fixture(autouse=True)
    def _without_inductor(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Trace and differentiate as ever, but leave out a minute of C++ compiler."""
        compile_module: Callable[..., None] = nn.Module.compile
        monkeypatch.setattr(
            nn.Module,
            "compile",
            lambda module, *, dynamic, mode="": compile_module(
                module, backend="aot_eager", dynamic=dynamic
            ),
        )
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at all of them
    def test_a_run(self, config: MCConfig, whole: Whole, tmp_path: Path) -> None:
        """All its stages, to about the same end."""
        result = train(tmp_path / "run", config, replace(SETTINGS, compile=True))
        assert result.verdict.clean
        ours, theirs = losses(tmp_path / "run"), losses(whole.run_dir)
        for name, arrays in theirs.items():
            assert np.array_equal(ours[name]["held"], arrays["held"])
            np.testing.assert_allclose(ours[name]["nll"], arrays["nll"], rtol=1e-3)
        rows = [RunFolder(path).read_metrics() for path in (tmp_path / "run", whole.run_dir)]
        for one, other in zip(*rows, strict=True):
            assert one["lens_loss"] == pytest.approx(other["lens_loss"], rel=1e-2)


class TestGistsOf:
    def test_another_run_takes_gists_and_losses(self, whole: Whole, tmp_path: Path) -> None:
        """Bit by bit; it learns LensNet anew, and does neither stage again."""
        told: list[StepReport] = []
        settings = replace(SETTINGS, gists_of=str(whole.run_dir), guess_steps=0, steps=2)
        other = replace(whole.config, seed=1)
        result = train(tmp_path / "run", other, settings, report=told.append)
        assert [(r.phase, r.step) for r in told] == [("training", 2)]
        assert result.verdict.micro_steps == 4
        ours, theirs = weights(tmp_path / "run"), weights(whole.run_dir)
        same = {name for name in ours if ours[name].equal(theirs[name])}
        assert {name for name in ours if name.startswith("gistnet")} <= same
        assert not ours["lensnet.gist.weight"].equal(theirs["lensnet.gist.weight"])
        kept = [
            {name: value for name, value in bytes_of(path).items() if name != "metrics"}
            for path in (tmp_path / "run", whole.run_dir)
        ]
        assert kept[0] == kept[1]

    def test_a_run_that_has_nothing_yet(self, config: MCConfig, tmp_path: Path) -> None:
        """Is told from one that has."""
        with pytest.raises(FileNotFoundError) as raised:
            train(tmp_path / "run", config, replace(SETTINGS, gists_of=str(tmp_path / "none")))
        assert str(raised.value) == f"{tmp_path / 'none'} has no checkpoint yet; train it first"


class TestRefusals:
    @pytest.mark.parametrize(
        ("model", "settings", "said"),
        [
            (
                {"freeze_language_model": False},
                {},
                "gist_steps is 4, and stages are for losses that do not change: they take "
                "freeze_language_model and kept_sequences",
            ),
            (
                {},
                {"kept_sequences": 0, "gist_steps": 0},
                "guess_steps is 4, and stages are for losses that do not change: they take "
                "freeze_language_model and kept_sequences",
            ),
            (
                {"train_wc_length": 36},
                {},
                "a working context of 36 entries has no room for a block of 96 tokens in detail; "
                "make train_wc_length longer",
            ),
            (
                {"focus_window": 25},
                {},
                "variants are judged by which of 20 blocks they hold, and a focus_window of 25 "
                "entries shows 16 of them at LOD1; widen it",
            ),
            (
                {"sequence_tokens": 97},
                {},
                "sequences of files must not be trimmed, and of 97 tokens a working context of 48 "
                "entries keeps 96: set sequence_tokens to 96 or 99",
            ),
        ],
    )
    def test_what_does_not_go_together(
        self,
        config: MCConfig,
        tmp_path: Path,
        model: dict[str, Any],
        settings: dict[str, Any],
        said: str,
    ) -> None:
        """Before anything is written, and before GistNet has learned for hours."""
        with pytest.raises(ValueError) as raised:
            train(tmp_path / "run", replace(config, **model), replace(SETTINGS, **settings))
        assert str(raised.value) == said
        assert not (tmp_path / "run").exists()

    def test_steps_that_are_negative(self) -> None:
        """By name and value; none at all is fine."""
        TrainConfig(gist_steps=0, kept_sequences=0, guess_steps=0)
        for name in ("gist_steps", "kept_sequences", "guess_steps"):
            with pytest.raises(ValueError) as raised:
                TrainConfig(**{name: -1})
            assert str(raised.value) == f"{name} must not be negative, but is -1"
