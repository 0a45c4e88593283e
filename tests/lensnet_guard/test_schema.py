"""The names in a log: one list for writer and reader, and nothing is written that is not in it."""

import json
from pathlib import Path

import pytest
from torch import nn

from lensnet_guard import CallRecord, MicroStep, NoContext, Window, _schema, guard_module
from lensnet_guard.calls.compiled import CompileState
from lensnet_guard.logs import log_file
from lensnet_guard.logs.run_log import RunLog

BEFORE = Path(__file__).parent / "before" / "run"
NAMES = {value for name, value in vars(_schema).items() if name.isupper()}


def names_of(lines):
    """Events and fields of a log's lines, down to frames and sums; not the keys of a contract."""
    for line in map(json.loads, lines):
        yield from (line[_schema.EVENT], *line)
        yield from line.get(_schema.BEFORE, {})
        yield from line.get(_schema.COMPILED) or {}
        for frame in line.get(_schema.STACK, ()):
            yield from frame


@pytest.mark.parametrize(
    ("fields", "cls"), [(_schema.RECORD, CallRecord), (_schema.COMPILE_STATE, CompileState)]
)
def test_what_is_written_as_it_is(fields, cls):
    """Every public field of a record, in its order."""
    assert fields == tuple(name for name in cls.__slots__ if not name.startswith("_"))


def test_no_name_stands_for_two():
    """Every constant has a string of its own."""
    strings = [value for name, value in vars(_schema).items() if name.isupper()]
    assert len({*strings}) == len(strings)


def test_every_name_in_a_log_is_in_the_list(graphed_guard, tmp_path, x):
    """In a log of today, with compiled calls, and in one of before there was a list."""
    graphed_guard.start_log(tmp_path)
    with graphed_guard.context("training"), graphed_guard.sanctioned("preference_scorer"):
        graphed_guard.module(x)
    plain = guard_module(graphed_guard.module.__class__(3, 2), log=tmp_path / "plain")
    with plain.context("inference"):
        plain.module(x)
    plain.end_log()
    graphed_guard.end_log()
    files = [*tmp_path.rglob("*.jsonl"), *BEFORE.glob("*.jsonl")]
    assert len(files) == 4
    for file in files:
        assert {*names_of(file.read_text().splitlines())} <= NAMES


def test_every_event_has_its_names_in_the_list(tmp_path, x, monkeypatch):
    """Those too that only a rare run writes: hazards, a full file, records from memory."""
    guard = guard_module(nn.Linear(3, 2))
    with guard.context("inference"):
        guard.module(x)
    with pytest.raises(NoContext):
        guard.module(x)
    guard.evidence(tmp_path / "memory")
    first, second = guard.calls
    log = RunLog(tmp_path / "run", {_schema.MODULE: "critic"})
    log.hazard(second, first)
    log.overwritten(second, first, RuntimeError("overwritten"))
    log.micro_step("critic", "training", MicroStep(0, 0, {"critic": 1}, "training"))
    log.window("critic", Window("rollout", {"critic": (0, None)}, "training"))
    monkeypatch.setattr(log_file, "SEGMENT_BYTES", 1)
    log.write(_schema.TEST_BEGIN, **{_schema.TEST: "test_it"})
    log.write(_schema.TEST_END, **{_schema.TEST: "test_it"})
    log.close()
    lines = [line for file in tmp_path.rglob("*.jsonl") for line in file.read_text().splitlines()]
    assert {*names_of(lines)} <= NAMES
    written = {json.loads(line)[_schema.EVENT] for line in lines}
    assert written == {
        *(_schema.RUN_BEGIN, _schema.SEGMENT_BEGIN, _schema.CALL_BEGIN, _schema.CALL_END),
        *(_schema.VIOLATION, _schema.HAZARD, _schema.OVERWRITTEN, _schema.MICRO_STEP_END),
        *(_schema.WINDOW_END, _schema.TEST_BEGIN, _schema.TEST_END, _schema.RUN_END),
    }


def test_it_needs_nothing(run_python):
    """A reader of logs starts without torch."""
    code = "import sys, lensnet_guard._schema; print({'torch', 'orjson'} & {*sys.modules})"
    assert run_python(code).stdout == "set()\n"
