"""The run folder: nothing half-written, nothing overwritten."""

import json
import os
from pathlib import Path

import pytest
import torch

from megacontext.files import DamagedFileError
from megacontext.training.run_folder import RunFolder

CONFIG = {"model": {"d_model": 8}, "train": {}, "source": {}}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create(CONFIG)
    return folder


class TestCreate:
    def test_the_configuration_is_there_at_once(self, folder: RunFolder) -> None:
        """And read back as it was."""
        assert folder.read_config() == CONFIG

    def test_a_run_is_never_overwritten(self, folder: RunFolder, tmp_path: Path) -> None:
        """Nor is anything else that stands in the folder's place."""
        with pytest.raises(FileExistsError, match="holds a run already: continue it with --resume"):
            folder.create({})
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "thesis.tex").touch()
        with pytest.raises(FileExistsError, match="other is not an empty folder"):
            RunFolder(tmp_path / "other").create({})
        (tmp_path / "file").touch()
        with pytest.raises(FileExistsError, match="file is not an empty folder"):
            RunFolder(tmp_path / "file").create({})

    def test_a_relative_folder_moved_with_the_process(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It stays where the run began, whatever directory a callback changes to."""
        monkeypatch.chdir(tmp_path)
        folder = RunFolder("run")
        folder.create(CONFIG)
        (tmp_path / "other").mkdir()
        monkeypatch.chdir(tmp_path / "other")
        folder.append_metrics({"step": 1})
        folder.save_checkpoint({"step": 1})
        assert folder.read_config() == CONFIG
        names = {path.name for path in (tmp_path / "run").iterdir()}
        assert names == {"config.json", "metrics.jsonl", "checkpoint.pt"}

    @pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"model": null}', b"\xff\xfe", b"7"])
    def test_a_damaged_configuration_is_named(self, folder: RunFolder, content: bytes) -> None:
        """Whatever an editor did to it."""
        folder.config.write_bytes(content)
        with pytest.raises(DamagedFileError, match=r"config\.json is damaged \(.*put the original"):
            folder.read_config()

    def test_a_disk_that_is_full_left_half_a_folder(self, tmp_path: Path) -> None:
        """That no run could begin in, and none go on."""
        tokenizer = tmp_path / "tokenizer.json"
        tokenizer.write_text("{}")
        there = tmp_path / "there"
        there.mkdir()
        for path in (there, tmp_path / "new"):
            with pytest.raises(OSError, match=r"vocab\.json"):
                RunFolder(path).create(CONFIG, [tokenizer, tmp_path / "vocab.json"])
        assert sorted(p.name for p in tmp_path.iterdir()) == ["there", "tokenizer.json"]
        assert list(there.iterdir()) == []

    def test_two_processes_cannot_train_in_one_folder(self, folder: RunFolder) -> None:
        """Two resumed runs would write the same checkpoint."""
        with (
            folder.locked(),
            pytest.raises(BlockingIOError, match="another process is training"),
            folder.locked(),
        ):
            pass
        with folder.locked():
            assert folder.config.exists()

    def test_no_run_to_resume(self, tmp_path: Path) -> None:
        """The message names the folder."""
        with pytest.raises(FileNotFoundError, match=r"nowhere holds no run to resume: no config"):
            RunFolder(tmp_path / "nowhere").read_config()


class TestMetrics:
    def test_undefined_values_become_null(self, folder: RunFolder) -> None:
        """JSON has no nan."""
        folder.append_metrics({"step": 1, "loss": 0.5, "lod_loss/2": float("nan")})
        assert folder.read_metrics() == [{"step": 1, "loss": 0.5, "lod_loss/2": None}]

    def test_a_torn_last_line_is_no_line(self, folder: RunFolder) -> None:
        """As a kill may leave it."""
        folder.append_metrics({"step": 1})
        with folder.metrics.open("a") as file:
            file.write('{"step": 2, "lo')
        assert folder.read_metrics() == [{"step": 1}]

    @pytest.mark.parametrize(
        ("line", "found"),
        [
            (b"hello", "Expecting value: line 1 column 1 (char 0)"),
            (b"", "Expecting value: line 1 column 1 (char 0)"),
            (b'{"\xe9": 1}', "'utf-8' codec can't decode byte"),
            (b"[]", "it is no object with a step"),
            (b'{"loss": 1}', "it is no object with a step"),
            (b'{"step": null}', "it is no object with a step"),
            (b'{"step": 2, "loss": "low"}', "loss is no number"),
        ],
    )
    def test_a_damaged_line_is_named(self, folder: RunFolder, line: bytes, found: str) -> None:
        """Whatever it holds; and the file is as it was."""
        folder.append_metrics({"step": 1})
        with folder.metrics.open("ab") as file:
            file.write(line + b"\n")
        before = folder.metrics.read_bytes()
        with pytest.raises(DamagedFileError) as raised:
            folder.drop_metrics_after(1)
        assert str(raised.value).startswith(f"line 2 of {folder.metrics} is damaged ({found}")
        assert str(raised.value).endswith("); take that line out")
        assert folder.metrics.read_bytes() == before

    def test_a_full_disk_is_named(self, folder: RunFolder) -> None:
        """With the state of the file, and what to do."""
        folder.metrics.symlink_to("/dev/full")
        with pytest.raises(OSError) as raised:
            folder.append_metrics({"step": 1})
        assert raised.value.strerror == (
            f"cannot write {folder.metrics}: No space left on device; the lines before are kept, "
            "so make room and try again"
        )

    def test_steps_after_the_checkpoint_are_forgotten(self, folder: RunFolder) -> None:
        """A resumed run does them again."""
        for step in (1, 2, 3):
            folder.append_metrics({"step": step})
        folder.drop_metrics_after(2)
        assert [row["step"] for row in folder.read_metrics()] == [1, 2]


class TestCheckpoint:
    def test_it_loads_with_weights_only(self, folder: RunFolder) -> None:
        """Tensors, numbers and big integers of a random state; no code."""
        state = {"step": 3, "weights": torch.arange(3.0), "rng": {"state": 2**127 + 1}}
        folder.save_checkpoint(state)
        loaded = folder.load_checkpoint(torch.device("cpu"))
        assert loaded is not None
        assert torch.equal(loaded["weights"], state["weights"])
        assert (loaded["step"], loaded["rng"]) == (3, {"state": 2**127 + 1})

    @pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04truncated"])
    def test_a_damaged_checkpoint_is_named(self, folder: RunFolder, content: bytes) -> None:
        """Instead of a traceback from inside the unpickler."""
        folder.checkpoint.write_bytes(content)
        with pytest.raises(DamagedFileError, match=r"checkpoint\.pt is damaged \(.*put the orig"):
            folder.load_checkpoint(torch.device("cpu"))

    @pytest.mark.parametrize("size", [1, 100, 5_000, 100_000, -1_000, -10])
    def test_a_checkpoint_that_is_cut_off_is_named(self, folder: RunFolder, size: int) -> None:
        """Where decides what the library raises: at 5,000 bytes an OSError, without a name."""
        folder.save_checkpoint({"weights": torch.zeros(200, 200)})
        folder.checkpoint.write_bytes(folder.checkpoint.read_bytes()[:size])
        with pytest.raises(DamagedFileError, match=r"checkpoint\.pt is damaged \(.*put the orig"):
            folder.load_checkpoint(torch.device("cpu"))

    def test_a_lost_checkpoint_is_no_fresh_start(self, folder: RunFolder) -> None:
        """A run with metrics is not silently begun again."""
        folder.append_metrics({"step": 1})
        with pytest.raises(ValueError, match=r"checkpoint\.pt is missing"):
            folder.load_checkpoint(torch.device("cpu"))

    def test_no_checkpoint_yet(self, folder: RunFolder) -> None:
        """The run was killed before its first."""
        assert folder.load_checkpoint(torch.device("cpu")) is None

    def test_a_failed_save_keeps_the_old_checkpoint(
        self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The disk fills up, or the process dies, in the middle of writing."""
        folder.save_checkpoint({"step": 1})

        def full(fd: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"cannot write .*checkpoint\.pt: No space left"):
            folder.save_checkpoint({"step": 2})
        assert folder.load_checkpoint(torch.device("cpu")) == {"step": 1}
        names = sorted(path.name for path in folder.path.iterdir())
        assert names == ["checkpoint.pt", "config.json"], "what was half-written fills the disk"

    def test_the_configuration_is_plain_json(self, folder: RunFolder) -> None:
        """For people and other programs."""
        assert json.loads(folder.config.read_text()) == CONFIG
