"""The strip in the terminal tells what the working context holds."""

import numpy as np

from megacontext import Cut
from megacontext.focus_strip import focus_legend, focus_strip

CUT = Cut(np.array([16, 32, 36, 37, 38, 39, 40, 41]), np.array([2, 1, 0, 0, 0, 0, 0, 0]), 4)


class TestFocusStrip:
    def test_a_character_for_each_token(self) -> None:
        """When there is room."""
        assert focus_strip(CUT, 42, 80).plain == "·" * 16 + "░" * 16 + "▒" * 4 + "█" * 6

    def test_the_finest_of_a_stretch(self) -> None:
        """When there is not; never wider than allowed."""
        assert focus_strip(CUT, 42, 10).plain == "···░░░▒██"
        assert len(focus_strip(CUT, 42, 1).plain) == 1
        assert focus_strip(CUT, 42, 1).plain == "█"

    def test_the_legend(self) -> None:
        """Says how many tokens a character is."""
        legend = "█ LOD0, tokens  ▒ LOD1, gists  ░ LOD2, gists of gists  · not held"
        assert focus_legend(42, 80).plain == f"each character is 1 token: {legend}"
        assert focus_legend(80_000, 80).plain == f"each character is 1,000 tokens: {legend}"
