"""Kept losses: whole files or none, every block once, and what the language model says plainly."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.megacontext.model.test_hf_language_model import config_of, save

from lensnet_guard import guard_of
from megacontext import MCController
from megacontext.allocators.cut import from_block_lods, lod0_tail
from megacontext.data.source import Batch
from megacontext.evaluation.pickers import Visible, overlap
from megacontext.files import DamagedFileError
from megacontext.judged import Judged
from megacontext.training.kept import KeptLosses, judge, merge

pytest.importorskip("transformers")
ADVICE = "remove it, and it is computed again"


@pytest.fixture(scope="module")
def mc(tmp_path_factory: pytest.TempPathFactory) -> MCController:
    path = tmp_path_factory.mktemp("llama") / "model"
    save("llama, tied", path)
    return MCController(config_of(path, freeze_language_model=True, gists="weighted"))


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (3, 96), generator=generator)
    return Batch(tokens, torch.rand(3, 96, generator=generator) < 0.7)


@pytest.fixture(scope="module")
def judged(mc: MCController, batch: Batch) -> Judged:
    return judge(mc, batch, np.random.default_rng(0))


class TestJudge:
    def test_losses_are_those_of_the_language_model_run_plainly(
        self, mc: MCController, batch: Batch, judged: Judged
    ) -> None:
        """Summed over the labels of the horizon, one cut at a time, on embeddings put together."""
        assert batch.labelled is not None
        with torch.no_grad(), mc.context("inference"):
            levels = [mc.language_model.embed(batch.tokens)]
            levels.append(mc.gistnet.gist(levels[0].unflatten(1, (24, 4))))
            for row, held in enumerate(judged.held):
                for variant, of_variant in enumerate(held):
                    lods = np.where(of_variant.numpy(), 0, 1)
                    cut = from_block_lods(lods, 96, 4) if variant else lod0_tail(96, 48, 4)
                    assert len(cut) == 48
                    entries = [
                        levels[lod][row, position // (4**lod)]
                        for position, lod in zip(cut.positions, cut.lods, strict=True)
                    ]
                    logits = mc.language_model(
                        torch.stack(entries)[None],
                        torch.from_numpy(cut.positions)[None],
                        torch.from_numpy(cut.spans)[None],
                    )
                    nll = F.cross_entropy(
                        logits[0, -9:-1], batch.tokens[row, -8:], reduction="none"
                    )
                    expected = (nll * batch.labelled[row, -8:]).sum()
                    torch.testing.assert_close(
                        judged.nll[row, variant], expected, atol=1e-3, rtol=1e-4
                    )

    def test_all_blocks_are_held_once(self, judged: Judged) -> None:
        """By disjoint variants of four blocks each; the baseline holds what its tail does."""
        assert judged.held.shape == (3, 1 + 5 + 1, 20)
        assert judged.held[:, 0].nonzero()[:, 1].tolist() == [*range(12, 20)] * 3
        assert (judged.held[:, 1:].sum(-1) == 4).all()
        assert (judged.held[:, 1:-1].sum(1) == 1).all()
        assert not judged.held[0, 1:-1].equal(judged.held[1, 1:-1])

    def test_where_blocks_do_not_come_out_even(self, mc: MCController, batch: Batch) -> None:
        """The last variant holds some that another holds too; still none is left out."""
        other = MCController(replace(mc.config, train_wc_length=45))  # room for three
        held = judge(other, batch, np.random.default_rng(0)).held
        assert held.shape == (3, 1 + 7 + 1, 20)
        assert (held[:, 1:].sum(-1) == 3).all()
        assert {*held[:, 1:-1].sum(1).flatten().tolist()} == {1, 2}

    def test_the_last_holds_what_has_most_words_in_common(
        self, judged: Judged, batch: Batch
    ) -> None:
        """With the tokens before the horizon, of which none may be seen."""
        visible = Visible(batch.tokens[:, :-8].numpy(), 20, 4, 4)
        best = overlap(visible, 16, idf=True).argsort(axis=1, kind="stable")[:, -4:]
        found = [held.nonzero()[:, 0].tolist() for held in judged.held[:, -1]]
        assert found == [sorted(row) for row in best.tolist()]

    def test_seeded_and_without_lensnet(
        self, mc: MCController, batch: Batch, judged: Judged
    ) -> None:
        """Same numbers, same losses; no call of LensNet, no gradients."""
        called = len(mc.guard.calls)
        again = judge(mc, batch, np.random.default_rng(0))
        assert again.held.equal(judged.held)
        assert again.nll.equal(judged.nll)
        assert not judge(mc, batch, np.random.default_rng(1)).held.equal(judged.held)
        assert len(mc.guard.calls) == called == 0
        guard = guard_of(mc.language_model)
        assert guard is not None
        assert guard.count("training") == 0
        assert not again.nll.requires_grad

    def test_no_room_for_a_block(self, mc: MCController, batch: Batch) -> None:
        """There would be nothing to compare."""
        short = MCController(replace(mc.config, train_wc_length=36))
        with pytest.raises(ValueError) as raised:
            judge(short, batch, np.random.default_rng(0))
        assert str(raised.value) == (
            "a working context of 36 entries has no room for a block of 96 tokens in detail; make "
            "train_wc_length longer"
        )


@pytest.fixture
def kept(mc: MCController, judged: Judged, tmp_path: Path) -> KeptLosses:
    """Two files of the same."""
    losses = KeptLosses.beside(tmp_path / "kept", mc)
    for number in range(2):
        losses.write(number, judged, mc.config.vocab_size)
    return losses


class TestFiles:
    def test_what_was_written_is_read(self, kept: KeptLosses, judged: Judged) -> None:
        """One file after another, in the smallest type; nothing else lies there."""
        read = kept.read()
        assert read.tokens.equal(torch.cat([judged.tokens] * 2))
        assert read.nll.equal(torch.cat([judged.nll] * 2))
        assert read.held.equal(torch.cat([judged.held] * 2))
        assert sorted(path.name for path in kept.folder.iterdir()) == ["000000.npz", "000001.npz"]
        assert np.load(kept.path(0))["tokens"].dtype == np.uint8

    def test_a_write_that_fails_leaves_no_half(
        self, kept: KeptLosses, judged: Judged, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A new file is not there, and an old one is as it was."""
        before = kept.path(1).read_bytes()

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        for number in (1, 2):
            with pytest.raises(OSError, match="cannot write"):
                kept.write(number, judged, 256)
        assert not kept.path(2).exists()
        assert kept.path(1).read_bytes() == before
        assert len([*kept.folder.iterdir()]) == 2

    def test_what_a_kill_leaves_is_not_read(self, kept: KeptLosses) -> None:
        """A file that is not whole has another name."""
        (kept.folder / "000002.npz.tmp").write_bytes(kept.path(0).read_bytes()[:40])
        assert len(kept.read().tokens) == 6

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda data: data[:-100],
            lambda data: data[: len(data) // 2],
            lambda data: b"",
            lambda data: data[:60] + bytes(40) + data[100:],
            lambda data: b"no archive",
        ],
        ids=["truncated", "half", "empty", "overwritten", "another"],
    )
    @pytest.mark.filterwarnings("error")
    def test_a_damaged_file_is_named(self, kept: KeptLosses, spoil: object) -> None:
        """And what to do; nothing is left open."""
        path = kept.path(1)
        path.write_bytes(spoil(path.read_bytes()))  # type: ignore[operator]
        with pytest.raises(DamagedFileError) as raised:
            kept.read()
        assert str(raised.value).startswith(f"{path} is damaged (")
        assert str(raised.value).endswith(f"); {ADVICE}")

    def test_losses_of_other_networks(self, kept: KeptLosses, mc: MCController) -> None:
        """One weight of GistNet that has moved makes them wrong."""
        other = MCController(mc.config)
        assert KeptLosses.beside(kept.folder, other).read()
        with torch.no_grad():
            next(other.gistnet.parameters()).flatten()[0] += 1
        with pytest.raises(DamagedFileError) as raised:
            KeptLosses.beside(kept.folder, other).read()
        assert str(raised.value) == (
            f"{kept.path(0)} holds losses of other networks than those of this run; {ADVICE}"
        )

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        """There is nothing to learn from."""
        with pytest.raises(FileNotFoundError) as raised:
            KeptLosses(tmp_path, "").read()
        assert str(raised.value) == f"{tmp_path} holds no losses; compute them first"


class TestMerge:
    def test_one_file_of_all(self, kept: KeptLosses, tmp_path: Path) -> None:
        """With the same losses, of the same networks."""
        merge(kept.folder, tmp_path / "one")
        one = KeptLosses(tmp_path / "one", kept.made_by)
        assert [path.name for path in one.folder.iterdir()] == ["000000.npz"]
        for ours, theirs in zip(vars(one.read()).values(), vars(kept.read()).values(), strict=True):
            assert ours.equal(theirs)

    def test_of_nothing(self, tmp_path: Path) -> None:
        """Is said by the name of the file that is not there."""
        (tmp_path / "kept").mkdir()
        with pytest.raises(FileNotFoundError, match=r"kept/000000\.npz"):
            merge(tmp_path / "kept", tmp_path / "one")
