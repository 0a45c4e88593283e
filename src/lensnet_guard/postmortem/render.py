"""The findings in a terminal: the verdict first, then what led to it."""

import os
import re
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lensnet_guard._text import explained_by, moment
from lensnet_guard.postmortem.findings import Analysis, Call, Run
from lensnet_guard.postmortem.judge import missed

_SHOWN = 10  # of a long list
_SHOWN_FRAMES = 8


def render(analysis: Analysis, console: Console) -> None:
    """Print everything that there is to say."""
    good = analysis.exit_code == 0
    style = "bold green" if good else "bold red"
    console.print(Text(f"verdict: {short_paths(analysis.verdict)}", style))
    for run in analysis.runs:
        console.print(_head(run))
        parts = (_sites, _budget, _in_flight, _violations, _remarks, _damage)
        for part in (describe(run) for describe in parts):
            if part is not None:
                console.print(part)
    if analysis.divergence is not None:
        calls = ", ".join(f"rank {r}: {n}" for r, n in sorted(analysis.divergence.calls.items()))
        console.print(Text(f"ranks diverged at step {analysis.divergence.step}: {calls}", "red"))


def _head(run: Run) -> Text:
    seconds = f" after {run.last - run.started:.1f} s" if run.started and run.last else ""
    text = Text(f"\n{run.log}", "bold")
    text.append(f"\n  {run.module}, mode {run.mode}, rank {run.rank}, {run.who}", "")
    text.append(f"; began {moment(run.started)}, {run.state}{seconds}\n", "")
    lines = [Text(f"  {f'{m}: ' if m else ''}{sums}") for m, sums in run.sums.items()]
    for line in lines:
        line.highlight_regex("[1-9][0-9]* violations?$", "red")
    text.append(Text("\n").join(lines))
    if run.phases:
        told = ", ".join(f"{times} x {phase}" for phase, times in run.phases.items())
        text.append(f"\n  CUDA graphs: {told}")
    return text


def _sites(run: Run) -> Table | None:
    if not run.sites:
        return None
    table = Table(box=None, pad_edge=False)
    for title in ("times", "module", "context", "scope", "what"):
        table.add_column(title)
    table.add_column("called from", overflow="fold")
    for site, times in run.sites.most_common(_SHOWN):
        what = f"refused: {site.reason}" if site.reason else site.kind
        style = "red" if site.reason else ""
        where = (site.context or "unset", site.scope or "-")
        row = (str(times), site.called, *where, what, short_paths(site.caller))
        table.add_row(*map(Text, row), style=style)
    if len(run.sites) > _SHOWN:
        table.add_row("…", "", "", "", "", f"{len(run.sites) - _SHOWN} more call sites")
    return table


def _budget(run: Run) -> RenderableType | None:
    if (told := missed((run,))) is None:
        return None
    lines = [Text(f"{told}:", "red")]
    lines += [Text(f"  {deviation}") for deviation in run.deviations[:_SHOWN]]
    return Group(*lines)


def _in_flight(run: Run) -> RenderableType | None:
    if not (run.died and run.in_flight):
        return None
    lines: list[Text] = []
    for call in run.in_flight:
        lines.append(Text(f"in flight at death: call {call.seq} of {call.called}", "red"))
        lines.extend(_details(call))
    return Group(*lines)


def _violations(run: Run) -> RenderableType | None:
    lines: list[Text] = []
    for violation in run.violations[:_SHOWN]:
        call = violation.call
        of = f" of {call.called}" if run.modules or call.method else ""
        lines.append(Text(f"{call.reason}{of} (record {call.seq})", "red"))
        lines.extend(_details(call))
        lines.extend(Text(f"  differs   {short_paths(d)}") for d in violation.differences)
        if call.mistake is not None:
            lines.append(Text(explained_by(call.mistake)))
    if run.violation_count > _SHOWN:
        lines.append(Text(f"… {run.violation_count - _SHOWN} more violations"))
    return Group(*lines) if lines else None


def _remarks(run: Run) -> RenderableType | None:
    lines = []
    for title, notes in run.remarks:
        lines.append(Text(f"{title}: {notes.count}", "yellow"))
        lines += [Text(f"  {short_paths(note)}") for note in notes.kept[:_SHOWN]]
    return Group(*lines) if lines else None


def _details(call: Call) -> Sequence[Text]:
    where = call.context or "unset"
    if call.scope is not None:
        where += f", scope {call.scope}"
    if call.step is not None:
        where += f", step {call.step}, micro-step {call.micro_step}"
    grad = "enabled" if call.grad_enabled else "disabled"
    lines = [
        Text(f"  called at {short_paths(call.caller)}"),
        Text(f"  context   {where} (thread {call.thread}, grad {grad})"),
        Text(f"  inputs    {', '.join(call.inputs) or 'none'}"),
    ]
    if call.compiled is not None:
        lines.append(Text(f"  torch     {call.compiled}"))
    shown = call.stack[:_SHOWN_FRAMES]
    title = ("stack", *[""] * len(shown))
    lines += [Text(f"  {title[i]:9} {short_paths(frame)}") for i, frame in enumerate(shown)]
    if len(call.stack) > len(shown):
        lines.append(Text(f"            … {len(call.stack) - len(shown)} more frames; see --json"))
    return lines


def short_paths(text: str) -> str:
    """Make paths below the working directory relative to it, for a terminal to open."""
    try:
        here = os.getcwd() + os.sep
    except FileNotFoundError:  # the working directory is gone
        return text
    return re.sub(r"(?<![^\s(])" + re.escape(here), "", text)


def _damage(run: Run) -> RenderableType | None:
    return Group(*map(Text, run.log_faults)) if run.log_faults else None
