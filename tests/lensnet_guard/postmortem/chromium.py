"""A real headless Chromium, spoken to over two pipes: a page as those see it who open it."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
# Chromium reads commands from 3 and writes to 4, each ended by a NUL.
EXEC = "import os, sys; a = sys.argv; os.dup2(int(a[1]), 3); os.dup2(int(a[2]), 4)"


def find_chromium() -> str | None:
    """The browser's path, None without one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """One browser, with the events of all its pages in ``events``."""

    def __init__(self, program: str, profile: Path) -> None:
        import fcntl  # there is none on Windows, where the tests skip

        self.events: list[dict[str, Any]] = []
        self._number = 0
        (reads, self._commands), (self._answers, writes) = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (reads, writes)]
        command = [program, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            [sys.executable, "-Sc", f"{EXEC}; os.execv(a[3], a[3:])", *map(str, ends), *command],
            pass_fds=ends,
            stderr=subprocess.DEVNULL,
        )
        for end in (reads, writes, *ends):
            os.close(end)
        self._lines = os.fdopen(self._answers, "rb")
        self._watchdog = threading.Timer(120, self._process.kill)
        self._watchdog.start()

    def close(self) -> None:
        """End it: it leaves when nobody speaks to it any more."""
        os.close(self._commands)
        self._process.wait()
        self._watchdog.cancel()
        self._lines.close()

    def open(self, url: str, width: int = 1_200, *, dark: bool = False) -> "Page":
        """Open a page in a window, or on a phone, of that width in pixels."""
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.command(f"{domain}.enable")
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        page.command("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.command("Emulation.setEmulatedMedia", features=[scheme])
        page.command("Page.navigate", url=url)
        while not page.events("Page.loadEventFired"):
            self._read()
        return page

    def command(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": session} if session is not None else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        raw = bytearray()
        while not raw.endswith(b"\0"):
            byte = self._lines.read(1)
            assert byte, "the browser has died"
            raw += byte
        message: dict[str, Any] = json.loads(raw[:-1])
        if "id" not in message:
            self.events.append(message)
        return message


class Page:
    """One open page."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self._browser = browser
        self._session = session

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command to this page."""
        return self._browser.command(method, self._session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, which the page itself could not run."""
        answer = self.command("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def events(self, *methods: str) -> list[dict[str, Any]]:
        """What the browser has told of this page."""
        mine = [e for e in self._browser.events if e.get("sessionId") == self._session]
        return [event["params"] for event in mine if event["method"] in methods]
