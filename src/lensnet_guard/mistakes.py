"""The catalogue of mistakes, docs/mistakes.md, for the command line: its entries, by name.

The page is the only place that holds them. A wheel has it as a file of this package, and a checkout
where the other pages are.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

_NEAR = 3  # names that are told to who has misspelt one


@dataclass(frozen=True)
class Mistake:
    """A class of mistakes.

    Attributes:
        name: What messages call it.
        about: What it is, in one sentence.
        text: The whole entry, in Markdown.
    """

    name: str
    about: str
    text: str


def read_mistakes() -> dict[str, Mistake]:
    """Return all entries by name, in the order of the page.

    Raises:
        OSError: The page cannot be read.
    """
    _, *entries = re.split(r"^## ", _page(), flags=re.MULTILINE)
    found = {}
    for entry in entries:
        name, about, _ = (part.strip() for part in entry.split("\n\n", 2))
        text = re.sub(r"^<!--.*-->\n", "", f"## {entry.strip()}\n", flags=re.MULTILINE)
        found[name] = Mistake(name, about.replace("\n", " "), text)
    return found


def near(word: str, mistakes: Mapping[str, Mistake]) -> list[str]:
    """Return the names that somebody may have meant: alike, or of entries that have the word."""
    word = word.lower()
    alike = difflib.get_close_matches(word, mistakes, n=_NEAR)
    return alike or [name for name, one in mistakes.items() if word in one.text.lower()][:_NEAR]


def _page() -> str:
    page = files("lensnet_guard").joinpath("mistakes.md")
    if not page.is_file():
        page = Path(__file__).parents[2] / "docs" / "mistakes.md"
    return page.read_text(encoding="utf-8")
