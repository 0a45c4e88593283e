"""``megacontext eval``, as a user calls it."""

import json
from pathlib import Path

import pytest
from tests.megacontext.conftest import invoke


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of recall."""
    folder = tmp_path_factory.mktemp("runs") / "recall"
    small = "--steps 1 --lm-steps 1 --batch-size 2 --d-model 16 --num-heads 2 --lm-layers 1"
    code, out, _ = invoke("train", "--run-dir", folder, "--setting", "recall", *small.split())
    assert code == 0, out
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
        for way, row in rows.items():
            assert way.split(",")[0].split()[0] in err
            low, high = row["nll_interval"]
            assert low <= row["nll"] <= high
        assert (trained / "eval.png").read_bytes().startswith(b"\x89PNG")

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

    def test_help_has_an_example(self) -> None:
        """As every command's."""
        code, out, _ = invoke("eval", "--help")
        assert code == 0
        assert "megacontext eval --run-dir runs/recall" in out
