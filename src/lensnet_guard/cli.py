"""The command line: ``postmortem``, ``report``, ``trace``, ``suggest``, ``explain``, ``doctor``."""

import contextlib
import io
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TransferSpeedColumn,
)

from lensnet_guard._output import fail, require_own, show
from lensnet_guard._text import json_line
from lensnet_guard._version import __version__
from lensnet_guard.postmortem.analysis import analyse
from lensnet_guard.postmortem.findings import Analysis
from lensnet_guard.postmortem.plain import plain
from lensnet_guard.postmortem.reader import find_logs

_T = TypeVar("_T")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lensnet-guard")
def main() -> None:
    """Read the logs that guards have written, and examine the guard on this machine.

    Example: lensnet-guard postmortem runs/42
    """


@main.command("postmortem")
@click.argument("targets", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def postmortem(targets: tuple[Path, ...], as_json: bool) -> None:
    """What happened in a run: TARGETS are run folders or log files, also of several ranks.

    The verdict comes first; then the calls by context, scope and call site, the budgets that were
    missed, the calls in flight when the process died, and what set refused calls apart.

    Exits with 0 when the run was clean, 1 on violations, a crash or a damaged log, 2 when nothing
    could be read or the findings could not be printed.

    Example: lensnet-guard postmortem runs/42 --json
    """
    analysis = read(targets, as_json=as_json)
    if as_json:
        print_json(to_json(analysis))
    else:
        from lensnet_guard.postmortem.render import render

        _print(analysis, render, soft_wrap=True)
    sys.exit(analysis.exit_code)


@main.command("report")
@click.argument("target", metavar="RUN_DIR", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Default: report.html in RUN_DIR."
)
@click.option("--force", is_flag=True, help="Replace a file that is no report.")
def report(target: Path, output: Path | None, force: bool) -> None:
    """Write what happened in a run as one HTML page that needs no network.

    Verdict, timeline, violations and call sites with their stacks, of all logs in RUN_DIR; and the
    curves of metrics.jsonl and the picture overview.png where it has them. Writes over an earlier
    report, but over no other file without --force, and never over one that it reads.

    Exits with 0 when the page is written, whatever it says, and 2 when it cannot be.

    Example: lensnet-guard report runs/42 -o report.html
    """
    from lensnet_guard.postmortem.report import MARK, inputs, render_report
    from lensnet_guard.postmortem.timeline import read_timelines

    folder = target if target.is_dir() else target.parent
    output = output or folder / "report.html"
    _require_own(output, target, inputs(folder), MARK, force=force)
    analysis = read((target,))
    timelines = _with_progress((target,), read_timelines)
    with _replacing(output) as file:
        for piece in render_report(analysis, timelines, folder):
            file.write(piece.encode("utf-8", "backslashreplace"))
    show(f"{output}: {analysis.verdict}\n")


@main.command("trace")
@click.argument("target", metavar="RUN_DIR", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Default: trace.json in RUN_DIR."
)
@click.option("--force", is_flag=True, help="Replace a file that is no trace of this command.")
def trace(target: Path, output: Path | None, force: bool) -> None:
    """Write the calls of a run as a trace for ui.perfetto.dev or chrome://tracing.

    Calls and micro-steps of every thread, violations as instants, and calls in flight at death as
    slices without an end, of all logs in RUN_DIR. Writes over an earlier trace, but over no other
    file without --force, and never over a log that it reads.

    Exits with 0 when the trace is written and 2 when it cannot be.

    Example: lensnet-guard trace runs/42 -o trace.json
    """
    from lensnet_guard.postmortem.trace import MARK, write_trace

    output = output or (target if target.is_dir() else target.parent) / "trace.json"
    _require_own(output, target, (), MARK, force=force)

    def write(targets: tuple[Path, ...], progress: Callable[[int], object]) -> int:
        find_logs(targets)  # before a file is made
        with _replacing(output) as file:
            return write_trace(targets, file, progress)

    events = _with_progress((target,), write)
    show(f"{output}: {events} events\n")


@main.command("suggest")
@click.argument(
    "targets", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of code.")
def suggest(targets: tuple[Path, ...], as_json: bool) -> None:
    """Write the strictest contract that a run has kept, as Python to paste.

    RUN is the folder or the log of a run in observe mode, also of several ranks and modules: who
    called, how often in which window, and what held each time. Each line says what it rests on;
    below stands what would have broken a stricter contract.

    Exits with 0 when the run would have kept the contract, 1 when the program has to change first,
    as the last lines say, 2 when there is nothing to suggest it from.

    Example: lensnet-guard suggest runs/42 > policy.py
    """
    from lensnet_guard.postmortem.observed import NotObserved, read_observed
    from lensnet_guard.postmortem.suggest import suggest as suggest_for
    from lensnet_guard.postmortem.suggest_code import suggestion_code, suggestion_json

    try:
        observed, faults = _with_progress(targets, read_observed)
    except (NotObserved, SystemExit) as error:
        if as_json:  # a program reads stdout
            print_json({"exit_code": 2, "code": None, "faults": [], "modules": []})
        if isinstance(error, SystemExit):
            raise
        fail(OSError(str(error)))
    found = list(map(suggest_for, observed))
    exit_code = int(any(one.to_do for one in found))
    if as_json:
        print_json(suggestion_json(found, faults, exit_code))
    else:
        show(suggestion_code(found, faults))
    sys.exit(exit_code)


@main.command("explain")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def explain(name: str | None, as_json: bool) -> None:
    """What a mistake looks like, and the line of policy that stops it.

    NAME is what an error message ends with. Its entry has the symptom, public reports, and a
    program before and after, to run. Without a NAME all are listed, with a line for each.

    Exits with 0, or with 2 when there is no such entry, or it could not be printed.

    Example: lensnet-guard explain called-twice
    """
    from lensnet_guard.mistakes import near, read_mistakes

    try:
        mistakes = read_mistakes()
    except OSError as error:
        fail(error)
    found = [mistakes[name]] if name in mistakes else [] if name else list(mistakes.values())
    if as_json:  # in any case: a program reads stdout
        print_json({"mistakes": plain(found)})
    if not found:
        named = near(str(name), mistakes)
        told = f"near are {', '.join(named)}" if named else "`lensnet-guard explain` lists them all"
        fail(OSError(f"no mistake is called {name!r}; {told}"))
    if not as_json and name:
        _print(found[0].text, _markdown)
    elif not as_json:
        width = max(map(len, mistakes))
        show("".join(f"{one.name:<{width}}  {one.about}\n" for one in found))


def _markdown(text: str, console: Console) -> None:
    """In a terminal as it is meant to look; elsewhere as it is written, which reads as well."""
    if console.is_terminal:
        from rich.markdown import Markdown

        console.print(Markdown(text))
    else:
        console.out(text, end="")


@main.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def doctor(as_json: bool) -> None:
    """Which versions are here, and whether each mechanism of the guard works with them.

    Bypasses, activation checkpoints, torch.compile, logs, two ranks, CUDA graphs: each is tried for
    real, in a process of its own. What the machine has not got is "not tried".

    Exits with 0 when all that was tried holds, 1 when something does not, 2 when that could not be
    printed.

    Example: lensnet-guard doctor --json > doctor.json
    """
    from lensnet_guard.doctor import examine
    from lensnet_guard.doctor.examination import MECHANISMS

    with _progress(TextColumn("examining"), BarColumn()) as progress:
        task = progress.add_task("examining", total=len(MECHANISMS))
        found = examine(lambda: progress.advance(task))
    if as_json:
        print_json(found.to_json())
    else:
        from lensnet_guard.doctor.render import render

        _print(found, render)
    sys.exit(0 if found.holds else 1)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when complete; exits with 2 when it cannot."""
    try:
        if path.exists() and not path.is_file():
            raise OSError(f"{path} is there and is no file")
        path = Path(os.path.realpath(path))  # a link stays, and what it leads to is replaced
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with temporary.open("xb") as file:
            try:
                yield file
                file.close()
                temporary.replace(path)
            except BaseException:
                temporary.unlink()
                raise
    except OSError as error:
        fail(error)


def _require_own(
    output: Path, target: Path, others: Iterable[Path], mark: bytes, *, force: bool
) -> None:
    """Exit with 2 where a command is to write over what it reads, or over somebody's file."""
    try:
        logs = itertools.chain.from_iterable(find_logs((target,)).values())
        require_own(output, (*logs, *others), mark, force=force)
    except OSError as error:
        fail(error)


def read(targets: tuple[Path, ...], *, as_json: bool = False) -> Analysis:
    """Analyse with a progress bar; exits with 2 when there is nothing to read."""
    try:
        return _with_progress(targets, analyse)
    except SystemExit:
        if as_json:  # a program reads stdout
            print_json({"verdict": "unreadable: no log", "exit_code": 2, "runs": []})
        raise


def _print(found: _T, render: Callable[[_T, Console], object], *, soft_wrap: bool = False) -> None:
    """What a renderer tells people; printed whole, so that nothing ends half-way."""
    page = io.StringIO()
    terminal = (sys.stdout is not None and sys.stdout.isatty()) or None
    console = Console(file=page, force_terminal=terminal, soft_wrap=soft_wrap, highlight=False)
    render(found, console)
    show(page.getvalue())


def print_json(found: dict[str, Any]) -> None:
    """One line of JSON, whatever a damaged log has put into it."""
    show(json_line(found) + b"\n")


def _with_progress(
    targets: tuple[Path, ...],
    work: Callable[[tuple[Path, ...], Callable[[int], object]], _T],
) -> _T:
    """Read all logs under a progress bar; exits with 2 when there is nothing to read."""
    try:
        total = sum(map(_size, itertools.chain.from_iterable(find_logs(targets).values())))
        columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with _progress(*columns) as progress:
            task = progress.add_task("reading", total=total)
            return work(targets, lambda read: progress.advance(task, read))
    except OSError as error:
        fail(error)


def _progress(*columns: ProgressColumn) -> Progress:
    """On stderr, where that is a terminal: elsewhere it would leave an empty line."""
    console = Console(stderr=True)
    console.quiet = not console.is_terminal
    return Progress(*columns, console=console, transient=True)


def _size(path: Path) -> int:
    """In bytes; 0 when it is gone by now, as from a log that is being written."""
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def to_json(analysis: Analysis) -> dict[str, Any]:
    """Return the analysis as a JSON-ready object."""
    runs = []
    for run in analysis.runs:
        sites = [plain(site) | {"times": n} for site, n in run.sites.most_common()]
        runs.append(plain(run) | {"sites": sites, "died": run.died})
    return {
        "verdict": analysis.verdict,
        "exit_code": analysis.exit_code,
        "divergence": plain(analysis.divergence),
        "runs": runs,
    }
