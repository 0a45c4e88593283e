"""The trace of a run, checked against the Trace Event Format."""

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from lensnet_guard import LensNetViolation, guard_module, lensnet_guard
from lensnet_guard.cli import main

# Of each phase, the fields that the format asks for besides ph, ts, pid, tid and name.
REQUIRED = {"X": {"dur"}, "B": set(), "i": {"s"}, "M": {"args"}}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Two micro-steps, a violation, and inference in a thread of its own."""
    guard = guard_module(nn.Linear(2, 2), name="critic")

    def infer() -> None:
        with guard.context("inference"):
            guard.module(torch.ones(1, 2))

    with (
        pytest.warns(RuntimeWarning, match="none left this block"),
        lensnet_guard(guard.module, log=tmp_path),
    ):
        with guard.context("training"):
            for step in range(2):
                with guard.micro_step(step), guard.sanctioned("preference_scorer"):
                    guard.module(torch.ones(1, 2))
            with pytest.raises(LensNetViolation):
                guard.module(torch.ones(1, 2))
        thread = threading.Thread(target=infer, name="evaluator")
        thread.start()
        thread.join()
    return tmp_path


def write_trace(run_dir: Path) -> list[dict[str, Any]]:
    result = CliRunner().invoke(main, ["trace", str(run_dir)])
    assert result.exit_code == 0, result.output
    trace = json.loads((run_dir / "trace.json").read_text())
    assert set(trace) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert result.output == f"{run_dir / 'trace.json'}: {len(trace['traceEvents'])} events\n"
    check_format(trace["traceEvents"])
    return trace["traceEvents"]


def check_format(events: list[dict[str, Any]]) -> None:
    """What viewers ask of every event; and that every track has a name before it is used."""
    named: set[tuple[int, int]] = set()
    for event in events:
        assert event["ph"] in REQUIRED
        assert REQUIRED[event["ph"]] <= set(event)
        assert isinstance(event["name"], str)
        assert type(event["pid"]) is type(event["tid"]) is int
        assert isinstance(event["ts"], (int, float))
        assert event["ts"] >= 0
        assert isinstance(event["args"], dict)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            assert isinstance(event["args"]["name"], str)
            named.add((event["pid"], event["tid"]))
        else:
            assert isinstance(event["cat"], str)
            assert (event["pid"], event["tid"]) in named
        if event["ph"] == "X":
            assert isinstance(event["dur"], (int, float))
            assert event["dur"] >= 0
        if event["ph"] == "i":
            assert event["s"] in ("t", "p", "g")
    check_nesting([event for event in events if event["ph"] == "X"])


def check_nesting(slices: list[dict[str, Any]]) -> None:
    """Viewers drop slices of one track that overlap without one lying inside the other."""
    for track in {(event["pid"], event["tid"]) for event in slices}:
        inside = [s for s in slices if (s["pid"], s["tid"]) == track]
        inside.sort(key=lambda s: s["ts"])
        for former, latter in itertools.pairwise(inside):
            assert former["ts"] + former["dur"] <= latter["ts"] + 1  # microsecond


def log_of(run_dir: Path) -> Path:
    return run_dir / "lensnet.rank0.jsonl"


class TestTrace:
    def test_calls_are_those_of_the_log(self, run_dir: Path) -> None:
        """Begin and duration in microseconds, and what the call was made with."""
        calls = [event for event in write_trace(run_dir) if event.get("cat") == "call"]
        lines = [json.loads(line) for line in log_of(run_dir).read_text().splitlines()]
        begins = [line for line in lines if line["event"] == "call.begin"]
        assert [call["args"]["seq"] for call in calls] == [line["seq"] for line in begins]
        for call, begin in zip(calls, begins, strict=True):
            assert call["ph"] == "X"
            assert call["ts"] == pytest.approx(begin["timestamp"] * 1e6, abs=1)
            assert 0 < call["dur"] <= call["args"]["duration_ms"] * 1e3 + 0.001
            assert call["name"] == f"critic call {begin['seq']}"
            told = ("context", "scope", "step", "inputs")
            assert {k: call["args"][k] for k in told} == {k: begin[k] for k in told}
            assert call["args"]["outcome"] == "returned"
            assert "test_trace.py" in call["args"]["caller"]

    def test_tracks_are_named_after_threads(self, run_dir: Path) -> None:
        """The process after its rank, number, host and module."""
        metadata = [event for event in write_trace(run_dir) if event["ph"] == "M"]
        names = [event["args"]["name"] for event in metadata]
        assert names[0].startswith("rank 0, process ")
        assert names[0].endswith(": critic")
        assert names[1:] == ["MainThread", "micro-steps of MainThread", "evaluator"]
        header = json.loads(log_of(run_dir).read_text().partition("\n")[0])
        assert {event["pid"] for event in metadata} == {header["process.pid"]}

    def test_micro_steps_span_their_calls(self, run_dir: Path) -> None:
        """On a track of their own, from the first call on."""
        events = write_trace(run_dir)
        steps = [event for event in events if event.get("cat") == "micro_step"]
        assert [step["name"] for step in steps] == ["step 0, micro-step 0", "step 1, micro-step 0"]
        for step, call in zip(steps, [e for e in events if e.get("cat") == "call"], strict=False):
            assert step["ph"] == "X"
            assert step["ts"] == call["ts"]
            assert step["dur"] >= call["dur"]
            assert step["tid"] != call["tid"]

    def test_violations_are_instants(self, run_dir: Path) -> None:
        """With their message."""
        (violation,) = [e for e in write_trace(run_dir) if e.get("cat") == "violation"]
        assert violation["ph"] == "i"
        assert violation["name"] == "UnsanctionedCall of critic"
        assert "outside its sanctioned scope" in violation["args"]["message"]

    def test_calls_in_flight_begin_and_never_end(self, run_dir: Path) -> None:
        """A log cut off inside a call, in the middle of the next line."""
        lines = log_of(run_dir).read_text().splitlines(keepends=True)
        log_of(run_dir).write_text("".join(lines[:2]) + lines[2][:20])
        (call,) = [event for event in write_trace(run_dir) if event["ph"] != "M"]
        assert call["ph"] == "B"
        assert call["args"]["outcome"] == "in flight when the log stopped"

    def test_runs_with_one_process_number(self, run_dir: Path) -> None:
        """Ranks in containers are all process 1: each has its own number in the trace."""
        (run_dir / "lensnet.rank1.jsonl").write_bytes(log_of(run_dir).read_bytes())
        events = write_trace(run_dir)
        first, second = sorted({event["pid"] for event in events})
        assert second == first + 1
        assert sum(event["pid"] == second for event in events) == len(events) / 2

    def test_a_micro_step_without_calls(self, tmp_path: Path) -> None:
        """A moment, for nobody knows when it began."""
        guard = guard_module(nn.Linear(2, 2))
        with lensnet_guard(guard.module, log=tmp_path), guard.context("inference"):
            with guard.micro_step(0):
                pass
        (step,) = [event for event in write_trace(tmp_path) if event["ph"] != "M"]
        assert step["ph"] == "i"

    @pytest.mark.parametrize(
        "damage",
        [
            b"",
            b"\x00\xff\n[1]\n{}\n",
            b'{"event":"call.begin"}\n{"event":"violation","stack":[1],"caller":0}\n',
            b'{"event":"run.begin","timestamp":1e308,"process.pid":18446744073709551615}\n',
            b'{"event":"call.begin"}\n{"event":"call.end","duration_ms":-1e300}\n',
            b'{"event":"micro_step.end","calls":[],"step":{},"timestamp":-5.0}\n',
        ],
    )
    def test_damaged_logs(self, run_dir: Path, damage: bytes) -> None:
        """Alone, and at the end of a good log: still a trace that viewers can read."""
        good = log_of(run_dir).read_bytes()
        for content in (damage, good + damage):
            log_of(run_dir).write_bytes(content)
            write_trace(run_dir)


class TestCommand:
    def test_no_log(self, tmp_path: Path) -> None:
        """Exit code 2, one line, and no file."""
        result = CliRunner().invoke(main, ["trace", str(tmp_path)])
        assert result.exit_code == 2
        assert result.output == f"lensnet-guard: no lensnet.rank*.jsonl in {tmp_path}\n"
        assert not list(tmp_path.iterdir())

    def test_the_output_can_be_named(self, run_dir: Path) -> None:
        """And nothing else is left behind."""
        output = run_dir / "named.json"
        assert CliRunner().invoke(main, ["trace", str(run_dir), "-o", str(output)]).exit_code == 0
        assert {path.name for path in run_dir.iterdir()} == {"lensnet.rank0.jsonl", "named.json"}

    def test_an_output_that_is_a_folder(self, run_dir: Path) -> None:
        """Exit code 2 and one line."""
        result = CliRunner().invoke(main, ["trace", str(run_dir), "-o", str(run_dir)])
        assert result.exit_code == 2
        assert result.output == f"lensnet-guard: {run_dir} is there and is no file\n"

    def test_help_has_an_example(self) -> None:
        """One that can be pasted."""
        result = CliRunner().invoke(main, ["trace", "--help"])
        assert "Example: lensnet-guard trace runs/42 -o trace.json" in result.output
