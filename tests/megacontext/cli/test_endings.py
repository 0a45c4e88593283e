"""How commands end: exit codes and messages, of real processes that meet real trouble."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
from tests.megacontext.conftest import TEXT, checkpoint, invoke

from megacontext.cli import endings
from megacontext.cli.endings import Termination
from megacontext.training.run_folder import RunFolder

SIZES = "--batch-size 1 --sequence-tokens 96 --train-wc-length 47 --d-model 16 --num-heads 2"
SMALL = f"{SIZES} --lm-layers 1 --lens-layers 1 --recent-tokens 24 --horizon-tokens 8".split()
LONG = [*SMALL, "--steps", "100000", "--log-interval", "1", "--checkpoint-interval", "100000"]


def start(*arguments: object, **more: object) -> "subprocess.Popen[str]":
    """A command, as a user starts it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict(more.pop("env", {}))  # type: ignore[call-overload]
    return subprocess.Popen(
        [sys.executable, "-m", "megacontext", *map(str, arguments)],
        env=environment,
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more},  # type: ignore[call-overload]
    )


def run(*arguments: object, **more: object) -> tuple[int, str, str]:
    """It, to its end."""
    process = start(*arguments, **more)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def train(run_dir: Path, *more: object, **how: object) -> tuple[int, str, str]:
    return run("train", "--run-dir", run_dir, "--text", TEXT[0], *SMALL, "--steps", 1, *more, **how)


def continue_with(run_dir: Path) -> str:
    return (
        f"The log is in {run_dir}; the last checkpoint is kept.\n"
        f"Continue with: megacontext train --run-dir {run_dir} --resume\n"
    )


def steps_are_made(run_dir: Path, process: "subprocess.Popen[str]", number: int = 2) -> None:
    """Wait for a training to be in its loop."""
    while len(RunFolder(run_dir).read_metrics()) < number:
        assert process.poll() is None, process.communicate()[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained, for a step; do not change it."""
    path = tmp_path_factory.mktemp("trained") / "run"
    code, out, err = train(path)
    assert code == 0, out + err
    return path


class TestTermination:
    def test_sigterm_lost_what_was_done_since_the_last_checkpoint(self, tmp_path: Path) -> None:
        """A checkpoint of the step that it came in, 143, how to go on; and the log has an end."""
        run_dir = tmp_path / "run"
        process = start("train", "--run-dir", run_dir, "--text", TEXT[0], *LONG)
        steps_are_made(run_dir, process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 143
        step = checkpoint(run_dir)["step"]
        assert [row["step"] for row in RunFolder(run_dir).read_metrics()] == [*range(1, step + 1)]
        assert err == (
            "SIGTERM: the run ends with this step; another one ends it at once.\n"
            f"Terminated: stopped after step {step}, and saved in {run_dir}.\n"
        ) + continue_with(run_dir)
        last = json.loads((run_dir / "lensnet.rank0.jsonl").read_text().splitlines()[-1])
        assert last["event"] == "run.end"

    def test_a_second_one_ends_it_at_once(self, tmp_path: Path) -> None:
        """Wherever it is: here its step never ends."""
        script = tmp_path / "endless.py"
        script.write_text(
            "import time\n"
            "from megacontext.cli.endings import Termination\n"
            "with Termination() as stop:\n"
            "    stop()\n"
            "    print('asked', flush=True)\n"
            "    while not stop():\n"
            "        pass\n"
            "    print('heard', flush=True)\n"
            "    time.sleep(600)\n"
        )
        process = subprocess.Popen(
            [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for line in ("asked\n", "heard\n"):
            assert process.stdout.readline() == line
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGTERM

    def test_before_the_first_step_it_ends_at_once(self) -> None:
        """For there is nothing to save; and the handler before comes back."""
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as ended, Termination():
            signal.raise_signal(signal.SIGTERM)
        assert ended.value.code == 143
        assert signal.getsignal(signal.SIGTERM) == before

    def test_in_the_phase_of_the_language_model_alone(self, tmp_path: Path) -> None:
        """Saved there, too; and the run goes on to the weights of one that was not stopped."""
        run_dir = tmp_path / "run"
        options = [*SMALL, "--lm-steps", "100000", "--log-interval", "1", "--steps", "1"]
        process = start("train", "--run-dir", run_dir, "--text", TEXT[0], *options)
        assert process.stdout is not None
        # A line for each tenth: the first checkpoint says that the loop is near.
        while not (run_dir / "checkpoint.pt").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 143
        assert checkpoint(run_dir)["step"] == 0

    def test_all_ranks_end_after_the_same_step(self, tmp_path: Path) -> None:
        """Two processes, of which the second is told; no rank waits for one that has gone."""
        run_dir = tmp_path / "run"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        arguments = ["train", "--run-dir", run_dir, "--text", TEXT[0], *LONG, "--accumulation", 2]
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [
            start(*arguments, env=world | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]
        steps_are_made(run_dir, ranks[0])
        ranks[1].send_signal(signal.SIGTERM)
        errors = [rank.communicate(timeout=90)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [143, 143], errors
        step = checkpoint(run_dir)["step"]
        for number, error in enumerate(errors):
            assert f"Terminated: stopped after step {step}, and saved in {run_dir}.\n" in error
            log = (run_dir / f"lensnet.rank{number}.jsonl").read_text().splitlines()
            ended = [json.loads(line) for line in log if '"micro_step.end"' in line]
            assert [line["step"] for line in ended] == [*range(step)]


def limited(**limits: int) -> Callable[[], None]:
    """Sets resource limits of a child, in bytes."""

    def limit() -> None:
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))

    return limit


class TestTrouble:
    def test_a_disk_that_is_full_stayed_so(self, tmp_path: Path) -> None:
        """3, the file's name, and no half checkpoint; a limit of a file's size is a real one."""
        run_dir = tmp_path / "run"
        code, _, err = train(run_dir, preexec_fn=limited(FSIZE=100_000))
        assert code == 3
        assert (
            f"Error: [Errno 27] cannot write {run_dir / 'checkpoint.pt'}: File too large; " in err
        )
        assert err.endswith(continue_with(run_dir))
        assert "Usage" not in err
        assert "Traceback" not in err
        assert not list(run_dir.glob("*.tmp"))
        code, out, err = run("train", "--run-dir", run_dir, "--resume")
        assert code == 0, err
        assert "2 micro-steps, 2 LensNet calls, 0 violations" in out

    def test_too_little_memory(self, tmp_path: Path) -> None:
        """3, and a word of what helps; whoever it is who asks for it."""
        sizes = ["--d-model", 65_536, "--num-heads", 8, "--lm-layers", 40]
        code, _, err = train(tmp_path / "run", *sizes, preexec_fn=limited(AS=16 << 30))
        assert code == 3
        assert "Error: there is not enough memory, and smaller sizes need less (" in err
        assert "Traceback" not in err
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("config.json", b"{}", "{path} is damaged ('model'); put the original back, or start"),
            ("config.json", b'{"model": {"wide": 1}, "train": {}, "source": {}}', "{path} is dam"),
            ("metrics.jsonl", b"hello\n", "line 1 of {path} is damaged (Expecting value"),
            ("metrics.jsonl", b'{"step": "\xff"}\n', "line 1 of {path} is damaged ('utf-8' codec"),
            ("metrics.jsonl", b"[]\n", "line 1 of {path} is damaged (it is no object"),
            ("checkpoint.pt", None, "{path} is damaged ("),
        ],
    )
    def test_a_damaged_file(
        self, name: str, content: bytes | None, message: str, trained: Path, tmp_path: Path
    ) -> None:
        """3, its name, and what to do: not a word on usage. None is cut at 5,000 bytes."""
        run_dir = tmp_path / "run"
        run_dir.mkdir()
        for path in trained.iterdir():
            (run_dir / path.name).write_bytes(path.read_bytes())
        path = run_dir / name
        path.write_bytes(path.read_bytes()[:5_000] if content is None else content)
        code, _, err = invoke("train", "--run-dir", run_dir, "--resume")
        assert code == 3
        assert err.startswith("Error: " + message.format(path=path))
        assert "Usage" not in err
        assert "Traceback" not in err

    def test_a_checkpoint_of_another_model(self, trained: Path, tmp_path: Path) -> None:
        """Is named as well, by all commands."""
        run_dir = tmp_path / "run"
        sizes = [*SMALL, "--d-model", 32]
        invoke("train", "--run-dir", run_dir, "--text", TEXT[0], *sizes, "--steps", 1)
        (run_dir / "checkpoint.pt").write_bytes((trained / "checkpoint.pt").read_bytes())
        for arguments in (
            ("train", "--run-dir", run_dir, "--resume"),
            ("generate", "--run-dir", run_dir, "--text", "a"),
            ("eval", "--run-dir", run_dir, "--sequences", 1, "--oracle-draws", 1),
        ):
            code, _, err = invoke(*arguments)
            assert code == 3
            assert err.startswith(
                f"Error: {run_dir / 'checkpoint.pt'} is damaged (Error(s) in loading state_dict"
            )


class TestStreams:
    @pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
    def test_a_narrow_encoding_stopped_it_in_the_middle(
        self, encoding: str, trained: Path, tmp_path: Path
    ) -> None:
        """All of the text comes, what cannot be written as escapes; so does the strip."""
        prompt = tmp_path / "prompt"
        prompt.write_bytes(bytes(range(256)) * 20)
        code, out, err = run(
            *("generate", "--run-dir", trained, "--prompt", prompt, "--max-tokens", 60),
            *("--show-focus", "--temperature", 2),
            env={"PYTHONIOENCODING": encoding},
            encoding=encoding,
        )
        assert code == 0, err
        assert "\\ufffd" in out
        assert "\\u2588" not in err
        assert "#" in err
        assert "60 bytes generated" in err
        environment = {"PYTHONIOENCODING": encoding}
        code, out, err = train(tmp_path / "rün", env=environment, encoding=encoding)
        assert code == 0, err
        assert "1 micro-step, 1 LensNet call, 0 violations" in out
        code, out, err = run(
            *("eval", "--run-dir", trained, "--sequences", 2, "--oracle-draws", 1),
            env=environment,
            encoding=encoding,
        )
        assert code == 0, err
        assert "recency window" in out

    @pytest.mark.parametrize("command", ["generate", "train"])
    def test_nobody_reads_any_more(self, command: str, trained: Path, tmp_path: Path) -> None:
        """141, as of a program that SIGPIPE ends, and no traceback at the end of Python."""
        read, write = os.pipe()
        os.close(read)
        if command == "generate":
            arguments = ["--run-dir", trained, "--text", "a", "--quiet", "--max-tokens", 500]
        else:
            arguments = ["--run-dir", tmp_path / "run", "--text", TEXT[0], *SMALL, "--steps", 10]
        code, _, err = run(command, *arguments, stdout=write)
        os.close(write)
        assert code == 141
        assert err == ("" if command == "generate" else continue_with(tmp_path / "run"))

    @pytest.mark.parametrize("command", ["generate", "train"])
    def test_a_full_device(self, command: str, trained: Path, tmp_path: Path) -> None:
        """3, and told on the other stream."""
        if command == "generate":
            arguments = ["--run-dir", trained, "--text", "a", "--quiet"]
        else:
            arguments = ["--run-dir", tmp_path / "run", "--text", TEXT[0], *SMALL, "--steps", 10]
        full: IO[str]
        with open("/dev/full", "w") as full:
            code, _, err = run(command, *arguments, stdout=full)
        assert code == 3
        again = "" if command == "generate" else continue_with(tmp_path / "run")
        assert err == f"Error: cannot write to standard output: No space left on device\n{again}"

    def test_streams_that_are_closed_lead_nowhere(self, trained: Path) -> None:
        """None was there, and its methods were not either."""
        command = f'"{sys.executable}" -m megacontext generate --run-dir "{trained}" --text a'
        done = subprocess.run(
            ["bash", "-c", f"{command} --max-tokens 5 >&- <&-"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "5 bytes generated" in done.stderr
        done = subprocess.run(
            ["bash", "-c", f"{command} --max-tokens 5 --top-k 1 2>&- <&-"], capture_output=True
        )
        assert (done.returncode, done.stderr) == (0, b"")


class TestUsage:
    @pytest.mark.parametrize("command", ["train", "eval", "generate"])
    def test_help_has_the_exit_codes(self, command: str) -> None:
        """All of them."""
        out = " ".join(invoke(command, "--help")[1].split())
        assert out.endswith(
            "Exit codes: 0 done, 1 LensNet was called where it may not be, or not as often as it "
            "must, 2 wrong usage, 3 failed otherwise, 130 interrupted, 141 nobody reads the output "
            "any more, 143 terminated."
        )

    def test_a_mistake_of_ours_keeps_its_traceback(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """And has the code of a failure, not that of a broken contract."""
        with pytest.raises(SystemExit) as ended, endings.plain_endings():
            {}["nowhere"]
        assert ended.value.code == 3
        error = capsys.readouterr().err
        assert "KeyError: 'nowhere'" in error
        assert error.endswith("This is a mistake in megacontext. Please report it.\n")
