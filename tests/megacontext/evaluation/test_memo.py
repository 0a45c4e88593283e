"""Losses that are kept by what they are of, also when a kill tears the file."""

from pathlib import Path

import numpy as np
import pytest

from megacontext.evaluation.memo import Memo, key_of


class TestMemo:
    def test_each_key_is_computed_once(self, tmp_path: Path) -> None:
        """Also when it is asked for twice at a time, and in another process."""
        asked: list[list[int]] = []

        def compute(numbers: list[int]) -> np.ndarray:
            asked.append(numbers)
            return np.array([[n / 3.0, 1.0] for n in numbers])

        path = tmp_path / "losses.jsonl"
        first = Memo(path).many(["a", "b", "a"], compute)
        again = Memo(path).many(["b", "c", "a"], compute)
        assert asked == [[0, 1], [1]]
        assert first.tolist() == [[0.0, 1.0], [1 / 3, 1.0], [0.0, 1.0]]
        assert again.tolist() == [[1 / 3, 1.0], [1 / 3, 1.0], [0.0, 1.0]]

    @pytest.mark.parametrize("torn", range(1, 12))
    def test_a_torn_line_is_computed_again(self, tmp_path: Path, torn: int) -> None:
        """Whatever of it was written, and the line after it is whole."""
        path = tmp_path / "losses.jsonl"
        Memo(path).many(["a", "b"], lambda _: np.array([[1.0], [2.0]]))
        path.write_bytes(path.read_bytes()[:-torn])
        memo = Memo(path)
        known = len(memo)
        assert known in (1, 2)  # without its end of line it is whole
        memo.many(["b", "c"], lambda numbers: np.array([[2.0], [3.0]])[numbers])
        whole = Memo(path).many(["a", "b", "c"], lambda _: pytest.fail("it is known"))
        assert whole.tolist() == [[1.0], [2.0], [3.0]]

    @pytest.mark.parametrize("line", ["", "7", "null", '["a"]', '["a", "b"]', "\x00", '{"a": 1}'])
    def test_a_line_of_another_kind_is_left_out(self, tmp_path: Path, line: str) -> None:
        """It is no loss; those around it are known."""
        path = tmp_path / "losses.jsonl"
        Memo(path).many(["a"], lambda _: np.array([[1.0]]))
        path.write_text(f"{line}\n{path.read_text()}\n{line}")
        assert Memo(path).many(["a"], lambda _: pytest.fail("it is known")).tolist() == [[1.0]]

    def test_a_file_that_cannot_be_written_is_told(self, tmp_path: Path) -> None:
        """By name."""
        memo = Memo(tmp_path / "none" / "losses.jsonl")
        with pytest.raises(FileNotFoundError, match=r"losses\.jsonl"):
            memo.many(["a"], lambda _: np.zeros((1, 1)))


class TestKeyOf:
    def test_parts_do_not_run_into_each_other(self) -> None:
        """Nor do arrays of other lengths."""
        assert key_of("ab", "c") != key_of("a", "bc")
        ones = np.ones(3, dtype=np.int64)
        assert key_of("a", ones, ones[:2]) != key_of("a", ones[:2], ones)
        assert key_of("a", ones) == key_of("a", ones.copy())
