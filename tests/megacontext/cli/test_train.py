"""The command line, as a user calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.megacontext.conftest import SMALL as SIZES
from tests.megacontext.conftest import TEXT, arguments, invoke, weights

from megacontext import MCController
from megacontext.model.gguf import cache_folder

VERDICT = "3 micro-steps, 3 LensNet calls, 0 violations; 1 inference call"
SMALL = "--steps 3 --batch-size 2 --accumulation 1 --d-model 16 --lm-layers 1 --lens-layers 1"


def train(run_dir: Path, *more: object) -> tuple[int, str, str]:
    return invoke("train", "--run-dir", run_dir, "--text", TEXT[0], *SMALL.split(), *more)


class TestTrain:
    def test_it_ends_with_the_verdict(self, tmp_path: Path) -> None:
        """The last line is computed from the log; exit code 0."""
        code, out, _ = train(tmp_path / "run")
        assert code == 0
        assert out.splitlines()[-1] == VERDICT
        assert "unigram entropy" in out

    def test_json_goes_to_stdout_and_nothing_else_does(self, tmp_path: Path) -> None:
        """A program can read it."""
        code, out, err = train(tmp_path / "run", "--json")
        result = json.loads(out)
        assert code == 0
        assert result["invariant_held"] is True
        assert result["verdict"]["calls"] == 3
        assert "step 3/3" in err

    def test_resume_after_the_end(self, tmp_path: Path) -> None:
        """Needs nothing but the folder."""
        train(tmp_path / "run")
        code, out, _ = invoke("train", "--run-dir", tmp_path / "run", "--resume")
        assert code == 0
        assert out.splitlines()[-1] == VERDICT

    def test_how_to_run_is_kept_for_a_resume(self, tmp_path: Path) -> None:
        """`--bf16` and `--compile` are settings like the others; what is compiled runs too."""
        code, _, _ = train(tmp_path / "run", "--bf16")
        saved = json.loads((tmp_path / "run" / "config.json").read_text())["train"]
        assert (code, saved["bf16"], saved["compile"]) == (0, True, False)
        code, _, err = invoke("train", "--run-dir", tmp_path / "run", "--resume", "--compile")
        assert code == 2
        assert "leave out --compile" in err

    def test_profile(self, tmp_path: Path) -> None:
        """The result says where it is, or why there is none: no step is left to profile."""
        path = tmp_path / "run" / "profile.json.gz"
        out = train(tmp_path / "run", "--profile")[1]
        assert f"\nprofile in {path}: open it in https://ui.perfetto.dev\n3 micro-steps" in out
        assert path.exists()
        resume = "train", "--run-dir", tmp_path / "run", "--resume"
        code, out, _ = invoke(*resume, "--profile")
        assert code == 0
        assert (
            "\nno profile was written: all steps of the run had been made; profile a new run\n"
        ) in out
        assert "no profile" not in invoke(*resume)[1]

    def test_profile_as_json(self, tmp_path: Path) -> None:
        """Its path, and null where it was not asked for."""
        printed = train(tmp_path / "run", "--profile", "--json")[1]
        assert json.loads(printed)["profile"] == str(tmp_path / "run" / "profile.json.gz")
        assert json.loads(train(tmp_path / "other", "--json")[1])["profile"] is None

    def test_a_violation_is_printed_and_exits_with_1(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With its message, and where the log is; no traceback."""
        build_tree = MCController.build_tree

        def peeking(self: MCController, tokens: object, *rest: object) -> object:
            self.lensnet(tokens)
            return build_tree(self, tokens, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(MCController, "build_tree", peeking)
        code, out, err = train(tmp_path / "run")
        assert code == 1
        assert "UnsanctionedCall: LensNet was called in training outside its sanctioned" in err
        assert f"The log is in {tmp_path / 'run'}; the last checkpoint is kept.\n" in err
        assert "Traceback" not in out + err


class TestLanguageModel:
    def test_a_gguf_file_that_is_frozen(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is said where it was converted to; the other commands find it again."""
        from tests.megacontext.model.test_gguf import write_gguf  # skips without its library

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        write_gguf(tmp_path / "tiny.gguf")
        sizes = {k: SIZES[k] for k in ("block_size", "sequence_tokens", "train_wc_length")}
        sizes |= {k: SIZES[k] for k in ("recent_tokens", "horizon_tokens", "lens_layers")}
        small = {"steps": 2, "batch_size": 2, "warmup_steps": 1, "text": TEXT[0], **sizes}
        run = ("--run-dir", "run")
        model = ("--language-model", "tiny.gguf", "--freeze-language-model")
        code, told, error = invoke("train", *run, *model, *arguments(**small))
        assert code == 0, error
        (folder,) = (path for path in cache_folder().iterdir() if path.is_dir())
        assert told.splitlines()[:2] == [
            f"{tmp_path / 'tiny.gguf'} was converted once, to 0 MB in {folder}",
            f"{tmp_path / 'tiny.gguf'} reads text as its tokenizer's tokens",
        ]
        assert "2 micro-steps, 2 LensNet calls, 0 violations" in told
        assert {name.split(".")[0] for name in weights(tmp_path / "run")} == {"gistnet", "lensnet"}
        code, text, _ = invoke("generate", *run, "--text", "a", "--max-tokens", 4, "--quiet")
        assert (code, bool(text.strip("\n"))) == (0, True)

    def test_stages_beside_it(self, tmp_path: Path) -> None:
        """Each has its option; the gists and losses of a run are taken by another."""
        from tests.megacontext.model.test_hf_language_model import save  # skips without its library

        save("llama, tied", tmp_path / "model")
        sizes = {k: v for k, v in SIZES.items() if k not in ("vocab_size", "d_model", "num_heads")}
        sizes.pop("lm_layers")
        text = Path(TEXT[0]) / "calls"
        small = {"steps": 1, "batch_size": 2, "warmup_steps": 1, "text": text, "data": "files"}
        model = ("--language-model", tmp_path / "model", "--freeze-language-model")
        run = ("--run-dir", tmp_path / "run")
        stages = arguments(gist_steps=1, kept_sequences=5, guess_steps=2)
        code, told, error = invoke("train", *run, *model, *arguments(**sizes, **small), *stages)
        assert code == 0, error
        assert "3 micro-steps, 3 LensNet calls, 0 violations" in told
        for said in ("gists", "pre-training", "losses of variants"):
            assert said in error + told
        saved = json.loads((tmp_path / "run" / "config.json").read_text())["train"]
        assert [saved[n] for n in ("gist_steps", "kept_sequences", "guess_steps")] == [1, 5, 2]
        assert len([*(tmp_path / "run" / "kept").iterdir()]) == 2  # of four sequences each
        again = ("--run-dir", tmp_path / "again", "--gists-of", tmp_path / "run")
        code, told, error = invoke(
            "train", *again, *model, *arguments(**sizes, **small, kept_sequences=5)
        )
        assert code == 0, error
        assert "1 micro-step, 1 LensNet call, 0 violations" in told
        first, second = weights(tmp_path / "run"), weights(tmp_path / "again")
        gists = [name for name in first if name.startswith("gistnet")]
        assert all(first[name].equal(second[name]) for name in gists)

    def test_a_model_that_is_not_there(self, tmp_path: Path) -> None:
        """Neither a name nor a path."""
        code, _, error = invoke("train", "--run-dir", tmp_path, "--language-model", "smollm3")
        assert code == 2
        assert "'smollm3' does not exist" in " ".join(error.split())


class TestWrongUsage:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--train-wc-length", "40"], "train_wc_length 40 cannot be reached"),
            (["--device", "abacus"], "device 'abacus' cannot be used here"),
            (["--steps", "0"], "steps must be positive, not 0"),
            (["--gist-steps", "-1"], "gist_steps must not be negative, but is -1"),
            (["--guess-steps", "9"], "guess_steps is 9, and stages are for losses that do not"),
            (["--kept-sequences", "9"], "they take freeze_language_model and kept_sequences"),
            (["--gists-of", "nowhere"], "'nowhere' does not exist"),
            (["--resume", "--steps", "9"], "leave out --steps, --text"),
        ],
    )
    def test_errors_are_one_message_and_exit_with_2(
        self, tmp_path: Path, options: list[str], message: str
    ) -> None:
        """No traceback, no folder."""
        arguments = [*options, "--text", *TEXT]
        code, _, err = invoke("train", "--run-dir", tmp_path / "run", *arguments)
        assert code == 2
        assert message in " ".join(err.replace("│", " ").split())
        assert not (tmp_path / "run").exists()

    def test_a_folder_that_holds_a_run(self, tmp_path: Path) -> None:
        """Is not overwritten."""
        train(tmp_path / "run")
        code, _, err = train(tmp_path / "run")
        assert code == 2
        assert "holds a run already" in err


class TestHelp:
    def test_every_command_has_an_example(self) -> None:
        """In its --help."""
        assert "Example: megacontext train" in invoke("--help")[1]
        assert "megacontext train --run-dir runs/mine --resume" in invoke("train", "--help")[1]

    def test_python_m_megacontext(self) -> None:
        """The module is the command."""
        command = [sys.executable, "-m", "megacontext", "--help"]
        assert "train" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
