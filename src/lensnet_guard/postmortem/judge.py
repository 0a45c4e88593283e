"""From findings to one verdict: the worst that can be said of the runs, and the exit code for it.

A later process of the same rank takes the place of an earlier one: a run that crashed and was
resumed is judged by how it went on. Violations and missed budgets never heal: numbers may be wrong
since then, whoever goes on from them.
"""

from collections.abc import Callable, Sequence

from lensnet_guard._text import count
from lensnet_guard.postmortem.findings import Call, Divergence, Run

_Runs = Sequence[Run]


def judge(runs: _Runs, divergence: Divergence | None) -> tuple[str, int]:
    """Return the verdict in a line, and the exit code: 0 clean, 1 not clean, 2 unreadable."""
    current = current_runs(runs)
    if not current:
        return "unreadable: no line of the log is an event", 2
    rules: tuple[Callable[[], str | None], ...] = (
        lambda: _crash(current),
        lambda: _death(current),
        lambda: _violations(runs, current),
        lambda: _overwritten(current),
        lambda: _raised(current),
        lambda: f"ranks diverged at step {divergence.step}" if divergence is not None else None,
        lambda: missed(runs),
        lambda: _damage(runs, current),
    )
    for rule in rules:
        if (verdict := rule()) is not None:
            return verdict, 1
    running = any(run.running for run in current)
    verdict = "still running, clean so far" if running else "clean"
    return verdict + "".join(f"; {aside}" for aside in _asides(runs, current)), 0


def current_runs(runs: _Runs) -> list[Run]:
    """Return the runs that no later process of their rank has taken the place of.

    Guards of one process may have runs side by side. Its workers belong to it: they take nobody's
    place, and lose theirs with it.
    """
    heads = _heads(runs)
    begun: dict[str, Run] = {}  # the newest of each rank
    after: dict[str, Run] = {}  # the newest of each log
    until: dict[object, float] = {}  # the last line of each head
    for run in runs:
        if run.events:
            after[run.log] = run
            head, newest = heads[id(run)], begun.get(run.rank)
            if head == _process(run):
                until[head] = max(until.get(head, 0.0), run.last or 0.0)
                if not run.forked and (newest is None or _start(newest) < _start(run)):
                    begun[run.rank] = run

    def superseded(run: Run) -> bool:
        head, newest = heads[id(run)], begun.get(run.rank)
        last = until[head]
        later = [newest] if newest is not None and last and _start(newest) > last else []
        return any(heads[id(other)] != head for other in (*later, after[run.log]))

    return [run for run in runs if run.events and not superseded(run)]


def _heads(runs: _Runs) -> dict[int, object]:
    """Return, by `id` of the run, the process that it descends from, or its own."""
    heads: dict[int, object] = {}
    newest: dict[tuple[str, str, int | None], Run] = {}  # pids come again: by the time of the run
    for run in sorted(runs, key=_start):
        known = newest.get((run.host, run.rank, run.parent)) if run.parent is not None else None
        heads[id(run)] = heads[id(known)] if known is not None else _process(run)
        newest[run.host, run.rank, run.pid] = run
    return heads


def _process(run: Run) -> object:
    return run.process or id(run)


def _start(run: Run) -> float:
    return run.started or 0.0


def missed(runs: _Runs) -> str | None:
    """Return in how many micro-steps and windows budgets were missed; None where in none."""
    micro_steps = sum(run.deviation_count for run in runs)
    windows = sum(run.missed_windows for run in runs)
    told = [count(micro_steps, "micro-step")] if micro_steps else []
    told += [count(windows, "window")] if windows else []
    return f"budget missed in {' and '.join(told)}" if told else None


def _crash(runs: _Runs) -> str | None:
    for run in runs:
        if run.in_flight and (run.died or run.ended):
            others = len(run.in_flight) - 1
            more = f", or in {others} more in flight" if others else ""
            if run.died:
                return f"crash in {_name(run.in_flight[-1])}{more}"
            return f"the run ended in the middle of {_name(run.in_flight[-1])}{more}"
    return None


def _death(runs: _Runs) -> str | None:
    for run in runs:
        if run.died:
            torn = f", log torn at line {run.torn_at}" if run.torn_at else ""
            return f"the process died outside any call of {run.module}{torn}"
    return None


def _violations(runs: _Runs, current: _Runs) -> str | None:
    violations = sum(run.violation_count for run in runs)
    if not violations:
        return None
    told = count(violations, "violation")
    heads, guilty = _heads(runs), [run for run in current if run.violation_count]
    if not guilty:
        told += " in an earlier run"
    elif all(run.forked or heads[id(run)] != _process(run) for run in guilty):
        told += f" in {count(len(guilty), 'worker')}"
    kept = [run.violations[0].call for run in runs if run.violations]
    if not kept:
        return f"{told}, in lines that are gone"
    return f"{told}, the first {kept[0].reason} at {kept[0].caller}"


def _overwritten(runs: _Runs) -> str | None:
    return next((run.overwritten.kept[0] for run in runs if run.overwritten.count), None)


def _raised(runs: _Runs) -> str | None:
    calls = [run.raised for run in runs if run.raised is not None]
    return f"{_name(calls[0])}, {calls[0].message}, and no call came after" if calls else None


def _damage(runs: _Runs, current: _Runs) -> str | None:
    for run in runs:
        if run.damage.count:
            return f"log damaged: {run.damage.kept[0]}"
    for run in current:
        if run.unreadable.count:
            return f"log damaged at line {run.unreadable.kept[0]}"
    for run in current:
        if run.lost_lines:
            return f"{count(run.lost_lines, 'line')} of the log were lost"
    return None


def _asides(runs: _Runs, current: _Runs) -> list[str]:
    """Return what a clean verdict does not hide."""
    asides = []
    if hazards := [hazard for run in current for hazard in run.hazards.kept]:
        number = sum(run.hazards.count for run in current)
        asides.append(f"{count(number, 'CUDA graph hazard')}, the first: {hazards[0]}")
    if raised := sum(run.raised_count for run in current):
        asides.append(f"{count(raised, 'call')} raised")
    if earlier := sum(run.died for run in runs if run not in current):
        asides.append(f"{count(earlier, 'earlier run')} died")
    return asides


def _name(call: Call) -> str:
    return f"call {call.seq} of {call.called}, called from {call.caller}"
