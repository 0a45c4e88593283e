"""Files that are written whole or not at all, and errors that name them."""

import errno
import threading
from pathlib import Path

import pytest
import torch

from megacontext.files import (
    DamagedFileError,
    cannot_write,
    hold_lock,
    reading,
    replacing,
    write_atomically,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that is there, on a disk that is full from now on."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    (tmp_path / "file.tmp").symlink_to("/dev/full")
    return path


class TestReplacing:
    @pytest.mark.parametrize("sync", [True, False])
    def test_the_new_file_takes_the_old_ones_place(self, tmp_path: Path, sync: bool) -> None:
        """And nothing else is left."""
        path = tmp_path / "file"
        path.write_bytes(b"old")
        with replacing(path, sync=sync) as file:
            file.write(b"new")
            assert path.read_bytes() == b"old"
        assert path.read_bytes() == b"new"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_what_was_half_written_filled_the_disk(
        self, tmp_path: Path, error: type[BaseException]
    ) -> None:
        """Whatever stops it, the old file is kept, and no other; the exception is as it was."""
        path = tmp_path / "file"
        path.write_bytes(b"old")
        with pytest.raises(error, match=r"^'?stopped'?$"), replacing(path) as file:
            file.write(b"half")
            raise error("stopped")
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_full_disk(self, path: Path) -> None:
        """Is told with the file's name, its state and what to do."""
        with pytest.raises(OSError) as raised:
            write_atomically(path, b"new")
        assert raised.value.errno == errno.ENOSPC
        assert raised.value.strerror == (
            f"cannot write {path}: No space left on device; what was there is kept, so make room "
            "and try again"
        )
        assert path.read_bytes() == b"old"
        assert list(path.parent.iterdir()) == [path]

    @pytest.mark.parametrize("numbers", [10, 10_000_000])
    def test_torch_told_of_a_full_disk_as_an_internal_error(self, path: Path, numbers: int) -> None:
        """An enforce that failed in its writer; how large the file is decided which error."""
        with pytest.raises(OSError, match=r"cannot write .*file: No space left on device"):
            with replacing(path) as file:
                torch.save({"weights": torch.zeros(numbers)}, file)
        assert path.read_bytes() == b"old"
        assert list(path.parent.iterdir()) == [path]

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        """Room would not help."""
        path = tmp_path / "nowhere" / "file"
        error = OSError(errno.ENOENT, "No such file or directory")
        with pytest.raises(OSError) as raised:
            write_atomically(path, b"new")
        assert str(raised.value) == str(cannot_write(path, error))
        assert str(raised.value).endswith("No such file or directory; what was there is kept")


class TestLock:
    def test_one_at_a_time(self, tmp_path: Path) -> None:
        """In the same process too; the message is the one that was given, the file stays."""
        path = tmp_path / "lock"
        held = hold_lock(path, "somebody is at it")
        with pytest.raises(BlockingIOError, match=r"^somebody is at it$"):
            hold_lock(path, "somebody is at it")
        held.release()
        hold_lock(path, "").release()

    def test_it_is_let_go_with_whoever_has_it(self, tmp_path: Path) -> None:
        """A session that nobody refers to any more blocks nobody, whatever thread ends it."""
        held = [hold_lock(tmp_path / "lock", "")]
        thread = threading.Thread(target=held.clear)
        thread.start()
        thread.join()
        hold_lock(tmp_path / "lock", "").release()


class TestReading:
    @pytest.mark.parametrize(
        ("error", "found"),
        [
            (ValueError("line one:\nline two"), "line one"),
            (KeyError("step"), "'step'"),
            (EOFError(), "EOFError"),
            (OSError(errno.EINVAL, "Invalid argument"), "[Errno 22] Invalid argument"),
        ],
    )
    def test_whatever_is_wrong_is_told_with_the_file(self, error: Exception, found: str) -> None:
        """In one line. Libraries raise anything over bytes that they did not expect."""
        with pytest.raises(DamagedFileError) as raised, reading(Path("f"), "put it back"):
            raise error
        assert str(raised.value) == f"f is damaged ({found}); put it back"

    @pytest.mark.parametrize(
        "error",
        [
            MemoryError(),
            torch.OutOfMemoryError("CUDA out of memory"),
            PermissionError(errno.EACCES, "Permission denied", "f"),
            DamagedFileError("another file is damaged"),
            KeyboardInterrupt(),
        ],
    )
    def test_what_is_not_the_files_fault_is_as_it_was(self, error: BaseException) -> None:
        """Nor what has a name already."""
        with pytest.raises(type(error)) as raised, reading(Path("f"), "put it back"):
            raise error
        assert raised.value is error
