"""The guard's suite and a short training on every torch that is supported, as one table.

Example: python benchmarks/matrix.py
         python benchmarks/matrix.py --only 2.15 --internals
         python benchmarks/matrix.py --only 2.7 2.9 --tests tests/lensnet_guard/boundary

Each torch has an environment of its own, made once with uv, in the user's cache folder, and made
anew when what it needs changes. Two things follow constraints.txt: every library but torch, and
nothing in the row "oldest", which has the oldest of everything that pyproject.toml admits. Whole
rows go into docs/compatibility.md, each when it is done. Exit code 1 when something failed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- the matrix: make matrix -->", "<!-- end of the matrix -->"
HEADINGS = (
    *("torch", "Python", "lightning", "accelerate", "transformers"),
    *("guard's tests", "short training", "seconds"),
)
LIBRARIES = ("lightning", "accelerate", "transformers")
SUITE = ["tests/lensnet_guard"]
INTERNALS = [  # all that reads what torch does not promise
    *("test_torch_internals.py", "test_untested.py", "calls/test_compiled.py"),
    *("boundary", "plumbing"),
]
TRAINING = ("--steps", "6", "--batch-size", "2", "--warmup-steps", "2", "--log-interval", "2")
MAKE_S, TESTS_S, TRAINING_S = 1_800, 5_400, 900  # what each may take


@dataclass(frozen=True)
class Setting:
    """One row: a torch, and the Python to run it with where that is at hand."""

    torch: str
    python: str
    oldest: bool = False

    def __str__(self) -> str:
        return f"torch {self.torch}{', oldest libraries' if self.oldest else ''}"


MATRIX = (
    Setting("2.7.1", "3.10", oldest=True),
    Setting("2.9.1", "3.12"),
    Setting("2.11.0", "3.12"),
    Setting("2.13.0", "3.10"),
    Setting("2.14.1", "3.11"),
    Setting("2.15.0", "3.13"),
)


class NotMade(Exception):
    """An environment that could not be made; says what failed."""


def minor(setting: Setting) -> str:
    return ".".join(setting.torch.split(".")[:2])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Environments ------------------------------------------------------------------------------------


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "lensnet-guard", "matrix")


def candidates(version: str) -> Iterator[str]:
    """Interpreters that may be of a version: on the path, pyenv's, and the one that runs this."""
    for folder in os.get_exec_path():
        yield str(Path(folder, f"python{version}"))
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    for folder in sorted(pyenv.glob(f"versions/{version}.*"), reverse=True):
        yield str(folder / "bin" / "python")
    yield sys.executable


@cache
def interpreter(version: str) -> tuple[str, str]:
    """Its path and full version; this process's own where there is none of that version."""
    for path in candidates(version):
        if os.access(path, os.X_OK):
            code = (
                "import platform, sys; print(sys.executable, platform.python_version(), sep='\\n')"
            )
            done = subprocess.run([path, "-c", code], capture_output=True, text=True)
            real, _, full = done.stdout.strip().partition("\n")  # the path may be a shim's
            if done.returncode == 0 and full.startswith(f"{version}."):
                return real, full
    full = ".".join(map(str, sys.version_info[:3]))
    say(f"no Python {version} is at hand: {full} instead")
    return sys.executable, full


def uv(*arguments: str) -> None:
    """Run uv.

    Raises:
        NotMade: it failed, and has said why.
        SystemExit: there is none.
    """
    program = [sys.executable, "-m", "uv"] if find_spec("uv") else ["uv"]
    try:
        done = subprocess.run([*program, "--quiet", *arguments], cwd=ROOT, timeout=MAKE_S)
    except FileNotFoundError:
        raise SystemExit("matrix.py needs uv: pip install uv") from None
    if done.returncode:
        raise NotMade(f"uv {' '.join(arguments[:2])} failed, see above")


def environment(setting: Setting) -> Path:
    """The Python of an environment that has all that the tests need, and this checkout."""
    path, version = interpreter(setting.python)
    folder = cache_folder() / f"torch-{setting.torch}-python-{version}"
    python, stamp = folder / "bin" / "python", folder / "made-from.json"
    constraints = f"torch=={setting.torch}\n"
    if not setting.oldest:
        pinned = (ROOT / "constraints.txt").read_text()
        # Each torch bounds setuptools by itself.
        constraints += re.sub(r"^(torch|setuptools)==.*\n", "", pinned, flags=re.MULTILINE)
    needed = json.dumps([path, version, setting.oldest, constraints, dependencies()], indent=1)
    if not (stamp.exists() and stamp.read_text() == needed):
        say(f"{setting}: making its environment in {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        uv("venv", "--python", path, str(folder))
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write(constraints)
            file.flush()
            resolution = "lowest-direct" if setting.oldest else "highest"
            into = ["--python", str(python), "--resolution", resolution, "-c", file.name]
            # test brings the extras of all that is tested: megacontext, lightning, hf, tensorboard
            uv("pip", "install", *into, "-r", "pyproject.toml", "--extra", "test")
        stamp.write_text(needed)
    ours = ["--no-deps", "--editable", str(ROOT)]  # at every run: its place
    uv("pip", "install", "--python", str(python), *ours)
    return python


def dependencies() -> str:
    """What pyproject.toml says of them."""
    text = (ROOT / "pyproject.toml").read_text()
    return text[text.index("\ndependencies = [") : text.index("\n[project.entry-points")]


# Rows --------------------------------------------------------------------------------------------


def run(python: Path, *arguments: str, log: Path, limit_s: float) -> int:
    """Run a module of an environment with this checkout's sources, its words in ``log``."""
    with log.open("w") as output:
        try:
            return subprocess.run(
                [str(python), "-m", *arguments],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=limit_s,
            ).returncode
        except subprocess.TimeoutExpired:
            output.write(f"\nended after {limit_s:,.0f} s\n")
            return 124


def show(log: Path) -> None:
    """The end of what a failed run said."""
    lines = log.read_text(errors="replace").splitlines()
    say("\n".join([line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-30:]))
    say(f"all of it: {log}")


def versions(python: Path) -> list[str]:
    code = (
        "import platform\nfrom importlib.metadata import version\n"
        f"print(platform.python_version(), *map(version, {LIBRARIES!r}))"
    )
    done = subprocess.run([str(python), "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.split()


def row_of(setting: Setting, tests: list[str], *, train: bool) -> tuple[list[str], bool]:
    """The cells of a row, and whether all of it passed."""
    begin = time.monotonic()
    python = environment(setting)
    log = python.parents[1] / "tests.log"
    say(f"{setting}: tests")
    arguments = ("pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *tests)
    passed = run(python, *arguments, log=log, limit_s=TESTS_S) == 0
    last = log.read_text(errors="replace").rstrip().rpartition("\n")[2]
    counted = re.findall(r"\d+ (?:passed|failed|errors?)", last)
    say(f"{setting}: {last}")
    if not passed:
        show(log)
    trained = "not run"
    if train:
        say(f"{setting}: a short training")
        log = log.with_name("training.log")
        with tempfile.TemporaryDirectory() as folder:
            arguments = ("megacontext", "train", "--run-dir", folder, *TRAINING)
            code = run(python, *arguments, log=log, limit_s=TRAINING_S)
        trained = "ok" if code == 0 else f"**exit code {code}**"
        if code:
            show(log)
        passed = passed and code == 0
    cells = [setting.torch, *versions(python), ", ".join(counted) or "**none**", trained]
    return [*cells, f"{time.monotonic() - begin:,.0f}"], passed


def table(rows: list[list[str]]) -> str:
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write(row: list[str]) -> None:
    """Put a row into the page, in the place of the one with the same torch minor."""
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    old, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"matrix.py: {PAGE} has lost its markers {BEGIN} and {END}")
    rows = [line.strip("| ").split(" | ") for line in old.splitlines() if line.startswith("| 2.")]
    order = {minor(setting): number for number, setting in enumerate(MATRIX)}

    def place(cells: list[str]) -> int | None:
        return order.get(".".join(cells[0].split(".")[:2]))

    kept = {number: cells for cells in [*rows, row] if (number := place(cells)) is not None}
    text = table([kept[number] for number in sorted(kept)])
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
    temporary.replace(PAGE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [minor(setting) for setting in MATRIX]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="TORCH")
    parser.add_argument(
        "--internals", action="store_true", help="only tests of what torch does not promise"
    )
    parser.add_argument("--tests", nargs="+", help="default: the guard's suite, and a training")
    arguments = parser.parse_args()
    tests = arguments.tests or SUITE
    if arguments.internals:
        tests = [f"{SUITE[0]}/{name}" for name in INTERNALS]
    whole = tests == SUITE
    rows, held = [], True
    for setting in MATRIX:
        if minor(setting) in arguments.only:
            try:
                row, passed = row_of(setting, tests, train=whole)
            except NotMade as why:
                say(f"{setting}: no environment: {why}")
                held = False
                continue
            rows.append(row)
            held = held and passed
            if whole:
                write(row)
    print(table(rows))
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
