"""``megacontext eval``, as a user calls it."""

import json
import re
import shutil
from pathlib import Path

import pytest
from tests.megacontext.conftest import TEXT, invoke

from megacontext.cli.eval import _settings
from megacontext.training.pretrained import read_run
from megacontext.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of recall."""
    folder = tmp_path_factory.mktemp("runs") / "recall"
    small = "--steps 1 --lm-steps 1 --batch-size 2 --d-model 16 --num-heads 2 --lm-layers 1"
    code, out, _ = invoke("train", "--run-dir", folder, "--setting", "recall", *small.split())
    assert code == 0, out
    return folder


@pytest.fixture(scope="module")
def trained_on_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of windows of files."""
    folder = tmp_path_factory.mktemp("runs") / "files"
    small = "--steps 1 --lm-steps 1 --batch-size 2 --d-model 16 --num-heads 2 --lm-layers 1"
    sizes = "--sequence-tokens 160 --train-wc-length 83 --recent-tokens 32 --horizon-tokens 12"
    arguments = (*small.split(), *sizes.split(), "--text", TEXT[0], "--data", "files")
    code, out, _ = invoke("train", "--run-dir", folder, *arguments)
    assert code == 0, out
    assert json.loads((folder / "config.json").read_text())["train"]["data"] == "files"
    return folder


class TestEval:
    def test_table_json_and_picture(self, trained: Path) -> None:
        """A row for each way, the same figures in the file, and a picture."""
        arguments = ("--sequences", 6, "--oracle-draws", 2)
        code, out, err = invoke("eval", "--run-dir", trained, *arguments, "--json")
        assert code == 0, err
        result = json.loads(out)
        assert json.loads((trained / "eval.json").read_text()) == result
        rows = {row["way"]: row for row in result["ways"]}
        assert rows["LensNet focus"]["behind_lensnet"] == 0
        assert rows["random collapse"]["gap_closed"] == 0
        assert rows["oracle"]["gap_closed"] == 1
        assert rows["full context"]["gap_to_full_closed"] == 1
        assert result["clusters"] is None
        for way, row in rows.items():
            assert way.split(",")[0] in err
            assert row["kind"] in err
            low, high = row["nll_interval"]
            assert low <= row["nll"] <= high
        assert (trained / "eval.png").read_bytes().startswith(b"\x89PNG")

    def test_the_table_fits_a_terminal_of_80_columns(self, trained: Path) -> None:
        """No figure is cut off or wrapped; what is as good as LensNet is said in words."""
        arguments = ("--sequences", 6, "--oracle-draws", 2, "--no-session")
        code, out, _ = invoke("eval", "--run-dir", trained, *arguments)
        assert code == 0
        figures = r"\d\.\d{3} [+-]\d\.\d{3} \[[+-]\d\.\d{3}, [+-]\d\.\d{3}\]( +-?\d+\.\d\d){2}"
        assert re.search(rf"^ lexical, last 16 +{figures} $", out, re.MULTILINE)
        assert "in a session" not in out
        assert "LensNet focus is better than every baseline" in out or "Not clearly worse" in out

    def test_without_gists(self, trained: Path) -> None:
        """In files of its own: the run's eval.json is with them."""
        arguments = ("--sequences", 2, "--oracle-draws", 1, "--no-greedy", "--no-gists", "--json")
        code, out, err = invoke("eval", "--run-dir", trained, *arguments)
        assert code == 0, err
        result = json.loads(out)
        assert json.loads((trained / "eval-no-gists.json").read_text()) == result
        assert result["gists"] is False
        rows = {row["way"]: row for row in result["ways"]}
        assert "greedy oracle" not in rows
        assert rows["LensNet focus"]["entries"] == rows["recency window"]["entries"] == 95 - 23

    def test_other_data_than_the_runs(self, trained_on_text: Path) -> None:
        """In files of their own, clustered by file; what does not fit the model is wrong usage."""
        arguments = ("--sequences", 6, "--oracle-draws", 1, "--no-greedy", "--no-session", "--json")
        run = ("eval", "--run-dir", trained_on_text, *arguments)
        for data in ("reuse", "mqar"):
            code, out, err = invoke(*run, "--data", data)
            assert code == 0, err
            result = json.loads(out)
            assert json.loads((trained_on_text / f"eval-{data}.json").read_text()) == result
            assert result["data"] == data
            assert "have read some of these" not in err
            assert (result["clusters"] is None) == (data == "mqar")
        assert not (trained_on_text / "eval.json").exists()
        code, _, err = invoke(*run, "--data", "needles")
        assert code == 2
        assert "block_size must be at least that" in " ".join(err.split())

    @pytest.mark.parametrize(
        ("sizes", "session"),
        [
            ((70, 70, 64, 32), False),  # no block before the tail
            ((50, 50, 64, 32), False),  # the tail is longer than the sequence
            ((128, 128, 64, 32), True),  # every way holds all of it
            ((96, 40, 32, 16), False),  # no room for a session
            ((96, 40, 8, 1), True),  # the horizon is a single token
        ],
    )
    @pytest.mark.filterwarnings("error::RuntimeWarning")
    def test_sizes_that_train_can_be_evaluated(
        self, tmp_path: Path, sizes: tuple[int, ...], session: bool
    ) -> None:
        """Whatever they leave no room for; where there is no gap, JSON has no nan for its share."""
        small = "--steps 1 --batch-size 2 --d-model 16 --num-heads 2 --lm-layers 1 --lens-layers 1"
        options = ("sequence-tokens", "train-wc-length", "recent-tokens", "horizon-tokens")
        given = [a for o, size in zip(options, sizes, strict=True) for a in (f"--{o}", size)]
        run = ("--run-dir", tmp_path / "run")
        code, out, _ = invoke("train", *run, *small.split(), *given, "--text", TEXT[0])
        assert code == 0, out
        few = ("--sequences", 2, "--oracle-draws", 2, "--json")
        code, out, err = invoke("eval", *run, *few)
        assert code == 0, err
        result = json.loads(out, parse_constant=pytest.fail)
        ways = [row["way"] for row in result["ways"]]
        assert ("LensNet focus, in a session" in ways) == session
        told = "A session is not among the ways: wc_length" in err
        assert told != session
        assert "nan" not in err

    def test_a_seed_below_zero(self, trained: Path) -> None:
        """It is wrong usage, and told before anything is loaded."""
        code, _, err = invoke("eval", "--run-dir", trained, "--seed", -1)
        assert code == 2
        assert "Invalid value for '--seed': -1 is not in the range x>=0" in err

    def test_files_that_the_run_may_have_read(self, trained_on_text: Path, tmp_path: Path) -> None:
        """Other ones are held out from a run on text: it is told."""
        run_dir = tmp_path / "run"
        shutil.copytree(trained_on_text, run_dir)
        config = json.loads((run_dir / "config.json").read_text())
        config["train"]["data"] = "text"
        (run_dir / "config.json").write_text(json.dumps(config))
        arguments = ("--sequences", 1, "--oracle-draws", 1, "--no-greedy", "--no-session")
        code, out, _ = invoke("eval", "--run-dir", run_dir, *arguments, "--data", "reuse")
        assert code == 0
        assert (
            "The run was trained on text, which holds other files out than reuse does: it may have "
            "read some of these. Train and evaluate it with --data files for files that it never "
            "saw.\n"
        ) in out
        code, out, _ = invoke("eval", "--run-dir", trained_on_text, *arguments, "--data", "text")
        assert code == 0
        assert "The run was trained on files, which holds other files out than text does" in out

    def test_a_part_of_the_text_was_taken_for_what_the_run_never_saw(
        self, trained_on_text: Path
    ) -> None:
        """Its files have other names there, and so are held out otherwise: it is told."""
        arguments = ("--sequences", 1, "--oracle-draws", 1, "--no-greedy", "--no-session")
        given = ("--data", "reuse", "--text", Path(TEXT[0]).parent)
        code, out, _ = invoke("eval", "--run-dir", trained_on_text, *arguments, *given)
        assert code == 0
        assert (
            "The run was trained on another --text, and which files are held out depends on that: "
            "it may have read some of these. Leave --text out for files that it never saw.\n"
        ) in out

    def test_other_data_than_the_runs_was_of_another_text(self, trained_on_text: Path) -> None:
        """What reads files reads those of the run, unless others are given; needles their own."""
        folder = RunFolder(trained_on_text)
        assert _settings(folder, "reuse", ()).text == read_run(folder).settings.text != ()
        assert _settings(folder, None, ()) == read_run(folder).settings
        assert _settings(folder, "needles", ()).text == ()
        assert _settings(folder, "reuse", (Path("/other"),)).text == ("/other",)

    def test_the_same_command_twice(self, trained: Path) -> None:
        """The same figures."""
        arguments = ("--run-dir", trained, "--sequences", 3, "--oracle-draws", 1, "--json")
        assert invoke("eval", *arguments)[1] == invoke("eval", *arguments)[1]

    def test_wrong_usage(self, trained: Path, tmp_path: Path) -> None:
        """No run, no sequences: a message, exit code 2, and nothing is written."""
        code, _, err = invoke("eval", "--run-dir", tmp_path)
        assert code == 2
        assert "holds no run" in err
        assert not list(tmp_path.iterdir())
        code, _, err = invoke("eval", "--run-dir", trained, "--sequences", 0)
        assert code == 2
        assert "Invalid value for '--sequences': 0 is not in the range x>=1." in err
        code, _, err = invoke("eval", "--run-dir", trained, "--device", "abacus")
        assert code == 2
        assert "device 'abacus' cannot be used here" in err
        code, _, err = invoke("eval", "--run-dir", trained, "--steps", 5)
        assert code == 2
        assert "--steps is of the trainings of --ablate; leave it out, or add that" in err
        code, _, err = invoke("eval", "--run-dir", trained, "--ablate", "--data", "mqar")
        assert code == 2
        assert "--ablate trains and evaluates on the run's own data" in err

    def test_help_has_an_example(self) -> None:
        """As every command's."""
        code, out, _ = invoke("eval", "--help")
        assert code == 0
        assert "megacontext eval --run-dir runs/recall" in out
