"""Sessions whose history needs more levels of gists than the networks were trained on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.megacontext.conftest import SMALL
from tests.megacontext.inference.test_session import HISTORY, OFTEN, assert_same_state, reread

from megacontext import MCConfig, MCController

LONG = torch.randint(0, 64, (200_000,), generator=torch.Generator().manual_seed(7))


class TestDepth:
    def test_it_tiles_the_history_within_the_budget_for_ever(self, mc: MCController) -> None:
        """Checked after every token: a level is added when it must be, and no token is lost."""
        mc.begin_inference_session(HISTORY[:400], settings=OFTEN)
        session, config = mc._session, mc.config
        assert session is not None
        levels = []
        for at in range(400, 1_100):
            mc.inference_step(HISTORY[at : at + 1])
            session.cut.check(0, at + 1, config.recent_tokens)
            assert len(session.cut) <= config.train_wc_length + 7
            if mc.inference_report().next_refocus == 8:
                assert len(session.cut) <= config.train_wc_length
                levels.append(len(session.store.gists))
        assert levels == sorted(levels)
        assert sorted(set(levels)) == [2, 4, 5]
        report = mc.inference_report()
        assert (report.first_token, report.dropped) == (0, 0)
        assert sum(report.entries_by_lod[3:]) > 0
        assert report.expanded > 0

    def test_a_token_costs_as_much_whatever_came_before(self) -> None:
        """In entries that are read and scored, and in gists that are made; nothing is timed."""
        for tokens in (3_000, 200_000):
            mc = MCController(MCConfig(**SMALL, focus_window=96))
            mc.begin_inference_session(LONG[:tokens], settings=OFTEN)
            seen: dict[str, list[int]] = {"read": [], "scored": [], "gists": []}
            mc.language_model.register_forward_pre_hook(
                lambda _, x, seen=seen: seen["read"].append(x[0].shape[1])
            )
            mc.lensnet.register_forward_pre_hook(
                lambda _, x, seen=seen: seen["scored"].append(x[0].shape[1])
            )
            mc.gistnet.norm.register_forward_hook(
                lambda _, x, __, seen=seen: seen["gists"].append(len(x[0]))
            )
            for token in HISTORY[:64]:
                mc.inference_step(token[None])
            assert mc.inference_report().first_token == 0
            assert max(seen["read"]) <= 48
            assert len(seen["read"]) == 64 + 8
            assert len(seen["scored"]) == 8
            assert max(seen["scored"]) <= 96
            assert sum(seen["gists"]) <= 64 // 4 + 64 // 16 + 64 // 64 + 3  # a few high ones
            mc.end_inference_session()

    def test_lensnet_was_asked_about_a_level_that_it_has_no_embedding_of(
        self, mc: MCController
    ) -> None:
        """It takes what is coarser for the highest that it knows, and is told the true span."""
        asked: list[tuple[int, int]] = []
        mc.lensnet.register_forward_pre_hook(
            lambda _, x: asked.append((int(x[3].max()), int(x[2].max())))
        )
        mc.begin_inference_session(LONG[:20_000], settings=OFTEN)
        assert max(lod for lod, _ in asked) == 2
        assert max(span for _, span in asked) > 16**2

    def test_what_the_cut_holds_open_was_one_entry_of_the_view(self) -> None:
        """Then its parts have one score, and no session finds its way down."""
        mc = MCController(MCConfig(**SMALL, focus_window=48))
        mc.begin_inference_session(LONG[:20_000], settings=OFTEN)
        session, finest = mc._session, []
        assert session is not None
        for at in range(0, 160, 8):
            mc.inference_step(HISTORY[at : at + 8])
            cut, depth = session.cut, len(session.store.gists)
            view = session._allocator.focus_view(cut, depth)
            of_view, of_cut = (of.token_lods(20_200) for of in (view, cut))
            assert (of_view <= np.maximum(of_cut, 1)).all()
            finest.append(int(of_cut[:19_000].min()))
        assert min(finest) < depth - 1

    def test_logits_are_those_without_the_cache(self, mc: MCController) -> None:
        """Positions count from a token that is very far back."""
        mc.begin_inference_session(LONG, settings=OFTEN)
        logits = mc.inference_step(HISTORY[:5])
        torch.testing.assert_close(logits, reread(mc)[:, -5:], atol=1e-4, rtol=1e-4)


class TestResume:
    @pytest.fixture
    def folder(self, config: MCConfig, tmp_path: Path) -> Path:
        """A session of 600 tokens, of which 200 came one by one."""
        mc, path = MCController(config), tmp_path / "session"
        mc.begin_inference_session(HISTORY[:400], tree_store="disk", path=path, settings=OFTEN)
        mc.inference_step(HISTORY[400:600])
        mc.end_inference_session()
        return path

    def test_it_goes_on_as_if_nothing_had_happened(self, config: MCConfig, folder: Path) -> None:
        """Across the token at which another level is added, what rests included."""
        whole, resumed = MCController(config), MCController(config)
        whole.begin_inference_session(HISTORY[:400], settings=OFTEN)
        whole.inference_step(HISTORY[400:600])
        resumed.resume_inference_session(folder)
        assert_same_state(whole, resumed)
        assert any(len(keys) for keys in whole._session.focus.resting)
        for mc in (whole, resumed):
            mc.inference_step(HISTORY[600:1_060])
        assert_same_state(whole, resumed)
        assert whole._session.store.gists == (265, 66, 16, 4, 1)

    def test_levels_of_tokens_that_a_kill_lost_were_taken_for_others(
        self, config: MCConfig, folder: Path
    ) -> None:
        """Back to fewer tokens than the highest level needs, and on with other ones."""
        with (folder / "tokens.bin").open("r+b") as file:
            file.truncate(200)
        (folder / "focus.json").unlink()
        mc, whole = MCController(config), MCController(config)
        mc.resume_inference_session(folder)
        mc.inference_step(LONG[:400])
        whole.begin_inference_session(HISTORY[:200], settings=OFTEN)
        whole.inference_step(LONG[:400])
        assert_same_state(whole, mc)

    @pytest.mark.parametrize("name", ["gists1.bin", "gists3.bin", "gists4.bin"])
    def test_any_level_may_be_missing(self, config: MCConfig, folder: Path, name: str) -> None:
        """It is made from the one below."""
        mc, whole = MCController(config), MCController(config)
        (folder / name).unlink()
        mc.resume_inference_session(folder)
        whole.begin_inference_session(HISTORY[:400], settings=OFTEN)
        whole.inference_step(HISTORY[400:600])
        assert_same_state(whole, mc)

    def test_an_older_version_refuses_the_folder(self, folder: Path) -> None:
        """It would not know the levels: by the format, which is the second."""
        assert json.loads((folder / "session.json").read_bytes())["format"] == 2
