"""The strip in the terminal tells what the working context holds."""

import numpy as np

from megacontext import Cut
from megacontext.evaluation.focus_strip import focus_legend, focus_strip, tokens_per_character

CUT = Cut(np.array([16, 32, 36, 37, 38, 39, 40, 41]), np.array([2, 1, 0, 0, 0, 0, 0, 0]), 4)


class TestFocusStrip:
    def test_a_character_for_each_token_that_is_covered(self) -> None:
        """When there is room; a history that was lost is not drawn."""
        assert focus_strip(CUT, 80).plain == "░" * 16 + "▒" * 4 + "█" * 6

    def test_the_finest_of_a_stretch(self) -> None:
        """When there is not; never wider than allowed."""
        assert tokens_per_character(CUT, 10) == 3
        assert focus_strip(CUT, 10).plain == "░░░░░▒███"
        assert focus_strip(CUT, 1).plain == "█"

    def test_deeper_levels_are_digits(self) -> None:
        """In a terminal of whatever characters; the legend names those that there are."""
        deep = Cut(np.array([0, 64, 80, 81]), np.array([3, 2, 0, 0]), 4)
        assert focus_strip(deep, 41).plain == "3" * 32 + "░" * 8 + "█"
        assert focus_strip(deep, 41, ascii_only=True).plain == "3" * 32 + "." * 8 + "#"
        deeper = Cut(np.array([0, 2**40, 3 * 2**39]), np.array([40, 39, 12]), 2)
        assert focus_strip(deeper, 6).plain == "EEEDDc"
        assert focus_legend(2, 3).plain.endswith("░ LOD2, gists of gists  3 gists of those")
        assert focus_legend(2, 7).plain.endswith("░ LOD2, gists of gists  3-7 gists of those")

    def test_the_legend(self) -> None:
        """Says how many tokens a character is."""
        names = "  █ LOD0, tokens  ▒ LOD1, gists  ░ LOD2, gists of gists"
        assert focus_legend(1).plain == f"each character is 1 token:{names}"
        assert focus_legend(1_000).plain == f"each character is 1,000 tokens:{names}"
