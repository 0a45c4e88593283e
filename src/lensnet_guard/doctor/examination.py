"""The examination: every mechanism in a process of its own, with a time limit, all at once."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lensnet_guard.doctor.versions import versions

ANSWER = "answer.json"  # in an attempt's folder, where `attempt` leaves it
LIMIT_S = 120  # for one attempt: it takes 2 to 8 s, but far longer on a busy machine

MECHANISMS = {  # of the module `mechanisms`, which needs torch
    "torch": "torch",
    "bypass": "bypass refused",
    "recompute": "recompute",
    "reentrant": "recompute, reentrant",
    "compile": "compiled once",
    "log": "log read back",
    "ranks": "two ranks",
    "cuda_graphs": "CUDA graphs",
}
_SLOW_FIRST = ("compile", "ranks")
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Finding:
    """What the attempt at one mechanism showed.

    Attributes:
        name: The mechanism, in words.
        state: ``"not tried"`` where the machine has not what it needs, which is no failure.
        detail: What was seen, or what went wrong.
        seconds: From the start of its process to its end.
    """

    name: str
    state: Literal["holds", "fails", "not tried"]
    detail: str
    seconds: float


@dataclass(frozen=True)
class Examination:
    """What the doctor found.

    Attributes:
        versions: By name, None for what is not installed.
        findings: One for each mechanism.
    """

    versions: dict[str, str | None]
    findings: tuple[Finding, ...]

    @property
    def holds(self) -> bool:
        """Whether no mechanism fails; one that could not be tried does not."""
        return all(finding.state != "fails" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return the examination as a JSON-ready object."""
        findings = [vars(finding) for finding in self.findings]
        return {"holds": self.holds, "versions": self.versions, "mechanisms": findings}


def examine(done: Callable[[], object] = lambda: None) -> Examination:
    """Try every mechanism.

    Args:
        done: Called after each, from several threads.
    """

    def one(mechanism: str) -> Finding:
        command = [sys.executable, "-m", "lensnet_guard.doctor", mechanism]
        found = try_alone(MECHANISMS[mechanism], command)
        done()
        return found

    at_once = min(max(2, os.cpu_count() or 1), len(MECHANISMS))
    with ThreadPoolExecutor(at_once) as pool:
        first = {name: pool.submit(one, name) for name in _SLOW_FIRST}
        rest = {name: pool.submit(one, name) for name in MECHANISMS if name not in first}
        found = {name: future.result() for name, future in (first | rest).items()}
    return Examination(versions(), tuple(found[name] for name in MECHANISMS))


def try_alone(name: str, command: Sequence[str], limit_s: float = LIMIT_S) -> Finding:
    """Run one attempt to its end, or to its time limit, with all the processes that it starts.

    Args:
        name: Of the finding.
        command: Gets an empty folder as a further argument, and leaves its answer in there.
        limit_s: Seconds until it is ended.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lensnet-guard-") as folder:
        said = Path(folder, "said")
        with said.open("wb") as output:
            process = subprocess.Popen(
                [*command, folder],
                cwd=folder,  # the user's own folder may have a random.py
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        seconds = round(time.monotonic() - begin, 1)
        last = said.read_text(errors="replace").strip().splitlines()[-1:]
        if code is None:
            detail = f"no answer within {limit_s:g} s: ended"
            return Finding(name, "fails", "; it last said: ".join([detail, *last]), seconds)
        try:
            answer = json.loads(Path(folder, ANSWER).read_text())
        except FileNotFoundError:
            detail = f"its process ended with {_describe(code)} and no answer"
            return Finding(name, "fails", "; it last said: ".join([detail, *last]), seconds)
        return Finding(name, answer["state"], answer["detail"], seconds)


def _environment() -> dict[str, str]:
    """This process's, with its import path, and without what makes a process one of several."""
    environment = {k: v for k, v in os.environ.items() if k not in _RANK_VARIABLES}
    path = os.pathsep.join(dict.fromkeys(map(os.path.abspath, sys.path)))
    return environment | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it has started, however far they are."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
