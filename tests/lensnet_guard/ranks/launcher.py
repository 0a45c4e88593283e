"""Ranks in real processes: one that has imported torch forks them, so that a run costs no import.

As torchrun runs them, each in a process of its own, but with nobody who kills the others.
"""

import json
import os
import re
import runpy
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import lensnet_guard

WAIT_S = 120
IMPORTED = "torch.nn.parallel", "torch._dynamo"  # the latter is what DDP takes its time to import


@dataclass
class Ended:
    """How a rank ended."""

    code: int
    out: str
    err: str
    seconds: float


class Launcher:
    """Starts ranks, as long as it is open."""

    def __enter__(self) -> "Launcher":
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def run(self, folder: Path, script: str, world: int = 2) -> list[Ended]:
        """Run a script as so many ranks, and wait until all have ended."""
        (folder / "rank.py").write_text(script)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps([str(folder), world]), file=self._server.stdin, flush=True)
        ended = []
        for rank, (code, seconds) in enumerate(json.loads(self._server.stdout.readline())):
            out, err = ((folder / f"{rank}.{kind}").read_text() for kind in ("out", "err"))
            out = re.sub(r"^\[Gloo\].*\n", "", out, flags=re.MULTILINE)  # torch 2.9's talks
            ended.append(Ended(code, out, err, seconds))
        return ended


def serve() -> None:
    """Fork the ranks of each run that is asked for, and say how they ended."""
    for module in IMPORTED:
        import_module(module)
    for name in lensnet_guard.__all__:
        getattr(lensnet_guard, name)
    while request := sys.stdin.readline():
        folder, world = json.loads(request)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start, children = time.monotonic(), []
        for rank in range(world):
            child = os.fork()
            if not child:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                for number, kind in ((1, "out"), (2, "err")):
                    os.dup2(os.open(f"{folder}/{rank}.{kind}", os.O_CREAT | os.O_WRONLY), number)
                runpy.run_path(f"{folder}/rank.py", run_name="__main__")
                return
            children.append(child)
        ended: dict[int, tuple[int, float]] = {}
        while len(ended) < world and time.monotonic() - start < WAIT_S:
            for child in children:
                if child not in ended and (found := os.waitpid(child, os.WNOHANG))[0]:
                    code = os.waitstatus_to_exitcode(found[1])
                    ended[child] = code, time.monotonic() - start
            time.sleep(0.02)
        for child in children:
            if child not in ended:  # it hangs, and is a failure
                os.kill(child, 9)
                os.waitpid(child, 0)
        print(json.dumps([ended.get(child, (None, WAIT_S)) for child in children]), flush=True)


if __name__ == "__main__":
    serve()
