"""Bytes that come one by one, as text: whole characters only, and no further than a stop string."""

import codecs
from collections.abc import Sequence


class TextStream:
    """Decodes UTF-8 as it comes and holds back what may become a stop string.

    Args:
        stops: Strings before which the text ends; none may be empty.

    Attributes:
        stopped: Whether one of them came.

    Raises:
        ValueError: An empty stop string.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        if "" in stops:
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def feed(self, data: bytes) -> str:
        """Take in some bytes, and return the text that is certain now."""
        return self._release(self._decoder.decode(data))

    def finish(self) -> str:
        """Return the rest: nothing more comes."""
        text = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        longest = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]


def _overlap(text: str, stop: str) -> int:
    """Count the characters at the end of a text with which the stop string may begin."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if stop.startswith(text[-size:])), 0)
