"""What the variants of sequences lose under a language model that does not change: computed once.

They do not depend on LensNet, so they are kept beside the run: a file for each few sequences, each
written whole, so that whoever was killed goes on where it was, and several processes share the work
by the files' numbers. A file has the tokens themselves; it is all that LensNet is trained from.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megacontext.allocators.cut import Cut, from_block_lods, lod0_tail
from megacontext.controller import MCController
from megacontext.data.source import Batch, Ints
from megacontext.evaluation.losses import horizon_nll
from megacontext.evaluation.pickers import LAST, Visible, overlap
from megacontext.files import DamagedFileError, reading, write_atomically
from megacontext.judged import Judged, joined
from megacontext.model.fingerprint import fingerprint
from megacontext.model.tokens import as_ids

IN_A_FILE = 4  # sequences
_ADVICE = "remove it, and it is computed again"


@dataclass(frozen=True)
class KeptLosses:
    """A folder of files, by number.

    Attributes:
        folder: Of the files; made when the first is written.
        made_by: Fingerprint of the networks whose losses they are.
    """

    folder: Path
    made_by: str

    @classmethod
    def beside(cls, folder: Path, mc: MCController) -> "KeptLosses":
        """Return the losses of a model's language model and GistNet as they are now."""
        return cls(folder, fingerprint(mc.language_model.embedding, mc.gistnet))

    def path(self, number: int) -> Path:
        """Return the path of a file."""
        return self.folder / f"{number:06d}.npz"

    def write(self, number: int, judged: Judged, vocab_size: int) -> None:
        """Write a file, whole or not at all.

        Raises:
            OSError: It cannot be written.
        """
        self.folder.mkdir(exist_ok=True)
        buffer = BytesIO()
        np.savez_compressed(
            buffer,
            tokens=as_ids(judged.tokens.numpy(force=True), vocab_size),
            nll=judged.nll.numpy(force=True).astype(np.float32),
            held=judged.held.numpy(force=True),
            made_by=np.array(self.made_by),
        )
        write_atomically(self.path(number), buffer.getvalue())

    def read(self) -> Judged:
        """Read all files.

        Returns:
            Their sequences.

        Raises:
            FileNotFoundError: There is none.
            DamagedFileError: One of them cannot be read, or is of other networks.
        """
        paths = sorted(self.folder.glob("*.npz"))
        if not paths:
            raise FileNotFoundError(f"{self.folder} holds no losses; compute them first")
        return joined([self._read(path) for path in paths])

    def _read(self, path: Path) -> Judged:
        with reading(path, _ADVICE), _opened(path) as saved:
            if str(saved["made_by"]) != self.made_by:
                raise DamagedFileError(
                    f"{path} holds losses of other networks than those of this run; {_ADVICE}"
                )
            tokens = torch.from_numpy(saved["tokens"].astype(np.int64))
            return Judged(tokens, torch.from_numpy(saved["nll"]), torch.from_numpy(saved["held"]))


def merge(folder: Path, into: Path) -> None:
    """Make one file of all those of a folder.

    Args:
        folder: Of the files.
        into: Another folder, which is made.

    Raises:
        FileNotFoundError: There is no file.
        DamagedFileError: One of them cannot be read, or is of other networks than the first.
        OSError: The new one cannot be written.
    """
    first = min(folder.glob("*.npz"), default=folder / "000000.npz")
    with reading(first, _ADVICE), _opened(first) as saved:
        made_by, ids = str(saved["made_by"]), saved["tokens"].dtype
    losses = KeptLosses(folder, made_by).read()
    KeptLosses(into, made_by).write(0, losses, np.iinfo(ids).max + 1)


def judge(mc: MCController, batch: Batch, rng: np.random.Generator) -> Judged:
    """Compute what variants of sequences lose.

    Each sequence has the baseline; as many variants as it takes to hold every block in one of them
    once, or in two; and one that holds what has most words in common with the tail.

    Args:
        mc: Its language model and GistNet make the losses.
        batch: Sequences, all of the length that training keeps.
        rng: Draws the variants.

    Returns:
        The variants and their losses.

    Raises:
        ValueError: A working context has no room for a block, or the history is not all at LOD1.
    """
    config, num_tokens = mc.config, batch.tokens.shape[1]
    blocks, picks = config.geometry.detail(num_tokens, config.train_wc_length)
    if not picks:
        raise ValueError(
            f"a working context of {config.train_wc_length} entries has no room for a block of "
            f"{num_tokens} tokens in detail; make train_wc_length longer"
        )
    with torch.no_grad(), mc.context("inference"):
        tree = mc.build_tree(batch.tokens, labelled=batch.labelled)
        held = np.stack(list(_drawn(mc, batch, blocks, picks, rng)))
        baseline = lod0_tail(num_tokens, config.train_wc_length, config.block_size)
        cuts = [[baseline, *_cuts(of_one, num_tokens, config.block_size)] for of_one in held]
        nll = horizon_nll(mc, tree, cuts) * _labels(batch, config.horizon_tokens)
    of_baseline = np.arange(blocks) * config.block_size >= baseline.positions[0]
    of_baseline = np.broadcast_to(of_baseline, (len(held), 1, blocks))
    held = np.concatenate([of_baseline, held], axis=1)
    return Judged(batch.tokens, torch.from_numpy(nll).float(), torch.from_numpy(held))


def _drawn(
    mc: MCController, batch: Batch, blocks: int, picks: int, rng: np.random.Generator
) -> Iterator[NDArray[np.bool_]]:
    """Yield what the variants of each sequence hold, bool ``[V, blocks]``."""
    tokens = batch.tokens.numpy(force=True)[:, : -mc.config.horizon_tokens]
    visible = Visible(tokens, blocks, mc.config.block_size, picks)
    common = overlap(visible, LAST, idf=True).argsort(axis=1, kind="stable")[:, -picks:]
    for best in common:
        order = rng.permutation(blocks)
        order = np.concatenate([order, order[: -blocks % picks]])  # the last one takes of the first
        variants = np.concatenate([order.reshape(-1, picks), best[None]])
        held = np.zeros((len(variants), blocks), dtype=np.bool_)
        np.put_along_axis(held, variants, True, axis=1)
        yield held


def _cuts(held: NDArray[np.bool_], num_tokens: int, block_size: int) -> list[Cut]:
    return [from_block_lods(np.where(h, 0, 1), num_tokens, block_size) for h in held]


def _labels(batch: Batch, horizon_tokens: int) -> Ints:
    """Count the labels of each horizon, int64 ``[B, 1]``."""
    if batch.labelled is None:
        return np.full((len(batch.tokens), 1), horizon_tokens)
    labels: Ints = batch.labelled[:, -horizon_tokens:].sum(1, keepdim=True).numpy(force=True)
    return labels


def _opened(path: Path) -> "np.lib.npyio.NpzFile":
    """Open a file of arrays, which is read at once: of a damaged one numpy leaves a file open."""
    arrays: np.lib.npyio.NpzFile = np.load(BytesIO(path.read_bytes()), allow_pickle=False)
    return arrays
