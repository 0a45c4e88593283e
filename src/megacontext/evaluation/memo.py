"""Losses that take long to compute, kept by what they are of.

An evaluation that was killed goes on where it was, ways that pick the same cut share what it loses,
and so do models that differ in their LensNet alone.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_KEY_BYTES = 16


class Memo:
    """Arrays of floats by key, in memory and in a file to which lines are only added.

    Args:
        path: Of the file, a line of JSON for each array; made when the first is added. None for
            none. A line that a kill has torn is left out, and computed again.

    Raises:
        OSError: The file cannot be read.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[str, Floats] = {}
        if path is not None and path.exists():
            for line in path.read_bytes().split(b"\n"):
                self._take(line)

    def __len__(self) -> int:
        """Count the arrays."""
        return len(self._known)

    def many(self, keys: Sequence[str], compute: Callable[[list[int]], Floats]) -> Floats:
        """Return the arrays of some keys, and compute those that are not known.

        Args:
            keys: Of each; the same key means the same array.
            compute: Is told the numbers of keys, and gives their arrays, ``[numbers, n]``.

        Returns:
            The arrays, ``[keys, n]``.

        Raises:
            OSError: The file cannot be written.
        """
        first = {key: number for number, key in reversed(list(enumerate(keys)))}
        missing = sorted(number for key, number in first.items() if key not in self._known)
        if missing:
            self._add([keys[number] for number in missing], compute(missing))
        return np.stack([self._known[key] for key in keys])

    def _add(self, keys: Sequence[str], arrays: Floats) -> None:
        self._known |= zip(keys, arrays, strict=True)
        if self._path is None:
            return
        lines = [json.dumps([k, a.tolist()]) for k, a in zip(keys, arrays, strict=True)]
        with self._path.open("ab") as file:  # begins with a new line, lest the last one is torn
            file.write(("\n" + "\n".join(lines) + "\n").encode())

    def _take(self, line: bytes) -> None:
        with suppress(ValueError, TypeError):
            key, values = json.loads(line)
            self._known[key] = np.array(values, dtype=np.float64)


def key_of(*parts: str | NDArray[np.generic]) -> str:
    """Make a key of all that decides an array."""
    digest = hashlib.blake2b(digest_size=_KEY_BYTES)
    for part in parts:
        data = part.encode() if isinstance(part, str) else np.ascontiguousarray(part).tobytes()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
