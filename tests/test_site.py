"""The documentation as a site: it builds without a warning, has all of the API, stands alone."""

import functools
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
from tests.lensnet_guard.postmortem.chromium import NAMES, Chromium, find_chromium

import lensnet_guard
import megacontext

pytest.importorskip("mkdocs", reason="the extra named docs is not installed; it needs Python 3.11")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as ``make docs`` does it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir"]
    done = subprocess.run([*command, folder], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(site: Path) -> Iterator[str]:
    """The site from a server: a browser does not search in files."""
    handler = functools.partial(_Silent, directory=site)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chromium]:
    program = find_chromium()
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    browser = Chromium(program, tmp_path)
    yield browser
    browser.close()


class TestApi:
    @pytest.mark.parametrize("package", [lensnet_guard, megacontext], ids=lambda p: p.__name__)
    def test_has_every_public_name(self, site: Path, package: object) -> None:
        """Of both packages, from their docstrings."""
        page = (site / "api" / f"{package.__name__}.html").read_text()
        names = {f"{package.__name__}.{name}" for name in package.__all__ if name[0] != "_"}
        assert names - set(re.findall(r'<h3 id="([\w.]+)"', page)) == set()

    def test_has_the_fixtures(self, site: Path) -> None:
        """And nothing else of the plugin."""
        page = (site / "api" / "pytest_plugin.html").read_text()
        assert re.findall(r'<h2 id="lensnet_guard\.pytest_plugin\.(\w+)"', page) == [
            *("assert_lensnet_calls", "assert_max_lensnet_calls", "lensnet_calls", "lensnet_guard")
        ]


class TestPages:
    def test_link_to_nothing_outside(self, site: Path) -> None:
        """No font, script, picture or page of another host."""
        pages = sorted(site.rglob("*.html"))
        assert len(pages) > 10
        for page in pages:
            assert re.findall(r'(?:src|href)="(?:\w+:)?//[^"]*"', page.read_text()) == []

    @pytest.mark.parametrize("width", [400, 1_200])
    def test_in_a_browser(self, site: Path, url: str, browser: Chromium, width: int) -> None:
        """On a phone too: everything is loaded, nothing from elsewhere, nothing is too wide."""
        for path in sorted(site.rglob("*.html")):
            page = browser.open(f"{url}/{quote(str(path.relative_to(site)))}", width)
            asked = [event["request"]["url"] for event in page.events("Network.requestWillBeSent")]
            assert [a for a in asked if not a.startswith((url, "data:", "blob:"))] == []
            assert page.events("Runtime.exceptionThrown") == []
            root = "document.documentElement"
            assert page.evaluate(f"{root}.scrollWidth - {root}.clientWidth") == 0, path.name
            broken = "[...document.images].filter(i => i.complete && !i.naturalWidth).length"
            assert page.evaluate(broken) == 0

    def test_can_be_searched(self, url: str, browser: Chromium) -> None:
        """By words of any page."""
        page = browser.open(f"{url}/index.html?q=confidence")
        found = "document.querySelectorAll('.md-search-result__link').length"
        deadline = time.monotonic() + 20
        while not page.evaluate(found):
            assert time.monotonic() < deadline, "the search found nothing"
