"""What commit b8ffdb3 has written, by `make.py`, is read as it was then."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from lensnet_guard.postmortem import read_verdict
from megacontext import MCConfig, MCController, Recipe, load_model, train
from megacontext.allocators.focus import nodes_of
from megacontext.cli import main

BEFORE = Path(__file__).parent


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that was stopped after two of four steps."""
    return Path(shutil.copytree(BEFORE / "run", tmp_path / "run"))


def rows(metrics: Path) -> list[dict[str, float]]:
    """Lines of metrics; what was undefined is nan."""
    lines = map(json.loads, metrics.read_text().splitlines())
    return [{k: math.nan if v is None else v for k, v in line.items()} for line in lines]


def megacontext(*arguments: object) -> dict[str, Any]:
    """The JSON that a command prints."""
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    printed: dict[str, Any] = json.loads(result.stdout)
    return printed


class TestRun:
    def test_it_goes_on_to_the_same_end(self, run_dir: Path) -> None:
        """Its metrics are those of a run that was never stopped."""
        result = train(run_dir, resume=True)
        assert str(result.verdict) == "4 micro-steps, 4 LensNet calls, 0 violations; " + (
            "4 inference calls"
        )
        whole = rows(BEFORE / "metrics_of_the_whole.jsonl")
        found = rows(run_dir / "metrics.jsonl")
        assert [row["step"] for row in found] == [1, 2, 3, 4]
        assert found == [pytest.approx(row, rel=1e-3, nan_ok=True) for row in whole]

    @pytest.mark.parametrize(
        "recipe", [{"scored": "variant"}, {"causal_lens": True}, {"judged": "all"}], ids=str
    )
    def test_an_ablation_is_loaded(self, run_dir: Path, recipe: dict[str, Any]) -> None:
        """As what it was; it stood among the model's sizes."""
        config = json.loads((run_dir / "config.json").read_text())
        config["model"] |= recipe
        (run_dir / "config.json").write_text(json.dumps(config))
        mc = load_model(run_dir)
        assert mc.config.recipe == Recipe(**recipe)
        assert mc.lensnet.causal == ("causal_lens" in recipe)

    def test_a_term_that_is_no_more_is_refused(self, run_dir: Path) -> None:
        """By what it is, and not as damage: by load_model and by --resume."""
        config = json.loads((run_dir / "config.json").read_text())
        config["model"]["rank_weight"] = 0.5
        (run_dir / "config.json").write_text(json.dumps(config))
        for read in (load_model, lambda path: train(path, resume=True)):
            with pytest.raises(ValueError, match=r"^rank_weight is 0\.5, and the preference loss"):
                read(run_dir)

    def test_its_log_is_read(self) -> None:
        """With the verdict of then."""
        assert str(read_verdict(BEFORE / "run")) == (
            "2 micro-steps, 2 LensNet calls, 0 violations; 2 inference calls"
        )

    def test_its_model_is_loaded(self) -> None:
        """Under the names that the weights had."""
        mc = load_model(BEFORE / "run")
        assert mc.config == MCConfig(
            d_model=16,
            num_heads=2,
            lm_layers=1,
            lens_layers=1,
            sequence_tokens=144,
            train_wc_length=67,
            recent_tokens=24,
            horizon_tokens=6,
            num_variants=2,
        )
        keys = json.loads((BEFORE / "state_dict_keys.json").read_text())
        state = MCController(mc.config).state_dict()
        assert {name: list(weight.shape) for name, weight in state.items()} == keys
        assert list(state) == list(keys)

    def test_it_is_evaluated(self, run_dir: Path) -> None:
        """By the command."""
        told = megacontext("eval", "--run-dir", run_dir, "--sequences", 2, "--oracle-draws", 1)
        rows = {row["way"]: row for row in told["ways"]}
        before = {"recency window", "uniform LOD", "random collapse", "salience", "oracle"}
        assert before | {"LensNet focus", "full context"} <= rows.keys()

    def test_it_generates(self, run_dir: Path) -> None:
        """By the command."""
        told = megacontext("generate", "--run-dir", run_dir, "--text", "ab", "--max-tokens", 3)
        assert told["report"]["tokens"] == 5


class TestSession:
    def test_it_goes_on(self, tmp_path: Path) -> None:
        """With what it had to say then, in detail and in gists."""
        folder = shutil.copytree(BEFORE / "session", tmp_path / "session")
        mc = load_model(BEFORE / "run")
        logits = mc.resume_inference_session(folder)
        said = json.loads((BEFORE / "session_says.json").read_text())
        torch.testing.assert_close(
            logits[0, 0, :8], torch.tensor(said["logits"]), rtol=1e-3, atol=1e-4
        )
        report = mc.inference_report()
        assert (report.tokens, report.next_refocus) == (said["tokens"], 6)
        assert report.lensnet_calls == 3
        focus = json.loads((BEFORE / "session" / "focus.json").read_text())
        assert mc.inference_cut.lods[: len(focus["lods"])].tolist() == focus["lods"]
        mc.inference_step(torch.arange(9))
        assert mc.inference_report().refocuses == focus["totals"]["refocuses"] + 1
        mc.end_inference_session()

    def test_what_rested_rests(self, tmp_path: Path) -> None:
        """Its nodes were one integer each; the folder is of this version's format from then on."""
        folder = shutil.copytree(BEFORE / "session", tmp_path / "session")
        focus = json.loads((folder / "focus.json").read_text())
        mc = load_model(BEFORE / "run")
        mc.resume_inference_session(folder)
        rested = [[(key // 4, key % 4) for key in keys] for keys in focus["resting"]]
        assert any(rested)
        found = [nodes_of(keys) for keys in mc._session.focus.resting]
        assert [list(zip(*map(list, nodes), strict=True)) for nodes in found] == rested
        assert json.loads((folder / "session.json").read_text())["format"] == 2
        mc.end_inference_session()
        mc.resume_inference_session(folder)
        mc.end_inference_session()

    def test_it_grows_deep(self, tmp_path: Path) -> None:
        """A folder with two levels of gists gets as many as its history needs."""
        folder = shutil.copytree(BEFORE / "session", tmp_path / "session")
        mc = load_model(BEFORE / "run")
        history = torch.randint(0, 256, (8_000,), generator=torch.Generator().manual_seed(6))
        with (folder / "tokens.bin").open("ab") as file:
            file.write(bytes(history.tolist()))
        mc.resume_inference_session(folder)
        report = mc.inference_report()
        assert report.first_token == 0
        assert report.entries_by_lod[3] > 0
        mc.end_inference_session()
        assert (folder / "gists4.bin").exists()
