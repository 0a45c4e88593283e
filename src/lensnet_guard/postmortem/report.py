"""The findings as one HTML page that needs no network and no script.

All text of the logs is escaped, and the page's own policy forbids scripts and requests, so that a
log from a stranger may be opened. What it shows of a run is bounded; it says what it leaves out.
"""

import base64
import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

import orjson

from lensnet_guard._text import count, moment
from lensnet_guard.postmortem.findings import Analysis, Call, Run
from lensnet_guard.postmortem.judge import missed
from lensnet_guard.postmortem.timeline import MARKS, Timeline, draw, legend

_SITES = 500  # shown of a run, the most frequent
_SITE_COLUMNS = ("times", "module", "context", "scope", "what", "from")
_DEVIATIONS = 50
_POINTS = 1_000  # of a curve
_PICTURE_BYTES = 8 * 2**20
_LINE_BYTES = 2**20  # a longer line holds no metrics
_CURVES = {  # title -> the metrics in it
    "loss": ("loss", "lm_loss", "validation_loss"),
    "preference learning": ("lens_loss", "preference_agreement", "validation_agreement"),
}

MARK = b"<title>lensnet-guard report</title>"  # in the head: by it an earlier report is known
_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>lensnet-guard report</title>
<style>
:root { --page:#f6f7f9; --card:#fff; --text:#1b1f24; --soft:#5a6470; --line:#d8dde3;
 --good:#1a7f4b; --bad:#c4262e; --blue:#2f6fb0; --orange:#b96a00; --grey:#87919d; --purple:#7a3fb8 }
@media (prefers-color-scheme: dark) { :root { --page:#14171b; --card:#1d2126; --text:#e4e8ec;
 --soft:#9aa5b1; --line:#363d45; --good:#4cc38a; --bad:#ff6b6b; --blue:#6cb0f5; --orange:#f0a848;
 --grey:#98a3af; --purple:#c296f5 } }
body { margin:0 auto; max-width:70rem; padding:1rem; background:var(--page); color:var(--text);
 font:16px/1.5 system-ui,sans-serif; overflow-wrap:anywhere }
h1 { font-size:1.3rem } h2 { font-size:1.1rem } h3 { font-size:1rem; margin:1.5rem 0 .3rem }
section { background:var(--card); border:1px solid var(--line); border-radius:8px;
 padding:.5rem 1rem 1rem; margin:1rem 0 }
.verdict { border-left:6px solid var(--bad); padding:.5rem 1rem; background:var(--card) }
.verdict.good { border-color:var(--good) }
.soft, .row, .ticks { color:var(--soft); font-size:.85rem; margin:.2rem 0 0 }
.ticks { display:flex; justify-content:space-between }
.lane { display:block; width:100%; height:24px; background:var(--page); border-radius:3px }
.plot { display:block; width:100%; height:180px; background:var(--page) }
.plot polyline { fill:none; stroke-width:2; vector-effect:non-scaling-stroke }
.returned, .c0 { fill:var(--blue); stroke:var(--blue) }
.raised, .c1 { fill:var(--orange); stroke:var(--orange) }
.recompute { fill:var(--grey) } .flight, .c2 { fill:var(--purple); stroke:var(--purple) }
.violation { fill:var(--bad) } .micro { fill:var(--good) } rect { stroke-width:0 }
.key { display:inline-block; margin-right:1rem; white-space:nowrap }
.key svg { width:.8em; height:.8em; margin-right:.3em }
table { border-collapse:collapse; width:100% }
th, td { text-align:left; vertical-align:top; padding:.25rem .6rem .25rem 0;
 border-top:1px solid var(--line) }
th { color:var(--soft); font-weight:normal; font-size:.85rem; border:0 }
.refused { color:var(--bad) } summary { cursor:pointer } img { max-width:100% }
pre { white-space:pre-wrap; font-size:.85rem; margin:.3rem 0 .3rem 1rem }
@media (max-width:40rem) { body { padding:.5rem } thead { display:none }
 tr { display:block; border-top:1px solid var(--line); padding:.4rem 0 }
 td { display:block; border:0; padding:0 }
 td::before { content:attr(data-label) " "; color:var(--soft); font-size:.85rem } }
</style></head><body>
<h1>lensnet-guard report</h1>
"""


def inputs(folder: Path) -> tuple[Path, Path]:
    """Return the files that a report shows beside the logs, if they are there: metrics, picture."""
    return folder / "metrics.jsonl", folder / "overview.png"


def render_report(
    analysis: Analysis, timelines: dict[str, list[Timeline]], folder: Path
) -> Iterator[str]:
    """Yield the page, piece by piece.

    Args:
        analysis: Of the same logs as the timelines.
        timelines: Of every log's runs; see `read_timelines`.
        folder: Of the run, whose ``metrics.jsonl`` and ``overview.png`` are shown if they are there
            and can be read.
    """
    yield _HEAD
    good = "good" if analysis.exit_code == 0 else ""
    yield f'<p class="verdict {good}" id="verdict">{escape(analysis.verdict)}</p>'
    if analysis.divergence is not None:
        made = sorted(analysis.divergence.calls.items())
        calls = ", ".join(f"rank {rank}: {count(n, 'call')}" for rank, n in made)
        yield _paragraph(f"Ranks diverged at step {analysis.divergence.step}: {calls}", "refused")
    limit = max(100, MARKS // max(len(analysis.runs), 1))
    left = {log: iter(of_log) for log, of_log in timelines.items()}
    for run in analysis.runs:
        timeline = next(left.get(run.log, iter(())), None) or Timeline()
        yield "<section>"
        for part in (_run(run), draw(timeline, limit), _violations(run), _in_flight(run)):
            yield from part
        for part in (_remarks(run), _sites(run, timeline), _budget(run), _damage(run)):
            yield from part
        yield "</section>"
    yield from _training(folder)
    yield "</body></html>\n"


def _run(run: Run) -> Iterator[str]:
    took = f" after {run.last - run.started:.1f} s" if run.started and run.last else ""
    yield f"<h2>{escape(run.log)}</h2>"
    yield _paragraph(
        f"{run.module}, mode {run.mode}, rank {run.rank}, {run.who}; "
        f"began {moment(run.started)}, {run.state}{took}"
    )
    for module, sums in run.sums.items():
        yield _paragraph(f"{module}: {sums}" if module else str(sums))
    if run.phases:
        phases = ", ".join(f"{times} x {phase}" for phase, times in run.phases.items())
        yield _paragraph(f"CUDA graphs: {phases}")
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    yield _paragraph(f"{' '.join(run.argv)}; {versions}", "soft") if run.argv or versions else ""


def _sites(run: Run, timeline: Timeline) -> Iterator[str]:
    if not run.sites:
        return
    yield '<h3>Call sites</h3><table class="sites"><thead><tr>'
    yield "".join(f"<th>{head}</th>" for head in _SITE_COLUMNS)
    yield "</tr></thead><tbody>"
    for site, times in run.sites.most_common(_SITES):
        what = f"refused: {site.reason}" if site.reason else site.kind
        cells = (str(times), site.called, site.context or "unset", site.scope or "-", what)
        yield f'<tr class="site{" refused" if site.reason else ""}">'
        for label, text in zip(_SITE_COLUMNS, cells, strict=False):
            yield f'<td data-label="{label}">{escape(text)}</td>'
        stack = _stack(timeline.stacks.get(site, ()))
        yield f'<td data-label="from"><details><summary>{escape(site.caller)}</summary>'
        yield f"{stack}</details></td></tr>\n"
    yield "</tbody></table>"
    yield _more(len(run.sites) - _SITES, "call site")


def _violations(run: Run) -> Iterator[str]:
    if not run.violation_count:
        return
    yield "<h3>Violations</h3>"
    for number, violation in enumerate(run.violations):
        call = violation.call
        yield f'<details class="broken"{"" if number else " open"}><summary class="refused">'
        of = f" of {call.called}" if run.modules or call.method else ""
        yield escape(f"{call.reason}{of} at {call.caller} (record {call.seq}, {_where(call)})")
        yield f"</summary><pre>{escape(call.message or '')}</pre>"
        if violation.differences:
            told = "\n".join(violation.differences)
            yield f"<pre>differs from the call allowed before it:\n{escape(told)}</pre>"
        yield _call(call) + "</details>\n"
    yield _more(run.violation_count - len(run.violations), "violation")


def _in_flight(run: Run) -> Iterator[str]:
    if not run.in_flight or run.ended:
        return
    yield f"<h3>{'In flight at death' if run.died else 'In flight now'}</h3>"
    for call in run.in_flight[:_SITES]:
        title = escape(f"call {call.seq} of {call.called}, {_where(call)}, at {call.caller}")
        yield f'<details class="open-call" open><summary>{title}</summary>{_call(call)}</details>'
    yield _more(len(run.in_flight) - _SITES, "call")


def _budget(run: Run) -> Iterator[str]:
    if (told := missed((run,))) is None:
        return
    yield f"<h3>{told[0].upper()}{told[1:]}</h3><ul>"
    yield from (f"<li>{escape(str(found))}</li>" for found in run.deviations[:_DEVIATIONS])
    noun = "window" if run.missed_windows else "micro-step"
    yield "</ul>" + _more(run.deviation_count + run.missed_windows - _DEVIATIONS, noun)


def _remarks(run: Run) -> Iterator[str]:
    for title, notes in run.remarks:
        yield f"<h3>{title[0].upper()}{title[1:]}: {notes.count}</h3><ul>"
        yield from (f'<li class="remark">{escape(note)}</li>' for note in notes.kept)
        yield "</ul>" + _more(notes.count - len(notes.kept), "call")


def _damage(run: Run) -> Iterator[str]:
    for fault in run.log_faults:
        yield _paragraph(f"{fault[0].upper()}{fault[1:]}.", "refused")


def _training(folder: Path) -> Iterator[str]:
    """Yield curves and LOD strips, where the run has them."""
    metrics, overview = inputs(folder)
    rows = _metrics(metrics)
    plots = [piece for title, names in _CURVES.items() for piece in _plot(title, rows, names)]
    picture = _picture(overview)
    if plots or picture:
        yield f"<section><h2>Training</h2>{''.join(plots)}{picture}</section>"


def _metrics(path: Path) -> list[dict[str, float]]:
    """Return rows of numbers, thinned out evenly; lines that are no such rows are passed over."""
    rows: list[dict[str, float]] = []
    stride = 1
    if not path.is_file():  # a pipe would be waited for, a device has no end
        return rows
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_LINE_BYTES), b"")):
                if number % stride:
                    continue
                try:
                    row = orjson.loads(line)
                except ValueError:
                    continue
                if isinstance(row, dict):
                    rows.append({k: float(v) for k, v in row.items() if _is_number(v)})
                if len(rows) == 2 * _POINTS:
                    rows, stride = rows[::2], 2 * stride
    except OSError:
        pass
    return [row for row in rows if "step" in row]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and abs(value) < 1e100


def _plot(title: str, rows: Sequence[dict[str, float]], names: Iterable[str]) -> Iterator[str]:
    curves = {n: [(row["step"], row[n]) for row in rows if n in row] for n in names}
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(0.0, min(y for _, y in points)), max(y for _, y in points)
    across, up = 1000 / ((right - left) or 1), 180 / ((high - low) or 1)
    yield f"<h3>{escape(title)}</h3>"
    shown = [(name, curve) for name, curve in curves.items() if curve]
    for colour, (name, curve) in enumerate(shown):
        yield legend(f"c{colour}", f"{name}, last {curve[-1][1]:.4g}")
    yield f'<p class="row">{high:.4g}</p><svg class="plot" viewBox="0 -4 1000 188" role="img" '
    yield f'aria-label="{escape(title)} by step" preserveAspectRatio="none">'
    for colour, (_, curve) in enumerate(shown):
        line = " ".join(f"{(x - left) * across:.1f},{(high - y) * up:.1f}" for x, y in curve)
        yield f'<polyline class="c{colour}" points="{line}"/>'
    yield f'</svg><p class="ticks"><span>{low:.4g}; step {left:g}</span>'
    yield f"<span>step {right:g}</span></p>"


def _picture(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        if path.stat().st_size > _PICTURE_BYTES:
            return _paragraph(f"{path.name} is too large to be shown here.", "soft")
        data = path.read_bytes()
    except OSError:
        return ""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return ""
    source = base64.b64encode(data).decode()
    alt = "losses, calls per micro-step and LOD strips of the run"
    return f'<h3>Overview</h3><img alt="{alt}" src="data:image/png;base64,{source}">'


def _call(call: Call) -> str:
    grad = "enabled" if call.grad_enabled else "disabled"
    inputs = escape(", ".join(call.inputs) or "none")
    thread = escape(call.thread)
    torch = f"; {escape(call.compiled)}" if call.compiled is not None else ""
    return f"<p>inputs {inputs}; thread {thread}; grad {grad}{torch}</p>{_stack(call.stack)}"


def _stack(frames: Sequence[str]) -> str:
    return f"<pre>{escape(chr(10).join(frames) or 'no stack was kept')}</pre>"


def _where(call: Call) -> str:
    where = call.context or "unset"
    where += f", scope {call.scope}" if call.scope is not None else ""
    return where + ("" if call.step is None else f", step {call.step}.{call.micro_step}")


def _paragraph(text: str, css: str = "") -> str:
    return f'<p class="{css}">{escape(text)}</p>'


def _more(number: int, noun: str) -> str:
    return _paragraph(f"… and {count(number, f'more {noun}')}", "soft") if number > 0 else ""
