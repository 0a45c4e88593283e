"""The files of a log: segments, in bounded space, whatever the disk does."""

import os
import shutil
import warnings

import pytest
from tests.lensnet_guard.helpers import FILE, read

from lensnet_guard import guard_module
from lensnet_guard.logs import log_file
from lensnet_guard.logs.log_file import LogFile, segments_of
from lensnet_guard.logs.run_log import RunLog
from lensnet_guard.postmortem import analyse


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
        lines = [line for p in (*segments_of(path), path) for line in read(p)]
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
        first = read(path)[0]
        oldest = segments_of(path)[0]
        assert first["event"] == "segment.begin"
        assert (first["module"], first["rank"], first["schema_version"]) == ("Scorer", "0", 1)
        assert segments_of(path)[-1].name == f"lensnet.rank0.seg{first['segment']:05}.jsonl"
        calls = sum(line["event"] == "call.begin" for line in read(path))
        assert first["before"]["calls"] + calls == 200
        assert read(oldest)[0]["before"]["calls"] > 100  # those before it are gone

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
                for line in read(path)
                if line["event"] == "note"
            ]
            assert numbers == list(range(50))

    def test_a_folder_that_may_not_be_changed(self, tmp_path, monkeypatch):
        """A segment that cannot be set aside costs a warning, and the log goes on where it can."""

        def refuse(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "rename", refuse)
        log = RunLog(tmp_path, {"module": "m"})
        with pytest.warns(RuntimeWarning, match="cannot write the log in") as caught:
            for _ in range(50):
                log.write("note", text="x" * 1_000)
            log.close()
        assert len(caught) == 1
        assert len(read(log.path)) == 52

    def test_a_file_that_is_not_ours_was_set_aside(self, tmp_path):
        """Where somebody has put another file in the place of the log, it is left alone."""
        log = RunLog(tmp_path, {"module": "m"})
        log.write("note", text="x" * 30_000)
        log.path.unlink()
        log.path.write_text("mine\n")
        with pytest.warns(RuntimeWarning, match="was removed while the log was written"):
            log.write("note", text="y")
        log.close()
        assert log.path.read_text().startswith("mine\n")
        assert segments_of(log.path) == []

    def test_a_line_larger_than_a_segment(self, tmp_path):
        """It is written, once, and the next goes to a new file."""
        log = RunLog(tmp_path, {"module": "m"})
        log.write("note", text="x" * 50_000)
        log.write("note", text="y")
        log.close()
        assert [path.name for path in segments_of(log.path)] == ["lensnet.rank0.seg00001.jsonl"]
        assert len(read(segments_of(log.path)[0])) == 2


FATES = {  # how people tidy up -> what is said of it
    "removed": lambda path, _: path.unlink(),
    "removed with its folder": lambda path, _: shutil.rmtree(path.parent),
    "moved": lambda path, aside: path.rename(aside),
    "moved with its folder": lambda path, aside: path.parent.rename(aside),
    "emptied": lambda path, _: path.write_bytes(b""),
}


@pytest.mark.parametrize("fate", FATES)
class TestTidiedAway:
    """What becomes of a file is noticed at the next line, a second after the last look or later."""

    @pytest.fixture
    def log(self, tmp_path, monkeypatch):
        monkeypatch.setattr(log_file, "LOOK_S", 0.0)
        return RunLog(tmp_path / "log", {"module": "m"})

    def tidied(self, log, fate, tmp_path):
        """What is told of it: all warnings to the end of the log."""
        path = log.path
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            log.write("note", number=1)
            FATES[fate](path, tmp_path / "aside")
            for number in range(2, 5):
                log.write("note", number=number)
            log.close()
        return [str(warning.message) for warning in caught]

    def test_nobody_heard_of_it(self, log, fate, tmp_path):
        """One warning, and how many lines it has cost at the end."""
        path, folder = log.path, log.folder
        first, *rest = self.tidied(log, fate, tmp_path)
        lost = "" if fate.startswith("moved") else ", and 2 lines with it"
        told = f"{path} was {fate.split()[0]} while the log was written{lost}"
        if fate == "removed with its folder":
            told = f"cannot write the log in {folder}: {told}; [Errno 2] No such file or directory"
            told = f"{told}: '{path}'"
        elif fate == "moved with its folder":
            told += ", which goes on where the file is now"
        else:
            told += ", which goes on in a new file there"
        assert first == (
            f"lensnet_guard: {told}. Enforcement and the ring buffer go on; lost lines are counted."
        )
        count = {"removed": 2, "emptied": 2, "removed with its folder": 5}.get(fate, 0)
        where = folder if fate == "removed with its folder" else path
        last = (
            f"lensnet_guard: {count} log lines could not be written to {where}, or are gone from "
            "it; enforcement was not affected"
        )
        assert rest == ([last] if count else [])
        assert log.lost_lines == count

    def test_what_came_after_was_lost_too(self, log, fate, tmp_path):
        """Unless the folder is gone, the lines after it are in a file, and nothing is there twice.

        The new file is a log of its own, that says what came before.
        """
        self.tidied(log, fate, tmp_path)
        if fate == "removed with its folder":
            assert list(tmp_path.iterdir()) == []
            return
        moved = fate == "moved with its folder"
        lines = read((tmp_path / "aside" if moved else tmp_path / "log") / FILE)
        first = [("run.begin", None), ("note", 1)] if moved else [("segment.begin", None)]
        assert [(line["event"], line.get("number")) for line in lines] == [
            *first,
            *(("note", number) for number in range(2, 5)),
            ("run.end", None),
        ]
        lost = 0 if fate.startswith("moved") else 2
        assert moved or (lines[0]["segment"], lines[0]["before"]["lost_lines"]) == (0, lost)
        assert lines[-1]["lost_lines"] == lost

    def test_at_the_very_end(self, log, fate, tmp_path, monkeypatch):
        """A log looks once more before it ends, however short ago it has looked."""
        monkeypatch.setattr(log_file, "LOOK_S", 3_600.0)
        log.write("note")
        FATES[fate](log.path, tmp_path / "aside")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            log.close()
        assert f"was {fate.split()[0]} while the log was written" in str(caught[0].message)

    def test_for_a_reader(self, log, fate, tmp_path):
        """What is left says that lines are missing, and is not taken for damage."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            self.tidied(log, fate, tmp_path)
        if fate != "removed with its folder":
            moved = fate == "moved with its folder"
            analysis = analyse([tmp_path / "aside" if moved else tmp_path / "log"])
            (run,) = analysis.runs
            told = "clean" if fate.startswith("moved") else "2 lines of the log were lost"
            assert (analysis.verdict, run.damage.count) == (told, 0)
            assert run.dropped_segments is not moved


class TestLogFile:
    def test_names(self, tmp_path):
        """The first free one: by rank, by process, by number."""
        pid = os.getpid()
        files = [LogFile(tmp_path, pid) for _ in range(3)]
        for file in files:
            file.open("3")
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
        file = LogFile(tmp_path, os.getpid())
        file.open("0")
        file.close()
        file.write(b"{}\n")
        assert file.lost_lines == 1
