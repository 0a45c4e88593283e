"""Bytes as text: whole characters, and never a piece of a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacontext.inference.text_stream import TextStream


def stream(pieces: list[bytes], *stops: str) -> tuple[list[str], bool]:
    out = TextStream(stops)
    texts = [out.feed(piece) for piece in pieces]
    return [*texts, out.finish()], out.stopped


class TestTextStream:
    def test_characters_come_whole(self) -> None:
        """However many bytes they have; what is none is replaced."""
        assert stream([b"a", b"\xc3", b"\xa4", b"\xf0\x9f", b"\x98\x80"])[0] == [
            "a",
            "",
            "ä",
            "",
            "😀",
            "",
        ]
        assert stream([b"\xff", b"a", b"\xc3"])[0] == ["\ufffd", "a", "", "\ufffd"]

    def test_a_stop_that_comes_in_pieces_is_not_printed(self) -> None:
        """What may become one is held back, and given when it does not."""
        assert stream([b"x#", b"#", b"y##", b"# z"], "###") == (["x", "", "##y", "", ""], True)
        assert stream([b"x##"], "###") == (["x", "##"], False)
        assert stream([b"aab"], "ab") == (["a", ""], True)

    def test_the_first_of_several_ends_it(self) -> None:
        """Nothing comes after it."""
        assert stream([b"one two three", b" one"], "three", "two") == (["one ", "", ""], True)

    @given(st.text("ab\u00e4", max_size=30), st.lists(st.text("ab\u00e4", min_size=1, max_size=4)))
    def test_however_it_is_cut_up_the_text_is_the_same(self, text: str, stops: list[str]) -> None:
        """Up to the earliest end of a stop string; byte by byte, or at once."""
        bytewise, stopped = stream([bytes([b]) for b in text.encode()], *stops)
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        assert stopped == bool(ends)
        if ends:
            text = text[: min(ends)]
            text = text[: min(text.find(stop) for stop in stops if stop in text)]
        assert "".join(bytewise) == text

    def test_an_empty_stop_is_refused(self) -> None:
        """It would end every text before it begins."""
        with pytest.raises(ValueError, match="a stop string must not be empty"):
            TextStream(["", "x"])
