"""What a command writes: to any standard output, and over no file but its own."""

import io
import os
import subprocess
import sys

import pytest

from lensnet_guard._output import fail, require_own, show

MARK = b"<mark>"


@pytest.fixture
def show_in_process():
    """Show a text in a process of its own, whose standard output is ``stdout``."""

    def run(text, stdout, times=1, **env):
        shown = f"show({text!r} * {times})"
        code = f"from lensnet_guard._output import show\n{shown}\nraise SystemExit(7)"
        return subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **env},
            stdout=stdout,
            stderr=subprocess.PIPE,
            timeout=60,
        )

    return run


class TestShow:
    @pytest.mark.parametrize(
        ("encoding", "shown"),
        [
            ("ascii", b"\\u2026 \\xe9 \\udc80 \\u8a55"),
            ("cp1252", b"\x85 \xe9 \\udc80 \\u8a55"),
            ("utf-8", b"\xe2\x80\xa6 \xc3\xa9 \\udc80 \xe8\xa9\x95"),
        ],
    )
    def test_a_character_that_the_encoding_lacks_ended_in_a_traceback(
        self, show_in_process, encoding, shown
    ):
        """Its escape is shown, also of what no encoding has."""
        done = show_in_process("… é \udc80 評", subprocess.PIPE, PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stdout, done.stderr) == (7, shown, b"")

    def test_bytes_are_never_recoded(self, show_in_process):
        """JSON is UTF-8, whatever the terminal is."""
        done = show_in_process("é".encode(), subprocess.PIPE, PYTHONIOENCODING="ascii")
        assert (done.returncode, done.stdout, done.stderr) == (7, "é".encode(), b"")

    def test_an_output_that_has_no_encoding(self, monkeypatch):
        """As in a test, or a notebook."""
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        show("é\udc80")
        assert sys.stdout.getvalue() == "é\\udc80"

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
    @pytest.mark.parametrize("text", ["é", b"bytes"])
    def test_a_full_device_ended_in_a_traceback(self, show_in_process, text):
        """Exit code 2, and one line that says why."""
        with open("/dev/full", "wb") as full:
            done = show_in_process(text, full)
        told = b"lensnet-guard: cannot write to standard output: No space left on device\n"
        assert (done.returncode, done.stderr) == (2, told)

    @pytest.mark.parametrize("text", ["é", b"bytes"])
    @pytest.mark.parametrize("times", [1, 100_000])
    def test_a_reader_that_has_gone(self, show_in_process, text, times):
        """It has seen enough: no word, and the exit code is that of the command."""
        reading, writing = os.pipe()
        os.close(reading)
        done = show_in_process(text, writing, times)
        os.close(writing)
        assert (done.returncode, done.stderr) == (7, b"")

    @pytest.mark.parametrize("text", ["é", b"bytes"])
    def test_an_output_that_is_closed(self, monkeypatch, text):
        """Python has none then."""
        monkeypatch.setattr(sys, "stdout", None)
        show(text)


class TestFail:
    def test_the_reason(self, capsys):
        """Exit code 2, and one line."""
        with pytest.raises(SystemExit) as ended:
            fail(OSError("no paper"))
        assert ended.value.code == 2
        assert capsys.readouterr().err == "lensnet-guard: no paper\n"

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
    def test_nobody_to_tell(self, monkeypatch):
        """The exit code tells it alone."""
        with open("/dev/full", "w", buffering=1) as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", full)
            with pytest.raises(SystemExit) as ended:
                fail(OSError("no paper"))
            os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
        assert ended.value.code == 2


class TestRequireOwn:
    @pytest.mark.parametrize("force", [False, True])
    @pytest.mark.parametrize("link", [None, os.symlink, os.link])
    def test_an_input_was_written_over(self, tmp_path, link, force):
        """By whatever name, with or without force, even if it looks like an earlier output."""
        read = tmp_path / "log"
        read.write_bytes(MARK)
        path = tmp_path / "link" if link else tmp_path / "." / "log"
        if link:
            link(read, path)
        with pytest.raises(FileExistsError) as caught:
            require_own(path, [tmp_path / "missing", read], MARK, force=force)
        assert str(caught.value) == (
            f"{path} is read for this, so it is not written over; choose another file with -o"
        )

    @pytest.mark.parametrize("content", [b"weights", b" " * 2_000 + MARK])
    def test_a_foreign_file_was_written_over(self, tmp_path, content):
        """Only force does that."""
        path = tmp_path / "checkpoint.pt"
        path.write_bytes(content)
        with pytest.raises(FileExistsError) as caught:
            require_own(path, [], MARK, force=False)
        assert str(caught.value) == (
            f"{path} holds something else, so it is not written over; choose another file with -o, "
            "or replace it with --force"
        )
        require_own(path, [], MARK, force=True)

    @pytest.mark.parametrize("content", [None, b"", b"<html>" + MARK + b"..."])
    def test_what_may_be_written(self, tmp_path, content):
        """What is not there, what is empty, and what the command has made before."""
        path = tmp_path / "report.html"
        if content is not None:
            path.write_bytes(content)
        require_own(path, [], MARK, force=False)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs os.mkfifo")
    def test_a_pipe_was_waited_for(self, tmp_path):
        """What is no file holds nothing to be lost; whoever opens it says what it is."""
        os.mkfifo(tmp_path / "pipe")
        require_own(tmp_path / "pipe", [], MARK, force=False)
