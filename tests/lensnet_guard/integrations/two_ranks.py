"""Two ranks for each of several scenarios, all forked from one process that imports a library once.

Each rank is a process of its own that ends as a script does: by its end or by what it raises.
"""

import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

_LAUNCHER = """
import contextlib, importlib, os, socket, sys

{body}

for name in "torch._dynamo", "datasets":  # what DDP and accelerate import later, in every rank
    with contextlib.suppress(ImportError):
        importlib.import_module(name)

os.environ.pop("RANK", None)
for scenario in {scenarios!r}:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2"
    )
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            for number, name in (1, "out"), (2, "err"):
                file = os.open(f"{{scenario}}.{{rank}}.{{name}}", os.O_WRONLY | os.O_CREAT)
                os.dup2(file, number)
            os.environ["LOCAL_RANK"] = str(rank)
            if {tells_rank}:
                os.environ["RANK"] = str(rank)
            train(scenario, rank)
            sys.exit()
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(scenario, *codes)
"""


@dataclass(frozen=True)
class Ended:
    """How a rank ended."""

    code: int
    out: str
    err: str


def run_scenarios(
    folder: Path, body: str, scenarios: list[str], *, tells_rank: bool = True
) -> dict[str, list[Ended]]:
    """Run a script's ``train(scenario, rank)`` in two processes for each scenario.

    Args:
        folder: Where it runs.
        body: The script, which defines ``train`` and starts no thread.
        scenarios: The names of scenarios.
        tells_rank: Whether ``RANK`` is in the environment, as torchrun has it.

    Returns:
        How the ranks of each ended.
    """
    script = folder / "ranks.py"
    text = _LAUNCHER.format(body=textwrap.dedent(body), scenarios=scenarios, tells_rank=tells_rank)
    script.write_text(text)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ended = {}
    for line in done.stdout.splitlines():
        scenario, *codes = line.split()
        if scenario in scenarios:
            ended[scenario] = [
                Ended(
                    int(code),
                    *(
                        (folder / f"{scenario}.{rank}.{kind}").read_text()
                        for kind in ("out", "err")
                    ),
                )
                for rank, code in enumerate(codes)
            ]
    return ended
