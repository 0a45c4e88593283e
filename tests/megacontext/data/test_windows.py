"""Windows of files: each within one, and of those that use again the one that does so most."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.data.documents import Documents
from megacontext.data.tokenizer import ByteTokenizer
from megacontext.data.windows import WindowSource

RNG = np.random.default_rng(0)
# Each file has bytes of its own, so a window tells which it is from.
FILES = [RNG.integers(8 * i, 8 * i + 8, 40 + 30 * i).astype(np.uint8) for i in range(8)]
DOCUMENTS = Documents(tuple(FILES[:5]), tuple(FILES[5:]), "", ByteTokenizer())
SOURCE = WindowSource(DOCUMENTS, recent_tokens=16, horizon_tokens=8)


class TestDraw:
    @given(st.integers(0, 10**6), st.integers(20, 120), st.sampled_from([1, 24]))
    @settings(max_examples=25)
    def test_a_window_lies_in_a_file_of_its_part(self, seed: int, length: int, tries: int) -> None:
        """It says of which; its length is exact, and the seed makes it again."""
        source = dataclasses.replace(SOURCE, tries=tries)
        for make, files in (
            (source.batch, DOCUMENTS.training),
            (source.held_out_batch, DOCUMENTS.held_out),
        ):
            made = make(np.random.default_rng(seed), 4, length)
            again = make(np.random.default_rng(seed), 4, length)
            assert made.tokens.shape == (4, length)
            assert made.tokens.equal(again.tokens)
            assert made.files is not None
            for window, number in zip(made.tokens.numpy(), made.files, strict=True):
                assert window.astype(np.uint8).tobytes() in files[number].tobytes()

    def test_files_count_alike(self) -> None:
        """Long ones are not drawn more often."""
        made = SOURCE.held_out_batch(np.random.default_rng(0), 3_000, 20)
        assert made.files is not None
        counts = np.bincount(made.files)
        assert counts.min() > 0.9 * counts.mean()

    def test_a_file_that_is_as_long_as_a_window(self) -> None:
        """Is drawn whole."""
        whole = WindowSource(Documents((FILES[0],), (), "", ByteTokenizer()), 16, 8)
        assert whole.batch(np.random.default_rng(0), 1, 40).tokens[0].tolist() == FILES[0].tolist()

    def test_too_short_files_are_refused(self) -> None:
        """Where no file of a part is as long as a window."""
        with pytest.raises(ValueError) as raised:
            SOURCE.batch(np.random.default_rng(0), 1, 200)
        assert str(raised.value) == (
            "too little text: the longest of 5 files of one part has 160 bytes, and one sequence "
            "needs 200; give longer files, or more of them, or shorten --sequence-tokens"
        )


class TestReuse:
    def test_the_window_is_taken_that_uses_most_again(self) -> None:
        """In its horizon, from before the tail and not in it; common tokens do not count."""
        rng = np.random.default_rng(1)
        common = rng.integers(0, 4, 1_000)
        file = common.copy()
        file[500:503] = file[580:583] = [100, 101, 102]  # 80 apart: history and horizon
        file[200:203] = file[206:209] = [110, 111, 112]  # 6 apart: never both
        documents = Documents((file.astype(np.uint8),), (), "", ByteTokenizer())
        reuse = WindowSource(documents, recent_tokens=16, horizon_tokens=8, tries=2_000)
        (window,) = reuse.batch(np.random.default_rng(2), 1, 120).tokens.tolist()
        assert {100, 101, 102} <= set(window[:-16])
        assert {100, 101, 102} <= set(window[-8:])
        assert not {100, 101, 102} & set(window[-16:-8])
        assert reuse.description["tries"] == 2_000

    def test_it_uses_more_than_any_window(self) -> None:
        """Measured as it was chosen, on real files."""
        source = dataclasses.replace(SOURCE, tries=24)
        drawn = {
            tries: dataclasses.replace(SOURCE, tries=tries)
            .held_out_batch(np.random.default_rng(3), 64, 60)
            .tokens.numpy()
            for tries in (1, 24)
        }
        used = {tries: source._reuse(windows, 44, 52).mean() for tries, windows in drawn.items()}
        assert used[24] > used[1]


def test_unigram_entropy_is_of_what_is_held_out() -> None:
    """Bytes that are as frequent as each other."""
    documents = Documents((FILES[0],), (np.arange(64, dtype=np.uint8),), "", ByteTokenizer())
    assert WindowSource(documents, 16, 8).unigram_entropy() == pytest.approx(np.log(64))
