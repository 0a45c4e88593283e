"""The HTML page of a run, read as a file and in a real browser."""

import json
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from matplotlib.image import imsave
from tests.lensnet_guard.postmortem.chromium import NAMES, Chromium, find_chromium
from torch import nn

from lensnet_guard import LensNetViolation, guard_module, lensnet_guard
from lensnet_guard.cli import main
from lensnet_guard.postmortem.analysis import analyse
from lensnet_guard.postmortem.timeline import MARKS, Timeline, read_timelines

EVIL = "<script>alert(1)</script>"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Two clean micro-steps, a call too many, a call outside any; in inference, one that raised."""
    guard = guard_module(nn.Linear(2, 2), name=EVIL)

    def call() -> None:
        guard.module(torch.ones(1, 2))

    with (
        pytest.warns(RuntimeWarning, match="none left this block"),
        lensnet_guard(guard.module, log=tmp_path),
    ):
        with guard.context("training"):
            for step in range(2):
                with guard.micro_step(step), guard.sanctioned("preference_scorer"):
                    call()
            with pytest.raises(LensNetViolation):
                with guard.micro_step(2), guard.sanctioned("preference_scorer"):
                    call()
                    call()
            with pytest.raises(LensNetViolation):
                guard.module(torch.ones(1, 2))
        with guard.context("inference"):
            with pytest.raises(RuntimeError, match="shapes"):
                guard.module(torch.ones(1, 3))
            call()
    return tmp_path


def write_report(run_dir: Path) -> str:
    result = CliRunner().invoke(main, ["report", str(run_dir)])
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"{run_dir / 'report.html'}: ")
    return (run_dir / "report.html").read_text()


def log_of(run_dir: Path) -> Path:
    return run_dir / "lensnet.rank0.jsonl"


def events_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log_of(run_dir).read_text().splitlines()]


def sites_of(events: list[dict[str, Any]]) -> dict[tuple[object, ...], int]:
    """Call sites and their calls, counted here without the code under test."""
    sites: dict[tuple[object, ...], int] = {}
    for event in events:
        if event["event"] == "violation" or (
            event["event"] == "call.begin" and not event["reason"]
        ):
            frame = event["stack"][event["caller"]]
            where = frame["code.file.path"], frame["code.line.number"], frame["code.function.name"]
            key = (event["context"], event["scope"], event["kind"], event["reason"], *where)
            sites[key] = sites.get(key, 0) + 1
    return sites


class Page(HTMLParser):
    """What a page holds: elements by tag and class, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cells:
            self.cells[-1] += data

    def of_class(self, tag: str, name: str) -> list[dict[str, str | None]]:
        found = [attrs for element, attrs in self.elements if element == tag]
        return [attrs for attrs in found if name in (attrs.get("class") or "").split()]


class TestRows:
    def test_call_sites_are_those_of_the_log(self, run_dir: Path) -> None:
        """A row for each, with its number of calls and its stack."""
        page = Page(write_report(run_dir))
        sites = sites_of(events_of(run_dir))
        assert len(page.of_class("tr", "site")) == len(sites) == 5
        assert sorted(int(n) for n in page.cells[::6]) == sorted(sites.values())
        for _, _, _, _, file, line, function in sites:
            assert f"{file}:{line} in {function}" in page.text
        assert "no stack was kept" not in page.text

    def test_violations_are_those_of_the_log(self, run_dir: Path) -> None:
        """An entry for each, its message whole; the first is open."""
        page = Page(write_report(run_dir))
        logged = [event for event in events_of(run_dir) if event["event"] == "violation"]
        entries = page.of_class("details", "broken")
        assert len(entries) == len(logged) == 2
        assert ["open" in attrs for attrs in entries] == [True, False]
        for violation in logged:
            assert violation["message"] in page.text

    def test_the_verdict_is_that_of_the_post_mortem(self, run_dir: Path) -> None:
        """Word for word, and not marked as good."""
        page = Page(write_report(run_dir))
        assert page.of_class("p", "verdict") == [{"class": "verdict ", "id": "verdict"}]
        assert analyse([run_dir]).verdict in page.text

    def test_a_call_in_flight(self, run_dir: Path) -> None:
        """A log cut off inside a call, in the middle of the next line."""
        lines = log_of(run_dir).read_text().splitlines(keepends=True)
        log_of(run_dir).write_text("".join(lines[:2]) + lines[2][:20])
        page = Page(write_report(run_dir))
        assert len(page.of_class("details", "open-call")) == 1
        assert "In flight at death" in page.text
        assert "A file ends inside line 3 of lensnet.rank0.jsonl." in page.text

    def test_every_rank_has_a_section(self, run_dir: Path) -> None:
        """And the page says where ranks diverged."""
        header, *lines = log_of(run_dir).read_text().splitlines(keepends=True)
        lines = [line.replace('"calls":{"preference_scorer":1}', '"calls":{}') for line in lines]
        second = header.replace('"rank":"0"', '"rank":"1"') + "".join(lines[2:])
        (run_dir / "lensnet.rank1.jsonl").write_text(second)
        page = Page(write_report(run_dir))
        assert len([tag for tag, _ in page.elements if tag == "section"]) == 2
        assert "Ranks diverged at step 0: rank 0: 1 call, rank 1: 0 calls" in page.text


class TestSafety:
    def test_a_module_named_script_is_text(self, run_dir: Path) -> None:
        """No element comes out of a log, and the page's policy forbids scripts anyway."""
        text = write_report(run_dir)
        page = Page(text)
        assert not {"script", "link", "iframe"} & {tag for tag, _ in page.elements}
        assert f"{EVIL}, mode enforce" in page.text
        assert "default-src 'none'" in text

    def test_every_field_is_escaped(self, run_dir: Path) -> None:
        """Every string of the log is replaced by one that breaks out of tags and attributes."""
        evil = "'\"--></svg><img src=x onerror=alert(1)>"

        def poison(value: Any, key: str = "") -> Any:
            if isinstance(value, dict):
                return {k: poison(v, k) for k, v in value.items()}
            if isinstance(value, list):
                return [poison(v) for v in value]
            kept = ("event", "context", "kind")
            return evil + value if isinstance(value, str) and key not in kept else value

        lines = [json.dumps(poison(event)) + "\n" for event in events_of(run_dir)]
        log_of(run_dir).write_text("".join(lines))
        page = Page(write_report(run_dir))
        assert "img" not in {tag for tag, _ in page.elements}
        assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
        assert page.text.count(evil) > 20

    def test_nothing_is_fetched(self, run_dir: Path) -> None:
        """No attribute holds an address but data: ones."""
        (run_dir / "overview.png").write_bytes(PNG)
        page = Page(write_report(run_dir))
        addresses = [a[k] for _, a in page.elements for k in ("src", "href") if k in a]
        assert [str(address)[:15] for address in addresses] == ["data:image/png;"]

    @pytest.mark.parametrize(
        "damage",
        [
            b"",
            b"\x00\xff\n[1]\n{}\n",
            b'{"event":"call.begin"}\n{"event":"violation","stack":[1],"caller":0}\n',
            b'{"event":"run.begin","timestamp":1e308,"versions":{"a":1}}\n{"event":"call.end"}\n',
            b'{"event":"micro_step.end","calls":[],"due":{"a":null},"step":{},"timestamp":-5.0}\n',
        ],
    )
    def test_damaged_logs(self, run_dir: Path, damage: bytes) -> None:
        """Alone, and at the end of a good log."""
        good = log_of(run_dir).read_bytes()
        for content in (damage, good + damage + good):
            log_of(run_dir).write_bytes(content)
            assert write_report(run_dir).endswith("</body></html>\n")


class TestTraining:
    def test_curves_and_picture(self, run_dir: Path) -> None:
        """What the run folder has besides the log; lines that are no row are passed over."""
        rows = [
            {"step": n, "lm_loss": 6 - n, "lens_loss": 0.7, "preference_agreement": None}
            for n in (1, 2, 3)
        ]
        lines = [json.dumps(row) for row in rows]
        (run_dir / "metrics.jsonl").write_text("\n".join([*lines, "[]", '{"step":4,"lm_l']))
        (run_dir / "overview.png").write_bytes(PNG)
        text = write_report(run_dir)
        assert 'points="0.0,0.0 500.0,36.0 1000.0,72.0"' in text
        assert "lm_loss, last 3" in text
        assert "lens_loss, last 0.7" in text
        assert "preference_agreement" not in text
        assert "data:image/png;base64," in text

    def test_long_curves_are_thinned_out(self, run_dir: Path) -> None:
        """The page stays small however long the training was."""
        lines = [json.dumps({"step": n, "loss": 1.0}) for n in range(30_000)]
        (run_dir / "metrics.jsonl").write_text("\n".join(lines))
        (points,) = re.findall(r'points="([^"]+)"', write_report(run_dir))
        assert 1_000 <= len(points.split()) < 2_000

    def test_a_picture_that_is_none(self, run_dir: Path) -> None:
        """It is left out."""
        (run_dir / "overview.png").write_bytes(b"<svg onload=alert(1)>")
        assert "Training" not in write_report(run_dir)


class TestTimeline:
    def test_marks_stand_for_every_call(self, run_dir: Path) -> None:
        """By row and outcome, as the log has them."""
        (timeline,) = read_timelines([run_dir])[str(run_dir / "lensnet.rank0")]
        sums: dict[tuple[str, str], int] = {}
        for mark in timeline.marks():
            sums[mark.row, mark.outcome] = sums.get((mark.row, mark.outcome), 0) + mark.count
        assert sums == {
            ("micro-steps", "micro-step"): 2,
            ("micro-steps", "micro-step with violations"): 1,
            ("training", "returned"): 3,
            ("training", "violation"): 2,
            ("inference", "raised"): 1,
            ("inference", "returned"): 1,
        }

    @pytest.mark.parametrize("limit", [MARKS, 100])
    def test_many_calls_make_few_marks(self, limit: int) -> None:
        """And none of the calls and violations is dropped, wherever they are."""
        timeline = Timeline()
        for event in _long_log(50_000):
            timeline.take(event)
        timeline.finish()
        marks = timeline.marks(limit)
        assert len(marks) <= limit
        assert sum(m.count for m in marks if m.outcome == "returned") == 50_000
        assert sum(m.count for m in marks if m.outcome == "violation") == 50
        assert all(0 <= m.start <= timeline.last - timeline.began for m in marks)

    def test_clocks_that_go_back(self) -> None:
        """A call may end before it began, and before the log did."""
        timeline = Timeline()
        for name, at in (("run.begin", 100.0), ("call.begin", 50.0), ("call.end", 40.0)):
            timeline.take({"event": name, "timestamp": at, "seq": 1, "kind": "call"})
        timeline.finish()
        assert [(m.start, m.count) for m in timeline.marks()] == [(0.0, 1)]


def _long_log(calls: int) -> Iterator[dict[str, Any]]:
    for n in range(calls):
        fields = {"seq": n, "module": "M", "kind": "call", "context": ("training", None)[n % 2]}
        yield {"event": "call.begin", "timestamp": n * 1e-3 + 1e9, **fields}
        yield {"event": "call.end", "timestamp": n * 1e-3 + 1e9 + (n % 7) * 0.3, **fields}
        if n % 1_000 == 0:
            yield {"event": "violation", "timestamp": n * 1e-3 + 1e9, "reason": "R", **fields}


class TestCommand:
    def test_no_log(self, tmp_path: Path) -> None:
        """Exit code 2, one line, and no file."""
        result = CliRunner().invoke(main, ["report", str(tmp_path)])
        assert result.exit_code == 2
        assert result.output == f"lensnet-guard: no lensnet.rank*.jsonl in {tmp_path}\n"
        assert not list(tmp_path.iterdir())

    def test_the_output_is_replaced_as_a_whole(self, run_dir: Path) -> None:
        """An older page gives way; nothing else is left behind."""
        output = run_dir / "out.html"
        output.write_text("<title>lensnet-guard report</title>old")
        assert CliRunner().invoke(main, ["report", str(run_dir), "-o", str(output)]).exit_code == 0
        assert output.read_text().startswith("<!DOCTYPE html>")
        assert {path.name for path in run_dir.iterdir()} == {"lensnet.rank0.jsonl", "out.html"}

    def test_an_output_that_is_a_link_was_replaced_itself(self, run_dir: Path) -> None:
        """It stays, and what it leads to is the page."""
        (run_dir / "link.html").symlink_to("page.html")
        for _ in range(2):
            arguments = ["report", str(run_dir), "-o", str(run_dir / "link.html")]
            assert CliRunner().invoke(main, arguments).exit_code == 0
            assert (run_dir / "link.html").is_symlink()
            assert (run_dir / "page.html").read_text().startswith("<!DOCTYPE html>")

    @pytest.mark.parametrize("output", ["", "/", ".."])
    def test_an_output_without_a_name_raised(self, run_dir: Path, output: str) -> None:
        """It is a folder, and no place for a page."""
        result = CliRunner().invoke(main, ["report", str(run_dir), "-o", output])
        assert result.exit_code == 2
        assert result.output == f"lensnet-guard: {output or '.'} is there and is no file\n"

    @pytest.mark.parametrize("output", [".", "missing/out.html"])
    def test_an_output_that_cannot_be_written(self, run_dir: Path, output: str) -> None:
        """Exit code 2 and one line."""
        result = CliRunner().invoke(main, ["report", str(run_dir), "-o", str(run_dir / output)])
        assert result.exit_code == 2
        assert result.output.startswith("lensnet-guard: ")
        assert result.output.count("\n") == 1
        assert [path.name for path in run_dir.iterdir()] == ["lensnet.rank0.jsonl"]

    def test_help_has_an_example(self) -> None:
        """One that can be pasted."""
        result = CliRunner().invoke(main, ["report", "--help"])
        assert "Example: lensnet-guard report runs/42 -o report.html" in result.output


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    program = find_chromium()
    if program is None or os.name != "posix":
        pytest.skip(f"none of {', '.join(NAMES)} is installed")
    browser = Chromium(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


class TestInChromium:
    @pytest.fixture
    def url(self, run_dir: Path) -> str:
        """Of a report with all that it can hold."""
        (run_dir / "metrics.jsonl").write_text('{"step":1,"loss":2}\n{"step":2,"loss":1}\n')
        imsave(run_dir / "overview.png", [[0.0, 1.0]])
        write_report(run_dir)
        return (run_dir / "report.html").as_uri()

    def test_the_console_stays_silent(self, browser: Chromium, url: str) -> None:
        """Nothing runs, nothing fails, and nothing is fetched but the page itself."""
        page = browser.open(url)
        told = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        assert page.events(*told) == []
        asked = [event["request"]["url"] for event in page.events("Network.requestWillBeSent")]
        assert [address for address in asked if not address.startswith("data:")] == [url]
        assert page.evaluate("document.scripts.length") == 0
        assert page.evaluate("[...document.images].map(i => i.naturalWidth)") == [2]

    def test_the_rows_are_those_of_the_log(
        self, browser: Chromium, url: str, run_dir: Path
    ) -> None:
        """Each call site with its times, context, scope, outcome and line, as they are seen."""
        page = browser.open(url)
        cells = "[...document.querySelectorAll('tr.site')].map(r => [...r.cells].map(c => %s))"
        rows = page.evaluate(cells % "c.innerText.trim()")
        logged = [
            [
                *(str(times), EVIL, context or "unset", scope or "-"),
                f"refused: {reason}" if reason else kind,
                f"{file}:{line} in {function}",
            ]
            for (context, scope, kind, reason, file, line, function), times in sites_of(
                events_of(run_dir)
            ).items()
        ]
        assert sorted(rows) == sorted(logged)
        lanes = page.evaluate("[...document.querySelectorAll('p.row')].map(p => p.innerText)")
        assert {"micro-steps (3)", "training (5)", "inference (2)"} <= set(lanes)

    def test_stacks_open(self, browser: Chromium, url: str) -> None:
        """At a click, without a script."""
        page = browser.open(url)
        first = "document.querySelector('tr.site details')"
        seen = f"{first}.querySelector('pre').checkVisibility()"
        closed = page.evaluate(seen)
        page.evaluate(f"{first}.querySelector('summary').click()")
        assert (closed, page.evaluate(seen)) == (False, True)
        assert "test_report.py:" in page.evaluate(f"{first}.querySelector('pre').innerText")

    @pytest.mark.parametrize("width", [320, 412, 1_200])
    def test_it_fits(self, browser: Chromium, url: str, run_dir: Path, width: int) -> None:
        """On a phone too, also with names that have no place to break."""
        long = "N" * 300
        log_of(run_dir).write_text(log_of(run_dir).read_text().replace(EVIL, long))
        write_report(run_dir)
        page = browser.open(url, width)
        root = "document.documentElement"
        assert page.evaluate("innerWidth") == width
        assert page.evaluate(f"{root}.scrollWidth - {root}.clientWidth") == 0
        for part in ("tr.site", "details.broken", "svg", "pre", "img"):
            found = f"[...document.querySelectorAll('{part}')]"
            rights = page.evaluate(f"{found}.map(e => e.getBoundingClientRect().right)")
            assert rights
            assert max(rights) <= width

    @pytest.mark.parametrize("dark", [False, True])
    def test_every_text_can_be_read(self, browser: Chromium, url: str, dark: bool) -> None:
        """Dark and light: enough contrast (4.5 to 1) between a text and what it stands on."""
        page = browser.open(url, dark=dark)
        colours = """[...document.querySelectorAll("body *")]
            .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
            .filter(e => e.checkVisibility() && !e.closest("svg"))
            .map(e => {
                let under = e;
                while (getComputedStyle(under).backgroundColor === "rgba(0, 0, 0, 0)")
                    under = under.parentElement;
                return [getComputedStyle(e).color, getComputedStyle(under).backgroundColor];
            })"""
        pairs = {tuple(pair) for pair in page.evaluate(colours)}
        assert len(pairs) > 2
        assert {pair: _contrast(*pair) for pair in pairs if _contrast(*pair) < 4.5} == {}
        page_colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (_luminance(page_colour) < 0.05) is dark


def _luminance(colour: str) -> float:
    """Of ``rgb(…)``, as the Web Content Accessibility Guidelines define it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _contrast(one: str, other: str) -> float:
    dark, light = sorted(map(_luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)
