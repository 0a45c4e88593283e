"""Sessions: a history that grows, a context that does not, and what survives a kill."""

import copy
import dataclasses
import json
import multiprocessing
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.megacontext.conftest import SMALL
from torch import Tensor

from megacontext import MCConfig, MCController, SessionConfig
from megacontext.allocators.rules import coarsest_length

HISTORY = torch.randint(0, 64, (3_000,), generator=torch.Generator().manual_seed(5))
OFTEN = SessionConfig(refocus_interval=8)
SHORT = SessionConfig(refocus_interval=8, wc_length=28)  # no room for a third level of gists


def reread(mc: MCController) -> Tensor:
    """Logits of the whole working context, without any cache."""
    context = mc.working_context
    with torch.no_grad():
        logits: Tensor = mc.language_model(context.embeddings, context.starts, context.spans)
    return logits


def assert_same_state(one: MCController, other: MCController) -> None:
    """Cut, tokens, gists, what rests, and what the model would say next."""
    first, second = one._session, other._session
    assert first is not None
    assert second is not None
    assert first.cut == second.cut
    assert [r.tolist() for r in first.focus.resting] == [r.tolist() for r in second.focus.resting]
    for a, b in zip(first.store._columns, second.store._columns, strict=True):
        every = np.arange(len(a))
        np.testing.assert_allclose(a.take(every), b.take(np.arange(len(b))), atol=1e-5)
    torch.testing.assert_close(reread(one), reread(other), atol=1e-4, rtol=1e-4)


class TestLogits:
    @settings(max_examples=10)
    @given(st.integers(1, 1_200), st.lists(st.integers(1, 30), min_size=1, max_size=8))
    def test_with_the_cache_they_are_those_without_it(self, prompt: int, steps: list[int]) -> None:
        """After the prompt and after every step, however long, across refocuses."""
        mc, at = MCController(MCConfig(**SMALL)), prompt
        logits = mc.begin_inference_session(HISTORY[:prompt], settings=OFTEN)
        assert logits.shape == (1, 1, 64)
        for size in steps:
            torch.testing.assert_close(logits[:, -1:], reread(mc)[:, -1:], atol=1e-4, rtol=1e-4)
            logits = mc.inference_step(HISTORY[at : at + size])
            assert logits.shape == (1, size, 64)
            at += size
        torch.testing.assert_close(logits[:, -1:], reread(mc)[:, -1:], atol=1e-4, rtol=1e-4)

    def test_between_refocuses_every_token_gets_its_own(self, mc: MCController) -> None:
        """The language model reads what is new, once."""
        mc.begin_inference_session(HISTORY[:100], settings=OFTEN)
        lengths: list[int] = []
        mc.language_model.register_forward_pre_hook(lambda _, x: lengths.append(x[0].shape[1]))
        logits = mc.inference_step(HISTORY[100:105])
        assert lengths == [5]
        torch.testing.assert_close(logits, reread(mc)[:, -5:], atol=1e-4, rtol=1e-4)
        mc.inference_step(HISTORY[105:107])
        mc.inference_step(HISTORY[107:108])  # and a refocus, after which all is read again
        length = mc.inference_report().length
        assert lengths[-3:] == [2, 1, length]

    def test_a_read_that_was_interrupted_leaves_no_half_read_cache(self, mc: MCController) -> None:
        """Its tokens are in the history; the next step reads them again."""
        mc.begin_inference_session(HISTORY[:100], settings=OFTEN)

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        hook = mc.language_model.blocks[0].mlp.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            mc.inference_step(HISTORY[100:102])
        hook.remove()
        assert mc.inference_report().tokens == 102
        logits = mc.inference_step(HISTORY[102:105])
        torch.testing.assert_close(logits, reread(mc)[:, -3:], atol=1e-4, rtol=1e-4)

    def test_what_was_appended_and_never_read_is_read_with_the_next(
        self, mc: MCController, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Interrupted right between the two."""
        mc.begin_inference_session(HISTORY[:100], settings=OFTEN)
        append = mc._session.store.append
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

            def interrupted(tokens: np.ndarray) -> None:
                append(tokens)
                raise KeyboardInterrupt

            patch.setattr(mc._session.store, "append", interrupted)
            mc.inference_step(HISTORY[100:102])
        logits = mc.inference_step(HISTORY[102:105])
        torch.testing.assert_close(logits, reread(mc)[:, -3:], atol=1e-4, rtol=1e-4)

    def test_no_gradients(self, mc: MCController) -> None:
        """Nor anything that keeps them."""
        assert not mc.begin_inference_session(HISTORY[:20]).requires_grad
        assert not mc.inference_step(HISTORY[:3]).requires_grad
        assert not mc.working_context.embeddings.requires_grad


class TestWorkingContext:
    def test_without_room_for_another_level_the_oldest_is_lost(self, mc: MCController) -> None:
        """Checked after every token of a history many times as long as the context can cover."""
        mc.begin_inference_session(HISTORY[:300], settings=SHORT)
        session, config = mc._session, mc.config
        assert session is not None
        lost = [0]
        for at in range(300, 1_300):
            mc.inference_step(HISTORY[at : at + 1])
            cut = session.cut
            cut.check(int(cut.positions[0]), at + 1, config.recent_tokens)
            assert len(cut) <= 28 + 7
            if mc.inference_report().next_refocus == 8:
                assert len(cut) <= 28
                lost.append(int(cut.positions[0]))
        report = mc.inference_report()
        assert lost == sorted(lost)
        assert report.first_token == lost[-1] > 0
        assert report.dropped > 0
        assert all(first % 16 == 0 for first in lost)

    def test_nothing_is_lost_that_the_coarsest_context_can_cover(self, mc: MCController) -> None:
        """The first loss comes when even that is too long."""
        mc.begin_inference_session(HISTORY[:1], settings=SHORT)
        session = mc._session
        assert session is not None
        geometry = session.rules.geometry
        for at in range(1, 1_000, 8):
            before = mc.inference_report().tokens
            mc.inference_step(HISTORY[at : at + 8])
            if mc.inference_report().first_token:
                break
            assert coarsest_length(0, mc.inference_report().tokens, geometry) <= 28 + 7
        assert coarsest_length(0, before + 8, geometry) > 28

    def test_starts_count_from_the_first_covered_token(self, mc: MCController) -> None:
        """Labels are the tokens after each entry; only the last has none."""
        mc.begin_inference_session(HISTORY[:2_000], settings=SHORT)
        mc.inference_step(HISTORY[2_000:2_003])
        context, report = mc.working_context, mc.inference_report()
        assert context.embeddings.shape == (1, report.length, 32)
        assert (int(context.starts[0, 0]), context.pad_mask) == (0, None)
        assert report.first_token > 0
        following = report.first_token + (context.starts + context.spans)[0, :-1]
        assert torch.equal(context.labels[0, :-1], HISTORY[following])
        assert context.labels[0, -1] == -100

    def test_nothing_flips_within_the_cooldown(self, mc: MCController) -> None:
        """In a real session, whose LensNet changes its mind at every refocus."""
        of = SessionConfig(refocus_interval=8, cooldown=3, margin=0.0)
        mc.begin_inference_session(HISTORY[:400], settings=of)
        session = mc._session
        assert session is not None
        with torch.no_grad():
            mc.lensnet.head.weight.normal_(std=3.0)
        rows = [session.cut.token_lods(400)]
        for at in range(400, 1_000, 8):
            with torch.no_grad():
                mc.lensnet.head.bias.copy_(torch.randn(1))
            mc.inference_step(HISTORY[at : at + 8])
            rows.append(session.cut.token_lods(at + 8))
        assert mc.inference_report().expanded > 5
        width = len(rows[-1])
        lods = np.stack([np.pad(r, (0, width - len(r)), constant_values=-1) for r in rows])
        steps = np.where((lods[1:] < 0) | (lods[:-1] < 0), 0, np.sign(np.diff(lods, axis=0)))
        for back in range(1, 4):
            assert (steps[back:] * steps[:-back] >= 0).all()


class TestReport:
    def test_it_says_what_happened(self, mc: MCController, assert_lensnet_calls) -> None:
        """Figures that add up, and an event for each iteration."""
        of = SessionConfig(refocus_interval=8, iterations=2)
        with assert_lensnet_calls(n=2 + 3 * 2):
            mc.begin_inference_session(HISTORY[:200], settings=of)
            mc.inference_step(HISTORY[200:227])
        report = mc.inference_report()
        assert (report.tokens, report.refocuses, report.lensnet_calls) == (227, 4, 8)
        assert report.next_refocus == 8 - 3
        assert sum(report.entries_by_lod) == report.length == mc.working_context.starts.shape[1]
        assert report.wc_length == 48
        assert [event.tokens for event in report.events] == [200] * 2 + [208] * 2 + [216] * 2 + [
            224
        ] * 2
        assert sum(event.expanded for event in report.events) == report.expanded
        assert sum(event.collapsed for event in report.events) == report.collapsed
        for event in report.events:
            saved = 3 * (event.collapsed - event.expanded) + event.dropped
            assert event.before - saved == event.after
        assert report.ram_bytes > 0 == report.disk_bytes
        json.dumps(dataclasses.asdict(report))

    def test_a_prompt_in_pieces_is_the_prompt(self, config: MCConfig) -> None:
        """Which need not fit into memory together; progress is told."""
        whole, pieces, told = MCController(config), MCController(config), []
        whole.begin_inference_session(HISTORY[:500])
        pieces.begin_inference_session(iter(HISTORY[:500].split(70)), progress=told.append)
        assert_same_state(whole, pieces)
        assert told == [70, 140, 210, 280, 350, 420, 490, 500]


def wrong(of: Callable[[MCController], object], mc: MCController) -> str:
    with pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
        of(mc)
    return f"{type(raised.value).__name__}: {raised.value}"


class TestWrongUsage:
    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            (HISTORY[:0], "ValueError: there must be at least one token"),
            ([], "ValueError: a session begins with at least one token"),
            (HISTORY[:4].int(), "TypeError: tokens must be an int64 tensor, not torch.int32"),
            (None, "TypeError: tokens must be an int64 tensor, not NoneType"),
            ([[1, 2]], "TypeError: tokens must be an int64 tensor, not list"),
            (
                HISTORY[:4].view(2, 2),
                "ValueError: tokens must be [T] or [1, T]: a session has one history, not [2, 2]",
            ),
            (
                torch.tensor([3, 64]),
                "ValueError: tokens must lie in [0, 64), but run from 3 to 64",
            ),
        ],
    )
    def test_tokens_that_are_none(
        self, mc: MCController, tmp_path: Path, tokens: object, message: str
    ) -> None:
        """Refused at the beginning, before there is a folder, and at a step, which adds nothing."""
        path = tmp_path / "session"
        begin = {"tree_store": "disk", "path": path}
        assert wrong(lambda mc: mc.begin_inference_session(tokens, **begin), mc) == message
        assert not path.exists()
        if isinstance(tokens, Tensor):
            mc.begin_inference_session(HISTORY[:9])
            assert wrong(lambda mc: mc.inference_step(tokens), mc) == message
            assert mc.inference_report().tokens == 9

    def test_a_step_before_the_beginning(self, mc: MCController) -> None:
        """And after the end."""
        message = (
            "RuntimeError: there is no inference session: begin one with "
            "mc.begin_inference_session(tokens)"
        )
        assert wrong(lambda mc: mc.inference_step(HISTORY[:1]), mc) == message
        assert wrong(lambda mc: mc.working_context, mc) == message
        mc.begin_inference_session(HISTORY[:1])
        mc.end_inference_session()
        assert wrong(lambda mc: mc.inference_report(), mc) == message

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"tree_store": "cloud"}, "tree_store must be 'memory' or 'disk', not 'cloud'"),
            ({"tree_store": "disk"}, "tree_store='disk' and path belong together: give both or"),
            ({"path": "x"}, "tree_store='disk' and path belong together: give both or"),
            (
                {"settings": SessionConfig(wc_length=21)},
                "wc_length 21 is too short for a session: the last 16 tokens at LOD0, and what "
                "cannot be collapsed before them, take up to 22 entries",
            ),
            (
                {"settings": SessionConfig(wc_length=1_040)},
                "focus_window 1024 is too short for a wc_length of 1040: the focus view of all "
                "that it can cover has up to 1034 entries; choose a shorter wc_length, or a "
                "model with a wider focus_window",
            ),
        ],
    )
    def test_settings_that_do_not_fit(
        self, mc: MCController, arguments: dict[str, object], message: str
    ) -> None:
        """Told at the beginning, not after a million tokens."""
        begin = lambda mc: mc.begin_inference_session(HISTORY[:9], **arguments)  # noqa: E731
        assert wrong(begin, mc).startswith(f"ValueError: {message}")
        assert mc._session is None

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"refocus_interval": 0}, "ValueError: refocus_interval must be at least 1, not 0"),
            ({"iterations": 1.0}, "TypeError: iterations must be an int, not 1.0"),
            ({"wc_length": 0}, "ValueError: wc_length must be at least 1, not 0"),
            ({"cooldown": -1}, "ValueError: cooldown must be at least 0, not -1"),
        ],
    )
    def test_settings_that_make_no_session(
        self, mc: MCController, setting: dict[str, int], message: str
    ) -> None:
        """Named, with their values."""
        assert wrong(lambda _: SessionConfig(**setting), mc) == message

    def test_the_window_that_is_just_wide_enough(self) -> None:
        """The bound in the message is exact: over all lengths of history the view has as many."""
        mc = MCController(MCConfig(**{**SMALL, "focus_window": 42}))
        mc.begin_inference_session(HISTORY[:1], settings=OFTEN)
        session = mc._session
        assert session is not None
        allocator, longest = session._allocator, 0
        calls: list[int] = []
        mc.lensnet.register_forward_pre_hook(lambda _, x: calls.append(x[0].shape[1]))
        for at in range(1, 1_200, 3):
            mc.inference_step(HISTORY[at : at + 3])
            longest = max(longest, len(allocator.focus_view(session.cut)))
        assert max(*calls, longest) == 42
        narrow = MCController(MCConfig(**{**SMALL, "focus_window": 41}))
        assert "has up to 42 entries" in wrong(
            lambda mc: mc.begin_inference_session(HISTORY[:9]), narrow
        )

    def test_two_threads_at_once(self, mc: MCController) -> None:
        """The second is refused; the first is not disturbed."""
        mc.begin_inference_session(HISTORY[:50])
        inside, go_on = threading.Event(), threading.Event()

        def wait(*_: object) -> None:
            inside.set()
            go_on.wait(20)

        hook = mc.language_model.register_forward_pre_hook(wait)
        thread = threading.Thread(target=mc.inference_step, args=(HISTORY[50:53],))
        thread.start()
        assert inside.wait(20)
        message = wrong(lambda mc: mc.inference_step(HISTORY[:1]), mc)
        go_on.set()
        thread.join()
        hook.remove()
        assert message == (
            "RuntimeError: another thread is using this session; give each thread its own"
        )
        assert mc.inference_report().tokens == 53

    def test_copies_of_a_controller_have_no_session(self, mc: MCController) -> None:
        """It may own files; the original keeps its own."""
        mc.begin_inference_session(HISTORY[:50])
        assert copy.deepcopy(mc)._session is None
        assert pickle.loads(pickle.dumps(mc))._session is None
        assert mc.inference_report().tokens == 50

    def test_a_second_beginning_takes_the_place_of_the_first(
        self, mc: MCController, tmp_path: Path
    ) -> None:
        """Whose folder is free then; one that fails leaves the first as it was."""
        mc.begin_inference_session(HISTORY[:50], tree_store="disk", path=tmp_path / "one")
        with pytest.raises(FileExistsError, match="holds a session already: resume it, or"):
            mc.begin_inference_session(HISTORY[:9], tree_store="disk", path=tmp_path / "one")
        assert mc.inference_report().tokens == 50
        mc.begin_inference_session(HISTORY[:9])
        mc.resume_inference_session(tmp_path / "one")
        assert mc.inference_report().tokens == 50


def feed(path: Path, upto: int, piece: int) -> None:
    """Begin or resume a session in a folder, and feed it the history."""
    torch.set_num_threads(1)
    mc = MCController(MCConfig(**SMALL))
    if (path / "session.json").exists():
        mc.resume_inference_session(path)
    else:
        mc.begin_inference_session(HISTORY[:40], tree_store="disk", path=path, settings=OFTEN)
    while (done := mc.inference_report().tokens) < upto:
        mc.inference_step(HISTORY[done : min(done + piece, upto)])


def hold(path: Path, ready: threading.Event, release: threading.Event) -> None:
    mc = MCController(MCConfig(**SMALL))
    mc.resume_inference_session(path)
    ready.set()
    release.wait(60)


@pytest.fixture(scope="module")
def processes():
    """Real processes that have imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megacontext"])
    return context


@pytest.fixture
def folder(config: MCConfig, tmp_path: Path) -> Path:
    """A session of 400 tokens, ended."""
    mc = MCController(config)
    path = tmp_path / "session"
    mc.begin_inference_session(HISTORY[:90], tree_store="disk", path=path, settings=OFTEN)
    mc.inference_step(HISTORY[90:400])
    mc.end_inference_session()
    return path


class TestResume:
    def test_it_goes_on_as_if_nothing_had_happened(
        self, config: MCConfig, folder: Path, mc: MCController
    ) -> None:
        """Same cut, tokens, gists, cooldown, counts and logits as in memory, without end."""
        mc.begin_inference_session(HISTORY[:90], settings=OFTEN)
        expected = mc.inference_step(HISTORY[90:400])[:, -1:]
        resumed = MCController(config)
        logits = resumed.resume_inference_session(folder)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        assert_same_state(mc, resumed)
        for one in (mc, resumed):
            one.inference_step(HISTORY[400:500])
        assert_same_state(mc, resumed)
        left, right = (dataclasses.asdict(one.inference_report()) for one in (mc, resumed))
        for name in ("refocuses", "lensnet_calls", "expanded", "collapsed", "dropped", "tokens"):
            assert left[name] == right[name]

    def test_a_relative_folder_moved_with_the_process(
        self, config: MCConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A session goes on where it was, whatever directory the process changes to."""
        monkeypatch.chdir(folder.parent)
        mc = MCController(config)
        mc.resume_inference_session(folder.name)
        (folder.parent / "other").mkdir()
        monkeypatch.chdir("other")
        mc.inference_step(HISTORY[400:500])
        mc.end_inference_session()
        assert list(Path().iterdir()) == []

    def test_killed_at_random_moments_it_loses_nothing(
        self, config: MCConfig, tmp_path: Path, processes
    ) -> None:
        """SIGKILL, again and again; the end is that of a session that nobody disturbed."""
        path, kills = tmp_path / "session", 0
        rng = random.Random(0)
        aims = sorted(rng.sample(range(41, 500), 4))  # it goes on for long, however late
        for aim in aims:
            process: BaseProcess = processes.Process(target=feed, args=(path, 1_000, 5))
            process.start()
            deadline = time.monotonic() + 60
            while process.is_alive() and time.monotonic() < deadline:
                if (path / "tokens.bin").exists() and os.stat(path / "tokens.bin").st_size >= aim:
                    time.sleep(rng.random() * 0.003)
                    os.kill(process.pid or 0, signal.SIGKILL)
                    process.join()
            kills += process.exitcode == -signal.SIGKILL
        assert kills == len(aims)
        assert os.stat(path / "tokens.bin").st_size < 1_000
        last = processes.Process(target=feed, args=(path, 1_000, 5))
        last.start()
        last.join()
        assert last.exitcode == 0
        whole, resumed = MCController(config), MCController(config)
        whole.begin_inference_session(HISTORY[:40], settings=OFTEN)
        for at in range(40, 1_000, 5):
            whole.inference_step(HISTORY[at : at + 5])
        resumed.resume_inference_session(path)
        assert_same_state(whole, resumed)

    def test_killed_before_its_first_focus(self, config: MCConfig, folder: Path) -> None:
        """The tokens that it had taken in are those of a beginning."""
        (folder / "focus.json").unlink()
        whole, resumed = MCController(config), MCController(config)
        resumed.resume_inference_session(folder)
        whole.begin_inference_session(HISTORY[:400], settings=OFTEN)
        assert_same_state(whole, resumed)

    def test_killed_between_tokens_and_focus(self, config: MCConfig, folder: Path) -> None:
        """What was due is done at once: tokens are the truth."""
        with (folder / "tokens.bin").open("ab") as file:
            file.write(bytes(HISTORY[400:470].tolist()))
        mc = MCController(config)
        mc.resume_inference_session(folder)
        report = mc.inference_report()
        assert (report.tokens, report.next_refocus) == (470, 8)

    def test_two_processes_are_kept_apart(self, config: MCConfig, folder: Path, processes) -> None:
        """And a killed one leaves no lock behind."""
        ready, release = processes.Event(), processes.Event()
        other = processes.Process(target=hold, args=(folder, ready, release))
        other.start()
        assert ready.wait(60)
        mc = MCController(config)
        with pytest.raises(BlockingIOError) as raised:
            mc.resume_inference_session(folder)
        assert str(raised.value) == (
            f"another session is using {folder}; end it, or choose another folder"
        )
        os.kill(other.pid, signal.SIGKILL)
        other.join()
        mc.resume_inference_session(folder)

    def test_other_weights_are_refused(self, config: MCConfig, folder: Path) -> None:
        """Of the embedding or of GistNet; those of LensNet may learn on."""
        mc = MCController(config)
        with torch.no_grad():
            mc.lensnet.head.bias.add_(1)
        mc.resume_inference_session(folder)
        mc.end_inference_session()
        with torch.no_grad():
            mc.gistnet.norm.weight[0] += 1e-3
        with pytest.raises(ValueError) as raised:
            mc.resume_inference_session(folder)
        assert str(raised.value) == (
            f"{folder} was made with other weights of embedding and GistNet, so its gists mean "
            "nothing to this model; load the checkpoint that made it, or begin a new session"
        )

    def test_other_sizes_are_refused(self, folder: Path) -> None:
        """Named; and the lock is free again."""
        other = MCController(MCConfig(**{**SMALL, "block_size": 8, "d_model": 16}))
        for _ in range(2):
            with pytest.raises(ValueError) as raised:
                other.resume_inference_session(folder)
            assert str(raised.value) == (
                f"{folder} was made by a model with d_model 32, not 16; block_size 4, not 8"
            )

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("session.json", "{", "session.json is damaged (Expecting property name"),
            ("session.json", "[]", "session.json is damaged (it is no object); put the original"),
            ("session.json", "{}", "session.json is damaged; put the original back"),
            ("session.json", "\xff", "session.json is damaged ('utf-8' codec can't decode byte"),
            ("session.json", '{"format": 9}', "session has format 9, and this version reads 1"),
            ("session.json", '{"format": 1}', "session.json is damaged; put the original back"),
            ("focus.json", "", "focus.json is damaged (Expecting value"),
            ("focus.json", "{}", "focus.json is damaged ('tokens'); remove it, and the session"),
            (
                "focus.json",
                '{"tokens": 9, "positions": [0], "lods": [0], "resting": [], "totals": {}}',
                "focus.json is damaged (the cut does not tile [0, 9)",
            ),
            ("tokens.bin", "abc", "it was focused on 394 tokens, and tokens.bin has 3; remove"),
        ],
    )
    def test_damage_is_told(
        self, mc: MCController, folder: Path, name: str, content: str, message: str
    ) -> None:
        """With the file, and what to do."""
        (folder / name).write_text(content, encoding="latin-1")
        with pytest.raises(ValueError) as raised:
            mc.resume_inference_session(folder)
        assert message in str(raised.value)

    def test_where_there_is_none(self, mc: MCController, tmp_path: Path) -> None:
        """Or only its beginning."""
        with pytest.raises(FileNotFoundError, match=r"no session to resume: no session\.json"):
            mc.resume_inference_session(tmp_path)
        mc.begin_inference_session(HISTORY[:1], tree_store="disk", path=tmp_path / "one")
        mc.end_inference_session()
        (tmp_path / "one" / "tokens.bin").write_bytes(b"")
        with pytest.raises(ValueError, match="killed before the first; remove the folder"):
            mc.resume_inference_session(tmp_path / "one")


class TestFolder:
    def test_a_folder_with_other_things_is_not_touched(
        self, mc: MCController, tmp_path: Path
    ) -> None:
        """Nor is a file."""
        (tmp_path / "note").write_text("mine")
        for path in (tmp_path, tmp_path / "note"):
            with pytest.raises(FileExistsError, match="is not an empty folder; choose another"):
                mc.begin_inference_session(HISTORY[:9], tree_store="disk", path=path)
        assert [p.name for p in tmp_path.iterdir()] == ["note"]

    def test_a_focus_that_cannot_be_written_changes_nothing(
        self, config: MCConfig, folder: Path, mc: MCController
    ) -> None:
        """The session stays usable, and catches up when it can."""
        mc.resume_inference_session(folder)
        before = (folder / "focus.json").read_bytes()
        (folder / "focus.json.tmp").mkdir()
        with pytest.raises(OSError, match=r"cannot write .*focus\.json: Is a directory; what was"):
            mc.inference_step(HISTORY[400:420])
        assert (folder / "focus.json").read_bytes() == before
        taken = mc.inference_report().tokens
        assert (taken, mc.inference_report().next_refocus) == (402, 0)
        (folder / "focus.json.tmp").rmdir()
        mc.inference_step(HISTORY[taken:420])
        whole = MCController(config)
        whole.begin_inference_session(HISTORY[:90], settings=OFTEN)
        whole.inference_step(HISTORY[90:420])
        assert_same_state(whole, mc)
