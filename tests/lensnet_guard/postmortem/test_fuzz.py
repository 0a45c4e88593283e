"""Torn, truncated, foreign or garbage: every reader of logs comes to an end, and to a verdict."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.lensnet_guard.postmortem import everything
from tests.lensnet_guard.postmortem.everything import FILE, read_everything

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
EVENTS = st.sampled_from(
    [
        *("run.begin", "segment.begin", "call.begin", "call.end", "violation", "micro_step.end"),
        *("window.end", "hazard", "overwritten", "run.end"),
    ]
)
FIELDS = st.sampled_from(
    [
        *("seq", "module", "kind", "reason", "context", "scope", "step", "micro_step", "calls"),
        *("due", "stack", "caller", "inputs", "before", "versions", "rank", "timestamp"),
        *("process.pid", "process.command_args", "lost_lines", "message", "thread", "compiled"),
        *("at", "earlier_at", "earlier_seq", "outcome", "duration_ms", "segment", "violations"),
        *("policies", "policy", "mode", "window", "windows", "method", "callers", "held"),
        *("optimizer_step", "raised"),
    ]
)
LINES = st.builds(
    lambda event, fields: json.dumps({"event": event, **fields}).encode() + b"\n",
    EVENTS,
    st.dictionaries(FIELDS, JSON, max_size=6),
)


FRAME = {"code.file.path": "train.py", "code.line.number": 5, "code.function.name": "step"}
CALL = {"module": "m", "guard": 1, "seq": 1, "kind": "call", "context": "training", "step": 0}
CALL |= {"micro_step": 0, "thread": "t", "inputs": ["float32[1]"], "stack": [FRAME], "caller": 0}
CALL |= {"callers": ["train:step"], "held": ["no_grad", "adapters_on"], "optimizer_step": 0}
CALL |= {"windows": ["w"], "scope": "s"}
PAIR = {"module": "m", "seq": 2, "at": "train.py:6", "earlier_seq": 1, "earlier_at": "train.py:5"}
COMPILED = {
    **{"cuda_graphs": True, "generation": 3, "marks": 1, "live_outputs": [1], "phase": "replay"},
    **{"graphs_compiled": 1, "cuda_graphs_skipped": 1, "new_inputs": True},
}
SEED = [  # one line of every kind
    {"event": "run.begin", "schema_version": 1, "module": "m", "rank": "0", "mode": "observe"},
    {"event": "segment.begin", "schema_version": 1, "segment": 1, "before": {"calls": 0}},
    {"event": "call.begin", **CALL, "compiled": COMPILED},
    {"event": "call.end", **CALL, "outcome": "raised E", "duration_ms": 0.5, "compiled": COMPILED},
    {"event": "violation", **CALL, "seq": 2, "reason": "BypassedGuard", "message": "no"},
    {"event": "micro_step.end", "context": "training", "step": 0, "micro_step": 0, "due": {"s": 1}},
    {"event": "window.end", "context": None, "module": "m", "window": "w", "due": {"s": [1, 2]}},
    {"event": "hazard", **PAIR},
    {"event": "overwritten", **PAIR},
    {"event": "run.end", "violations": 1, "lost_lines": 0},
]


class TestAnyBytes:
    @given(st.lists(LINES | st.binary(max_size=40) | st.just(b"\n"), max_size=12))
    @example([b'{"event":"micro_step.end","context":"training","calls":{"a":-5}}\n'])
    @settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_made_of_events(self, tmp_path, parts):
        """Lines of the right shape with anything in them, among lines of no shape."""
        (tmp_path / FILE).write_bytes(b"".join(parts))
        read_everything(tmp_path)

    @pytest.mark.skipif(
        importlib.util.find_spec("atheris") is None, reason="atheris is not installed"
    )
    def test_guided_by_coverage(self, tmp_path):
        """Each change that reaches new code is kept and changed again, from a fixed seed."""
        corpus, run = tmp_path / "corpus", tmp_path / "run"
        corpus.mkdir()
        run.mkdir()
        lines = [json.dumps({"timestamp": 1e9 + n, **e}) + "\n" for n, e in enumerate(SEED)]
        (corpus / "seed").write_text("".join(lines))
        flags = ("-seed=5", "-runs=600", "-max_total_time=20", "-max_len=8192")
        fuzzed = subprocess.run(
            [sys.executable, everything.__file__, str(run), str(corpus), *flags],
            cwd=tmp_path,  # where a crash would leave its input
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert fuzzed.returncode == 0, fuzzed.stderr[-3_000:]
        covered = [int(number) for number in re.findall(r"cov: (\d+)", fuzzed.stderr)]
        assert re.search(r"Done \d{2,} runs in", fuzzed.stderr)
        assert covered[-1] > covered[0] > 300


class TestFound:
    """What the fuzzers have found."""

    @pytest.mark.parametrize(
        "lines",
        [
            b'{"event":"micro_step.end","step":9223372036854775808,"calls":{"a":1e999}}\n',
            b'{"event":"run.begin","module":"\\ud800","host.name":"\\ud800"}\n',
            b'{"event":"call.begin"}\n{"event":"call.end","outcome":"\\ud800","duration_ms":NaN}\n',
        ],
    )
    def test_the_trace_could_not_be_written(self, tmp_path, lines):
        """Numbers above 64 bits, and halves of a character as file names have them."""
        (tmp_path / FILE).write_bytes(lines)
        read_everything(tmp_path)

    def test_sums_that_python_does_not_print(self, tmp_path):
        """A number of more than 4,300 digits is not turned into text."""
        most = int("9" * 4_300)
        ends = [{"event": "run.begin"}, {"event": "run.end", "violations": most}] * 2
        (tmp_path / FILE).write_text("".join(json.dumps(end) + "\n" for end in ends))
        read_everything(tmp_path)

    def test_text_that_turned_its_direction(self, tmp_path):
        """A name that reads backwards in a terminal comes out as its escape."""
        line = {"event": "violation", "reason": "R", "module": "\u202ecba"}
        (tmp_path / FILE).write_text(json.dumps(line))
        read_everything(tmp_path)
