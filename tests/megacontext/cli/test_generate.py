"""``megacontext generate``, as a user calls it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.megacontext.conftest import TEXT, invoke

from megacontext.config import MCConfig
from megacontext.controller import MCController
from megacontext.training.run_folder import RunFolder

SMALL = "--steps 2 --batch-size 2 --d-model 16 --lm-layers 1 --lens-layers 1 --num-heads 2"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained, a little."""
    path = tmp_path_factory.mktemp("trained") / "run"
    assert invoke("train", "--run-dir", path, "--text", *TEXT, *SMALL.split())[0] == 0
    return path


def generate(run_dir: Path, *arguments: object, stdin: bytes | None = None) -> tuple[int, str, str]:
    return invoke("generate", "--run-dir", run_dir, *arguments, stdin=stdin)


def report(out: str) -> dict[str, object]:
    result: dict[str, object] = json.loads(out)
    return result


class TestText:
    def test_same_seed_same_text(self, run_dir: Path) -> None:
        """Another seed, another text; greedy needs none. Text alone is on stdout."""
        options = ("--text", "def main(", "--max-tokens", 40)
        first, again = (generate(run_dir, *options, "--seed", 3) for _ in range(2))
        assert first[0] == 0
        assert first[1] == again[1]
        assert first[1] != generate(run_dir, *options, "--seed", 4)[1]
        greedy = {generate(run_dir, *options, "--temperature", 0, "--seed", s)[1] for s in (1, 2)}
        assert len(greedy) == 1
        assert "refocus at 9 tokens" in first[2]
        assert "40 bytes generated" in first[2]

    def test_a_file_standard_input_and_an_argument_are_the_same(
        self, run_dir: Path, tmp_path: Path
    ) -> None:
        """Whatever bytes they hold."""
        (tmp_path / "prompt").write_bytes(b"caf\xc3\xa9 = " * 50)
        options = ("--max-tokens", 20, "--quiet")
        by_file = generate(run_dir, "--prompt", tmp_path / "prompt", *options)
        by_stdin = generate(run_dir, "--prompt", "-", *options, stdin=b"caf\xc3\xa9 = " * 50)
        by_text = generate(run_dir, "--text", "café = " * 50, *options)
        assert by_file == by_stdin == by_text
        assert by_file[2] == ""

    def test_json_has_text_and_report_and_nothing_streams(self, run_dir: Path) -> None:
        """One object on stdout."""
        options = ("--text", "x = " * 100, "--max-tokens", 33)
        code, out, err = generate(run_dir, *options, "--json")
        assert code == 0
        result = report(out)
        assert set(result) == {"text", "generated_tokens", "stopped", "report"}
        assert result["generated_tokens"] == 33
        session = result["report"]
        assert isinstance(session, dict)
        assert (session["tokens"], session["refocuses"]) == (433, 2)
        assert f"{result['text']}\n" == generate(run_dir, *options)[1]
        assert "refocus at 432 tokens" in err

    def test_a_stop_string_is_not_printed(self, run_dir: Path) -> None:
        """Also when its bytes come one by one; the rest is as it would be."""
        options = ("--text", "x", "--max-tokens", 60, "--temperature", 0.8, "--quiet")
        whole = generate(run_dir, *options)[1].rstrip("\n")
        stop = whole[20:22]
        code, out, _ = generate(run_dir, *options, "--stop", stop, "--stop", "never came", "--json")
        assert code == 0
        assert report(out)["stopped"] is True
        assert report(out)["text"] == whole[: whole.find(stop)]

    def test_one_host_value_for_each_token(
        self, run_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a device each would wait for it."""
        values: list[int] = []
        for name in ("item", "__int__", "tolist"):
            method = getattr(torch.Tensor, name)
            monkeypatch.setattr(
                torch.Tensor, name, lambda self, m=method: values.append(1) or m(self)
            )
        generate(run_dir, "--text", "x", "--max-tokens", 20, "--quiet")
        assert len(values) == 20

    def test_show_focus_draws_what_is_held(self, run_dir: Path) -> None:
        """A legend whenever its scale changes, and a strip for each refocus."""
        code, _, err = generate(
            run_dir, "--text", "y = 1\n" * 200, "--max-tokens", 70, "--show-focus"
        )
        assert code == 0
        assert err.count("each character is 15 tokens:  █ LOD0") == 1
        assert err.count("each character is 16 tokens:  █ LOD0") == 1
        strips = [line for line in err.splitlines() if line and not set(line) - set("█▒░")]
        assert len(strips) == 3
        assert strips[-1].endswith("█")

    def test_show_focus_draws_every_level_that_is_held(self, run_dir: Path) -> None:
        """A long prompt has more of them than were trained."""
        code, _, err = generate(
            run_dir, "--prompt", "-", "--max-tokens", 0, "--show-focus", stdin=b"y = 1\n" * 10_000
        )
        assert code == 0
        assert "from token 0 on" in err
        assert re.search(r"LOD2, gists of gists  3(-\d)? gists of those", err)
        held = re.search(r"working context \d+ entries \((.*)\) of", err)
        assert held is not None
        levels = [word for word in held[1].replace(",", "").split() if word.startswith("LOD")]
        assert levels[:4] == ["LOD0", "LOD1", "LOD2", "LOD3"]
        strip = err.splitlines()[-2]
        assert not set(strip) - set("█▒░3456")
        assert len(strip) <= 80


class TestSession:
    def test_a_session_on_disk_goes_on(self, run_dir: Path, tmp_path: Path) -> None:
        """As one that was never interrupted; a prompt is appended."""
        folder = tmp_path / "session"
        greedy = ("--temperature", 0, "--json", "--quiet")
        disk = ("--tree-store", "disk", "--session-dir", folder)
        begun = generate(run_dir, "--text", "ab" * 150, "--max-tokens", 21, *greedy, *disk)
        more = generate(run_dir, "--session-dir", folder, "--resume", "--max-tokens", 21, *greedy)
        whole = generate(run_dir, "--text", "ab" * 150, "--max-tokens", 42, *greedy)
        assert (begun[0], more[0]) == (0, 0)
        joined = f"{report(begun[1])['text']}{report(more[1])['text']}"
        assert joined == report(whole[1])["text"]
        (tmp_path / "more").write_text("and more")
        told = generate(
            run_dir, "--session-dir", folder, "--resume", "--prompt", tmp_path / "more",
            "--max-tokens", 0, *greedy,
        )  # fmt: skip
        session = report(told[1])["report"]
        assert isinstance(session, dict)
        assert session["tokens"] == 342 + 8
        assert session["disk_bytes"] == 350 + (350 // 8 + 350 // 64) * 16 * 4

    def test_a_real_pipe(self, run_dir: Path) -> None:
        """The command in a process of its own, its prompt through a pipe."""
        command = [sys.executable, "-m", "megacontext", "generate", "--run-dir", str(run_dir)]
        command += ["--prompt", "-", "--max-tokens", "5", "--temperature", "0"]
        done = subprocess.run(command, input=b"x" * 70_000, capture_output=True, check=True)
        assert b"of 70,005 tokens" in done.stderr
        assert len(done.stdout) >= 5


class TestWrongUsage:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ([], "give a --prompt or a --text to continue, or --resume a session"),
            (["--text", "a", "--prompt", "-"], "give --prompt or --text, not both"),
            (["--text", ""], "a session begins with at least one token"),
            (["--text", "a", "--top-p", "0"], "top_p must lie in (0, 1], not 0"),
            (["--text", "a", "--temperature", "-1"], "temperature must be 0 or more, not -1"),
            (["--text", "a", "--max-tokens", "-1"], "--max-tokens must not be negative, but is -1"),
            (["--text", "a", "--stop", ""], "a stop string must not be empty"),
            (["--text", "a", "--wc-length", "20"], "wc_length 20 is too short for a session"),
            (["--text", "a", "--tree-store", "disk"], "belong together: give both"),
            (["--text", "a", "--session-dir", "x"], "belong together: give both"),
            (["--text", "a", "--device", "abacus"], "device 'abacus' cannot be used here"),
            (["--resume"], "--resume needs the --session-dir that is to go on"),
            (["--resume", "--session-dir", "x"], "x holds no session to resume"),
            (["--resume", "--session-dir", "x", "--cooldown", "1"], "leave out --cooldown"),
        ],
    )
    def test_one_message_and_exit_code_2(
        self, run_dir: Path, options: list[str], message: str
    ) -> None:
        """No traceback."""
        code, out, err = generate(run_dir, *options)
        assert (code, out) == (2, "")
        assert message in " ".join(err.replace("│", " ").split())

    def test_a_folder_without_a_model(self, tmp_path: Path) -> None:
        """Nothing was trained there."""
        code, _, err = generate(tmp_path, "--text", "a")
        assert code == 2
        assert "holds no run" in err

    def test_a_model_of_other_data(self, tmp_path: Path) -> None:
        """Its tokens are no bytes."""
        folder = RunFolder(tmp_path / "run")
        folder.create({"model": {"vocab_size": 48}, "train": {}, "source": {}})
        mc = MCController(MCConfig(vocab_size=48))
        folder.save_checkpoint({"model": mc.state_dict()})
        code, _, err = generate(tmp_path / "run", "--text", "a")
        assert code == 2
        assert "was not trained on bytes: its vocab_size is 48" in " ".join(err.split())

    def test_help_has_an_example(self) -> None:
        """And the exit codes."""
        out = invoke("generate", "--help")[1]
        assert 'megacontext generate --run-dir runs/first --text "def main("' in out
        assert "130 interrupted" in out
