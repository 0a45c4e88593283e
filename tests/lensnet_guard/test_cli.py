"""The command line, as people and programs meet it."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from lensnet_guard import cli, guard_module
from lensnet_guard.cli import main


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

    def test_for_programs(self, folder):
        """The same as JSON."""
        result = run("postmortem", folder, "--json")
        assert result.exit_code == 1
        found = json.loads(result.stdout)
        assert found["exit_code"] == 1
        (only,) = found["runs"]
        assert (only["module"], only["training_calls"], only["violation_count"]) == ("critic", 2, 1)
        assert {site["times"] for site in only["sites"]} == {1, 2}

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
