"""The tree of a history that grows: tokens and gists, in memory or in files.

LOD0 is kept as tokens, whose embeddings are looked up when they are needed; gists are kept as
arrays. A finished gist is never computed again. On disk there is one file for the tokens and one
for each level of gists; they are only appended to, and their sizes say how much there is. Levels
are added as the history grows: GistNet makes gists of gists of any level with the same weights.
"""

import os
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megacontext.allocators.cut import Cut
from megacontext.model.gistnet import GistNet
from megacontext.model.hf_language_model import AnyLanguageModel
from megacontext.model.tokens import as_ids

Array = NDArray[Any]
CHUNK_TOKENS = 16_384  # that are embedded at once when many are appended
_LEAST_ROWS = 1_024


class Column(Protocol):
    """Rows of one kind that are appended to, ``[rows, *row]``."""

    def __len__(self) -> int: ...

    def append(self, rows: Array) -> None:
        """Add rows; all of them, or none and an OSError."""

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` rows."""

    def take(self, indices: NDArray[np.int64]) -> Array:
        """Return rows ``[n, *row]``, in one gather."""

    def nbytes(self) -> tuple[int, int]:
        """Return how many bytes there are in memory, and on disk."""

    def close(self) -> None:
        """Let go of files."""


class MemoryColumn:
    """Rows in memory; room grows by half, so that each is copied a few times at most.

    Args:
        dtype: Of the rows.
        row: Shape of each.
    """

    def __init__(self, dtype: np.dtype[Any], row: tuple[int, ...] = ()) -> None:
        self._rows = np.empty((_LEAST_ROWS, *row), dtype=dtype)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, rows: Array) -> None:
        """Add rows; all of them, or none and an OSError."""
        end = self._length + len(rows)
        if end > len(self._rows):
            room = np.empty((max(end, len(self._rows) * 3 // 2), *rows.shape[1:]), self._rows.dtype)
            room[: self._length] = self._rows[: self._length]
            self._rows = room
        self._rows[self._length : end] = rows
        self._length = end

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` rows."""
        self._length = length

    def take(self, indices: NDArray[np.int64]) -> Array:
        """Return rows ``[n, *row]``, in one gather."""
        rows: Array = self._rows[: self._length].take(indices, axis=0)
        return rows

    def nbytes(self) -> tuple[int, int]:
        """Return how many bytes there are in memory, and on disk."""
        return self._rows.nbytes, 0

    def close(self) -> None:
        """Let go of files."""


class DiskColumn:
    """Rows in a file, read by memory map. A torn row at its end is cut off when it is opened.

    Args:
        path: Of the file; made when there is none.
        dtype: Of the rows.
        row: Shape of each.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], row: tuple[int, ...] = ()) -> None:
        self._path = path
        self._dtype, self._row = dtype, row
        self._row_bytes = dtype.itemsize * int(np.prod(row))
        binary = getattr(os, "O_BINARY", 0)  # Windows
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | binary, 0o666)
        self._close = weakref.finalize(self, os.close, self._file)
        self._length = os.fstat(self._file).st_size // self._row_bytes
        os.ftruncate(self._file, self._length * self._row_bytes)
        self._mapped: Array = np.empty((0, *row), dtype=dtype)

    def __len__(self) -> int:
        return self._length

    def append(self, rows: Array) -> None:
        """Add rows; all of them, or none and an OSError."""
        data = memoryview(np.ascontiguousarray(rows, dtype=self._dtype).tobytes())
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            self.truncate(self._length)
            raise OSError(
                error.errno, f"cannot write to {self._path}: {error.strerror}; it is as it was"
            ) from error
        self._length += len(rows)

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` rows."""
        os.ftruncate(self._file, length * self._row_bytes)
        self._length = length
        self._mapped = self._mapped[:length]

    def take(self, indices: NDArray[np.int64]) -> Array:
        """Return rows ``[n, *row]``, in one gather."""
        if len(self._mapped) < self._length:
            shape = (self._length, *self._row)
            self._mapped = np.asarray(np.memmap(self._path, self._dtype, mode="r", shape=shape))
        rows: Array = self._mapped.take(indices, axis=0)
        return rows

    def nbytes(self) -> tuple[int, int]:
        """Return how many bytes there are in memory, and on disk."""
        return 0, self._length * self._row_bytes

    def close(self) -> None:
        """Let go of files."""
        self._mapped = self._mapped[:0].copy()
        self._close()


class TreeStore:
    """The tree over one growing history.

    Args:
        language_model: Embeds tokens; where it is, gathers go.
        gistnet: Makes gists.
        block_size: Tokens of a LOD1 gist, K.
        max_lod: The highest level to begin with; see `deepen`.
        folder: Keeps the columns in files there; in memory if None.

    Raises:
        OSError: The files cannot be written.
    """

    def __init__(
        self,
        language_model: AnyLanguageModel,
        gistnet: GistNet,
        *,
        block_size: int,
        max_lod: int,
        folder: Path | None = None,
    ) -> None:
        self._model, self._gistnet, self._folder = language_model, gistnet, folder
        self._block_size = block_size
        self._vocab_size, self._d_model = language_model.embedding.weight.shape
        ids = as_ids(np.empty(0, np.int64), self._vocab_size)
        self._columns = [self._new_column("tokens.bin", ids.dtype, ())]
        self.deepen(max_lod if folder is None else max(max_lod, _highest_on_disk(folder)))

    def __len__(self) -> int:
        """Count the tokens."""
        return len(self._columns[0])

    @property
    def device(self) -> torch.device:
        """Where gathers go."""
        return self._model.embedding.weight.device

    @property
    def gists(self) -> tuple[int, ...]:
        """How many there are at LOD1, LOD2, and so on."""
        return tuple(len(column) for column in self._columns[1:])

    def nbytes(self) -> tuple[int, int]:
        """Return how many bytes there are in memory, and on disk."""
        each = [column.nbytes() for column in self._columns]
        return sum(ram for ram, _ in each), sum(disk for _, disk in each)

    def deepen(self, max_lod: int) -> None:
        """Have levels up to ``max_lod``, if there are fewer; what is missing of them is made.

        A new level has a K-th of the gists of the one below it.

        Args:
            max_lod: The highest level that there is to be.

        Raises:
            OSError: The files cannot be written; no level is added that is not complete.
        """
        for lod in range(len(self._columns), max_lod + 1):
            column = self._new_column(f"gists{lod}.bin", np.dtype(np.float32), (self._d_model,))
            # Gists of tokens that are gone.
            column.truncate(min(len(column), len(self) // self._block_size**lod))
            try:
                self._grow_column(self._columns[-1], column)
            except BaseException:
                column.close()
                raise
            self._columns.append(column)

    def append(self, tokens: NDArray[np.int64]) -> None:
        """Add tokens, and the gists that they finish; all, or none and an error.

        Args:
            tokens: What is new, ``[n]``.

        Raises:
            ValueError: Tokens that the model does not embed.
            OSError: The files cannot be written.
        """
        ids, before = as_ids(tokens, self._vocab_size), len(self)
        try:
            for begin in range(0, len(ids), CHUNK_TOKENS):
                self._columns[0].append(ids[begin : begin + CHUNK_TOKENS])
                self._grow()
        except BaseException:
            self._truncate(before)
            raise

    def tokens(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens at some positions, int64 ``[n]``."""
        tokens: NDArray[np.int64] = self._columns[0].take(positions).astype(np.int64)
        return tokens

    def embed(self, tokens: NDArray[np.int64]) -> Tensor:
        """Return LOD0 embeddings ``[n, D]`` of tokens ``[n]``."""
        return self._model.embed(torch.from_numpy(tokens).to(self.device))

    def gather(self, cut: Cut) -> Tensor:
        """Gather embeddings of a cut's entries, ``[1, W, D]``, level by level."""
        like = self._model.embedding.weight
        gathered = like.new_empty(len(cut), like.shape[1], dtype=self._model.dtype)
        indices = cut.positions // cut.spans
        for lod, column in enumerate(self._columns):
            of_lod = np.flatnonzero(cut.lods == lod)
            if lod == 0:
                rows = self.embed(self.tokens(indices[of_lod]))
            else:
                rows = torch.from_numpy(column.take(indices[of_lod])).to(gathered)
            gathered[torch.from_numpy(of_lod).to(self.device)] = rows
        return gathered[None]

    def close(self) -> None:
        """Let go of files."""
        for column in self._columns:
            column.close()

    def _grow(self) -> None:
        """Make the gists whose children are complete and that are not there yet."""
        for below, column in pairwise(self._columns):
            self._grow_column(below, column)

    def _grow_column(self, below: Column, column: Column) -> None:
        k = self._block_size
        while (missing := len(below) // k - len(column)) > 0:
            begin, number = len(column) * k, min(missing, max(CHUNK_TOKENS // k, 1))
            rows = below.take(np.arange(begin, begin + number * k))
            column.append(self._make_gists(rows, number))

    def _new_column(self, name: str, dtype: np.dtype[Any], row: tuple[int, ...]) -> Column:
        if self._folder is None:
            return MemoryColumn(dtype, row)
        return DiskColumn(self._folder / name, dtype, row)

    def _make_gists(self, rows: Array, number: int) -> Array:
        if rows.ndim == 1:
            children = self.embed(rows.astype(np.int64))
        else:
            children = torch.from_numpy(rows).to(self.device, self._model.dtype)
        children = children.view(number, self._block_size, -1)
        gists = self._gistnet.gist(children, of_tokens=rows.ndim == 1)
        made: Array = gists.float().numpy(force=True)
        return made

    def _truncate(self, tokens: int) -> None:
        for lod, column in enumerate(self._columns):
            column.truncate(min(len(column), tokens // self._block_size**lod))


def _highest_on_disk(folder: Path) -> int:
    """Return the highest level that has a file: all of them are to keep step with the tokens."""
    names = (path.stem.removeprefix("gists") for path in folder.glob("gists*.bin"))
    return max((int(name) for name in names if name.isdecimal()), default=0)
