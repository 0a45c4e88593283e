"""The files of logs: which they are, and how they are read while somebody writes them."""

import json
import os
from pathlib import Path

import pytest
import torch
from tests.lensnet_guard.helpers import FILE
from torch import nn

from lensnet_guard import guard_module
from lensnet_guard.logs import log_file
from lensnet_guard.logs.run_log import RunLog
from lensnet_guard.postmortem import analyse, reader
from lensnet_guard.postmortem.reader import find_logs, open_logs
from lensnet_guard.postmortem.timeline import read_timelines


@pytest.fixture
def small(monkeypatch):
    """Segments of 20 kB, three of which are kept."""
    monkeypatch.setattr(log_file, "SEGMENT_BYTES", 20_000)
    monkeypatch.setattr(log_file, "KEPT_SEGMENTS", 3)


def train(guard, steps):
    with guard.context("training"):
        for step in range(steps):
            with guard.micro_step(step), guard.sanctioned("preference_scorer"):
                guard.module(torch.ones(2, 3))


class TestFindLogs:
    def test_segments_come_in_the_order_of_their_numbers(self, tmp_path):
        """The current file comes last, and foreign names are logs of their own."""
        names = ["lensnet.rank0.seg00010.jsonl", "lensnet.rank0.seg9.jsonl", FILE]
        for name in (*names, "lensnet.rank0.pid7.jsonl", "other.jsonl"):
            (tmp_path / name).touch()
        logs = find_logs([tmp_path])
        assert [Path(log).name for log in logs] == ["lensnet.rank0", "lensnet.rank0.pid7"]
        assert [path.name for path in logs[str(tmp_path / "lensnet.rank0")]] == [
            *(names[1], names[0]),
            FILE,
        ]

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    def test_something_that_is_neither_a_file_nor_a_folder(self, tmp_path):
        """A pipe or a device would be waited for."""
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(FileNotFoundError, match=r"^neither a file nor a folder: \S+pipe$"):
            find_logs([tmp_path / "pipe"])

    def test_links_in_a_circle(self, tmp_path):
        """They lead nowhere, and hide nothing."""
        (tmp_path / "circle").symlink_to("circle")
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            find_logs([tmp_path / "circle"])
        RunLog(tmp_path, {"module": "m"}).close()
        (tmp_path / "lensnet.rank1.jsonl").symlink_to("lensnet.rank1.jsonl")
        (tmp_path / "lensnet.rank2.jsonl").symlink_to(tmp_path)
        (tmp_path / "lensnet.rank3.jsonl").symlink_to(FILE)
        assert [Path(log).name for log in find_logs([tmp_path])] == ["lensnet.rank0"]


@pytest.mark.usefixtures("small")
class TestWhileItIsWritten:
    def test_a_log_that_was_rotated_meanwhile_looked_damaged(self, tmp_path, monkeypatch):
        """Full files are set aside, and the oldest are gone, between the list and the reading."""
        guard = guard_module(nn.Linear(3, 2), log=tmp_path)
        train(guard, 100)
        opened = reader._open

        def rotate(path, stack):
            monkeypatch.setattr(reader, "_open", opened)
            train(guard, 100)
            return opened(path, stack)

        monkeypatch.setattr(reader, "_open", rotate)
        analysis = analyse([tmp_path])
        assert analysis.verdict == "still running, clean so far"
        assert analysis.runs[0].training_calls == 200
        guard.end_log()

    def test_files_that_are_set_aside_while_they_are_read(self, tmp_path):
        """What is open stays as it was."""
        guard = guard_module(nn.Linear(3, 2), log=tmp_path)
        train(guard, 100)
        ((_, files),) = ((log, files) for log, files in _reading(tmp_path, guard))
        assert not any(file.path.exists() for file in files[:-1])
        guard.end_log()

    def test_between_two_files(self, tmp_path):
        """The new file is not there yet, or nobody has its lock: the full one is still held."""
        guard = guard_module(nn.Linear(3, 2), log=tmp_path)
        train(guard, 2)
        path = guard._history.log.path
        for between in (lambda: None, path.touch):
            if path.exists():
                path.rename(path.with_suffix(".seg00001.jsonl"))
            between()
            assert analyse([tmp_path]).verdict == "still running, clean so far"
        guard.end_log()

    def test_a_reader_that_looked_in_cost_the_log_its_name(self, tmp_path, monkeypatch):
        """It holds the lock for a moment, in which a writer may ask for it."""
        import fcntl

        path = tmp_path / FILE
        path.touch()
        with path.open("rb") as looking:
            fcntl.flock(looking, fcntl.LOCK_SH)
            monkeypatch.setattr(
                log_file.time, "sleep", lambda _: fcntl.flock(looking, fcntl.LOCK_UN)
            )
            log = RunLog(tmp_path, {"module": "m"})
        log.close()
        assert log.path == path

    def test_the_end_of_a_run_between_two_looks(self, tmp_path):
        """A process that wrote as the log was opened was alive then."""
        guard = guard_module(nn.Linear(3, 2), log=tmp_path)
        for _, files in open_logs([tmp_path]):
            guard.end_log()
            assert files[-1].held
            assert files[-1].lines.read().endswith(b"}\n")


def _reading(folder, guard):
    """What is read of a log from which everything is dropped at the first line."""
    for log, files in open_logs([folder]):
        train(guard, 200)
        seqs = [
            json.loads(line)["seq"] for file in files for line in file.lines if b"call.end" in line
        ]
        assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))
        assert len(seqs) > 20
        yield log, files


class TestGaps:
    @pytest.fixture
    def segments(self, tmp_path):
        """Three full files and the last; two calls in each but the second, which has none."""
        begin = {"event": "call.begin", "module": "m", "kind": "call", "context": "inference"}
        paths = [tmp_path / f"lensnet.rank0.seg{number:05}.jsonl" for number in (1, 2, 3)]
        seq = 0
        for number, path in enumerate([*paths, tmp_path / FILE]):
            head = {"event": "segment.begin" if number else "run.begin", "schema_version": 1}
            head |= {"segment": number, "before": {"inference_calls": seq}} if number else {}
            lines = [head | {"module": "m", "rank": "0", "timestamp": 1.0}]
            for _ in range(0 if number == 1 else 2):
                seq += 1
                lines += [begin | {"seq": seq}, {"event": "call.end", "module": "m", "seq": seq}]
            lines += [{"event": "note"}] if number < 3 else [{"event": "run.end"}]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert analyse([tmp_path]).verdict == "clean"
        return [*paths, tmp_path / FILE]

    def test_a_segment_that_is_missing(self, segments):
        """By its number: the second has no call that the sums could miss."""
        segments[1].unlink()
        analysis = analyse([segments[0].parent])
        assert (analysis.verdict, analysis.exit_code) == (
            "log damaged: lensnet.rank0.seg00003.jsonl follows segment 2, and segment 2 is missing",
            1,
        )

    def test_several_segments(self, segments):
        """All of them are named, and the sums of the next one count."""
        for path in segments[1:3]:
            path.unlink()
        analysis = analyse([segments[0].parent])
        assert analysis.verdict == (
            f"log damaged: {FILE} follows segment 3, and segments 2 to 3 are missing"
        )
        assert analysis.runs[0].inference_calls == 6

    def test_the_oldest_segments_are_no_gap(self, segments):
        """They are dropped to bound the space."""
        segments[0].unlink()
        analysis = analyse([segments[0].parent])
        assert (analysis.verdict, analysis.runs[0].dropped_segments) == ("clean", True)
        assert analysis.runs[0].inference_calls == 6

    def test_lines_that_are_missing_inside_a_segment(self, segments):
        """The sums in the next one tell."""
        first, *_, last = segments[2].read_text().splitlines(keepends=True)
        segments[2].write_text(first + last)
        assert analyse([segments[0].parent]).verdict == (
            f"log damaged: {FILE} tells of 4 calls before it, 2 are there"
        )

    def test_the_file_that_is_written_is_missing(self, segments):
        """The run has no end then."""
        segments[3].unlink()
        verdict = analyse([segments[0].parent]).verdict
        assert verdict == "the process died outside any call of m"


class TestFilesThatCannotBeRead:
    def test_hide_no_others(self, tmp_path, monkeypatch):
        """The post-mortem names them, the timeline goes on without."""
        RunLog(tmp_path, {"module": "m"}).close()
        (tmp_path / "lensnet.rank1.jsonl").touch()
        opened = Path.open

        def refuse(path, *arguments, **keywords):
            if "rank1" in path.name:
                raise PermissionError(13, "Permission denied")
            return opened(path, *arguments, **keywords)

        monkeypatch.setattr(Path, "open", refuse)
        verdict = analyse([tmp_path]).verdict
        assert verdict == f"log damaged: {tmp_path / 'lensnet.rank1.jsonl'}: Permission denied"
        assert len(read_timelines([tmp_path])) == 2
