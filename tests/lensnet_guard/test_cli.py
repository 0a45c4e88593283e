"""The command line, as people and programs meet it."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import nn

from lensnet_guard import cli, guard_module, mistakes
from lensnet_guard.cli import main
from lensnet_guard.mistakes import read_mistakes


@pytest.fixture
def folder(tmp_path):
    guard = guard_module(nn.Linear(3, 2), log=tmp_path / "run", mode="observe", name="critic")
    with guard.context("training"):
        for step in range(2):
            with guard.micro_step(step), guard.sanctioned("preference_scorer"):
                guard.module(torch.ones(1, 3))
        guard.module(torch.ones(2, 3))
    guard.end_log()
    return tmp_path / "run"


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


class TestPostmortem:
    def test_for_people(self, folder):
        """Verdict first, then call sites and the violation with its difference."""
        result = run("postmortem", folder)
        assert result.exit_code == 1
        lines = result.stdout.splitlines()
        assert lines[0].startswith("verdict: 1 violation, the first UnsanctionedCall at ")
        text = result.stdout
        assert "2 training calls in 2 micro-steps, 0 inference calls, 0 recomputes" in text
        assert "UnsanctionedCall (record 3)" in text
        assert "differs   inputs: float32[2, 3] cpu (allowed: float32[1, 3] cpu)" in text
        assert "\n  explained by lensnet-guard explain called-from-elsewhere\n" in text

    def test_for_programs(self, folder):
        """The same as JSON."""
        result = run("postmortem", folder, "--json")
        assert result.exit_code == 1
        found = json.loads(result.stdout)
        assert found["exit_code"] == 1
        (only,) = found["runs"]
        assert (only["module"], only["training_calls"], only["violation_count"]) == ("critic", 2, 1)
        assert {site["times"] for site in only["sites"]} == {1, 2}
        assert only["violations"][0]["call"]["mistake"] == "called-from-elsewhere"

    def test_clean(self, tmp_path):
        """Exit code 0."""
        guard_module(nn.Linear(3, 2), log=tmp_path).end_log()
        result = run("postmortem", tmp_path)
        assert result.exit_code == 0
        assert "clean" in result.stdout

    @pytest.mark.parametrize("arguments", [("missing",), (".",)])
    def test_nothing_to_read(self, tmp_path, monkeypatch, arguments):
        """Exit code 2, and one line that says why."""
        monkeypatch.chdir(tmp_path)
        result = run("postmortem", *arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("lensnet-guard: no ")

    def test_json_of_nothing(self, tmp_path):
        """A program gets an object in any case."""
        result = run("postmortem", tmp_path / "missing", "--json")
        assert result.exit_code == 2
        assert json.loads(result.stdout)["exit_code"] == 2

    @pytest.mark.parametrize("name", ["é\udc80", "plain"])
    def test_json_of_odd_logs(self, tmp_path, name):
        """Names in no encoding, numbers above 64 bits, times beyond all calendars."""
        guard_module(nn.Linear(3, 2), log=tmp_path, name=name).end_log()
        path = tmp_path / "lensnet.rank0.jsonl"
        odd = (
            '{"event":"segment.begin","before":{"calls":18446744073709551615},"timestamp":1e300}\n'
        )
        path.write_text(odd + path.read_text())
        assert json.loads(run("postmortem", tmp_path, "--json").stdout)["runs"]
        assert run("postmortem", tmp_path).exit_code in (0, 1)

    def test_a_file_that_goes_away_meanwhile(self, folder, monkeypatch):
        """As from a log that is being written: its size counts for nothing but the progress bar."""
        gone = folder / "lensnet.rank0.seg00001.jsonl"
        logs = {str(folder / "lensnet.rank0"): [gone, folder / "lensnet.rank0.jsonl"]}
        monkeypatch.setattr(cli, "find_logs", lambda _: logs)
        result = run("postmortem", folder)
        assert result.stdout.startswith("verdict: 1 violation")

    def test_a_module_with_a_markup_name(self, tmp_path):
        """What a terminal library takes for markup is text."""
        guard_module(nn.Linear(3, 2), log=tmp_path, name="[bold]x[/nope]").end_log()
        assert "[bold]x[/nope]" in run("postmortem", tmp_path).stdout

    def test_help(self):
        """With an example."""
        for arguments in (("--help",), ("postmortem", "--help")):
            result = run(*arguments)
            assert result.exit_code == 0
            assert "Example: lensnet-guard postmortem runs/42" in result.stdout

    def test_as_a_module(self, run_python, folder):
        """`python -m lensnet_guard` is the same, and imports no torch."""
        result = run_python(
            """
            import runpy, sys
            sys.argv = ["lensnet-guard", "postmortem", sys.argv[1]]
            try:
                runpy.run_module("lensnet_guard", run_name="__main__")
            except SystemExit as end:
                print(end.code, "torch" in sys.modules)
            """,
            folder,
        )
        assert result.stdout.endswith("1 False\n")


class TestSuggest:
    def test_for_people(self, folder):
        """Python, and what the run would have broken."""
        result = run("suggest", folder)
        assert result.exit_code == 1  # a call outside of any micro-step
        assert result.stdout.startswith("from lensnet_guard import CallPolicy")
        assert '        "preference_scorer": 1,\n' in result.stdout
        assert "# Before this holds:\n# - " in result.stdout

    def test_for_programs(self, folder):
        """The same as JSON."""
        result = run("suggest", folder, "--json")
        found = json.loads(result.stdout)
        assert (result.exit_code, found["exit_code"]) == (1, 1)
        assert found["code"] == run("suggest", folder).stdout
        assert found["modules"][0]["scopes"][0]["name"] == "preference_scorer"

    def test_help(self):
        """With an example."""
        result = run("suggest", "--help")
        assert result.exit_code == 0
        assert "Example: lensnet-guard suggest runs/42 > policy.py" in result.stdout

    def test_needs_no_torch(self, run_python, folder):
        """A log is read where nothing is installed but the command."""
        result = run_python(
            """
            import runpy, sys
            sys.argv = ["lensnet-guard", "suggest", sys.argv[1]]
            try:
                runpy.run_module("lensnet_guard", run_name="__main__")
            except SystemExit as end:
                print(end.code, "torch" in sys.modules)
            """,
            folder,
        )
        assert result.stdout.endswith("1 False\n"), result.stderr


class TestExplain:
    def test_an_entry(self):
        """As it is written, where no terminal is there to show it."""
        result = run("explain", "called-twice")
        assert result.exit_code == 0
        assert result.stdout == read_mistakes()["called-twice"].text
        assert result.stdout.startswith("## called-twice\n\nThe module is called more often")

    def test_in_a_terminal(self):
        """Rendered: no mark of Markdown is left, and code is as it was."""
        console = Console(file=io.StringIO(), force_terminal=True, width=100)
        cli._markdown(read_mistakes()["called-twice"].text, console)
        shown = re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue())
        assert "\x1b[" in console.file.getvalue()
        assert not re.search(r"^## |^```|\*\*", shown, flags=re.MULTILINE)
        assert "critic, x = nn.Sequential(" in shown

    def test_without_a_name(self):
        """All of them, a line each, in columns."""
        result = run("explain")
        assert result.exit_code == 0
        lines = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
        assert lines == [[one.name, one.about] for one in read_mistakes().values()]

    @pytest.mark.parametrize(
        ("name", "told"),
        [
            ("call-twice", "near are called-twice"),
            ("BypassedGuard", "near are bypassed-wrapper"),
            ("zzz", "`lensnet-guard explain` lists them all"),
        ],
    )
    def test_a_name_that_is_none(self, name, told):
        """Exit code 2, and which are near; a program gets an object all the same."""
        result = run("explain", name)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"lensnet-guard: no mistake is called {name!r}; {told}")
        result = run("explain", name, "--json")
        assert (result.exit_code, json.loads(result.stdout)) == (2, {"mistakes": []})

    def test_for_programs(self):
        """One entry, or all."""
        entries = [vars(one) for one in read_mistakes().values()]
        assert json.loads(run("explain", "--json").stdout) == {"mistakes": entries}
        (only,) = json.loads(run("explain", "ema-never", "--json").stdout)["mistakes"]
        assert only == vars(read_mistakes()["ema-never"])

    def test_a_page_that_is_gone(self, monkeypatch):
        """Exit code 2, and one line."""
        monkeypatch.setattr(mistakes, "_page", Path("nowhere/mistakes.md").read_text)
        result = run("explain", "called-twice")
        assert result.exit_code == 2
        assert result.stderr.startswith("lensnet-guard: [Errno 2] No such file")

    def test_help(self):
        """With an example."""
        result = run("explain", "--help")
        assert result.exit_code == 0
        assert "Example: lensnet-guard explain called-twice" in result.stdout

    def test_needs_no_torch(self, run_python):
        """Who reads an entry has waited long enough."""
        result = run_python(
            """
            import runpy, sys
            sys.argv = ["lensnet-guard", "explain", "called-twice"]
            try:
                runpy.run_module("lensnet_guard", run_name="__main__")
            finally:
                print("torch" in sys.modules)
            """
        )
        assert result.stdout.endswith("False\n"), result.stderr


class TestNarrowOutputs:
    """Standard output that lacks characters, room or a reader."""

    @pytest.fixture
    def odd(self, tmp_path):
        """A log with a lone surrogate in its names, and a call site with an ellipsis."""
        for name in ("é\udc80", "…"):
            guard_module(nn.Linear(3, 2), log=tmp_path / "odd", name=name).end_log()
        return tmp_path / "odd"

    @pytest.fixture
    def command(self):
        def command(stdout, *arguments, **env):
            return subprocess.run(
                [sys.executable, "-m", "lensnet_guard", *map(str, arguments)],
                env={**os.environ, **env},
                stdout=stdout,
                stderr=subprocess.PIPE,
                timeout=120,
            )

        return command

    @pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
    def test_half_a_report_and_a_traceback(self, command, odd, encoding):
        """Every run is told of, whatever the encoding."""
        done = command(subprocess.PIPE, "postmortem", odd, PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.startswith(b"verdict: clean")
        assert done.stdout.count(b"mode enforce") == 2
        assert "\\udc80".encode(encoding) in done.stdout

    @pytest.mark.parametrize("name", ["report", "trace"])
    def test_a_file_name_that_cannot_be_printed(self, command, odd, name):
        """The file is written, and its name comes out as escapes."""
        output = odd / "r\udcff é"
        done = command(subprocess.PIPE, name, odd, "-o", output, PYTHONIOENCODING="ascii")
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"r\\udcff \\xe9: " in done.stdout
        assert output.exists()

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
    @pytest.mark.parametrize(
        "options", [("postmortem",), ("postmortem", "--json"), ("report",), ("suggest",)]
    )
    def test_a_full_device(self, command, folder, options):
        """Exit code 2: nobody has heard the verdict."""
        with open("/dev/full", "wb") as full:
            done = command(full, *options, folder)
        told = b"lensnet-guard: cannot write to standard output: No space left on device\n"
        assert (done.returncode, done.stderr) == (2, told)

    @pytest.mark.parametrize(
        "options", [("postmortem",), ("postmortem", "--json"), ("report",), ("suggest",)]
    )
    def test_a_pipe_that_was_closed(self, command, folder, options):
        """`| head -1` has the exit code of the verdict, and no word on stderr."""
        reading, writing = os.pipe()
        os.close(reading)
        done = command(writing, *options, folder)
        os.close(writing)
        assert (done.returncode, done.stderr) == (int("report" not in options), b"")


class TestFilesThatAreWritten:
    """`report` and `trace` replace what they have made, and nothing else."""

    @pytest.mark.parametrize("name", ["report", "trace"])
    @pytest.mark.parametrize("force", [(), ("--force",)])
    def test_the_log_was_written_over(self, folder, name, force):
        """And every other file that the command reads."""
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        (folder / "overview.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        inputs = ["lensnet.rank0.jsonl"]
        inputs += ["metrics.jsonl", "overview.png"] if name == "report" else []
        for file in inputs:
            before = (folder / file).read_bytes()
            result = run(name, folder, "-o", folder / file, *force)
            assert result.exit_code == 2
            assert result.stderr == (
                f"lensnet-guard: {folder / file} is read for this, so it is not written over; "
                "choose another file with -o\n"
            )
            assert (folder / file).read_bytes() == before

    @pytest.mark.parametrize(
        ("name", "usual"), [("report", "report.html"), ("trace", "trace.json")]
    )
    def test_a_checkpoint_was_written_over(self, folder, name, usual):
        """Only --force replaces somebody else's file, also one of the usual name."""
        for options in (("-o", folder / "checkpoint.pt"), ()):
            path = folder / (options[1] if options else usual)
            path.write_bytes(b"weights")
            result = run(name, folder, *options)
            assert result.exit_code == 2
            assert result.stderr.startswith(f"lensnet-guard: {path} holds something else")
            assert path.read_bytes() == b"weights"
            assert run(name, folder, *options, "--force").exit_code == 0
            assert path.read_bytes() != b"weights"

    @pytest.mark.parametrize("name", ["report", "trace"])
    def test_an_earlier_one_is_replaced(self, folder, name):
        """A report of the same run, written while it goes on, needs no option; nor does one of the
        other command pass for it."""
        output = folder / "out"
        assert run(name, folder, "-o", output).exit_code == 0
        assert run(name, folder, "-o", output).exit_code == 0
        other = {"report": "trace", "trace": "report"}[name]
        assert run(other, folder, "-o", output).exit_code == 2
        assert [path.name for path in folder.iterdir() if path.suffix == ".tmp"] == []

    def test_a_log_that_is_no_file(self, tmp_path):
        """Nothing is read, and nothing written."""
        result = run("report", tmp_path, "-o", tmp_path / "out")
        assert (result.exit_code, list(tmp_path.iterdir())) == (2, [])

    @pytest.mark.parametrize("name", ["metrics.jsonl", "overview.png"])
    @pytest.mark.parametrize("kind", ["pipe", "zero"])
    def test_a_device_was_read_for_ever(self, folder, name, kind):
        """A pipe has no end as long as nobody writes to it, /dev/zero has none at all."""
        path = folder / name
        if kind == "zero":
            path.symlink_to("/dev/zero")
        else:
            os.mkfifo(path)
        assert run("report", folder).exit_code == 0


class TestUsage:
    @pytest.mark.parametrize(
        "arguments",
        [
            *(("nonsense",), ("postmortem",), ("postmortem", "--nonsense"), ("report", "a", "b")),
            *(("suggest",), ("suggest", "--nonsense"), ("explain", "a", "b")),
        ],
    )
    def test_it_is_wrong(self, arguments):
        """Exit code 2, with a word on how it is used."""
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("Usage: ")
