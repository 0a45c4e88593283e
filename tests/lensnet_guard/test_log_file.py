"""The files of a log: segments, in bounded space, whatever the disk does."""

import json

import pytest

from lensnet_guard import guard_module, log_file
from lensnet_guard.log import RunLog
from lensnet_guard.log_file import LogFile, segments_of

FILE = "lensnet.rank0.jsonl"


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def small(monkeypatch):
    """Segments of 20 kB, three of which are kept."""
    monkeypatch.setattr(log_file, "SEGMENT_BYTES", 20_000)
    monkeypatch.setattr(log_file, "KEPT_SEGMENTS", 3)


@pytest.fixture
def call(scorer, x):
    guard = guard_module(scorer)

    def call(folder, times):
        guard.start_log(folder)
        with guard.context("training"):
            for step in range(times):
                with guard.micro_step(step), guard.sanctioned("preference_scorer"):
                    guard.module(x)
        guard.end_log()

    return call


@pytest.mark.usefixtures("small")
class TestSegments:
    def test_space_is_bounded(self, call, tmp_path):
        """However long the run: the current file and the newest full ones."""
        call(tmp_path, 200)
        files = list(tmp_path.iterdir())
        assert len(files) == 4
        assert sum(path.stat().st_size for path in files) < 4 * 20_000 + 4 * 5_000

    def test_nothing_is_lost_between_them(self, call, tmp_path):
        """The lines of all files are those of the run, once each, in order."""
        call(tmp_path, 20)
        path = tmp_path / FILE
        lines = [line for p in (*segments_of(path), path) for line in lines_of(p)]
        begun = [line["seq"] for line in lines if line["event"] == "call.begin"]
        ended = [line["seq"] for line in lines if line["event"] == "call.end"]
        assert len(segments_of(path)) >= 2
        assert begun == ended == list(range(1, 21))
        assert lines[0]["event"] == "run.begin"
        assert lines[-1]["event"] == "run.end"

    def test_each_says_what_it_is(self, call, tmp_path):
        """The header again, the number of the segment before, and the sums up to here."""
        call(tmp_path, 200)
        path = tmp_path / FILE
        first = lines_of(path)[0]
        oldest = segments_of(path)[0]
        assert first["event"] == "segment.begin"
        assert (first["module"], first["rank"], first["schema_version"]) == ("Scorer", "0", 1)
        assert segments_of(path)[-1].name == f"lensnet.rank0.seg{first['segment']:05}.jsonl"
        calls = sum(line["event"] == "call.begin" for line in lines_of(path))
        assert first["before"]["calls"] + calls == 200
        assert lines_of(oldest)[0]["before"]["calls"] > 100  # those before it are gone

    def test_a_later_run_goes_on_counting(self, call, tmp_path):
        """A resumed run overwrites no segment of the one before it."""
        call(tmp_path, 20)
        before = [path.name for path in segments_of(tmp_path / FILE)]
        call(tmp_path, 20)
        after = [path.name for path in segments_of(tmp_path / FILE)]
        assert len(after) == 3
        assert after[-1] > before[-1]

    def test_two_processes_of_one_rank(self, tmp_path):
        """Each has segments of its own."""
        logs = [RunLog(tmp_path, {"module": "m"}) for _ in range(2)]
        for log in logs:
            for number in range(50):
                log.write("note", number=number, text="x" * 1_000)
            assert segments_of(log.path)
        for log in logs:
            log.close()
            numbers = [
                line["number"]
                for path in (*segments_of(log.path), log.path)
                for line in lines_of(path)
                if line["event"] == "note"
            ]
            assert numbers == list(range(50))

    def test_a_folder_that_is_gone(self, tmp_path):
        """A segment that cannot be set aside costs a warning, and the log goes on where it can."""
        log = RunLog(tmp_path / "log", {"module": "m"})
        log.path.unlink()
        with pytest.warns(RuntimeWarning, match="cannot write the log in"):
            for _ in range(50):
                log.write("note", text="x" * 1_000)
        log.close()

    def test_a_line_larger_than_a_segment(self, tmp_path):
        """It is written, once, and the next goes to a new file."""
        log = RunLog(tmp_path, {"module": "m"})
        log.write("note", text="x" * 50_000)
        log.write("note", text="y")
        log.close()
        assert [path.name for path in segments_of(log.path)] == ["lensnet.rank0.seg00001.jsonl"]
        assert len(lines_of(segments_of(log.path)[0])) == 2


class TestLogFile:
    def test_names(self, tmp_path):
        """The first free one: by rank, by process, by number."""
        files = [LogFile(tmp_path, "3") for _ in range(3)]
        pid = files[0].pid
        assert [file.path.name for file in files] == [
            "lensnet.rank3.jsonl",
            f"lensnet.rank3.pid{pid}.jsonl",
            f"lensnet.rank3.pid{pid}.2.jsonl",
        ]
        for file in files:
            file.close()

    def test_foreign_names_are_no_segments(self, tmp_path):
        """What somebody else put there is neither counted nor deleted."""
        for name in ("lensnet.rank0.segments.jsonl", "lensnet.rank0.seg2.jsonl"):
            (tmp_path / name).touch()
        assert [p.name for p in segments_of(tmp_path / FILE)] == ["lensnet.rank0.seg2.jsonl"]

    def test_after_the_end(self, tmp_path):
        """A line for a closed file is lost, and counted."""
        file = LogFile(tmp_path, "0")
        file.close()
        file.write(b"{}\n")
        assert file.lost_lines == 1
