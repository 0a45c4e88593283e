"""What the logs say, also when they are torn, foreign or garbage."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.lensnet_guard.helpers import FILE, SCOPE, X
from torch import nn

from lensnet_guard import CallPolicy, LensNetViolation, guard_module
from lensnet_guard.logs import log_file
from lensnet_guard.postmortem.analysis import KEPT_VIOLATIONS, analyse
from lensnet_guard.postmortem.reader import MAX_LINE_BYTES, find_logs, read_lines


def train(guard, steps, calls=lambda step: 1):
    with guard.context("training"):
        for step in range(steps):
            with guard.micro_step(step), guard.sanctioned(SCOPE):
                for _ in range(calls(step)):
                    guard.module(X)


def logged(folder, **keywords):
    return guard_module(nn.Linear(3, 2), log=folder, name="critic", **keywords)


@pytest.fixture
def log(tmp_path):
    """A clean run of three steps and a call in inference."""
    guard = logged(tmp_path)
    train(guard, 3)
    with guard.context("inference"):
        guard.module(X)
    guard.end_log()
    return tmp_path / FILE


class TestVerdict:
    def test_clean(self, log):
        """With its sums."""
        analysis = analyse([log.parent])
        assert (analysis.verdict, analysis.exit_code) == ("clean", 0)
        (run,) = analysis.runs
        assert (run.module, run.rank, run.mode, run.ended) == ("critic", "0", "enforce", True)
        assert (run.training_calls, run.inference_calls, run.micro_steps) == (3, 1, 3)
        assert list(run.micro_step_calls) == [1, 1, 1]

    def test_violations(self, tmp_path):
        """What was refused, and what set it apart from the call that was allowed."""
        guard = logged(tmp_path)
        train(guard, 1)
        with pytest.raises(LensNetViolation), guard.context("training"), torch.no_grad():
            guard.module(X[:1])
        guard.end_log()
        analysis = analyse([tmp_path])
        assert analysis.exit_code == 1
        assert analysis.verdict.startswith("1 violation, the first UnsanctionedCall at ")
        assert analysis.verdict.endswith("test_violations")
        (violation,) = analysis.runs[0].violations
        assert violation.allowed.seq == 1
        differences = [text.partition(":")[0] for text in violation.differences]
        assert differences == ["caller", "scope", "inputs", "grad"]
        assert "inputs: float32[1, 3] cpu (allowed: float32[2, 3] cpu)" in violation.differences
        assert "grad: disabled (allowed: enabled)" in violation.differences

    def test_a_budget_that_was_missed(self, tmp_path):
        """Which micro-step, made and due."""
        guard = logged(tmp_path, mode="observe", policy=CallPolicy(scopes={SCOPE: 2}))
        train(guard, 4, calls=lambda step: 1 if step == 2 else 2)
        guard.end_log()
        (run,) = analyse([tmp_path]).runs
        (deviation,) = run.deviations
        assert (deviation.step, deviation.made, deviation.due) == (2, {SCOPE: 1}, {SCOPE: 2})
        assert run.violation_count == 1

    def test_torn_at_the_end(self, log):
        """The process died while the disk took half a line."""
        text = log.read_bytes()
        log.write_bytes(text[:-20])
        analysis = analyse([log])
        torn = len(text[:-20].splitlines())
        assert analysis.verdict == (
            f"the process died outside any call of critic, log torn at line {torn} of {FILE}"
        )
        assert analysis.runs[0].torn_at == f"{torn} of {FILE}"

    def test_garbage_in_the_middle(self, log):
        """The rest is read all the same."""
        lines = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(b"".join([*lines[:2], b"\xff\x00garbage\n", b"[1]\n", *lines[2:]]))
        analysis = analyse([log])
        assert (analysis.verdict, analysis.exit_code) == (f"log damaged at line 3 of {FILE}", 1)
        assert analysis.runs[0].unreadable.kept == [f"3 of {FILE}", f"4 of {FILE}"]
        assert analysis.runs[0].training_calls == 3

    @pytest.mark.parametrize("content", [b"", b"\n\n", b"\x00" * 100, b"{}\n[]\n1\n", b"{"])
    def test_nothing_readable(self, tmp_path, content):
        """Exit code 2."""
        (tmp_path / FILE).write_bytes(content)
        analysis = analyse([tmp_path])
        assert analysis.verdict == "unreadable: no line of the log is an event"
        assert analysis.exit_code == 2

    def test_a_killed_run_that_was_resumed(self, log):
        """The last run decides; the one before is told."""
        text = log.read_text()
        killed = "".join(text.splitlines(keepends=True)[:2])
        log.write_text(killed.replace('"service.instance.id":"', '"service.instance.id":"0') + text)
        analysis = analyse([log])
        assert analysis.verdict == "clean; 1 earlier run died"
        assert [run.died for run in analysis.runs] == [True, False]
        assert [call.seq for call in analysis.runs[0].in_flight] == [1]

    def test_lost_lines(self, log):
        """What could not be written is no clean run."""
        log.write_text(log.read_text().replace('"lost_lines":0', '"lost_lines":7'))
        assert analyse([log]).verdict == "7 lines of the log were lost"

    def test_no_log(self, tmp_path):
        """Neither a folder without one nor a path that does not exist."""
        with pytest.raises(FileNotFoundError, match=r"no lensnet\.rank\*\.jsonl in"):
            analyse([tmp_path])
        with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*missing"):
            analyse([tmp_path / "missing"])


class TestRanks:
    def rank(self, folder, rank, monkeypatch, calls):
        monkeypatch.setenv("RANK", rank)
        guard = logged(folder, mode="observe")
        train(guard, 6, calls)
        guard.end_log()

    def test_divergence(self, tmp_path, monkeypatch):
        """Which rank called more often, and from which step on."""
        self.rank(tmp_path, "0", monkeypatch, lambda step: 1)
        self.rank(tmp_path, "1", monkeypatch, lambda step: 2 if step >= 4 else 1)
        analysis = analyse([tmp_path])
        assert analysis.divergence.step == 4
        assert analysis.divergence.calls == {"0": 1, "1": 2}

    def test_a_rank_that_is_behind(self, tmp_path, monkeypatch):
        """Steps that it has not reached tell nothing."""
        self.rank(tmp_path, "0", monkeypatch, lambda step: 1)
        self.rank(tmp_path, "1", monkeypatch, lambda step: 1)
        lines = (tmp_path / "lensnet.rank1.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "lensnet.rank1.jsonl").write_text("".join(lines[:8]))
        assert analyse([tmp_path]).divergence is None

    def test_files_given_one_by_one(self, tmp_path, monkeypatch):
        """As well as their folder."""
        self.rank(tmp_path, "0", monkeypatch, lambda step: 1)
        self.rank(tmp_path, "1", monkeypatch, lambda step: 1)
        assert len(analyse(sorted(tmp_path.iterdir())).runs) == 2

    def test_accumulation_was_called_divergence(self, tmp_path, monkeypatch):
        """A rank that has yet to make the second micro-step of a step is only behind."""
        for rank, micro_steps in (("0", 2), ("1", 1)):
            monkeypatch.setenv("RANK", rank)
            guard = logged(tmp_path)
            with guard.context("training"):
                for micro_step in range(micro_steps):
                    with guard.micro_step(0, micro_step), guard.sanctioned(SCOPE):
                        guard.module(X)
            guard.end_log()
        assert analyse([tmp_path]).divergence is None

    def test_scopes_without_a_number_were_called_divergence(self, tmp_path, monkeypatch):
        """There is nothing to compare them by."""
        for rank, times in (("0", 3), ("1", 2)):
            monkeypatch.setenv("RANK", rank)
            guard = logged(tmp_path)
            with guard.context("training"):
                for _ in range(times):
                    with guard.sanctioned(SCOPE):
                        guard.module(X)
            guard.end_log()
        assert analyse([tmp_path]).divergence is None

    def test_a_log_that_was_named_twice(self, tmp_path, monkeypatch):
        """By its folder and by itself, it is one log."""
        self.rank(tmp_path, "0", monkeypatch, lambda step: 1)
        assert len(analyse([tmp_path, tmp_path / FILE]).runs) == 1


class TestOddLogs:
    def test_violations_in_dropped_segments_ended_the_reader(self, tmp_path, monkeypatch):
        """Their number is known, their lines are gone."""
        monkeypatch.setattr(log_file, "SEGMENT_BYTES", 20_000)
        monkeypatch.setattr(log_file, "KEPT_SEGMENTS", 1)
        guard = logged(tmp_path, mode="observe")
        guard.module(X)
        train(guard, 100)
        guard.end_log()
        assert analyse([tmp_path]).verdict == "1 violation, in lines that are gone"

    def test_guards_of_one_name_in_one_log_hid_a_call_in_flight(self, tmp_path):
        """Each counts from 1: the inner one's end was taken for the outer one's."""
        header = {"event": "run.begin", "schema_version": 1, "module": "Net", "timestamp": 1.0}
        begin = {"event": "call.begin", "module": "Net", "seq": 1, "kind": "call", "thread": "t"}
        end = {"event": "call.end", "module": "Net", "seq": 1, "guard": 2}
        lines = [header, begin | {"guard": 1}, begin | {"guard": 2}, end]
        (tmp_path / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
        analysis = analyse([tmp_path])
        assert analysis.verdict == "crash in call 1 of Net, called from unknown"

    def test_a_name_with_a_lone_surrogate_was_damage(self, tmp_path):
        """As argv has them for file names in another encoding."""
        guard_module(nn.Linear(3, 2), log=tmp_path, name="é\udc80").end_log()
        analysis = analyse([tmp_path])
        assert (analysis.verdict, analysis.runs[0].module) == ("clean", "é\udc80")

    def test_a_folder_with_the_name_of_a_log_hid_the_others(self, log):
        """And a pipe was waited for."""
        (log.parent / "lensnet.rank7.jsonl").mkdir()
        os.mkfifo(log.parent / "lensnet.rank8.jsonl")
        (log.parent / "lensnet.rank9.jsonl").symlink_to("nowhere")
        assert analyse([log.parent]).verdict == "clean"

    def test_a_budget_that_was_missed_without_a_violation(self, log):
        """The micro-step's own line says so."""
        log.write_text(log.read_text().replace('"due":{"preference_scorer":1}', '"due":{"x":1}'))
        assert analyse([log]).verdict == "budget missed in 3 micro-steps"


class TestSegments:
    def test_sums_of_dropped_segments_count(self, tmp_path, monkeypatch):
        """What is gone from the disk is in the header of what is left."""
        monkeypatch.setattr(log_file, "SEGMENT_BYTES", 20_000)
        monkeypatch.setattr(log_file, "KEPT_SEGMENTS", 2)
        guard = logged(tmp_path)
        train(guard, 200)
        guard.end_log()
        assert len(find_logs([tmp_path])[str(tmp_path / "lensnet.rank0")]) == 3
        analysis = analyse([tmp_path])
        (run,) = analysis.runs
        assert run.dropped_segments
        assert (run.training_calls, run.micro_steps, analysis.verdict) == (200, 200, "clean")


class TestAnyBytes:
    @given(st.data())
    @settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_a_log_cut_anywhere(self, log, data):
        """Every prefix of a real log can be read, and no call is counted twice."""
        text = log.read_bytes()
        part = log.parent / "part.jsonl"
        part.write_bytes(text[: data.draw(st.integers(0, len(text)))])
        (run,) = analyse([part]).runs
        assert run.training_calls <= 3

    def test_a_line_without_end(self, tmp_path):
        """A gigabyte in one line is read in pieces, and is one unreadable line."""
        path = tmp_path / FILE
        path.write_bytes(b"x" * (2 * MAX_LINE_BYTES + 5) + b'\n{"event":"run.end"}\n')
        with path.open("rb") as file:
            lines = list(read_lines(file))
        assert [(line.number, line.event is None) for line in lines] == [(1, True), (2, False)]

    def test_many_violations_are_kept_in_part(self, tmp_path):
        """The count is whole."""
        guard = logged(tmp_path, mode="observe")
        for _ in range(KEPT_VIOLATIONS + 5):
            guard.module(X)
        guard.end_log()
        (run,) = analyse([tmp_path]).runs
        assert (len(run.violations), run.violation_count) == (200, 205)


def test_reading_needs_no_torch(run_python: object, log: Path) -> None:
    """A log is read where nothing is installed but this."""
    result = run_python(  # type: ignore[operator]
        """
        import sys
        from lensnet_guard.postmortem import analyse
        print(analyse([sys.argv[1]]).verdict, "torch" in sys.modules)
        """,
        log,
    )
    assert result.stdout == "clean False\n", result.stderr
