"""The growing tree: finished gists are never made again, and files survive what happens to them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext import (
    GistNet,
    LanguageModel,
    MegaContextTree,
    TrainingWCVariationAllocator,
)
from megacontext.allocators.cut import Geometry
from megacontext.inference import tree_store
from megacontext.inference.tree_store import DiskColumn, MemoryColumn, TreeStore

K, D = 4, 8


def networks() -> tuple[LanguageModel, GistNet]:
    torch.manual_seed(1)
    model, gistnet = LanguageModel(50, D, 1, 2), GistNet(D)
    torch.nn.init.normal_(gistnet.mlp[2].weight)
    return model, gistnet


def make_store(folder: Path | None = None, max_lod: int = 2) -> TreeStore:
    return TreeStore(*networks(), block_size=K, max_lod=max_lod, folder=folder)


def some_tokens(number: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50, number)


def levels(store: TreeStore) -> list[np.ndarray]:
    return [column.take(np.arange(len(column))) for column in store._columns]


@pytest.fixture(params=["memory", "disk"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path if request.param == "disk" else None


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


class TestTokens:
    @pytest.mark.parametrize("token", [-1, 50, 300])
    def test_one_that_is_not_embedded_wrapped_around(self, folder: Path | None, token: int) -> None:
        """In the narrow type of the column. Nothing of it is appended."""
        store = make_store(folder)
        store.append(some_tokens(9))
        with pytest.raises(ValueError) as raised:
            store.append(np.array([7, token]))
        low, high = min(7, token), max(7, token)
        assert str(raised.value) == f"tokens must lie in [0, 50), but run from {low} to {high}"
        assert len(store) == 9
        assert store.tokens(np.arange(9)).tolist() == some_tokens(9).tolist()


class TestGrowth:
    @settings(max_examples=40)
    @given(st.lists(st.integers(1, 90), min_size=1, max_size=8))
    def test_any_chunking_makes_the_same_tree(self, pieces: list[int]) -> None:
        """As the one that training builds from all tokens at once."""
        tokens, store = some_tokens(sum(pieces)), make_store()
        for piece in np.split(tokens, np.cumsum(pieces)[:-1]):
            store.append(piece)
        model, gistnet = networks()
        given_tokens = torch.from_numpy(tokens)[None]
        tree = MegaContextTree.build(
            given_tokens, model.embed(given_tokens), gistnet, block_size=K, max_lod=2
        )
        assert len(store) == len(tokens)
        assert store.gists == (len(tokens) // K, len(tokens) // K**2)
        made = np.concatenate(levels(store)[1:])
        np.testing.assert_allclose(made, tree.levels[0, len(tokens) :].numpy(), atol=1e-5)

    def test_an_appended_token_never_makes_a_finished_gist_again(self, folder: Path | None) -> None:
        """Counted where it cannot lie: inside GistNet."""
        store, made = make_store(folder), []
        store._gistnet.norm.register_forward_hook(lambda _, args, __: made.append(len(args[0])))
        for token in some_tokens(100):
            store.append(np.array([token]))
        assert sum(made) == 100 // K + 100 // K**2
        assert set(made) == {1}

    def test_many_tokens_are_taken_in_bounded_pieces(
        self, folder: Path | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No more are embedded at once than CHUNK_TOKENS."""
        monkeypatch.setattr(tree_store, "CHUNK_TOKENS", 24)
        store, sizes = make_store(folder), []
        store._gistnet.norm.register_forward_hook(
            lambda _, args, __: sizes.append(len(args[0]) * K)  # children of the gists
        )
        store.append(some_tokens(1_000))
        assert max(sizes) <= 24
        assert store.gists == (250, 62)


class TestDeepen:
    def test_any_depth_is_the_tree_that_one_call_of_gistnet_makes(
        self, folder: Path | None
    ) -> None:
        """Whenever levels are added, before tokens or after."""
        tokens, store = some_tokens(1_300), make_store(folder, max_lod=1)
        for piece, max_lod in zip(np.split(tokens, [3, 700]), (2, 4, 5), strict=True):
            store.append(piece)
            store.deepen(max_lod)
        store.deepen(3)  # there are as many already
        model, gistnet = networks()
        given_tokens = torch.from_numpy(tokens)[None]
        tree = MegaContextTree.build(
            given_tokens, model.embed(given_tokens), gistnet, block_size=K, max_lod=5
        )
        assert store.gists == tuple(1_300 // K**lod for lod in range(1, 6))
        made = np.concatenate(levels(store)[1:])
        np.testing.assert_allclose(made, tree.levels[0, 1_300:].numpy(), atol=1e-4)
        cut = Geometry(K, 5, 8).within(13).coarse_cut(0, 1_300)
        assert sorted(set(cut.lods.tolist())) == [0, 1, 4, 5]
        expected = tree.working_context([[cut]]).embeddings
        torch.testing.assert_close(store.gather(cut), expected, atol=1e-4, rtol=1e-4)

    def test_a_level_of_tokens_that_are_gone_is_made_anew(self, tmp_path: Path) -> None:
        """A kill left gists of tokens that were not kept: they are cut off, others are made."""
        store = make_store(tmp_path, max_lod=3)
        store.append(some_tokens(320))
        store.close()
        with (tmp_path / "tokens.bin").open("r+b") as file:
            file.truncate(130)
        again = make_store(tmp_path)
        again.append(some_tokens(190, seed=1))
        again.deepen(3)
        whole = make_store(max_lod=3)
        whole.append(np.concatenate([some_tokens(320)[:130], some_tokens(190, seed=1)]))
        for mended, made in zip(levels(again), levels(whole), strict=True):
            np.testing.assert_allclose(mended, made, atol=1e-6)

    def test_a_level_that_cannot_be_made_is_not_there(
        self, folder: Path | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The next try makes all of it."""
        store = make_store(folder)
        store.append(some_tokens(640))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

            def interrupt(*_: object) -> None:
                raise KeyboardInterrupt

            patch.setattr(store, "_make_gists", interrupt)
            store.deepen(4)
        assert store.gists == (160, 40)
        store.deepen(4)
        assert store.gists == (160, 40, 10, 2)


class TestGather:
    def test_it_is_the_trees(self, folder: Path | None) -> None:
        """Every entry of any cut is the gist of exactly its own tokens."""
        tokens, store = some_tokens(120), make_store(folder)
        store.append(tokens)
        model, gistnet = networks()
        given_tokens = torch.from_numpy(tokens)[None]
        tree = MegaContextTree.build(
            given_tokens, model.embed(given_tokens), gistnet, block_size=K, max_lod=2
        )
        allocator = TrainingWCVariationAllocator(K, 2, 0.3, 8, 0)
        for _ in range(5):
            cut = allocator.sample(120, 60)
            expected = tree.working_context([[cut]]).embeddings
            torch.testing.assert_close(store.gather(cut), expected, atol=1e-5, rtol=1e-4)

    def test_one_gather_for_each_level(self, folder: Path | None, monkeypatch) -> None:
        """However many entries."""
        store, takes = make_store(folder), []
        store.append(some_tokens(120))
        column = DiskColumn if folder else MemoryColumn
        take = column.take
        monkeypatch.setattr(column, "take", lambda self, i: takes.append(len(i)) or take(self, i))
        cut = TrainingWCVariationAllocator(K, 2, 0.3, 8, 0).sample(120, 60)
        store.gather(cut)
        assert takes == np.bincount(cut.lods).tolist()


class TestDiskColumn:
    def test_a_torn_row_is_cut_off_before_anything_is_appended(self, tmp_path: Path) -> None:
        """Or all later rows would be skewed."""
        (tmp_path / "rows").write_bytes(np.arange(6, dtype=np.int32).tobytes() + b"to")
        column = DiskColumn(tmp_path / "rows", np.dtype(np.int32), (2,))
        column.append(np.array([[6, 7]]))
        assert column.take(np.array([3, 0])).tolist() == [[6, 7], [0, 1]]
        column.close()
        assert (tmp_path / "rows").stat().st_size == 32


class TestFiles:
    def test_tokens_take_one_byte_each_and_gists_four_a_feature(self, tmp_path: Path) -> None:
        """Nothing else is on disk, and nothing in memory."""
        store = make_store(tmp_path)
        store.append(some_tokens(160))
        sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
        assert sizes == {"tokens.bin": 160, "gists1.bin": 40 * D * 4, "gists2.bin": 10 * D * 4}
        assert store.nbytes() == (0, sum(sizes.values()))

    def test_what_was_torn_or_lost_is_made_good(self, tmp_path: Path) -> None:
        """A torn gist is cut off, missing ones are made from tokens, orphans are dropped."""
        store = make_store(tmp_path)
        store.append(some_tokens(160))
        whole = levels(store)
        store.close()
        with (tmp_path / "gists1.bin").open("r+b") as file:
            file.truncate(13 * D * 4 + 5)
        (tmp_path / "gists2.bin").unlink()
        again = make_store(tmp_path)
        for mended, before in zip(levels(again), whole, strict=True):
            np.testing.assert_allclose(mended, before, atol=1e-6)
        again.close()
        with (tmp_path / "tokens.bin").open("r+b") as file:
            file.truncate(70)
        assert make_store(tmp_path).gists == (17, 4)

    def test_a_full_disk_changes_nothing(self, tmp_path: Path) -> None:
        """A real limit of a real process: neither tokens nor gists are kept of a failed append."""
        script = """
import resource, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_tree_store import levels, make_store, some_tokens
import numpy as np
from megacontext.inference.tree_store import DiskColumn
torch.set_grad_enabled(False)
store = make_store(Path(sys.argv[1]))
store.append(some_tokens(100))
before = levels(store)
limit = (Path(sys.argv[1]) / "gists1.bin").stat().st_size + 40
column = DiskColumn(Path(sys.argv[1]) / "alone.bin", np.dtype(np.int64))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    store.append(some_tokens(60, seed=1))
except OSError as error:
    print(error)
assert [len(level) for level in levels(store)] == [100, 25, 6]
try:
    column.append(np.arange(10_000))
except OSError:
    assert (Path(sys.argv[1]) / "alone.bin").stat().st_size == len(column) == 0
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.append(some_tokens(60, seed=1))
print(store.gists)
"""
        command = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        error, gists = done.stdout.splitlines()
        where = tmp_path / "gists1.bin"
        assert error == f"[Errno 27] cannot write to {where}: File too large; it is as it was"
        assert gists == "(40, 10)"
        whole = make_store()
        whole.append(np.concatenate([some_tokens(100), some_tokens(60, seed=1)]))
        for one, other in zip(levels(make_store(tmp_path)), levels(whole), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)

    def test_large_vocabularies_take_the_bytes_they_need(self, tmp_path: Path) -> None:
        """Two for 50,000 tokens."""
        torch.manual_seed(0)
        model = LanguageModel(50_000, D, 1, 2)
        store = TreeStore(model, GistNet(D), block_size=K, max_lod=1, folder=tmp_path)
        store.append(np.array([49_999, 3]))
        assert (tmp_path / "tokens.bin").stat().st_size == 4
        assert store.tokens(np.array([1, 0])).tolist() == [3, 49_999]
