"""Everything that only a GPU can tell, in one command, on a bare machine without network.

Example: python benchmarks/gpu/run.py --fetch      # once, where there is network
         python benchmarks/gpu/run.py              # on the machine with the GPU, as `make gpu`
         python benchmarks/gpu/run.py --only overwritten smoke --steps 200

Wanted are Linux, Python 3.12, torch 2.11 or newer and what usually lies beside it; nothing of ours
is installed. The few small wheels that are missing are unpacked from ``wheels/``, where ``--fetch``
has put them, into a folder of this run. Each check is a process of its own with a time limit, so
that none stops the rest. ``gpu.json`` has every figure, ``gpu.md`` the table for
docs/performance.md, ``logs/`` what each check printed. Exit code 1 when something does not hold.

Without a GPU the same checks run on the CPU, and what only a GPU can tell is marked with a dash.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WHEELS = HERE / "wheels"
# What our packages and their tests import, without what weighs much or comes with torch.
SMALL = (
    *("structlog", "orjson", "wrapt", "click", "rich", "markdown-it-py", "mdurl", "Pygments"),
    *("pytest", "pytest-xdist", "execnet", "pluggy", "iniconfig", "packaging"),
    *("hypothesis", "sortedcontainers"),
)
MARKS = {True: "yes", False: "**no**", None: "-"}


@dataclass(frozen=True)
class Line:
    """One thing that was looked at.

    Attributes:
        what: in words.
        found: in words.
        required: in words; empty where nothing is.
        holds: whether it does; None where nothing is required, or this machine cannot tell.
    """

    what: str
    found: str
    required: str = ""
    holds: bool | None = None


Lines = Iterator[Line]


def at_most(what: str, value: float, most: float, unit: str, *, tells: bool = True) -> Line:
    """A figure with a limit; one that this machine cannot tell is only shown."""
    return Line(what, f"{value:.3g} {unit}", f"≤ {most:g} {unit}", value <= most if tells else None)


# What the checks' figures say --------------------------------------------------------------------


def of_tests(figures: dict[str, Any], cuda: bool) -> Lines:
    found = f"{figures['passed']} passed, {len(figures['failed'])} failed"
    if figures["skipped"]:
        found += f", {figures['skipped']} skipped"
    if figures["failed"]:
        found += ": " + ", ".join(figures["failed"])
    holds = not figures["failed"] and figures["passed"] > 0
    yield Line("`pytest -m gpu`", found, "all pass", holds if cuda or not holds else None)


def of_lines(figures: dict[str, Any], cuda: bool) -> Lines:
    """Of a check that judges for itself: what it found of each thing, and the limit."""
    for line in figures["lines"]:
        limit = "" if line["limit"] is None else _words(line["limit"])
        yield Line(line["name"], _words(line["found"]), limit, line["passed"])


def of_doctor(figures: dict[str, Any], cuda: bool) -> Lines:
    states = {found["name"]: found["state"] for found in figures["mechanisms"]}
    broken = [name for name, state in states.items() if state == "fails"]
    untried = [name for name, state in states.items() if state == "not tried"]
    found = f"{len(states) - len(broken) - len(untried)} mechanisms hold"
    for word, names in (("broken", broken), ("not tried", untried)):
        found += f"; {word}: {', '.join(names)}" if names else ""
    holds = not broken and not (cuda and untried)
    yield Line("`lensnet-guard doctor`", found, "all of them", holds)


def of_smoke(figures: dict[str, Any], cuda: bool) -> Lines:
    steps = f"{figures['steps']:,} steps of {figures['accumulation']} micro-steps"
    for line in of_lines(figures, cuda):
        yield Line(f"{steps}: {line.what}", line.found, line.required, line.holds)
    if figures["speedup"]:
        times = figures["step_ms_median"]
        yield Line(
            "the demo's step, eager and with `--compile`",
            f"{times['eager']:.1f} ms, {times['compiled']:.1f} ms: {figures['speedup']:.2f} x",
        )
    if cuda:
        peaks = figures["peak_memory_mb"]
        found = f"{peaks['eager']:.0f} MiB, {peaks['compiled']:.0f} MiB"
        yield Line("its peak memory on the device, eager and compiled", found)


def of_micro_step(figures: dict[str, Any], cuda: bool) -> Lines:
    size = f"4 sequences of {figures['tokens']:,} tokens, 20 contexts"
    controller, preference = figures["controller_ms"], figures["preference_ms"]
    yield at_most(f"controller per micro-step ({size})", controller, 5, "ms", tells=cuda)
    yield at_most("of it preference loss and metrics", preference, 2, "ms", tells=cuda)
    share = figures["controller_share_of_step"]
    models = figures["models_ms"] + figures["backward_ms"]
    yield Line("the controller's share of that step", f"{share:.1%}, models {models:.0f} ms")


def of_overhead(figures: dict[str, Any], cuda: bool) -> Lines:
    for name in (
        "guard, enforce + record, 16 frames (the default)",
        "a whole guarded micro-step with log",
    ):
        yield Line(f"{name}, over the bare module", f"{figures['added_us'][name]:.1f} µs")


def of_submodules(rows: list[dict[str, Any]], cuda: bool) -> Lines:
    for row in rows:
        yield Line(
            f"a guarded forward of {row['modules']} modules, over the bare one",
            f"{row['added_us']:.0f} µs of {row['bare_us']:,.0f} µs, "
            f"{row['added_us'] / row['modules']:.2f} µs per module",
        )


def of_memory(rows: list[dict[str, Any]], cuda: bool) -> Lines:
    plain, recompute = rows[-2:]
    yield Line(
        f"peak memory of a step of {plain['tokens']:,} tokens, {plain['variants']} variants, and "
        "with `--recompute`",
        f"{plain['peak_mb']:.0f} MB, {recompute['peak_mb'] / plain['peak_mb']:.2f} x",
    )
    if cuda:
        yield Line(
            "the same as the device's allocator tells it, parameters included",
            f"{plain['device_peak_mb']:.0f} MB, {recompute['device_peak_mb']:.0f} MB",
        )


def of_speed(rows: list[dict[str, Any]], cuda: bool) -> Lines:
    eager = next(row for row in rows if row["options"] == "")
    for row in rows:
        yield Line(
            f"a step of {row['model']}, {row['options'] or 'eager, float32'}",
            f"{row['step_ms']:.1f} ms, {eager['step_ms'] / row['step_ms']:.2f} x as fast",
        )


# The checks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A command that prints JSON last, and what it says.

    Attributes:
        arguments: of Python.
        limit_s: after which it is killed.
        lines: makes lines of what it printed, and of whether there is a GPU.
        read: makes figures of the check's output, and of its folder.
    """

    arguments: tuple[str, ...]
    limit_s: int
    lines: Callable[[Any, bool], Lines]
    read: Callable[[str, Path], Any] = lambda printed, _: json.loads(printed)


def read_junit(_: str, folder: Path) -> dict[str, Any]:
    """How the tests went."""
    cases = list(ElementTree.parse(folder / "tests.xml").iter("testcase"))
    failed = [
        case.get("name")
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "failed": failed, "skipped": skipped}


def read_last_object(printed: str, _: Path) -> Any:
    """The JSON that ends an output which begins with something else."""
    return json.loads(printed[printed.index("{") :])


def checks(folder: Path, steps: int, device: str) -> dict[str, Check]:
    """Every check by its name, in the order in which they run."""
    marked = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    tests = ("-m", "pytest", "-n", "4", "-m", "gpu", "-ra", "--show-capture=no")
    # Ours is not installed and must be named; a benchmark plugin warns of the workers, and stops.
    tests += ("-p", "lensnet_guard.pytest_plugin", "-p", "no:cacheprovider", "-p", "no:benchmark")
    tests += (f"--junitxml={folder / 'tests.xml'}", *marked)
    smoke = ("--steps", str(steps), "--out", str(folder / "smoke.json"))
    on = ("--device", device)
    # A CPU only tries the scripts out.
    fewer = () if device == "cuda" else ("--tokens", "1024")
    rounds = ("--rounds", "100" if device == "cuda" else "20")

    def script(name: str, *arguments: str) -> tuple[str, ...]:
        return f"benchmarks/{name}.py", *arguments

    json_on = ("--json", "--device", device)
    return {
        "overwritten": Check(script("gpu/overwritten", *on), 120, of_lines),
        "doctor": Check(("-m", "lensnet_guard", "doctor", "--json"), 90, of_doctor),
        "tests": Check(tests, 150, of_tests, read_junit),
        "micro_step": Check(script("micro_step", *json_on, *fewer), 60, of_micro_step),
        "overhead": Check(script("guard_overhead", "--json", "--rounds", "5"), 60, of_overhead),
        "submodules": Check(script("submodules", *json_on, *rounds), 60, of_submodules),
        "memory": Check(script("memory", *json_on, *fewer), 60, of_memory),
        "nccl": Check(script("gpu/nccl", *on), 60, of_lines),
        "smoke": Check(script("gpu_smoke", *smoke), 240, of_smoke, read_last_object),
        "speed": Check(script("gpu/speed", *on), 120, of_speed),
    }


def run(
    name: str,
    check: Check,
    limit_s: float,
    folder: Path,
    environment: dict[str, str],
    cuda: bool,
) -> Any:
    """One check in a process of its own: its figures, and lines that say what they mean."""
    out, err = (folder / "logs" / f"{name}.{stream}" for stream in ("out", "err"))
    begin, failure = time.monotonic(), ""
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, *check.arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code, failure = process.wait(), f"killed after {limit_s:.0f} s"
    figures, lines = None, []
    if not failure:
        try:
            figures = check.read(out.read_text(), folder)
            lines = list(check.lines(figures, cuda))
        except Exception as error:  # a check that broke is told, and the others go on
            last = err.read_text().strip().splitlines()[-1:] or [f"{type(error).__name__}: {error}"]
            failure = f"exit code {code}, {last[0]}"
    if failure:
        lines = [Line(f"the check `{name}` ran to its end", failure, "it does", False)]
    seconds = time.monotonic() - begin
    return {"seconds": seconds, "figures": figures, "lines": [asdict(line) for line in lines]}


# The machine -------------------------------------------------------------------------------------


def requirements() -> Iterator[str]:
    """What `wheels` must offer, as pip reads it; versions are those of constraints.txt."""
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, version = line.partition(";")[0].strip().partition("==")
        marker = line.partition(";")[2]
        if name.lower() in {n.lower() for n in SMALL} and '< "3.11"' not in marker:
            yield f"{name}=={version}"


def fetch() -> None:
    """Download the wheels; for CPython 3.12 on 64-bit Linux, whatever this machine runs."""
    platforms = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 17)] + ["manylinux2014_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", WHEELS]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    command += [word for name in platforms for word in ("--platform", name)]
    for wheel in WHEELS.glob("*.whl"):
        wheel.unlink()
    subprocess.run([*map(str, command), *requirements()], check=True)
    size = sum(wheel.stat().st_size for wheel in WHEELS.glob("*.whl"))
    print(f"{len(list(WHEELS.glob('*.whl')))} wheels, {size / 1e6:.1f} MB, in {WHEELS}")


def unpack_missing(target: Path) -> list[str]:
    """Unpack the wheels of packages that this Python lacks, or has in an older release."""
    least = dict(re.findall(r'"([\w-]+)>=([\d.]+)', (ROOT / "pyproject.toml").read_text()))
    unpacked = []
    for wheel in sorted(WHEELS.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = ""
        if not found or _numbers(found) < _numbers(least.get(name, "0")):
            zipfile.ZipFile(wheel).extractall(target)
            unpacked.append(f"{name} {version}")
    return unpacked


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def about(environment: dict[str, str]) -> dict[str, Any]:
    """What the figures were taken on."""
    ask = (
        "import json, torch; cuda = torch.cuda.is_available(); print(json.dumps({'torch': "
        "torch.__version__, 'cuda': torch.version.cuda if cuda else None, "
        "'card': torch.cuda.get_device_name() if cuda else None}))"
    )
    told = subprocess.run(
        [sys.executable, "-c", ask], env=environment, stdout=subprocess.PIPE, check=True, text=True
    )
    return {
        **json.loads(told.stdout),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
    }


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    machine = result["machine"]
    card = machine["card"] or "no GPU"
    lines = [
        f"Measured on {machine['date']} on {card}, torch {machine['torch']}, "
        f"Python {machine['python']}, {machine['cores']} cores, in "
        f"{result['seconds'] / 60:.1f} minutes, by `make gpu`.",
        "",
        "| what | found | required | |",
        "|---|---:|---:|---|",
    ]
    for check in result["checks"].values():
        for line in check["lines"]:
            cells = (line["what"], line["found"], line["required"])
            mark = MARKS[line["holds"]] if line["required"] or line["holds"] is not None else ""
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + f" | {mark} |")
    return "\n".join(lines) + "\n"


def _words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "none"
    return "nothing" if value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(checks(Path(), 0, "cpu"))
    parser.add_argument("--fetch", action="store_true", help="download the wheels, and end")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--steps", type=int, default=2_000, help="of training (default 2,000)")
    parser.add_argument(
        "--limit", type=int, default=480, metavar="S", help="seconds for all of it (default 480)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="default runs/gpu")
    arguments = parser.parse_args()
    if arguments.fetch:
        fetch()
        return
    folder: Path = arguments.out.resolve()
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as packages:
        unpacked = unpack_missing(Path(packages))
        paths = [str(ROOT / "src"), packages, os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        machine = {**about(environment), "unpacked": unpacked}
        print(json.dumps(machine), flush=True)
        cuda = machine["card"] is not None
        result: dict[str, Any] = {"machine": machine, "seconds": 0.0, "checks": {}}
        for name, check in checks(folder, arguments.steps, "cuda" if cuda else "cpu").items():
            if name not in arguments.only:
                continue
            print(f"{name} …", flush=True)
            left_s = begin + arguments.limit - time.monotonic()
            limit_s = max(min(check.limit_s, left_s), 0)
            result["checks"][name] = done = run(name, check, limit_s, folder, environment, cuda)
            result["seconds"] = time.monotonic() - begin
            for line in done["lines"]:
                required = f" (required: {line['required']})" if line["required"] else ""
                print(f"  {MARKS[line['holds']]:6} {line['what']}: {line['found']}{required}")
            print(f"  {done['seconds']:.0f} s", flush=True)
            # Written after every check, so that a machine that goes away leaves what it found.
            (folder / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
            (folder / "gpu.md").write_text(table(result), encoding="utf-8")
    lines = [line for check in result["checks"].values() for line in check["lines"]]
    broken = [line["what"] for line in lines if line["holds"] is False]
    print(f"{len(broken)} of {len(lines)} lines do not hold; {folder / 'gpu.md'}")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
