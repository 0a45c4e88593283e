"""The corpus: real files, held-out files, fixed windows."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megacontext.data.source import Batch, load_corpus
from megacontext.data.tokenizer import ByteTokenizer, Tokens


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_bytes(bytes([i]) * 100)
    return tmp_path


class TestLoadCorpus:
    def test_every_tenth_file_is_held_out(self, folder: Path) -> None:
        """Whole files, so that no window of the training part is in the other."""
        corpus = load_corpus([folder], min_tokens=10)
        assert set(corpus.validation) == {9, 19}
        assert set(corpus.training) == set(range(20)) - {9, 19}
        assert corpus.files == 20

    def test_of_a_single_file_the_end_is_held_out(self, tmp_path: Path) -> None:
        """Its last tenth."""
        (tmp_path / "one.txt").write_bytes(bytes(range(100)))
        corpus = load_corpus([tmp_path / "one.txt"], min_tokens=5)
        assert corpus.validation.tolist() == list(range(90, 100))

    def test_the_first_of_two_texts_was_held_out_whole(self, folder: Path) -> None:
        """Of a few files the end of each is held out; a file given twice is read once."""
        texts = [folder / "03.txt", folder / "04.txt", folder / "03.txt"]
        corpus = load_corpus(texts, min_tokens=5)
        assert corpus.training.tolist() == [3] * 90 + [4] * 90
        assert corpus.validation.tolist() == [3] * 10 + [4] * 10

    def test_python_caches_in_a_folder_changed_the_text(self, folder: Path) -> None:
        """Hidden files and caches are no text, and come and go by themselves."""
        before = load_corpus([folder], min_tokens=10)
        for litter in ("__pycache__", ".git"):
            (folder / litter).mkdir()
            (folder / litter / "0").write_bytes(b"litter" * 99)
        assert load_corpus([folder], min_tokens=10).sha256 == before.sha256

    def test_the_standard_library_is_the_default(self) -> None:
        """Real text that is always there, and megabytes of it."""
        corpus = load_corpus([], min_tokens=1_000)
        assert len(corpus.training) > 1_000_000
        assert b"import" in corpus.validation.tobytes()
        assert 2.5 < corpus.unigram_entropy() < 4

    def test_the_fingerprint_tells_texts_apart(self, folder: Path) -> None:
        """Also when a file moves from one part to the other."""
        before = load_corpus([folder], min_tokens=10)
        assert load_corpus([folder], min_tokens=10).sha256 == before.sha256
        (folder / "05.txt").write_bytes(b"changed" * 20)
        assert load_corpus([folder], min_tokens=10).sha256 != before.sha256

    def test_unreadable_text_is_refused(self, folder: Path, tmp_path: Path) -> None:
        """A path that does not exist; too little text for one window."""
        with pytest.raises(FileNotFoundError, match="no such text file or folder: nowhere"):
            load_corpus([Path("nowhere")], min_tokens=10)
        with pytest.raises(ValueError) as raised:
            load_corpus([folder], min_tokens=200)
        assert str(raised.value) == (
            "too little text: the validation part of 20 files has 200 bytes, and one sequence "
            "needs more than 200; give more files or shorten --sequence-tokens"
        )
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "link").symlink_to(folder)
        with pytest.raises(ValueError) as raised:
            load_corpus([tmp_path / "empty"], min_tokens=10)
        assert str(raised.value) == (
            f"there are no files in {tmp_path / 'empty'}: hidden ones, and folders behind links, "
            "are not read; give others, or what the links lead to"
        )

    def test_a_pipe_was_told_as_no_such_file(self, tmp_path: Path) -> None:
        """A resumed run could not read it again, so it is refused; nothing waits for a writer."""
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError) as raised:
            load_corpus([tmp_path / "pipe"], min_tokens=10)
        assert str(raised.value) == (
            f"{tmp_path / 'pipe'} is no file and no folder, and a resumed run must read its text "
            "again: save it as a file"
        )

    @pytest.mark.parametrize(("size", "token"), [(4, 300), (256, 256), (256, -1), (70_000, 70_000)])
    def test_tokens_beyond_the_vocabulary_wrapped_around(
        self, folder: Path, size: int, token: int
    ) -> None:
        """300 became 44. A tokenizer that makes what it says it does not is refused."""

        class Lying(ByteTokenizer):
            vocab_size = size

            def encode(self, pieces: Iterable[bytes]) -> Iterator[Tokens]:
                yield np.array([1, token] * 10)

        with pytest.raises(ValueError) as raised:
            load_corpus([folder], min_tokens=10, tokenizer=Lying())
        low, high = min(1, token), max(1, token)
        assert str(raised.value) == (
            f"tokens of Lying must lie in [0, {size}), but run from {low} to {high}"
        )


class TestBatches:
    def test_windows_are_stretches_of_the_text(self, folder: Path) -> None:
        """int64 [batch, length], in order."""
        corpus = load_corpus([folder], min_tokens=10)
        batch = corpus.batch(np.random.default_rng(0), 5, 30).tokens
        assert batch.shape == (5, 30)
        text = corpus.training.tobytes()
        assert all(bytes(row.tolist()) in text for row in batch)

    def test_held_out_windows_are_of_the_other_part(self, folder: Path) -> None:
        """And the same for the same random generator, so that losses can be compared."""
        corpus = load_corpus([folder], min_tokens=10)
        first, again = (
            corpus.held_out_batch(np.random.default_rng(0), 4, 9).tokens for _ in range(2)
        )
        assert first.equal(again)
        assert set(first.unique().tolist()) <= {9, 19}

    def test_unigram_entropy(self, folder: Path) -> None:
        """Two bytes, equally often: ln 2 nats."""
        assert load_corpus([folder], min_tokens=10).unigram_entropy() == pytest.approx(np.log(2))


class TestBatch:
    def test_a_share_is_of_all_that_is_known(self) -> None:
        """Half of the sequences with their facts and files; sizes stay as they are."""
        whole = Batch(
            torch.arange(12).view(4, 3),
            torch.ones(4, 3, dtype=torch.bool),
            fact_blocks=np.arange(8).reshape(4, 2),
            question_tokens=3,
            files=np.arange(4),
        )
        share = whole.share(1, 2)
        assert share.tokens.tolist() == [[6, 7, 8], [9, 10, 11]]
        assert share.labelled is not None
        assert share.labelled.shape == (2, 3)
        assert share.fact_blocks is not None
        assert share.fact_blocks.tolist() == [[4, 5], [6, 7]]
        assert share.files is not None
        assert share.files.tolist() == [2, 3]
        assert (share.asked_blocks, share.question_tokens) == (None, 3)
