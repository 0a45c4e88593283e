"""TRL's own tests with its trainers under our guard, beside the same tests without it.

Example: git clone --branch v1.9.0 https://github.com/huggingface/trl /tmp/trl
         pip install trl==1.9.0 peft 'lensnet-guard[hf]' pytest pytest-datadir scikit-learn joblib
         python benchmarks/trl_suite.py /tmp/trl --trainers dpo kto --out /tmp/trl-suite

Of a checkout only tests and scripts are used; trl is the one that is installed, best of the same
version. Nothing is loaded from the hub: `trl_standins` makes local models and data sets of the same
kinds. Every test that trains runs three times: as it is, and with ``guarded_trainer(trainer)``
around each ``train``, in enforce and in observe mode (`trl_guard_plugin`). A test agrees when its
outcome is the same, nothing was refused or recorded as a violation, and the same losses were
logged. Tests that fail as they are (they need the hub, a GPU or vLLM) are counted apart.

What is done stands in the folder, and is not done again: a run that was stopped goes on from there.
Exit code 1 when a test does not agree.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "trl.md"
BEGIN, END = "<!-- TRL's tests: benchmarks/trl_suite.py -->", "<!-- end of TRL's tests -->"
LIBRARIES = ("trl", "transformers", "peft", "accelerate", "torch")
FIRST = ("dpo", "kto", "gkd", "ppo", "grpo", "rloo", "online_dpo", "reward")  # with a contract
GUARDED = ("enforce", "observe")
HEADINGS = (
    *("trainer", "tests that train", "run", "fail by themselves", "nothing to guard", "guarded"),
    *("agree, enforce", "agree, observe", "same losses"),
)


@dataclass(frozen=True)
class Row:
    """What came of one file of tests.

    Attributes:
        trainer: The trainer that the file is about.
        tests: How many of its tests train.
        run: How many of them have been run; the others are left out below.
        failing: Those that fail without a guard, or are skipped.
        nothing: Those that pass, and train nothing that has a contract.
        guarded: The others, which are compared.
        agree: In each mode, how many of them do.
        same_losses: Of how many both modes log what no guard logs.
        differ: Each disagreement in a line.
    """

    trainer: str
    tests: int
    run: int
    failing: int
    nothing: int
    guarded: int
    agree: dict[str, int]
    same_losses: int
    differ: list[str]

    @property
    def cells(self) -> list[str]:
        numbers = (self.tests, self.run, self.failing, self.nothing, self.guarded)
        modes = (self.agree[mode] for mode in GUARDED)
        return [self.trainer, *map(str, (*numbers, *modes, self.same_losses))]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Running -----------------------------------------------------------------------------------------


def files_of(checkout: Path) -> dict[str, str]:
    """From a trainer's name to the file of its tests, those with a contract first."""
    found = {
        path.stem.removeprefix("test_").removesuffix("_trainer"): str(path.relative_to(checkout))
        for folder in ("tests", "tests/experimental")
        for path in sorted(checkout.glob(f"{folder}/test_*_trainer.py"))
    }
    if not found:
        raise SystemExit(f"trl_suite.py: {checkout} is no checkout of TRL: it has no tests/test_…")
    return {name: found[name] for name in (*FIRST, *found) if name in found}


def environment(out: Path) -> dict[str, str]:
    paths = (str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", ""))
    return {
        **os.environ,
        "HF_HOME": str(out / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def prepare(checkout: Path, out: Path) -> Path:
    """Make the stand-ins and a folder with the tests alone, so that trl is the installed one."""
    missing = out / "hub" / "missing.json"
    if not missing.exists():
        say("stand-ins for models and data sets")
        command = [sys.executable, str(HERE / "trl_standins.py"), str(checkout), str(out / "hub")]
        subprocess.run(command, check=True, stdout=sys.stderr)
    tests = out / "tests-of-trl"
    if not tests.exists():
        tests.mkdir(parents=True)
        shutil.copytree(checkout / "tests", tests / "tests")
        shutil.copy(checkout / "pyproject.toml", tests)
    return tests


def check_versions(out: Path) -> None:
    """Let no table hold results of other libraries than those that it names."""
    file = out / "versions.txt"
    if file.exists() and file.read_text() != versions():
        raise SystemExit(
            f"trl_suite.py: {out} has results of {file.read_text()}, and installed is "
            f"{versions()}; give another folder, --out, or delete that one"
        )
    file.write_text(versions())


def versions() -> str:
    return ", ".join(f"{name} {version(name).partition('+')[0]}" for name in LIBRARIES)


def run(tests: Path, out: Path, files: Iterable[str], limit_s: float | None) -> None:
    """Run the files in a process of their own; what it ends without is done by the next call."""
    command = [
        *(sys.executable, "-m", "pytest", "-q", "--tb=short", "-m", "not slow"),
        *("-p", "no:cacheprovider", "-p", "no:lensnet_guard", "-p", "trl_guard_plugin"),
        *("--trl-results", str(out / "results.jsonl"), *files),
    ]
    with (out / "pytest.log").open("a") as log:
        process = subprocess.Popen(
            command, cwd=tests, env=environment(out), stdout=log, stderr=subprocess.STDOUT
        )
        start, before = time.monotonic(), -1
        while process.poll() is None:
            if limit_s is not None and time.monotonic() - start > limit_s:
                say(f"stopped after {limit_s:,.0f} s; the same command goes on from here")
                process.terminate()
                process.wait()
                return
            runs = len(results(out))
            if runs != before:
                say(f"{runs} runs of tests")
            before = runs
            time.sleep(5)
    if process.returncode not in (0, 1, 5):  # 5: nothing was left to run
        raise SystemExit(f"trl_suite.py: pytest ended with {process.returncode}; see {log.name}")


def results(out: Path) -> list[dict[str, Any]]:
    file = out / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# Comparing ---------------------------------------------------------------------------------------


def compare(trainer: str, runs: list[dict[str, Any]], selected: int) -> Row:
    """The row of one file; tests whose three runs are not complete are left out."""
    tests: dict[str, dict[str, dict[str, Any]]] = {}
    for one in runs:
        tests.setdefault(one["name"], {})[one["mode"]] = one
    counts: Counter[str] = Counter()
    agree, differ = dict.fromkeys(GUARDED, 0), []
    for name, modes in tests.items():
        plain = modes["none"]
        kind = kind_of(plain)
        if kind == "guarded" and not all(mode in modes for mode in GUARDED):
            continue
        counts[kind] += 1
        if kind != "guarded":
            continue
        said = {mode: difference(plain, modes[mode]) for mode in GUARDED}
        for mode, why in said.items():
            agree[mode] += not why
            if why:
                differ.append(f"{name.partition('::')[2]}, {mode}: {why}")
        counts["same"] += all(logged(plain) == logged(modes[mode]) for mode in GUARDED)
    return Row(
        trainer=trainer,
        tests=selected,
        run=counts["failing"] + counts["nothing"] + counts["guarded"],
        failing=counts["failing"],
        nothing=counts["nothing"],
        guarded=counts["guarded"],
        agree=agree,
        same_losses=counts["same"],
        differ=differ,
    )


def kind_of(plain: dict[str, Any]) -> str:
    if plain["outcome"] != "passed":
        return "failing"
    return "nothing" if all(one["nothing"] for one in plain["trainings"]) else "guarded"


def logged(one: dict[str, Any]) -> list[str]:
    return [training["logged"] for training in one["trainings"]]


def difference(plain: dict[str, Any], guarded: dict[str, Any]) -> str:
    """What a guard has changed, in words; empty when nothing."""
    if guarded["outcome"] != plain["outcome"]:
        by = "the guard: " if guarded["ours"] else ""
        return f"{guarded['outcome']}, {by}{guarded['error']}"
    if violations := sum(training["violations"] for training in guarded["trainings"]):
        return f"{violations} violations"
    if not any(training["guarded"] for training in guarded["trainings"]):
        return "nothing was guarded"
    return "" if logged(plain) == logged(guarded) else "other losses"


# Telling -----------------------------------------------------------------------------------------


def markdown(rows: list[Row], command: str) -> str:
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(row.cells for row in rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    differ = [f"- {row.trainer}: `{line}`" for row in rows for line in row.differ]
    ran = sum(row.run for row in rows)
    compared = sum(row.guarded for row in rows)
    words = "these differ" if differ else f"of {compared} that were compared none differs"
    return "\n".join(
        [
            f"`{command}`, {time.strftime('%d %B %Y')}; {versions()}.",
            "",
            table,
            "",
            f"{ran} of {sum(row.tests for row in rows)} tests were run; {words}.",
            *(["", *differ] if differ else []),
        ]
    )


def write(text: str) -> None:
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"trl_suite.py: {PAGE} has lost its markers {BEGIN} and {END}")
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def rows_of(files: dict[str, str], out: Path) -> Iterator[Row]:
    runs, selected = results(out), json.loads((out / "selected.json").read_text())
    for trainer, file in files.items():
        if file in selected:
            of_file = [one for one in runs if one["name"].startswith(f"{file}::")]
            yield compare(trainer, of_file, selected[file])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="a checkout of TRL's repository")
    parser.add_argument("--trainers", nargs="+", metavar="NAME", help="default: all, dpo first")
    parser.add_argument("--out", type=Path, default=Path("trl-suite"), help="the folder")
    parser.add_argument("--limit", type=float, metavar="S", help="stop running after S seconds")
    parser.add_argument("--json", action="store_true", help="the rows, for programs")
    parser.add_argument("--write", action="store_true", help=f"into docs/{PAGE.name} as well")
    arguments = parser.parse_args()
    checkout, out = arguments.checkout.resolve(), arguments.out.resolve()
    files = files_of(checkout)
    if unknown := set(arguments.trainers or ()) - set(files):
        parser.error(f"no tests of {', '.join(sorted(unknown))}; there are {', '.join(files)}")
    files = {name: files[name] for name in arguments.trainers or files}
    of = re.sub(r"\s", "", (checkout / "VERSION").read_text())
    if of != version("trl"):
        say(f"the tests are of trl {of}, and trl {version('trl')} is installed")
    out.mkdir(parents=True, exist_ok=True)
    check_versions(out)
    run(prepare(checkout, out), out, files.values(), arguments.limit)
    rows = list(rows_of(files, out))
    text = markdown(rows, f"python benchmarks/trl_suite.py, TRL's tests of {of}")
    print(json.dumps([asdict(row) for row in rows], indent=1) if arguments.json else text)
    if arguments.write:
        write(text)
    sys.exit(1 if any(row.differ for row in rows) else 0)


if __name__ == "__main__":
    main()
