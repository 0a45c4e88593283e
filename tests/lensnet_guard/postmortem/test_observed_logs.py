"""Logs that tell little of how a module is called, or are damaged."""

import json
import os
import shutil
from pathlib import Path

import pytest
from tests.lensnet_guard.helpers import FILE, X, read
from tests.lensnet_guard.postmortem import programs
from tests.lensnet_guard.postmortem.test_observed import run, suggested
from tests.lensnet_guard.postmortem.test_suggest import observe
from torch import nn

from lensnet_guard import guard_module
from lensnet_guard.logs import log_file
from lensnet_guard.postmortem.observed import NotObserved, read_observed

BEFORE = Path(__file__).parents[1] / "before" / "run"


class TestNothingToSuggest:
    def test_no_call(self, tmp_path):
        """Exit code 1, and a question."""
        guard_module(nn.Linear(3, 2), mode="observe", log=tmp_path, name="critic").end_log()
        result = run(tmp_path)
        assert (result.exit_code, result.stdout) == (
            1,
            "# critic: 0 calls in training, 0 in inference\n\n# Before this holds:\n"
            "# - no call of critic was seen: is guard.module in its place?\n",
        )

    @pytest.mark.parametrize(
        ("log", "message"),
        [
            (
                BEFORE / "lensnet.rank0.jsonl",
                f"lensnet-guard: {BEFORE}/lensnet.rank0 is of a run in mode 'enforce', and only "
                "one that observes shows how its modules are called: run it once with "
                'mode="observe" or LENSNET_GUARD=observe, and a log\n',
            ),
            (
                BEFORE / "lensnet.rank1.jsonl",
                f"lensnet-guard: {BEFORE}/lensnet.rank1 was written by a lensnet-guard that did "
                "not note who makes a call and in what state; observe the run once more, with this "
                "version\n",
            ),
            ("missing", "lensnet-guard: no such file or folder: missing\n"),
        ],
    )
    def test_wrong_logs(self, log, message):
        """Exit code 2, and what to do."""
        result = run(log)
        assert (result.exit_code, result.stdout, result.stderr) == (2, "", message)
        result = run(log, "--json")
        assert (result.exit_code, json.loads(result.stdout)["exit_code"]) == (2, 2)

    def test_from_memory(self, tmp_path):
        """What was kept until a training raised tells of its last calls alone."""
        guard = guard_module(nn.Linear(3, 2), mode="observe")
        guard.module(X)
        guard.evidence(tmp_path)
        with pytest.raises(NotObserved, match="was written from memory, as a training ended"):
            read_observed([tmp_path])

    def test_an_observed_run_beside_others(self, tmp_path):
        """It is taken, and the others are told."""
        observe(tmp_path, programs.dpo)
        shutil.copy(BEFORE / "lensnet.rank0.jsonl", tmp_path / "lensnet.rank7.jsonl")
        found, faults = suggested(tmp_path)
        assert found.scopes[0].calls == 1
        assert [fault.partition(" is of a run in mode ")[2][:9] for fault in faults] == [
            "'enforce'"
        ]


class TestDamage:
    def test_a_log_cut_anywhere(self, tmp_path):
        """Each prefix ends in a suggestion or in words; none of them asks for more calls."""
        observe(tmp_path, programs.dpo)
        lines = (tmp_path / FILE).read_text().splitlines(keepends=True)
        for number in range(1, len(lines)):
            (tmp_path / FILE).write_text("".join(lines[:number]) + lines[number][:30])
            found, faults = suggested(tmp_path)
            assert f"{tmp_path}/lensnet.rank0: it stops before the end of the run" in faults
            assert found.scopes in (None, ()) or [s.calls for s in found.scopes] in ([1], [(0, 1)])

    def test_a_log_without_its_beginning(self, tmp_path, monkeypatch):
        """The first window of what is left is not whole, and it is told."""
        monkeypatch.setattr(log_file, "SEGMENT_BYTES", 4_000)
        observe(tmp_path, programs.dpo, steps=12)
        files = sorted(tmp_path.glob("*.seg*"))
        assert len(files) > 2
        for file in files[: len(files) // 2]:
            os.unlink(file)
        first = read(files[len(files) // 2])
        assert [line["event"] for line in first[1:4] if line["event"] != "violation"] != [
            *("call.begin", "call.end", "micro_step.end"),
        ]  # it begins within one
        found, faults = suggested(tmp_path)
        assert [scope.calls for scope in found.scopes] == [1]
        assert f"{tmp_path}/lensnet.rank0: its first lines are gone" in faults

    def test_lines_that_are_none(self, tmp_path):
        """They are counted."""
        observe(tmp_path, programs.dpo)
        path = tmp_path / FILE
        path.write_text("nonsense\n" + path.read_text())
        _, faults = suggested(tmp_path)
        assert faults == [f"{tmp_path}/lensnet.rank0: 1 line cannot be read"]

    def test_a_killed_micro_step(self, tmp_path):
        """Its calls may be fewer than were due, and not more than were made."""
        observe(tmp_path, programs.kto_of_one_function)
        lines = read(tmp_path / FILE)
        ends = [n for n, line in enumerate(lines) if line["event"] == "micro_step.end"]
        text = (tmp_path / FILE).read_text().splitlines(keepends=True)
        (tmp_path / FILE).write_text("".join(text[: ends[2] - 2]))
        found, _ = suggested(tmp_path)
        assert found.scopes[0].calls == 2
