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

    def test_the_legend(self) -> None:
        """Says how many tokens a character is."""
        names = "  █ LOD0, tokens  ▒ LOD1, gists  ░ LOD2, gists of gists"
        assert focus_legend(1).plain == f"each character is 1 token:{names}"
        assert focus_legend(1_000).plain == f"each character is 1,000 tokens:{names}"
