"""All that is done with a log, for fuzzers: whatever is in it, every reader comes to an end.

As a script, a coverage-guided run of atheris over it: ``everything.py FOLDER CORPUS [FLAGS]``.
"""

import ast
import contextlib
import io
import json
import random
import sys
from pathlib import Path

FILE = "lensnet.rank0.jsonl"


def read_everything(folder: Path) -> int:
    """Analyse, judge, render for people and programs, report and trace; the exit code."""
    from rich.console import Console

    from lensnet_guard.cli import print_json, to_json
    from lensnet_guard.postmortem.analysis import analyse
    from lensnet_guard.postmortem.render import render
    from lensnet_guard.postmortem.report import render_report
    from lensnet_guard.postmortem.timeline import read_timelines
    from lensnet_guard.postmortem.trace import write_trace
    from lensnet_guard.postmortem.verdict import read_verdict

    analysis = analyse([folder])
    assert analysis.exit_code in (0, 1, 2)
    assert analysis.verdict
    assert not read_verdict(folder).clean or analysis.exit_code == 0
    terminal = io.StringIO()
    render(analysis, Console(file=terminal, soft_wrap=True, highlight=False))
    assert terminal.getvalue().startswith("verdict: ")
    assert not set(terminal.getvalue()) & {"\x1b", "\x07", "\x9b", "\u202e"}
    out = io.TextIOWrapper(io.BytesIO())
    with contextlib.redirect_stdout(out):
        print_json(to_json(analysis))
    assert json.loads(out.buffer.getvalue())["exit_code"] == analysis.exit_code  # type: ignore[attr-defined]
    page = "".join(render_report(analysis, read_timelines([folder]), folder))
    assert page.endswith("</body></html>\n")
    assert "<script" not in page
    trace = io.BytesIO()
    written = write_trace([folder], trace)
    assert len(json.loads(trace.getvalue())["traceEvents"]) == written
    read_suggestion(folder)
    return analysis.exit_code


def read_suggestion(folder: Path) -> None:
    """Suggest a contract; what is printed is a policy and comments, whatever the log says."""
    from lensnet_guard.cli import print_json
    from lensnet_guard.postmortem.observed import NotObserved, read_observed
    from lensnet_guard.postmortem.suggest import suggest
    from lensnet_guard.postmortem.suggest_code import suggestion_code, suggestion_json

    try:
        observed, faults = read_observed([folder])
    except NotObserved:
        return
    found = list(map(suggest, observed))
    tree = ast.parse(suggestion_code(found, faults).encode("utf-8", "backslashreplace"))
    kinds = (ast.Import, ast.ImportFrom, ast.Assign)
    assert all(isinstance(node, kinds) for node in tree.body)
    called = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert {ast.unparse(name) for name in called} <= {"CallPolicy", "Scope", "autocast"}
    out = io.TextIOWrapper(io.BytesIO())
    with contextlib.redirect_stdout(out):
        print_json(suggestion_json(found, faults, 0))
    assert json.loads(out.buffer.getvalue())["exit_code"] == 0  # type: ignore[attr-defined]


ODD: tuple[object, ...] = (
    *(None, True, -1, 0, 2**62, 2**63, 10**4_000, 0.5, -1e300, float("nan"), float("inf")),
    *("", "x", "<script>", "\x1b[2J\u202e", "\ud800", [], {}, [[]], [{}], {"": []}, [None, 1, "2"]),
)


def mutate_lines(content: bytes, seed: int) -> bytes:
    """One change to a log that a mutation of its bytes would hardly ever make."""
    draw = random.Random(seed)
    lines = content.split(b"\n")
    at = draw.randrange(len(lines))
    what = draw.randrange(5)
    if what == 0:
        lines.insert(at, draw.choice(lines))
    elif what == 1:
        del lines[at]
    else:
        with contextlib.suppress(ValueError, RecursionError, IndexError):
            event = json.loads(lines[at])
            inner = event
            while draw.random() < 0.3:
                inner = draw.choice([v for v in inner.values() if isinstance(v, dict)])
            key = draw.choice(sorted(inner))
            inner[key] = inner[draw.choice(sorted(inner))] if what == 2 else draw.choice(ODD)
            lines[at] = json.dumps(event).encode()
    return b"\n".join(lines)


def main() -> None:
    import atheris

    folder = Path(sys.argv.pop(1))
    with atheris.instrument_imports(include=["lensnet_guard"]):
        import lensnet_guard.cli
        import lensnet_guard.postmortem.observed
        import lensnet_guard.postmortem.render
        import lensnet_guard.postmortem.report
        import lensnet_guard.postmortem.suggest_code
        import lensnet_guard.postmortem.trace  # noqa: F401

    def run(content: bytes) -> None:
        (folder / FILE).write_bytes(content)
        read_everything(folder)

    def mutate(content: bytes, max_size: int, seed: int) -> bytes:
        if seed % 4 == 0:
            return atheris.Mutate(content, max_size)
        return mutate_lines(content, seed)[:max_size]

    atheris.Setup(sys.argv, run, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
